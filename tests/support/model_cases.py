"""Checkpoints of tiny models, each changed in its own way, in every family that the engine has.

A family that is in the registry is here, too; what is special to it is one line in `OPTIONS`.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from eagleray.models.architectures import ARCHITECTURES
from support.random_checkpoint import make_model

FAMILIES = sorted(each.model_type for each in ARCHITECTURES.values() if each.model_type is not None)
SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OPTIONS: dict[str, list[Any]] = {  # drawn where a family's configuration has the key
    "num_attention_heads": [4],
    "num_key_value_heads": [1, 2, 4],
    "head_dim": [None, 8],
    "tie_word_embeddings": [False, True],
    "attention_bias": [False, True],
    "mlp_bias": [False, True],
    "sliding_window": [None, 3, 5],
    "use_sliding_window": [False, True],
    "max_window_layers": [0, 1, 28],
    "query_pre_attn_scalar": [5, 8],
    "attn_logit_softcapping": [None, 1.5],
    "final_logit_softcapping": [None, 2.0],
    "rms_norm_eps": [1e-6, 1e-3],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 16},
    ],
}
GONE = object()  # in place of a value: the key is taken out
NONSENSE: list[Any] = [
    None, GONE, 0, 1, 2, 3, -1, 4.0, 0.5, True, False, 10**6, 10**9, 10**18, 1e999, float("nan"), "2", "x", "", [], [1],
    {}, {"x": 1}, {"__float__": "Infinity"},
]  # fmt: skip
WINDOWED = ["sliding_attention", "full_attention"]
SENSIBLE: dict[str, list[Any]] = {
    "architectures": [["LlamaModel"], "LlamaForCausalLM", 5, None, [], [5]],
    "model_type": [*FAMILIES, "bert", "ministral", 5, None],
    "dtype": ["float32", "bfloat16", "float16", "torch.bfloat16", "float64", "int8", "auto", None],
    "torch_dtype": ["float32", "bfloat16", "torch.float16", None],
    "hidden_act": ["silu", "swish", "gelu", "gelu_pytorch_tanh", None],
    "hidden_activation": ["gelu_pytorch_tanh", "gelu", None],
    "layer_types": [WINDOWED[:1] * 3, WINDOWED[1:] * 3, [*WINDOWED, WINDOWED[0]], WINDOWED, ["attention"] * 3],
    "rope_theta": [10000, 100.0, 0, "100", None],
    "rope_type": ["default", "linear"],
    "rope_scaling": [
        None, {}, [1], {"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic"},
        {"type": "linear", "rope_type": "default", "factor": 2.0}, {"rope_type": None}, LLAMA3,
        {**LLAMA3, "original_max_position_embeddings": 16}, {"type": "default"}, {"rope_theta": 50.0},
        {"rope_type": "yarn", "factor": 2.0}, {"type": "linear"}, {"rope_type": "linear", "factor": "2"},
    ],
    "rope_parameters": [
        None, {}, {"rope_theta": 50.0}, {"full_attention": {"rope_theta": 50.0}}, {"rope_type": "default"},
        {"rope_theta": 50, "partial_rotary_factor": 0.5}, {"rope_theta": None, "rope_type": "default"},
        {name: {"rope_theta": 50.0, "rope_type": "default"} for name in WINDOWED},
    ],
    "original_max_position_embeddings": [16, None],
    "partial_rotary_factor": [1.0, 0.5, 1, None],
    "eos_token_id": [3, [3, 4], [], None, -1, 10**6, "3", [None], True],
    "quantization_config": [None, {}, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}],
    "compression_config": [None, {"format": "int-quantized"}],
    "attention_chunk_size": [None, 4],
    "is_causal": [True, False],
    "use_bidirectional_attention": [None, False, True],
    "pretraining_tp": [1, 2],
    "use_cache": [True, False],
    "text_config": [None, {"hidden_size": 3}],
    "per_layer_config": [{}, {"0": {"sliding_window": 2}}],
    "transformers_weights": [None, "other.safetensors", "../x.safetensors"],
    "temperature": [0.5, None],
    "_name_or_path": ["somebody/something"],
    "transformers_version": ["4.40.0", "5.0.0", None],
}  # fmt: skip
GENERATION: dict[str, list[Any]] = {
    "eos_token_id": [3, [3, 4], [], None, -1, "3", [None], True, {"a": 1}, 1.5],
    "temperature": [0.5, 1.0, 0.0, None, "hot", -1, True],
    "top_p": [0.9, 1.0, None, 2.0, "x"],
    "top_k": [20, 0, None, -1, 1.5],
    "min_p": [0.1, None],
    "repetition_penalty": [1.1, None, 0.0],
    "do_sample": [True, False, None],
    "num_beams": [1, None, 4],
    "suppress_tokens": [None, [], [5]],
    "no_repeat_ngram_size": [0, 2],
}

Case = tuple[str, Callable[[Path], None]]


def make_base(family: str, rng: random.Random) -> tuple[dict[str, Any], Any]:
    """Options drawn for a family, and transformers' model of them."""
    fields = AutoConfig.for_model(family).to_dict()
    drawn = {key: rng.choice(values) for key, values in OPTIONS.items() if key in fields}
    if isinstance(drawn["rope_parameters"], dict):
        drawn["rope_parameters"] = dict(drawn["rope_parameters"])
    options = {"model_type": family, **SIZES, **drawn}
    options = {key: value for key, value in options.items() if value is not None or key.endswith(("window", "capping"))}
    return options, make_with_nulls(options)


