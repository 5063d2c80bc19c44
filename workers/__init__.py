"""How one rank executes a step."""
