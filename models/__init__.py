"""What the network computes. Knows nothing of batches."""
