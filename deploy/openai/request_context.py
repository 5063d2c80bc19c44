"""What the middleware and the routes tell each other about the request that is being answered: its API key, its places
in the queue, its time in the engine. And what a batch says of the row that is.
"""

from collections import Counter
from contextvars import ContextVar

from eagleray.cluster.outputs import RequestMetrics
from eagleray.deploy.openai.errors import ApiError

RETRY_AFTER_S = 1  # a queue that is full moves on within a few steps


class Places:
    """`size` places for all; and even if none is left, each tenant may have its share of as many more.

    So the places that one tenant takes are never those of another, and `size` of them go to the first who come.
    """

    def __init__(self, size: int, num_tenants: int) -> None:
        self.size = size
        self.num_taken = 0
        self._share = min(size, max(1, size // num_tenants))
        self._held: Counter[str] = Counter()

    def reserve(self, tenant: str, count: int) -> bool:
        """Whether there were `count` places, which are then taken."""
        if self.num_taken + count > self.size and self._held[tenant] + count > self._share:
            return False
        self.num_taken += count
        self._held[tenant] += count
        return True

    def give_back(self, tenant: str, count: int) -> None:
        """What was taken."""
        self.num_taken -= count
        self._held[tenant] -= count
        if not self._held[tenant]:
            del self._held[tenant]


class Place:
    """The place of one request, which takes further ones once it is known how many choices it wants."""

    def __init__(self, further: Places, tenant: str) -> None:
        self._further, self._tenant = further, tenant
        self._num_taken = 0

    def take_further(self, count: int, param: str) -> None:
        """Raises `ApiError`: 400 for what is more than there ever is, 429 for what is too much at the moment."""
        size = self._further.size
        if count > size:
            message = f"{count + 1} choices are more than this server takes, {size + 1} at most"
            raise ApiError(400, f"{message}; ask for fewer, or raise max_queued_requests", param=param)
        if not self._further.reserve(self._tenant, count):
            message = f"{self._further.num_taken} further choices in progress or waiting here leave no room for {count}"
            raise queue_full(f"{message} more; retry in a while, or ask for fewer")
        self._num_taken += count

    def leave(self) -> None:
        """It is answered."""
        self._further.give_back(self._tenant, self._num_taken)
        self._num_taken = 0


class EngineTime:
    """The time from the first prompt's arrival at the engine to the end of the last one."""

    def __init__(self) -> None:
        self._arrivals: list[float] = []
        self._ends: list[float] = []

    def note(self, metrics: RequestMetrics) -> None:
        """A prompt's last output; one that has not ended by itself has no end."""
        if metrics.parts is not None and metrics.finished_time is not None:
            self._arrivals.append(metrics.arrival_time)
            self._ends.append(metrics.finished_time)

    @property
    def seconds(self) -> float | None:
        """None if no prompt ended by itself."""
        return max(self._ends) - min(self._arrivals) if self._ends else None


def queue_full(message: str) -> ApiError:
    """429: there is no place in the queue."""
    return ApiError(429, message, "rate_limit_error", code="queue_full", retry_after_s=RETRY_AFTER_S)


tenant_asking: ContextVar[str] = ContextVar("tenant_asking", default="")  # whose API key; "" where there are none
place_taken: ContextVar[Place | None] = ContextVar("place_taken", default=None)
engine_time: ContextVar[EngineTime | None] = ContextVar("engine_time", default=None)
row_seed: ContextVar[int | None] = ContextVar("row_seed", default=None)  # where the request has none; else the engine's
