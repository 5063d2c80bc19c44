"""Tokenizer folders, each changed in its own way, as the families' checkpoints have them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from eagleray.models.architectures import ARCHITECTURES
from support.model_cases import GONE, rewrite

MODEL_TYPES = [*(each.model_type for each in ARCHITECTURES.values() if each.model_type is not None), None]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = Regex(r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def _merged(letters: list[str], pairs: list[tuple[str, str]]) -> dict[str, int]:
    return {piece: index for index, piece in enumerate([*letters, *(a + b for a, b in pairs)])}


def byte_level() -> Tokenizer:
    """As Llama 3's and Qwen's."""
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "b"), ("Ġ", "ab"), ("Ġ", "c"), ("i", "n")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(_merged(letters, pairs), pairs))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return backend


def sentence_pieces(prefix: bool) -> Tokenizer:
    """As Llama 2's and Mistral's, and, without a space in front of a text, as Gemma's."""
    pairs = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "b"), ("▁", "ab"), ("▁", "c"), ("i", "n")]
    letters = ["<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = _merged([*letters, "▁", *"abcdefghijklmnopqrstuvwxyz"], pairs)
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in letters[:6]])
    return backend


def unigram() -> Tokenizer:
    """As T5's, whose class none of the families has, but a tokenizer of one's own may be of any kind."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("ab", -1.5)]
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -3.0) for letter in "abcdefghinorst")], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


BASES: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "pieces with a prefix": lambda: sentence_pieces(True),
    "pieces": lambda: sentence_pieces(False),
    "unigram": unigram,
}
CLASSES = [
    "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend",
    "Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "GemmaTokenizer",
    "GemmaTokenizerFast", "CodeLlamaTokenizer", "CohereTokenizerFast", "BertTokenizer", "T5TokenizerFast",
    "MyOwnTokenizer", "Nonsense", "MistralCommonBackend", "LlamaModel", "", None, 5,
]  # fmt: skip
TEMPLATES = [
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% for m in messages %}{{ m }}{% endfor %}{{ pad_token }}{{ unk_token }}{{ image_token }}",
    "{{ raise_exception('no') }}",
    "{{ messages[0].content.missing.deeper }}{{ 1 // 0 }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{% broken",
]


def token(rng: random.Random) -> Any:
    """A token in one of the ways in which files have them; or something else."""
    text = rng.choice([*SPECIAL, "<pad>", "<eos>", "<new>", "<new2>", "the", "zz", ""])
    flags = {flag: rng.random() < 0.5 for flag in rng.sample(["lstrip", "rstrip", "normalized", "single_word"], 2)}
    written = {"content": text, **flags}
    odd = [None, 5, True, [text], {"x": 1}, {"content": 5}, {"content": text, "unknown": 1}, GONE]
    usual = [text, written, {"__type": "AddedToken", **written}, {**written, "special": rng.random() < 0.5}]
    return rng.choice(usual * 4 + odd)


def tokens(rng: random.Random) -> list[Any]:
    return [found for found in (token(rng) for _ in range(rng.choice([0, 1, 2, 3]))) if found is not GONE]


def added(rng: random.Random) -> dict[str, Any]:
    start = rng.choice([0, 3, 270, 300])
    written = [{"content": text, "special": rng.random() < 0.5} for text in rng.sample([*SPECIAL, "<new>", "the"], 3)]
    entries: dict[str, Any] = {str(start + index): entry for index, entry in enumerate(written)}
    if rng.random() < 0.15:
        entries[rng.choice(["x", "-1", "1000000000000"])] = rng.choice([{"content": "<far>"}, "<far>", None])
    return entries


def config_value(key: str, rng: random.Random) -> Any:
    """A value of a key of tokenizer_config.json, or of special_tokens_map.json."""
    if rng.random() < 0.05:
        return rng.choice([None, 0, 1.5, True, "x", [], [1], {}, {"x": 1}])
    if key.endswith("_tokens"):
        own = {f"{name}_token": token(rng) for name in ("image", "video")}
        return rng.choice([tokens(rng), tokens(rng), {name: text for name, text in own.items() if text is not GONE}])
    if key == "added_tokens_decoder":
        return added(rng)
    if key == "tokenizer_class":
        return rng.choice(CLASSES)
    if key == "chat_template":
        named = [{"name": name, "template": rng.choice(TEMPLATES)} for name in ("default", "tool_use", "rag")]
        odd = [[{"name": "default"}], {"default": "x"}, 5]
        return rng.choice([*TEMPLATES * 2, named, named[:1], named[1:], *odd])
    if key.endswith("_token"):
        return token(rng)
    values = {"model_max_length": 10**30, "padding_side": "left", "auto_map": {"AutoTokenizer": ["a.B", None]}}
    return values.get(key, rng.random() < 0.5)


NAMED = ["bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "image_token"]
KEYS = [
    *NAMED, *NAMED, "tokenizer_class", "tokenizer_class", "tokenizer_class", "chat_template", "chat_template",
    "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "added_tokens_decoder",
    "add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "clean_up_tokenization_spaces",
    "legacy", "model_max_length", "padding_side", "auto_map", "pad", "use_default_system_prompt", "errors",
]  # fmt: skip


def change_backend(file: Path, rng: random.Random) -> str:
    """One thing in tokenizer.json."""
    content = json.loads(file.read_text())
    what = rng.choice(["special", "added", "id", "truncation", "padding", "post", "gone", "nonsense", "model", "cut"])
    entries = content["added_tokens"]
    if what == "special":
        for entry in rng.sample(entries, 2):
            entry["special"] = not entry["special"]
    elif what == "added":
        entries.append({**entries[0], "id": rng.choice([len(content["model"]["vocab"]) + 9, 2]), "content": "<late>"})
    elif what == "id":
        entries[0]["id"] = rng.choice([1, 500, -1, "x"])
    elif what == "truncation":
        content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    elif what == "padding":
        content["padding"] = {
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>",
        }  # fmt: skip
    elif what == "post":
        start = entries[1]
        post = TemplateProcessing(single=f"{start['content']} $A", special_tokens=[(start["content"], start["id"])])
        backend = Tokenizer.from_str(json.dumps(content))
        backend.post_processor = post
        content = json.loads(backend.to_str())
    elif what == "gone":
        del content[rng.choice(list(content))]
    elif what == "nonsense":
        content[rng.choice(list(content))] = rng.choice([None, 5, "x", [], {}, [1], {"type": "Unknown"}])
    elif what == "model":
        content["model"][rng.choice(list(content["model"]))] = rng.choice([None, 5, "x", [], {}, True])
    text = json.dumps(content)
    file.write_text(text[: len(text) // 2] if what == "cut" else text)
    return f"tokenizer.json: {what}"


def write_case(folder: Path, rng: random.Random) -> str:
    """A folder with at most five changes; returns what they are."""
    folder.mkdir(parents=True)
    base, model_type = rng.choice(list(BASES)), rng.choice(MODEL_TYPES)
    BASES[base]().save(str(folder / "tokenizer.json"))
    words = [base, str(model_type)]
    if model_type is not None:
        rewrite(folder / "config.json", {"model_type": model_type})
    for file, most in (("tokenizer_config.json", 4), ("special_tokens_map.json", 2)):
        if rng.random() < 0.75 / most * 3:
            keys = rng.sample(KEYS if most == 4 else [*NAMED, "additional_special_tokens"], rng.randint(0, most))
            values = {key: config_value(key, rng) for key in keys}
            rewrite(folder / file, values)
            words.append(f"{file}: {values}")
    if rng.random() < 0.3:
        values = {rng.choice(["<new>", "<s>", "the", "</s>"]): rng.choice([7, 300, 301, 1000]) for _ in range(2)}
        if rng.random() < 0.1:
            values["<odd>"] = rng.choice([-1, "x", None, 1.5])
        rewrite(folder / "added_tokens.json", values)
        words.append(f"added_tokens.json: {values}")
    if rng.random() < 0.2:
        rewrite(folder / "config.json", {"tokenizer_class": rng.choice(CLASSES)})
        words.append((folder / "config.json").read_text())
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"):
        if rng.random() < 0.15:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(rng.choice(TEMPLATES))
            words.append(name)
    if rng.random() < 0.25:
        words.append(change_backend(folder / "tokenizer.json", rng))
    return "; ".join(words)
