"""What each kind of device offers: the one place that knows of CUDA.

Code asks the `Platform` of its device for the capability that it needs, once, when it is constructed. What holds
without torch is in `device_kind.py`.

Triton comes with torch for CUDA, and with no other. So modules of kernels are imported under `if HAS_TRITON:`, and
called with tensors of devices of which `runs_kernels` says yes.

Programmatic dependent launch (CUDA Programming Guide) starts a kernel while the one before it still runs. A kernel that
is launched so does two things first. It lets the next one start, which then waits in turn; and it waits until the one
before has ended and its results can be read. Only what no kernel writes, weights, may be touched earlier. Every kernel
waits, even if it reads nothing of the one before: else the next could overtake both.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import ProfilerActivity

from eagleray.parallel import device_kind
from eagleray.parallel.cuda_graphs import CudaGraphs
from eagleray.parallel.device_kind import KINDS, DeviceKind

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run in its interpreter, on any device
HAS_TRITON = torch.cuda.is_available() or INTERPRETED  # whether modules of kernels can be imported

HOPPER = 228 << 10  # bytes per multiprocessor, as with Blackwell's for data centres; A100: 164, others: 100

OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
LAUNCH = {
    "launch_pdl": OVERLAP,
    "enable_fp_fusion": True,  # Triton's default until 3.9, which 3.10 turns round: a * b + c rounded once
}  # what every launch of a kernel says


class Accelerator(Protocol):
    """The parts of torch's module for a device beside the host, such as `torch.cuda`, that manage memory and order of
    work.

    Work is queued in streams, and so are copies from and to page-locked memory of the host, which does not wait.
    """

    def mem_get_info(self, device: torch.device, /) -> tuple[int, int]:
        """Bytes that are free, and that there are."""

    def memory_allocated(self, device: torch.device, /) -> int:
        """Bytes of this process's tensors."""

    def max_memory_allocated(self, device: torch.device, /) -> int:
        """The most that these were since `reset_peak_memory_stats`."""

    def reset_peak_memory_stats(self, device: torch.device, /) -> None: ...

    def memory_reserved(self, device: torch.device, /) -> int:
        """Bytes of this process's tensors, and what torch keeps for further ones."""

    def empty_cache(self) -> None:
        """Give back what torch keeps."""

    def set_device(self, device: torch.device | int, /) -> None:
        """Make it this thread's own."""

    def current_device(self) -> int: ...

    def synchronize(self, device: torch.device, /) -> None:
        """Wait until it has done all that is queued."""

    def default_stream(self, device: torch.device, /) -> torch.Stream: ...

    def stream(self, stream: Any, /) -> "_Entered":
        """Queue in this one of its streams, inside of `with`."""

    def Stream(self, device: torch.device, /) -> torch.Stream: ...

    def Event(self, *, blocking: bool) -> torch.Event:
        """A moment in a stream; a thread that waits for it sleeps if `blocking`."""


class _Entered(Protocol):
    """What `with` takes."""

    def __enter__(self) -> object: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> object: ...


class Processors(NamedTuple):
    """The processors of one device, for kernels."""

    number: int
    shared_memory: int  # bytes of each, for a kernel's tiles
    run_hopper_code: bool  # what is compiled for Hopper and nothing else


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What one kind of device offers."""

    kind: DeviceKind
    accelerator: Accelerator | None  # None where tensors are in the host's memory, and are there when a call returns
    graphs: CudaGraphs | None  # which replay launches; None where they are called
    compiles_kernels: bool  # Triton compiles for it, so that its kernels are the fast way
    processors: Callable[[torch.device], Processors]
    backend: str  # of torch.distributed
    adds_alike: bool  # that backend sums an element in one order, whatever stands beside it in a message
    has_symmetric_memory: bool  # torch's: kernels of one rank can reach another's, if the machine lets them
    masks_exactly: bool  # torch's attention leaves out what is masked, whatever it holds
    activities: tuple[ProfilerActivity, ...]  # that show in a profile

    @property
    def runs_kernels(self) -> bool:
        """Whether kernels take its tensors: compiled, or in the interpreter."""
        return self.compiles_kernels or INTERPRETED


def _stand_in(device: torch.device) -> Processors:
    """Processors for kernels in the interpreter: Hopper's memory, and little work to share out."""
    return Processors(2, HOPPER, run_hopper_code=False)


def _of_gpu(device: torch.device) -> Processors:
    found = torch.cuda.get_device_properties(device)
    return Processors(found.multi_processor_count, found.shared_memory_per_multiprocessor, found.major == 9)


HOST = Platform(
    kind=device_kind.HOST,
    accelerator=None,
    graphs=None,
    compiles_kernels=False,
    processors=_stand_in,
    backend="gloo",
    adds_alike=False,  # gloo's order depends on an element's place in the message
    has_symmetric_memory=False,
    masks_exactly=True,
    activities=(ProfilerActivity.CPU,),
)
CUDA = Platform(
    kind=device_kind.CUDA,
    accelerator=torch.cuda,
    graphs=CudaGraphs(),
    compiles_kernels=True,
    processors=_of_gpu,
    backend="nccl",
    adds_alike=True,
    has_symmetric_memory=True,
    masks_exactly=False,  # torch 2.11 reads masked keys in bfloat16
    activities=(ProfilerActivity.CPU, ProfilerActivity.CUDA),
)
PLATFORMS = (HOST, CUDA)
_BY_TYPE = {platform.kind.name: platform for platform in PLATFORMS} | {"meta": HOST}  # nothing runs on meta


def platform_of(device: torch.device) -> Platform:
    """The platform of `device`. Raises `ValueError` if there is none for its kind."""
    if device.type not in _BY_TYPE:
        raise ValueError(f"nothing here runs on {device}; choose one of {', '.join(KINDS)}")
    return _BY_TYPE[device.type]


def processors(device: torch.device) -> Processors:
    """Those of `device`; off the devices that kernels are compiled for, as if it were a small Hopper."""
    return platform_of(device).processors(device)


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given. The host always has."""
    if (accelerator := platform_of(device).accelerator) is not None:
        accelerator.synchronize(device)


def device_types(has: Callable[[Platform], bool]) -> list[str]:
    """The names by which torch dispatches ops to the platforms of which `has` says yes."""
    return [platform.kind.name for platform in PLATFORMS if has(platform)]
