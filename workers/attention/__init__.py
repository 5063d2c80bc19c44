"""The attention op, its backends and the paged KV cache they read."""
