"""The exceptions that callers of the engine handle."""

import os

ALL_MASKED = (
    "no token is left to draw: allowed_token_ids, bad_words and the stop tokens before min_tokens leave none here; "
    "allow more"
)


class EngineStartError(RuntimeError):
    """The engine could not start: no room on the cluster, or a rank failed; the message is that rank's own."""


class ContextLengthError(ValueError):
    """A request that the model's length has no room for."""


class EngineDeadError(RuntimeError):
    """A rank or the engine core is gone; every request that ran has ended with this cause."""


class EngineClosedError(EngineDeadError):
    """The engine was closed by its owner and can no longer be used."""


def check_process(owner: int) -> None:
    """Raise `EngineClosedError` in a process that was forked from an engine's owner: sockets and threads stay there."""
    if (here := os.getpid()) != owner:
        raise EngineClosedError(
            f"the engine belongs to process {owner}, from which this one, {here}, was forked; use it there, or make "
            "one here"
        )


def counted(number: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number} {noun}{'s' * (number != 1)}"
