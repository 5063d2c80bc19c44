"""The next token of every row: sampling parameters, penalties, log-probabilities."""
