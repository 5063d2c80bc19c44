"""How people run the engine: a command line, an HTTP server, batches, benchmarks."""
