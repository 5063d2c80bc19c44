"""The whole engine on a local Ray cluster with a small random model: what goes wrong, and who hears of it."""

import asyncio
import errno
import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from select import select
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ray.exceptions import RaySystemError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from safetensors.torch import save_file

from eagleray import (
    LLM,
    AsyncLLM,
    EngineClosedError,
    EngineConfig,
    EngineDeadError,
    EngineStartError,
    RequestOutput,
    SamplingParams,
)
from eagleray.cluster.core.executor import RankFailedError
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.runtime import placement
from eagleray.cluster.runtime.engine_client import EngineClient
from eagleray.cluster.runtime.launch import launch
from eagleray.cluster.runtime.ray_executor import RayExecutor
from eagleray.cluster.runtime.resolve import worker_config
from eagleray.models.config import ModelConfig
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import checkpoint_shards, load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.protocol.channel import Hub
from eagleray.workers.protocol.messages import TRACE_NUM_STEPS, RowStart, Sampling, Step, StepOutput
from eagleray.workers.protocol.startup import FETCHING, PHASES, READY, WEIGHTS, Progress
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine
from support.processes import children_named, command_line
from support.small_engine import CONFIG, KV_CACHE_BYTES, OPTIONS, start

PROMPT = [1, 2, 3]

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("ray_cluster")]


def assert_nothing_is_left() -> None:
    """No placement group, and no rank or core process."""
    deadline = time.monotonic() + 10
    while (left := rank_processes()) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=0.2)
    assert not left, f"still running: {left}"
    states = [group["state"] for group in placement_group_table().values()]
    assert set(states) <= {"REMOVED"}, states


def rank_processes() -> list[psutil.Process]:
    return [process for process in children_named("RankActor", "CoreActor") if process.is_running()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["ElmanForCausalLM"]}, "ElmanForCausalLM"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "3"),
    ],
    ids=["unsupported architecture", "more ranks than heads"],
)
def test_a_model_that_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    groups = set(placement_group_table())
    with pytest.raises(ValueError, match=message):
        start(tmp_path, tensor_parallel_size=3)
    assert set(placement_group_table()) == groups


