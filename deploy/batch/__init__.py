"""`eagleray batch`: a file of requests, answered by replicas, over any kill."""
