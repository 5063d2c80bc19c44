"""`eagleray serve`: replicas on Ray Serve, their supervision and their metrics."""
