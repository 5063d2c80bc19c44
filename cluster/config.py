"""`EngineConfig`: what a user sets once, when an engine starts."""

from dataclasses import dataclass, field
from typing import Any

from eagleray.cluster.options import check, described, option, options
from eagleray.cluster.sampling_params import MAX_SEED
from eagleray.models.config import DTYPES, MAX_HEADS, MAX_POSITIONS
from eagleray.models.loading.weight_formats import LOAD_FORMATS
from eagleray.parallel.device_kind import CUDA, HOST, KINDS
from eagleray.workers.protocol.config import HOST_KV_CACHE_BYTES

MAX_ROWS = 1 << 16  # every rank has tables with a line for each
MAX_STEPS_IN_FLIGHT = 16
MIXED_STEP_TOKENS = 2048  # an H200 takes some 50 ms for a model of 8B, and is a tenth slower than with more
MAX_THREADS = 1024
MAX_BYTES = 2**63 - 1
MAX_AMOUNT = 1e6  # of seconds, or CPUs
AMOUNT: dict[str, Any] = {"bounds": (0, MAX_AMOUNT), "excluded": 0}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine is started with. Raises `ValueError` naming the field, the value and the remedy.

    The commands, `LLM(...)`, a server's YAML and the documentation take these fields with what is said here.
    """

    model: str = field(metadata=described("a checkpoint's directory, OWNER/NAME of the Hugging Face hub, or demo"))
    revision: str | None = option(
        None,
        "branch, tag or commit of a model of the hub; what the hub has now if not given",
        min_length=1,
        allowed="a branch, a tag or a commit",
    )
    tensor_parallel_size: int = option(
        1, "number of ranks, each a Ray actor, that share every layer of the model", (1, MAX_HEADS)
    )
    dtype: str = option(
        "auto",
        f"number format of weights and KV cache; auto is the checkpoint's own, but {HOST.auto_dtype} on CPU",
        choices=("auto", *DTYPES),
    )
    device: str = option(
        "auto", "where the ranks run; auto is cuda if the cluster has GPUs, or else cpu", choices=("auto", *KINDS)
    )
    load_format: str = option(
        "safetensors", "where weights come from: safetensors files, or dummy for random ones", choices=LOAD_FORMATS
    )
    seed: int | None = option(
        None,
        "seed for dummy weights and for requests that bring none; a fresh one at every start if not given",
        (0, MAX_SEED),
        none="for a fresh one",
    )
    max_model_len: int | None = option(
        None,
        "maximum length of prompt and answer together, in tokens; the model's own limit if not given",
        (1, MAX_POSITIONS),
    )
    block_size: int | None = option(
        None,
        f"tokens in each block of the KV cache; {HOST.block_size} on CPU and {CUDA.block_size} on CUDA if not given",
        (1, MAX_POSITIONS),
    )
    max_num_seqs: int = option(256, "maximum number of requests that run at once", (1, MAX_ROWS))
    max_num_batched_tokens: int = option(
        8192, "maximum number of tokens in one step, over all requests", (1, MAX_POSITIONS)
    )
    mixed_step_tokens: int | None = option(
        None,
        "maximum number of tokens in a step in which some requests decode and others are at their prompts, unless "
        "more than eight times as many are to be run: fewer mean shorter waits between tokens, more an earlier first "
        f"token in a crowd; {MIXED_STEP_TOKENS} if not given",
        (1, MAX_POSITIONS),
    )
    max_chunk_tokens: int | None = option(
        None,
        "maximum number of tokens of one request in one step; longer prompts are cut into chunks",
        (1, MAX_POSITIONS),
    )
    enable_prefix_caching: bool = option(True, "reuse the KV cache of prompts that begin alike")
    gpu_memory_utilization: float = option(
        0.9, "share of a GPU's memory that a rank may use", (0, 1), excluded=0, allowed="a share above 0, up to 1"
    )
    kv_cache_bytes: int | None = option(
        None,
        f"bytes of each rank's KV cache; if not given, {HOST_KV_CACHE_BYTES >> 30} GiB on CPU, and on CUDA what the "
        "model leaves free",
        (1, MAX_BYTES),
    )
    steps_in_flight: int = option(
        2,
        "most steps sent to the ranks before their outputs are back; 1 waits for each step, 2 keeps the ranks busy, "
        "and more are used only where steps take less than some milliseconds",
        (1, MAX_STEPS_IN_FLIGHT),
    )
    num_speculative_tokens: int = option(
        0,
        "maximum length of a draft of a request's next tokens, looked up in its own text and verified in one step; "
        "0 turns speculation off",
        (0, 64),
    )
    compile: bool = option(False, "run the model through torch.compile")
    cpus_per_rank: float = option(1.0, "number of CPUs that each rank asks the cluster for", **AMOUNT)
    threads_per_rank: int | None = option(
        None,
        "number of threads of a rank on CPU; the node's cores divided among its ranks if not given",
        (1, MAX_THREADS),
    )
    placement_timeout_s: float = option(60.0, "seconds to wait for room on the cluster", **AMOUNT)
    start_timeout_s: float = option(1800.0, "seconds to wait for the ranks to load the model", **AMOUNT)
    step_timeout_s: float = option(120.0, "seconds without an answer after which a rank counts as dead", **AMOUNT)

    def __post_init__(self) -> None:
        check(self)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "a step could not run one token of every request; raise the first or lower the second"
            )
        for name in ("max_chunk_tokens", "mixed_step_tokens"):
            if (value := getattr(self, name)) is not None and value > self.max_num_batched_tokens:
                raise ValueError(
                    f"{name} is {value}, more than max_num_batched_tokens {self.max_num_batched_tokens}: no step has "
                    "room for so many; lower the first or raise the second"
                )
        if self.num_speculative_tokens >= self.max_num_seqs:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, but drafts share max_num_seqs, "
                f"{self.max_num_seqs}, with the requests that run; raise the second or lower the first"
            )

    @classmethod
    def names(cls) -> frozenset[str]:
        """Every option's name."""
        return frozenset(options(cls))
