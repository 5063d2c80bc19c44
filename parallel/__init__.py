"""How one tensor lives on several ranks."""
