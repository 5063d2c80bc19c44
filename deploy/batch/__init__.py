"""`eagleray batch`: answers a file of requests with several replicas, and resumes after any crash."""
