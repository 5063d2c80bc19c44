"""What is said when memory runs out: of an accelerator, who holds it; of the host, only that it is in use."""

from dataclasses import replace

import pytest
import torch

from eagleray.parallel import platform
from eagleray.parallel.platform import CUDA
from eagleray.workers.out_of_memory import GIB, explained, release_unused

DEVICE = torch.device("cpu")


class FewBytes:
    """What is asked of an accelerator."""

    def __init__(self) -> None:
        self.kept = GIB

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 2 * GIB, 8 * GIB

    def memory_reserved(self, device: torch.device) -> int:
        return 3 * GIB

    def empty_cache(self) -> None:
        self.kept = 0


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FewBytes:
    """As if the host were one."""
    made = FewBytes()
    monkeypatch.setitem(platform._BY_TYPE, DEVICE.type, replace(CUDA, accelerator=made))  # type: ignore[arg-type]
    return made


def words() -> str:
    with pytest.raises(MemoryError) as error, explained("a step", "lower it", DEVICE):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB. GPU 0 has")
    return str(error.value)


def test_of_an_accelerator_everybodys_share_is_said(accelerator: FewBytes) -> None:
    assert words() == (
        "cpu has no memory left for a step (5.00 GiB more were asked for): of 8.0 GiB, 2.0 are free, this rank's "
        "tensors take 3.0, and 3.0 are held by libraries and other processes; lower it"
    )


def test_of_the_host_that_it_is_in_use() -> None:
    assert words().endswith("more were asked for): the machine's memory is in use; lower it")


def test_what_tensors_no_longer_need_is_given_back(accelerator: FewBytes) -> None:
    release_unused(DEVICE)
    assert accelerator.kept == 0


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained("a step", "lower it", DEVICE):
        raise RuntimeError("shapes do not match")
