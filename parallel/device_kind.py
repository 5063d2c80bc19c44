"""The kinds of device that ranks run on: what holds of each before torch is imported. `platform.py` has the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """One kind. What depends on it asks for the trait that it needs, never for a kind's name."""

    name: str  # as users and torch say it
    resource: str | None  # as which a cluster counts such devices; None for a node's own cores, which its ranks share
    block_size: int  # tokens whose keys and values lie together, unless a user says otherwise
    wants_powers_of_two: bool  # its attention kernels take blocks of 16, 32, 64 and so on, and no others
    auto_dtype: str | None  # what computes fastest; None if that is whatever a checkpoint is in

    @property
    def on_host(self) -> bool:
        """Whether it is the node itself: the ranks of a node share its memory and its cores."""
        return self.resource is None


HOST = DeviceKind(name="cpu", resource=None, block_size=16, wants_powers_of_two=False, auto_dtype="float32")
CUDA = DeviceKind(
    name="cuda",
    resource="GPU",
    block_size=128,  # FlashAttention-3 reads pages of this size fastest
    wants_powers_of_two=True,
    auto_dtype=None,
)
KINDS: Mapping[str, DeviceKind] = MappingProxyType({kind.name: kind for kind in (HOST, CUDA)})


def kind_of(name: str) -> DeviceKind:
    """The kind that users call `name`. Raises `ValueError` if there is none."""
    if name not in KINDS:
        raise ValueError(f"there is no kind of device {name!r}; choose one of {', '.join(KINDS)}")
    return KINDS[name]
