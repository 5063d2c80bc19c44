"""A package, as folders below it are."""
