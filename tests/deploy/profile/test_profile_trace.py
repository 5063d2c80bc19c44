"""Traces made by hand: what ran, in which group, and when nothing did."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from eagleray.deploy.profile.trace import Share, group_of, read_trace, short_name, step_profile
from eagleray.workers.protocol.messages import TRACE_NUM_STEPS

FLASH = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<int> > >(flash::Params)"
ADD = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3> >(int)"
)
MUL = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<float, "
    "at::native::binary_internal::MulFunctor<float> > >(at::TensorIteratorBase&)::{lambda(int)#1}>(int)"
)


def event(name: str, start: float, duration: float, cat: str = "kernel", tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": start, "dur": duration}


def trace(*events: dict[str, Any], num_steps: int = 2) -> dict[str, Any]:
    return {TRACE_NUM_STEPS: num_steps, "traceEvents": list(events)}


# Two steps: 100 to 200 us and 200 to 300 us, with a copy on a stream of its own.
KERNELS = trace(
    {"ph": "M", "name": "process_name", "pid": 0},
    event("nvjet_tst_128x64_64x9", 100, 40),
    event("attend_kernel", 140, 20),
    event(ADD, 170, 10),
    event("Memcpy DtoH (Device -> Pinned)", 175, 15, "gpu_memcpy", tid=20),
    event("nvjet_tst_128x64_64x9", 200, 40),
    event("one_shot_all_reduce_kernel<float>(float*)", 240, 20),
    event("nvjet_tst_64x8_64x16", 280, 20),
    event("cudaLaunchKernel", 0, 500, "cuda_runtime"),
    event("aten::mm", 0, 500, "cpu_op"),
    event("gpu annotation", 0, 500, "gpu_user_annotation"),
)


def test_kernels_are_grouped_and_gaps_are_idle() -> None:
    profile = step_profile(KERNELS)
    assert (profile.num_steps, profile.on_device, profile.step_us) == (2, True, 100.0)
    assert profile.groups == [
        Share("weights", 1.5, 50.0, 50.0),
        Share("attention", 0.5, 10.0, 10.0),
        Share("collectives", 0.5, 10.0, 10.0),
        Share("sampling", 0.0, 0.0, 0.0),
        Share("rest", 1.0, 10.0, 10.0),  # the copy and the sum overlap by 5
        Share("idle", 0.0, 20.0, 20.0),  # 160 to 170, 190 to 200, 260 to 280
    ]


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("_all_reduce_rms_norm_kernel", "collectives"),
        ("_highest_kernel", "collectives"),
        ("_draw_kernel", "sampling"),
        ("_linear_kernel", "weights"),
        ("varlen_attend_kernel", "attention"),
        ("_rms_norm_kernel", "rest"),
    ],
)
def test_our_own_kernels_have_their_groups(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_kernels_are_summed_by_name_with_the_longest_first() -> None:
    kernels = step_profile(KERNELS).kernels
    assert kernels[0] == Share("nvjet_tst_128x64_64x9", 1.0, 40.0, 40.0)
    assert {share.name for share in kernels[1:4]} == {
        "nvjet_tst_64x8_64x16",
        "attend_kernel",
        "one_shot_all_reduce_kernel",
    }
    assert kernels[4:] == [
        Share("vectorized_elementwise_kernel[CUDAFunctor_add]", 0.5, 5.0, 5.0),
        Share("Memcpy DtoH", 0.5, 5.0, 5.0),
    ]


def test_a_kernel_that_waits_for_the_one_before_counts_from_its_end() -> None:
    """Programmatic dependent launch: each begins while the last still runs, one even ends before."""
    profile = step_profile(
        trace(event("a", 0, 10), event("b", 2, 20), event("c", 3, 7), event("d", 20, 10), num_steps=1)
    )
    assert {share.name: share.us for share in profile.kernels} == {"a": 10.0, "b": 12.0, "c": 0.0, "d": 8.0}
    assert sum(share.us for share in profile.groups) == profile.step_us == 30.0


def test_without_kernels_ops_count_for_what_they_do_themselves() -> None:
    ops = [
        event("eagleray::attention", 0, 100, "cpu_op"),
        event("aten::bmm", 10, 40, "cpu_op"),
        event("aten::as_strided", 20, 10, "cpu_op"),
        event("aten::bmm", 50, 30, "cpu_op"),
        event("aten::linear", 100, 50, "cpu_op"),
        event("aten::mm", 110, 40, "cpu_op"),
        event("aten::mul", 160, 40, "cpu_op"),
        event("aten::mul", 120, 10, "cpu_op", tid=8),
    ]
    profile = step_profile(trace(*reversed(ops), num_steps=1))
    assert (profile.on_device, profile.step_us) == (False, 200.0)
    groups = {share.name: share.us for share in profile.groups}
    assert groups == {"weights": 50, "attention": 100, "collectives": 0, "sampling": 0, "rest": 50, "idle": 10}
    own = {share.name: (share.calls, share.us) for share in profile.kernels}
    assert own["aten::bmm"] == (2, 60)
    assert own["eagleray::attention"] == (1, 30)
    assert own["aten::linear"] == (1, 10)
    assert own["aten::mul"] == (2, 50)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNN", "weights"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64", "weights"),
        ("void gemvx::kernel<int, int, __nv_bfloat16>(cublasGemvParams)", "weights"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(int)", "weights"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>(int)", "weights"),
        ("linear_small_batch_kernel", "weights"),
        (FLASH, "attention"),
        ("combine_kernel", "attention"),
        ("void flash_fwd_splitkv_combine_kernel<Traits>(Params)", "attention"),
        ("plan_kernel", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("two_shot_all_reduce_kernel", "collectives"),
        ("gather_tokens_kernel", "collectives"),
        ("sample_kernel", "sampling"),
        ("best_pairs_kernel", "sampling"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>(int)", "sampling"),
        ("add_rms_norm_kernel", "rest"),
        (ADD, "rest"),
        ("Memset (Device)", "rest"),
    ],
)
def test_a_kernel_finds_its_group(name: str, group: str) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (FLASH, "device_kernel[FlashAttnFwdSm90]"),
        (ADD, "vectorized_elementwise_kernel[CUDAFunctor_add]"),
        (MUL, "elementwise_kernel[MulFunctor]"),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex<float, long>(int)", "indexSelectSmallIndex"),
        ("nvjet_tst_64x8", "nvjet_tst_64x8"),
        ("aten::mm", "aten::mm"),
    ],
)
def test_a_name_is_shortened_to_what_tells_kernels_apart(name: str, short: str) -> None:
    assert short_name(name) == short


def test_a_trace_without_steps_or_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no step"):
        step_profile(trace(event("attend_kernel", 0, 1), num_steps=0))
    with pytest.raises(ValueError, match="neither kernels nor ops"):
        step_profile(trace(event("cudaLaunchKernel", 0, 1, "cuda_runtime")))


def test_a_file_is_read_packed_or_not_and_refused_if_it_is_no_trace(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.json", tmp_path / "a.json.gz"
    plain.write_text(json.dumps(KERNELS))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(plain) == read_trace(packed) == KERNELS
    for content in (b"[]", b"{}", b"{"):
        plain.write_bytes(content)
        packed.write_bytes(content)
        for file in (plain, packed):
            with pytest.raises(ValueError, match=file.name):
                read_trace(file)
