"""OpenAI's HTTP API over `AsyncLLM`: requests, answers, errors."""
