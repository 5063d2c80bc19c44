"""Where a model's files come from, and a rank's weights out of them."""
