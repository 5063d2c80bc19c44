"""From prompts to requests, and from the core's tokens back to text."""
