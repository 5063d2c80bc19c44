"""Kernels that draw rows with any options anew: edits of logits, the search of a cut, the draw, log-probabilities."""
