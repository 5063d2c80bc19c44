"""`EngineConfig`: what a user sets once, when an engine starts."""

from dataclasses import dataclass, field
from typing import Any

from eagleray.cluster.options import check, described, option, options
from eagleray.cluster.sampling_params import MAX_SEED
from eagleray.parallel.device_kind import KINDS

MAX_COUNT = 2**63 - 1
MAX_AMOUNT = 1e6  # of seconds, or CPUs
COUNT: dict[str, Any] = {"bounds": (1, MAX_COUNT), "allowed": "a whole number of at least 1"}
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
    tensor_parallel_size: int = option(1, "ranks, each a Ray actor, that share every layer of the model", **COUNT)
    dtype: str = option(
        "auto",
        "of weights and KV cache; auto is the checkpoint's own, but float32 on CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "where the ranks run; auto is cuda if the cluster has GPUs", choices=("auto", *KINDS))
    load_format: str = option(
        "safetensors", "dummy makes random weights instead of reading them", choices=("safetensors", "dummy")
    )
    seed: int | None = option(
        None,
        "of requests without one of their own, and of dummy weights; a fresh one at every start if not given",
        (0, MAX_SEED),
        none="for a fresh one",
    )
    max_model_len: int | None = option(
        None, "longest prompt and answer together, in tokens; the model's own limit if not given", **COUNT
    )
    block_size: int | None = option(
        None, "tokens in a block of the KV cache; 16 on CPU and 128 on CUDA if not given", **COUNT
    )
    max_num_seqs: int = option(256, "most requests that run at once", **COUNT)
    max_num_batched_tokens: int = option(8192, "most tokens in one step, over all requests", **COUNT)
    max_chunk_tokens: int | None = option(
        None, "most tokens of one request in one step, which cuts long prompts into chunks", **COUNT
    )
    enable_prefix_caching: bool = option(True, "reuse the KV cache of prompts that begin alike")
    gpu_memory_utilization: float = option(
        0.9, "share of a GPU's memory that a rank may use", (0, 1), excluded=0, allowed="a share above 0, up to 1"
    )
    kv_cache_bytes: int | None = option(
        None, "KV cache of each rank; if not given 1 GiB on CPU, on CUDA what the model leaves free", **COUNT
    )
    steps_in_flight: int = option(
        2,
        "most steps that the ranks have been sent and not answered: 1 waits for each before the next is sent, 2 keeps "
        "the ranks busy meanwhile; more are used only where steps take less than some milliseconds",
        **COUNT,
    )
    num_speculative_tokens: int = option(
        0,
        "longest draft of a request's next tokens, looked up in its own text and verified in one step; "
        "0 turns speculation off",
        (0, 64),
    )
    compile: bool = option(False, "run the model through torch.compile")
    cpus_per_rank: float = option(1.0, "CPUs that each rank asks of the cluster", **AMOUNT)
    threads_per_rank: int | None = option(
        None, "threads of a rank on CPU; the node's cores divided among its ranks if not given", **COUNT
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
        if self.num_speculative_tokens >= self.max_num_seqs:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, but drafts share max_num_seqs, "
                f"{self.max_num_seqs}, with the requests that run; raise the second or lower the first"
            )

    @classmethod
    def names(cls) -> frozenset[str]:
        """Every option's name."""
        return frozenset(options(cls))
