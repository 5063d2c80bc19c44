"""What engine core and ranks have in common: messages, sockets, configuration."""
