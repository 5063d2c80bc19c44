"""`eagleray bench`: latency and throughput of the engine and of servers."""
