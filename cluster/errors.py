"""What callers of the engine handle."""


class EngineStartError(RuntimeError):
    """The engine could not start: no room on the cluster, or a rank failed; the message is that rank's own."""


class ContextLengthError(ValueError):
    """A request that the model's length has no room for."""


class EngineDeadError(RuntimeError):
    """A rank or the engine core is gone; every request that ran has ended with this cause."""


class EngineClosedError(EngineDeadError):
    """The engine was closed by its owner; whoever still asks it for something comes too late."""
