"""An engine on Ray whose model is a few thousand random weights without a file."""

from pathlib import Path
from typing import Any

from eagleray import LLM

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
KV_CACHE_BYTES = 16_000_000  # beyond all that tests ask for; a rank is ready the sooner, the less it has to zero
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "threads_per_rank": 1,
    "kv_cache_bytes": KV_CACHE_BYTES,
}


def start(model_dir: Path, tensor_parallel_size: int = 1, **options: Any) -> LLM:
    return LLM(model_dir, tensor_parallel_size, **OPTIONS | options)
