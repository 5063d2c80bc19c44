"""Words of messages that depend on a number."""


def counted(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number} {noun}{'s' * (number != 1)}"
