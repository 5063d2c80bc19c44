"""The command line: its parser, `generate`, `chat`, and how both are shown."""