def test_ranks_start_again_in_another_number(model_dir: Path) -> None:
    """As many as there are bundles, then fewer, then as before; the same step has the same tokens each time."""
    config = worker_config(
        EngineConfig(model=str(model_dir), load_format="dummy", kv_cache_bytes=KV_CACHE_BYTES),
        ModelConfig.from_dir(model_dir),
        "cpu",
    )
    group = placement_group([{"CPU": 0.1}] * 2)
    listener = Hub()
    executor = RayExecutor(config, group, timeout_s=100, listener=listener.endpoint)
    prompt = np.asarray(PROMPT, np.int32).tobytes()
    blocks = list(range(-(-len(PROMPT) // config.block_size)))
    row = RowStart(0, prompt, len(PROMPT), blocks, Sampling(temperature=0.0))
    tokens = []
    try:
        for size in (2, 1, 2):
            assert executor.start(size) > len(blocks)
            with pytest.raises(RuntimeError, match="ranks are already running"):
                executor.start(size)
            executor.send(Step(1, start=[row], chunks={0: len(PROMPT)}))
            while (output := executor.receive()) is None:
                select(executor.pollable, [], [], 1)
            assert isinstance(output, StepOutput)
            tokens.append(output.token_ids)
            executor.stop()
            with pytest.raises(RankFailedError, match="the ranks are stopped"):
                executor.receive()
    finally:
        executor.stop()
        remove_placement_group(group)
        listener.close()
    assert tokens[0] == tokens[1] == tokens[2] != b""
    assert_nothing_is_left()


def test_a_model_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        start(tmp_path / "nowhere")


def test_a_tokenizer_that_turns_out_to_be_broken_ends_the_start(tmp_path: Path, model_dir: Path) -> None:
    """A file of which only the end is wrong: the ranks are on their way by then."""
    vocab = ",".join(f'"word {number}": {number}' for number in range(2_000_000))
    (tmp_path / "tokenizer.json").write_text(
        f'{{"model": {{"type": "WordLevel", "vocab": {{{vocab}}}}}, "decoder": 1}}'
    )
    heard: list[Progress] = []
    config = EngineConfig(model=str(model_dir), load_format="dummy", threads_per_rank=1, kv_cache_bytes=KV_CACHE_BYTES)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        launch(config, tmp_path, on_progress=heard.append)
    assert heard, "it was noticed before anything began"
    assert_nothing_is_left()


def test_more_ranks_than_the_cluster_can_place_is_an_error_with_the_figures(model_dir: Path) -> None:
    with pytest.raises(EngineStartError) as error:
        start(model_dir, tensor_parallel_size=2, cpus_per_rank=100.0, placement_timeout_s=1.5)
    assert "2 ranks of 100 CPU each" in str(error.value)
    assert "8 CPU" in str(error.value)
    assert_nothing_is_left()


def test_who_starts_an_engine_may_end_the_start_while_its_ranks_are_on_their_way(model_dir: Path) -> None:
    def look() -> None:
        if rank_processes():
            raise KeyError("enough")

    config = EngineConfig(model=str(model_dir), load_format="dummy", threads_per_rank=1, kv_cache_bytes=KV_CACHE_BYTES)
    with pytest.raises(KeyError, match="enough"):
        EngineClient.start(config, look=look)
    assert_nothing_is_left()


@pytest.mark.parametrize(
    ("blow", "heard"),
    [(RaySystemError("the cluster is busy"), EngineStartError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["error", "interrupt"],
)
def test_a_start_that_ends_once_it_has_room_gives_it_back(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, blow: BaseException, heard: type[BaseException]
) -> None:
    """As it asks Ray where the room is."""

    def fails(_: object) -> None:
        raise blow

    monkeypatch.setattr(placement, "placement_group_table", fails)
    with pytest.raises(heard):
        start(model_dir)
    assert_nothing_is_left()


def test_an_engine_that_is_ready_but_cannot_be_connected_to_is_ended(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has no descriptors left by then."""

    def no_more(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    def on_progress(progress: Progress) -> None:
        if progress.phase == READY:
            monkeypatch.setattr(os, "eventfd", no_more)

    config = EngineConfig(model=str(model_dir), load_format="dummy", threads_per_rank=1, kv_cache_bytes=KV_CACHE_BYTES)
    with pytest.raises(OSError, match="Too many open files"):
        EngineClient.start(config, on_progress)
    monkeypatch.undo()
    assert_nothing_is_left()


@dataclass(frozen=True)
class Started:
    """An engine of two ranks that was started, and closed at once."""

    heard: list[Progress]  # while it started
    model: CausalLM  # whose weights it has read
    alive: list[psutil.Process]  # its processes that were there still, some seconds after it was closed


@pytest.fixture(scope="module")
def started(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = load_model(
        model_dir, tp=TPGroup(), dtype=torch.float32, device=torch.device("cpu"), load_format="dummy", seed=3
    )
    save_file({name: piece.target.clone() for name, piece in checkpoint_shards(model)}, folder / "model.safetensors")
    heard: list[Progress] = []
    before = set(rank_processes())
    engine = EngineClient.start(
        EngineConfig(model=str(folder), tensor_parallel_size=2, kv_cache_bytes=KV_CACHE_BYTES), heard.append
    )
    processes = set(rank_processes()) - before
    assert len(processes) == 3
    engine.close()
    return Started(heard, model, psutil.wait_procs(processes, timeout=5)[1])


def test_phases_of_a_start_are_heard_in_order_with_all_bytes(started: Started) -> None:
    heard = started.heard
    assert list(dict.fromkeys(progress.phase for progress in heard)) == [phase for phase in PHASES if phase != FETCHING]
    places = [(PHASES.index(progress.phase), progress.done) for progress in heard]
    assert places == sorted(places)
    (size,) = {progress.total for progress in heard if progress.total}
    weights = sum(tensor.nbytes for name, tensor in started.model.named_parameters())
    norms = sum(tensor.nbytes for name, tensor in started.model.named_parameters() if "norm" in name)
    assert size == weights + norms  # of which every rank has all
    assert Progress(WEIGHTS, size, size) in heard


def test_closing_leaves_nothing_behind_and_gpus_or_cores_free(started: Started) -> None:
    assert not started.alive
    assert_nothing_is_left()


def test_a_rank_that_fails_to_load_says_why_once_and_is_never_ready(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    heard: list[Progress] = []
    with pytest.raises(EngineStartError, match=r"^rank [01]: .*model.embed_tokens.weight") as error:
        EngineClient.start(EngineConfig(model=str(tmp_path), tensor_parallel_size=2), heard.append)
    assert str(error.value).count("model.embed_tokens.weight") == 1
    assert "model.safetensors" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)
    assert heard[-1] == Progress(WEIGHTS)
    assert_nothing_is_left()


def test_ranks_that_take_too_long_to_start_are_refused_with_the_option_to_raise(model_dir: Path) -> None:
    with pytest.raises(EngineStartError, match="raise start_timeout_s"):
        start(model_dir, tensor_parallel_size=2, start_timeout_s=0.1)
    assert_nothing_is_left()


def test_a_rank_whose_process_dies_while_starting_is_named(model_dir: Path) -> None:
    def kill_first_rank() -> None:
        while not (ranks := [p for p in rank_processes() if "RankActor" in command_line(p)]):
            time.sleep(0.01)
        ranks[0].kill()

    killer = threading.Thread(target=kill_first_rank)
    killer.start()
    with pytest.raises(EngineStartError, match=r"^rank [01]: its process is gone"):
        start(model_dir, tensor_parallel_size=2)
    killer.join()
    assert_nothing_is_left()


def test_a_kv_cache_too_small_for_one_request_is_refused_with_the_remedy(model_dir: Path) -> None:
    with pytest.raises(EngineStartError, match="lower max_model_len"):
        start(model_dir, kv_cache_bytes=100_000)
    assert_nothing_is_left()


def test_a_model_larger_than_its_nodes_memory_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """Its files are sparse: sizes without bytes."""
    options = {"num_hidden_layers": 60, "hidden_size": 2**16, "intermediate_size": 2**18, "num_attention_heads": 64}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | options))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**12)
    heard: list[Progress] = []
    message = r"need \d{5}\.\d GB of node .*, which has \d+\.\d GB; lower kv_cache_bytes, use more nodes"
    with pytest.raises(EngineStartError, match=message):
        EngineClient.start(EngineConfig(model=str(tmp_path)), heard.append)
    assert WEIGHTS not in {progress.phase for progress in heard}
    assert_nothing_is_left()


def test_a_kv_cache_larger_than_memory_is_refused_with_the_remedy(model_dir: Path) -> None:
    message = r"KV cache in float32 need 1000000.\d GB of node .* lower kv_cache_bytes"
    with pytest.raises(EngineStartError, match=message):
        start(model_dir, kv_cache_bytes=10**15)
    assert_nothing_is_left()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([5, 120], {}, "120"),
        ([5], {"stop_token_ids": [120]}, "120"),
        ([5], {"logit_bias": {4000: 1.0}}, "4000"),
        ([5], {"allowed_token_ids": [-1]}, "-1"),
    ],
)
def test_a_bad_request_is_refused_at_once_and_the_good_ones_run(
    llm: LLM, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt], SamplingParams(**params), use_tqdm=False)
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=5, temperature=0), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_tokens_are_those_of_one_process_without_ray(llm: LLM, model_dir: Path) -> None:
    """And without drafts, which some of them have here: few tokens are allowed them."""
    prompts = [[i, i * 7 % 120, 3] for i in range(12)]
    few = [[5, 6, 7] if i % 3 else [] for i in range(12)]
    inline = inline_engine(model_dir)
    for index, prompt in enumerate(prompts):
        allowed = few[index]
        inline.add(index, prompt, 20, temperature=float(index % 2), seed=index, allowed_token_ids=allowed)
    inline.run()
    expected = [inline.token_ids(index) for index in range(12)]
    assert len({token_id for tokens in expected for token_id in tokens}) > 20

    params = [
        SamplingParams(max_tokens=20, temperature=i % 2, seed=i, allowed_token_ids=few[i] or None) for i in range(12)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert llm.stats.num_accepted_tokens > 10
    with start(model_dir, tensor_parallel_size=1, steps_in_flight=1) as single:
        outputs = single.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_four_threads_use_one_engine(llm: LLM) -> None:
    prompts = [[i, i * 7 % 120, 3] for i in range(12)]
    params = [SamplingParams(max_tokens=20 + i, seed=i, ignore_eos=True) for i in range(12)]

    def token_ids(begin: int) -> list[list[int]]:
        outputs = llm.generate(prompts[begin::4], params[begin::4], use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    one_by_one = [token_ids(begin) for begin in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(token_ids, range(4), timeout=60)) == one_by_one


def test_a_forked_process_has_no_engine_and_harms_none(llm: LLM) -> None:
    def in_child() -> bool:
        with pytest.raises(EngineClosedError, match=rf"belongs to process {parent}, from which .* was forked"):
            llm.generate([PROMPT], use_tqdm=False)
        llm.close()
        llm._engine._finalizer()  # type: ignore[attr-defined]  # as at the interpreter's end
        return True

    parent = os.getpid()
    if (child := os.fork()) == 0:
        code = 1
        with suppress(BaseException):
            code = 0 if in_child() else 1
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=5, temperature=0), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_every_rank_writes_a_profile_of_the_steps_in_between(llm: LLM, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with pytest.raises(ValueError, match="no profile is running; start one first"):
        llm.stop_profile()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written to .*/file/x: rank 0: .*Not a directory.*; rank 1: "):
        llm.start_profile(tmp_path / "file" / "x")
    llm.start_profile(tmp_path)
    with pytest.raises(ValueError, match="is already running"):
        llm.start_profile(tmp_path)
    llm.generate([PROMPT, PROMPT], params, use_tqdm=False)
    files = llm.stop_profile()
    assert files == [tmp_path / "rank0.json.gz", tmp_path / "rank1.json.gz"]
    for file in files:
        trace = json.loads(gzip.decompress(file.read_bytes()))
        num_attentions = sum(event["name"] == "eagleray::attention" for event in trace["traceEvents"])
        assert num_attentions == 2 * trace[TRACE_NUM_STEPS] >= 2 * 5


def inline_engine(model_dir: Path) -> InlineEngine:
    config = EngineConfig(model=str(model_dir), load_format="dummy", seed=0)
    worker = worker_config(config, ModelConfig.from_dir(model_dir), "cpu")
    model = load_model(
        model_dir, tp=TPGroup(), dtype=torch.float32, device=torch.device("cpu"), load_format="dummy", seed=worker.seed
    )
    scheduler = Scheduler(num_blocks=256, block_size=worker.block_size, max_num_seqs=16, max_num_batched_tokens=256)
    return InlineEngine(scheduler, Worker(worker, model, TPGroup(), 256))


@pytest.fixture(scope="module")
def async_llm(model_dir: Path) -> Iterator[AsyncLLM]:
    llm = AsyncLLM(model_dir, **OPTIONS)
    yield llm
    llm.close()


async def test_streams_go_on_while_others_are_submitted_and_aborted(async_llm: AsyncLLM) -> None:
    """Sending and receiving share a socket: whoever sends must not take the receiver's wake-up away."""
    llm = async_llm

    async def client(index: int) -> int:
        done = 0
        for number in range(25):
            time.sleep(0.002)  # as tokenising a prompt does, this keeps the event loop from reading
            stream = llm.generate([index, number, 3], SamplingParams(max_tokens=6, ignore_eos=True))
            async for output in stream:
                if number % 5 == 4:
                    break  # leaving aborts
                done += output.finished
            await stream.aclose()
        return done

    assert await asyncio.wait_for(asyncio.gather(*(client(index) for index in range(6))), 60) == [20] * 6
    while llm.stats.num_running or llm.stats.num_used_blocks:
        async for _ in llm.generate([1], SamplingParams(max_tokens=2)):
            pass


def test_an_engine_can_be_used_from_one_event_loop_after_the_other(async_llm: AsyncLLM) -> None:
    async def one_request() -> int:
        last: RequestOutput | None = None
        async for output in async_llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)):
            last = output
        assert last is not None
        return len(last.outputs[0].token_ids)

    for _ in range(2):
        assert asyncio.run(asyncio.wait_for(one_request(), 20)) == 3


async def test_requests_go_on_over_a_profile_and_get_their_tokens(async_llm: AsyncLLM, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)

    seen: list[list[int]] = []

    async def token_ids() -> list[int]:
        async for output in async_llm.generate(PROMPT, params):
            last = output.outputs[0].token_ids
            seen.append(last)
        return last

    expected = await token_ids()
    running = asyncio.create_task(token_ids())
    await async_llm.start_profile(tmp_path)
    before = len(seen)
    while len(seen) == before and not running.done():
        await asyncio.sleep(0)
    assert await async_llm.stop_profile() == [tmp_path / "rank0.json.gz"]
    with pytest.raises(ValueError, match="no profile is running"):
        await async_llm.stop_profile()
    assert await running == expected


async def test_who_waits_for_a_profile_hears_of_a_dead_rank(async_llm: AsyncLLM, tmp_path: Path) -> None:
    """The last test here of this engine, which it ends."""
    await async_llm.start_profile(tmp_path)
    (pid,) = async_llm._engine.info.rank_pids  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSTOP)
    stopping = asyncio.create_task(async_llm.stop_profile())
    await asyncio.sleep(0)  # it asks before it waits, and the rank cannot answer
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="rank 0: its process is gone"):
        await asyncio.wait_for(stopping, 20)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
async def test_a_rank_lost_while_requests_run_ends_them_all(model_dir: Path, blow: signal.Signals) -> None:
    """One that is gone ends them long before a step is late; a stuck one when its step is."""
    timeout_s = 1000.0 if blow == signal.SIGKILL else 2.0
    config = EngineConfig(
        model=str(model_dir),
        tensor_parallel_size=2,
        load_format="dummy",
        kv_cache_bytes=KV_CACHE_BYTES,
        step_timeout_s=timeout_s,
    )
    engine = EngineClient.start(config)
    llm = AsyncClient(
        engine, FrontEnd(None, ModelLimits(max_model_len=4096, vocab_size=120, eos_token_ids=frozenset()))
    )
    pids = engine.info.rank_pids
    received: list[int] = []

    async def consume(index: int) -> str:
        stream = llm.generate([index], SamplingParams(max_tokens=4000, ignore_eos=True))
        last: RequestOutput | None = None
        try:
            async for output in stream:
                received.append(index)
                last = output
        except EngineDeadError as error:
            return str(error)
        assert last is not None
        assert last.outputs[0].finish_reason == "error", last
        return last.outputs[0].error or ""

    consumers = [asyncio.create_task(consume(index)) for index in range(8)]
    while len(set(received)) < 8:
        await asyncio.sleep(0.02)
    os.kill(pids[1], blow)
    for cause in await asyncio.wait_for(asyncio.gather(*consumers), 60):
        assert ("rank 1: its process is gone" if blow == signal.SIGKILL else "step_timeout_s") in cause
    with pytest.raises(EngineDeadError):
        await anext(llm.generate(PROMPT, SamplingParams(max_tokens=2)))
    llm.close()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive
