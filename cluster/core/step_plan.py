"""A step while the scheduler builds it, and while its output is due."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from eagleray.cluster.core.request import Request
from eagleray.workers.protocol.messages import RowStart

# One request's part of a step: (request, row, first position, whether it samples).
# A bare tuple, because 256 are made while the ranks wait.
Chunk = tuple[Request, int, int, bool]


@dataclass(slots=True)
class StepPlan:
    """What a step is to run, and the tokens of its budget that are left."""

    budget: int
    num_draftable: int  # tokens of drafts that it may still have
    chunks: list[Chunk] = field(default_factory=list)
    uneven: dict[int, int] = field(default_factory=dict)  # row -> number of tokens, where it is not one
    starts: list[RowStart] = field(default_factory=list)
    started: list[Request] = field(default_factory=list)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    drafts: dict[int, bytes] = field(default_factory=dict)  # by row, as in `Step`
    num_tokens: dict[int, int] = field(default_factory=dict)  # likewise
    preempted: bool = False
    num_told: int = 0  # tokens that the ranks are told of requests that start

    def rest(self, running: Iterable[Request]) -> None:
        """Live rows that are not in the plan run nothing."""
        ran = {row for _, row, _, _ in self.chunks}
        self.uneven.update((r.row, 0) for r in running if r.row is not None and r.row not in ran)


@dataclass(slots=True)
class InFlight:
    """A step that the ranks have been told to run."""

    step: int
    chunks: list[Chunk]
    num_tokens: int
    started: list[Request]  # its first step, or the first after a preemption