def make_with_nulls(options: dict[str, Any]) -> Any:
    """transformers' model, where a value of None is a wish."""
    model = make_model({key: value for key, value in options.items() if value is not None})
    if any(value is None for value in options.values()):
        config = AutoConfig.for_model(**options)
        model.config = config
    return model


def rewrite(file: Path, changes: dict[str, Any]) -> None:
    """Change keys of a JSON object, or take them out."""
    content = (json.loads(file.read_text()) if file.is_file() else {}) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not GONE}))


def config_change(rng: random.Random, raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A change of one key of config.json, sensible or not."""
    key = rng.choice([*raw, *SENSIBLE])
    sensible = SENSIBLE.get(key)
    if sensible and rng.random() < 0.75:
        value = rng.choice(sensible)
    elif rng.random() < 0.3:
        value = GONE
    else:
        value = rng.choice(NONSENSE)
    return f"{key} -> {'gone' if value is GONE else repr(value)}", {key: value}


def old_spelling(raw: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Rotary positions as transformers wrote them before its fifth version."""
    rope = dict(raw.get("rope_parameters") or {})
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta", 10000.0)
    scaling = {rng.choice(["type", "rope_type"]): kind, **rope} if kind != "default" else None
    renamed = {"torch_dtype": raw["dtype"], "dtype": GONE} if "dtype" in raw else {}
    return {"rope_parameters": GONE, "rope_theta": theta, "rope_scaling": scaling, **renamed}


def shard(folder: Path, rng: random.Random, change: str) -> None:
    """The weights in two files with an index, which `change` makes wrong."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    rng.shuffle(names)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map: Any = {name: file for file, own in files.items() for name in own}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    if change != "both":
        single.unlink()
    else:
        save_file({name: t + 1 for name, t in load_file(folder / "a.safetensors").items()}, folder / "a.safetensors")
    if change == "wrong file":
        weight_map[names[0]] = "b.safetensors"
    elif change == "twice":
        twice = {name: tensors[name] for name in files["b.safetensors"]} | {names[0]: tensors[names[0]] + 1}
        save_file(twice, folder / "b.safetensors", metadata={"format": "pt"})
    elif change == "left out":
        del weight_map[names[0]]
    elif change == "outside":
        shutil.move(folder / "a.safetensors", folder.parent / "outside.safetensors")
        weight_map = {n: "../outside.safetensors" if f == "a.safetensors" else f for n, f in weight_map.items()}
    elif change == "list":
        weight_map = []
    elif change == "number":
        weight_map[names[0]] = 5
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDINGS = ("", "both", "wrong file", "twice", "left out", "outside", "list", "number")


def _edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path, random.Random], None]:
    def edit(folder: Path, rng: random.Random) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _set_head(tensors: dict[str, torch.Tensor], head: torch.Tensor | None) -> None:
    tensors.pop("lm_head.weight", None)
    if head is not None:
        tensors["lm_head.weight"] = head


def _in_dtype(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    return change


EMBEDDING = "model.embed_tokens.weight"
WEIGHT_CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "head equal": _edit(lambda t: _set_head(t, t[EMBEDDING].clone())),
    "head differs": _edit(lambda t: _set_head(t, t[EMBEDDING].flip(0).contiguous())),
    "head differs in one value": _edit(lambda t: _set_head(t, t[EMBEDDING] + (torch.arange(29.0) == 28)[:, None])),
    "head missing": _edit(lambda t: _set_head(t, None)),
    "embedding missing": _edit(lambda t: t.update(other=t.pop(EMBEDDING))),
    "a tensor missing": _edit(lambda t: _set_head(t, t.pop("model.norm.weight"))),
    "a tensor more": _edit(lambda t: t.update(extra=torch.zeros(3))),
    "frequencies stored": _edit(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})),
    "in bfloat16": _edit(_in_dtype(torch.bfloat16)),
    "in float16": _edit(_in_dtype(torch.float16)),
    "in float64": _edit(_in_dtype(torch.float64)),
    "in int8": _edit(_in_dtype(torch.int8)),
    **{
        f"sharded {change}".strip(): lambda folder, rng, change=change: shard(folder, rng, change)  # type: ignore[misc]
        for change in SHARDINGS
    },
}


def write_case(folder: Path, family: str, rng: random.Random) -> str:
    """A checkpoint with at most three changes; returns what they are."""
    folder.mkdir(parents=True)
    options, model = make_base(family, rng)
    model.save_pretrained(folder)
    if (generation := folder / "generation_config.json").is_file():
        generation.unlink()
    words = [family, str({key: value for key, value in options.items() if key in OPTIONS})]
    config = folder / "config.json"
    if rng.random() < 0.4:
        rewrite(config, old_spelling(json.loads(config.read_text()), rng))
        words.append("old spelling")
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        word, change = config_change(rng, json.loads(config.read_text()))
        rewrite(config, change)
        words.append(word)
    if rng.random() < 0.35:
        name = rng.choice(list(WEIGHT_CHANGES))
        WEIGHT_CHANGES[name](folder, rng)
        words.append(name)
    if rng.random() < 0.4:
        keys = rng.sample(list(GENERATION), rng.choice([0, 1, 2]))
        drawn = {key: rng.choice(GENERATION[key]) for key in keys}
        rewrite(folder / "generation_config.json", drawn)
        words.append(f"generation_config.json {drawn}")
    return "; ".join(words)
