"""What an OpenAI-compatible server is made of."""
