"""Fair scheduling between tenants and between the requests of each: who starts first, and who is preempted.

A group is what a client asked for at once: prompts, with `n` sequences each. A tenant is on whose account: an API key
of a server, or all of a front end. What is scarce goes to the tenant that holds the fewest rows, of its groups to the
one that holds the fewest, of those to the oldest, and in it to the oldest sequence; it is taken from those that hold
the most, the youngest sequence first. Only priority, where it is used, comes before all that.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eagleray.cluster.core.request import Request

TenantId = tuple[bytes, str]  # a front end, and a tenant of it


@dataclass(slots=True, eq=False)
class Tenant:
    """The client on whose account groups run."""

    id: TenantId
    num_rows: int = 0
    groups: "dict[tuple[str | int, int], Group]" = field(default_factory=dict)  # by name or number, and priority
    holding: "set[Group]" = field(default_factory=set)  # those with rows
    queue: "list[tuple[int, int, int, Group]]" = field(default_factory=list)  # those that wait, the next one first

    @property
    def next(self) -> "Group":
        """The waiting group that goes first."""
        return self.queue[0][-1]

    def largest_holder(self, priority: int, least: int) -> "Group | None":
        """The group with the most rows, at `least` so many, among those whose priority is not better."""
        if self.num_rows - len(self.holding) + 1 < least:
            return None  # not even if all others held one
        groups = (group for group in self.holding if group.priority >= priority and group.num_rows >= least)
        return max(groups, key=_num_rows, default=None)


@dataclass(slots=True, eq=False)
class Group:
    """Sequences of one client's request, all of one priority. Those that run are older than those that wait."""

    tenant: Tenant
    name: str | int
    priority: int
    arrival: int  # of its first sequence
    num_rows: int = 0
    waiting: "OrderedDict[int, Request]" = field(default_factory=OrderedDict)  # by arrival, the oldest first

    @property
    def order(self) -> tuple[int, int, int]:
        """Where it stands among the groups of its tenant."""
        return self.priority, self.num_rows, self.arrival


def _num_rows(of: Tenant | Group) -> int:
    return of.num_rows


def scheduling_key(request: "Request") -> tuple[int, int, int, int]:
    """The lowest is the next to be given something, the highest the next to lose it."""
    group = request.group
    return group.priority, group.tenant.num_rows, group.num_rows, request.arrival


class Fairness:
    """The requests that wait, in order, and how many rows each group and tenant holds.

    All costs are of the groups' number, not of the sequences'.
    """

    def __init__(self) -> None:
        self._tenants: dict[TenantId, Tenant] = {}
        self.num_waiting = 0
        self.num_waiting_tokens = 0  # of their prompts

    def group(self, tenant_id: TenantId, name: str | int, priority: int, arrival: int) -> Group:
        """The group of this name, a new one if there is none; it is forgotten with its last request."""
        tenant = self._tenants.get(tenant_id) or Tenant(tenant_id)
        return tenant.groups.get((name, priority)) or Group(tenant, name, priority, arrival)

    def wait(self, request: "Request") -> None:
        """A request that is younger than all others waits for a row."""
        group = request.group
        if not group.waiting:
            self._enter(group)
        group.waiting[request.arrival] = request
        self._count_waiting(request, 1)

    def leave(self, request: "Request") -> None:
        """A request waits no more, since it has ended."""
        group = request.group
        del group.waiting[request.arrival]
        self._count_waiting(request, -1)
        if not group.waiting:
            del group.tenant.queue[_place(group)]
            self._forget_if_idle(group)

    def take_row(self, request: "Request") -> None:
        """The request that waits first in its group has a row now."""
        group = request.group
        assert next(iter(group.waiting)) == request.arrival, "nobody overtakes in a group"
        del group.tenant.queue[_place(group)]
        del group.waiting[request.arrival]
        self._count_waiting(request, -1)
        self._count(group, 1)

    def give_row_back(self, request: "Request", *, waits_again: bool) -> None:
        """A request has lost its row: it has ended, or it is the youngest of its group that ran, and waits again."""
        group = request.group
        if group.waiting:
            del group.tenant.queue[_place(group)]
        if waits_again:
            group.waiting[request.arrival] = request
            group.waiting.move_to_end(request.arrival, last=False)
            self._count_waiting(request, 1)
        self._count(group, -1)

    def first(self, apart_from: Collection[Group] = ()) -> "Request | None":
        """The next request to be given a row, without those of some groups."""
        first, least = None, (0, 0, 0, 0)
        for tenant in self._tenants.values():
            for priority, num_rows, arrival, group in tenant.queue:
                if group not in apart_from:
                    place = (priority, tenant.num_rows, num_rows, arrival)
                    if first is None or place < least:
                        first, least = group, place
                    break
        return None if first is None else next(iter(first.waiting.values()))

    def has_others(self, group: Group) -> bool:
        """Whether another group waits, too."""
        return any(len(tenant.queue) > (tenant is group.tenant) for tenant in self._tenants.values())

    def over_share(self) -> Group | None:
        """A group that is to give up a row, for one that waits and would hold no more than half as much with it.

        Half, so that rows do not go to and fro; those that become free make shares equal later. Between tenants it is
        their rows that count, and between the groups of a tenant theirs.
        """
        waiting = [tenant for tenant in self._tenants.values() if tenant.queue]
        rich, poor = max(self._tenants.values(), key=_num_rows), min(waiting, key=_num_rows)
        if (
            rich.num_rows >= 2 * (poor.num_rows + 1)
            and (found := rich.largest_holder(poor.next.priority, 1)) is not None
        ):
            return found
        for tenant in waiting:
            if (found := tenant.largest_holder(tenant.next.priority, 2 * (tenant.next.num_rows + 1))) is not None:
                return found
        return None

    def _count_waiting(self, request: "Request", more: int) -> None:
        self.num_waiting += more
        self.num_waiting_tokens += more * request.num_prompt_tokens

    def _enter(self, group: Group) -> None:
        tenant = group.tenant
        self._tenants[tenant.id] = tenant
        tenant.groups[group.name, group.priority] = group
        insort(tenant.queue, (*group.order, group))

    def _count(self, group: Group, rows: int) -> None:
        """Count rows that it got or lost; it is not in its tenant's queue at the moment."""
        tenant = group.tenant
        tenant.num_rows += rows
        group.num_rows += rows
        if group.num_rows:
            tenant.holding.add(group)
        else:
            tenant.holding.discard(group)
        if group.waiting:
            self._enter(group)
        else:
            self._forget_if_idle(group)

    def _forget_if_idle(self, group: Group) -> None:
        tenant = group.tenant
        if not group.waiting and not group.num_rows:
            del tenant.groups[group.name, group.priority]
            if not tenant.groups:
                del self._tenants[tenant.id]


def _place(group: Group) -> int:
    """Where it is in its tenant's queue."""
    return bisect_left(group.tenant.queue, group.order)  # shorter than the entry that it begins
