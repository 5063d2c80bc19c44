"""OpenAI's HTTP API over an `AsyncLLM`; knows nothing of Ray Serve."""
