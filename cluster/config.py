"""`EngineConfig`: what a user sets once, when an engine starts."""

from dataclasses import dataclass, fields

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
MAX_COUNT = 2**63 - 1
MAX_AMOUNT = 1e6  # of seconds, or CPUs
LOAD_FORMATS = ("safetensors", "dummy")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine is started with. Raises `ValueError` naming the field, the value and the remedy."""

    model: str  # a directory with config.json, safetensors and tokenizer.json, OWNER/NAME of the hub, or demo
    revision: str | None = None  # of a model of the hub: a branch, a tag or a commit
    tensor_parallel_size: int = 1
    dtype: str = "auto"  # the checkpoint's, but float32 on CPU
    device: str = "auto"  # cuda where the cluster has GPUs
    load_format: str = "safetensors"
    seed: int | None = None  # of requests that bring none, a fresh one at every start if None; of dummy weights, too
    max_model_len: int | None = None  # the model's own limit
    block_size: int | None = None  # tokens in a KV block: 16 on CPU, 128 on CUDA
    max_num_seqs: int = 256  # rows
    max_num_batched_tokens: int = 8192  # token budget of a step
    max_chunk_tokens: int | None = None  # longest chunk of one request in a step
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None  # of each rank; 1 GiB on CPU, what the profile run leaves on CUDA
    steps_in_flight: int = 2  # 1 waits for each step before the next is sent
    compile: bool = False
    cpus_per_rank: float = 1.0
    threads_per_rank: int | None = None  # CPU only: the node's cores divided among its ranks
    placement_timeout_s: float = 60.0
    start_timeout_s: float = 1800.0
    step_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise ValueError(f"revision is {self.revision!r}; give a branch, a tag or a commit, or leave it out")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("device", self.device, DEVICES)
        _check_choice("load_format", self.load_format, LOAD_FORMATS)
        for name in ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "steps_in_flight"):
            _check_count(name, getattr(self, name))
        for name in ("max_model_len", "block_size", "max_chunk_tokens", "kv_cache_bytes", "threads_per_rank"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("cpus_per_rank", "placement_timeout_s", "start_timeout_s", "step_timeout_s"):
            _check_amount(name, getattr(self, name))
        for name in ("enable_prefix_caching", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}; give a whole number from 0 to 2**64 - 1, or None for a fresh one")
        _check_amount("gpu_memory_utilization", self.gpu_memory_utilization)
        if not 0 < self.gpu_memory_utilization <= 1:
            share = self.gpu_memory_utilization
            raise ValueError(f"gpu_memory_utilization is {share!r}; give a share above 0, up to 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs {self.max_num_seqs}: "
                "a step could not run one token of every request; raise the first or lower the second"
            )

    @classmethod
    def names(cls) -> frozenset[str]:
        """Every option's name."""
        return frozenset(field.name for field in fields(cls))


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name: str, value: object) -> None:
    if not _is_int(value) or not 1 <= value <= MAX_COUNT:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")


def _check_amount(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_AMOUNT:
        raise ValueError(f"{name} is {value!r}; give a number above 0, up to {MAX_AMOUNT:g}")
