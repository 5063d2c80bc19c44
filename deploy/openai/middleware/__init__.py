"""What every HTTP request passes: keys, limits, ids, CORS, probes, the playground."""
