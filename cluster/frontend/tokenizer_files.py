"""Builds a checkpoint's tokenizer with transformers' own classes, without importing torch.

Which class that is, `AutoTokenizer` decides by config.json and tokenizer_config.json; and ids depend on it, since some
classes take no more than the vocabulary from tokenizer.json. But `AutoTokenizer` imports torch, which takes seconds and
a driver has no use for. So its choice is made here, for the model types of which its rule is known; others go to it.
"""

import importlib
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

from eagleray.models.architectures import of_type
from eagleray.models.json_file import read_object, read_text, shown

MAX_BYTES = 64 << 20  # of tokenizer.json
PLAIN = "TokenizersBackend"  # the class that takes tokenizer.json as it is
UNUSUAL = "\x00\ue000\U0010ffff"  # of such a text, all is unknown: some files have no token for that
SMALL_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def build_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises `ValueError` that names file and key, or all files it is made of."""
    small = {name: read_object(folder / name) for name in SMALL_FILES}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _check_tokens(folder / name, small[name])
    _check_templates(folder, small["tokenizer_config.json"])
    for token, token_id in small["added_tokens.json"].items():
        if type(token_id) is not int or token_id < 0:
            raise _wrong(folder / "added_tokens.json", token, token_id, "a token id")
    chosen = _class_name(folder, small["config.json"], small["tokenizer_config.json"])
    try:
        found = _class(chosen).from_pretrained(str(folder))
        found.backend_tokenizer.encode(UNUSUAL)
    except Exception as error:  # of every kind, since the files may hold anything
        if isinstance(error, ImportError | MemoryError):
            raise
        beside = [file.name for file in sorted(folder.glob("*token*.json")) if file.name != "tokenizer.json"]
        others = f" with {' and '.join(beside)}" if beside else ""
        raise ValueError(
            f"{folder / 'tokenizer.json'} cannot be read as a tokenizer{others}: {type(error).__name__}: "
            f"{str(error)[:300]}; fetch the files again"
        ) from error
    _check_decoding(folder, found)
    return found


def _check_decoding(folder: Path, theirs: Any) -> None:
    """Raise `ValueError` where transformers would take spaces out of decoded texts, for which streams have no way."""
    is_bpe = type(theirs.backend_tokenizer.model).__name__ == "BPE"
    for_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if theirs.clean_up_tokenization_spaces and (not is_bpe or getattr(theirs, for_bpe)):
        key = for_bpe if is_bpe else "clean_up_tokenization_spaces"
        raise _wrong(folder / "tokenizer_config.json", key, True, "false")


def _class(name: str | None) -> Any:
    if name is None:
        from transformers.models.auto.tokenization_auto import AutoTokenizer  # which imports torch

        return AutoTokenizer
    if name == PLAIN:
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return TokenizersBackend
    return getattr(importlib.import_module("transformers"), name)


def _class_name(folder: Path, model: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The rule of `AutoTokenizer.from_pretrained` in transformers 5.24. None where it is to be asked itself."""
    if config.get("auto_map") is not None:
        raise _wrong(folder / "tokenizer_config.json", "auto_map", config["auto_map"], "a class of transformers' own")
    named, where = config.get("tokenizer_class"), "tokenizer_config.json"
    if named is None:
        named, where = model.get("tokenizer_class"), "config.json"
    if named is not None and (not isinstance(named, str) or not named.endswith(("Tokenizer", "TokenizerFast", PLAIN))):
        raise _wrong(folder / where, "tokenizer_class", named, "a tokenizer of transformers")
    model_type = model.get("model_type")
    architecture = of_type(model_type) if isinstance(model_type, str) else None
    if model_type is not None and architecture is None:
        return None
    registered = None if architecture is None else architecture.tokenizer
    if named is None:
        return registered or PLAIN
    named = named.removesuffix("Fast")
    overruled = architecture is not None and architecture.tokenizer_overrules
    if named == "LlamaTokenizer" and not overruled and '"ByteLevel"' in _text(folder):
        return PLAIN
    if registered == PLAIN:
        return PLAIN
    return _fast(folder / where, registered if registered and overruled else named)


def _fast(file: Path, name: str) -> str:
    """The class of this name, if it uses the `tokenizers` library; the plain one for a name that is nobody's."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    found = getattr(importlib.import_module("transformers"), name, None)
    if file.name == "tokenizer_config.json" and (found is None or found.__name__ == "PythonBackend"):
        return PLAIN
    if found is TokenizersBackend:
        return PLAIN
    if not (isinstance(found, type) and issubclass(found, TokenizersBackend)):
        raise _wrong(file, "tokenizer_class", name, "one that uses the tokenizers library")
    return name


def _text(folder: Path) -> str:
    return read_text(folder / "tokenizer.json", MAX_BYTES)


def _check_tokens(file: Path, config: Mapping[str, Any]) -> None:
    """Tokens are texts, or objects whose content is one."""
    for key, value in config.items():
        if key.endswith("_token") and not key.startswith("add_") and value is not None and not _is_token(value):
            raise _wrong(file, key, value, "a token")
        if key in ("bos_token", "eos_token") and (value == "" or (isinstance(value, dict) and not value["content"])):
            raise _wrong(file, key, value, "a token of at least one character")
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float)):
        raise _wrong(file, "model_max_length", length, "a number")
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key)
        tokens = list(value.values()) if isinstance(value, dict) else [] if value is None else value
        if not (isinstance(tokens, list) and all(map(_is_token, tokens))):
            raise _wrong(file, key, value, "tokens")
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or not all(_is_token_of_id(*item) for item in added.items()):
        raise _wrong(file, "added_tokens_decoder", added, "tokens by their ids")


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_token_of_id(token_id: str, value: object) -> bool:
    return token_id.isdecimal() and isinstance(value, dict) and _is_token(value)


def _check_templates(folder: Path, config: Mapping[str, Any]) -> None:
    """Chat templates are texts, of which one may be a file of its own."""
    template = config.get("chat_template")
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    )
    if template is not None and not isinstance(template, str) and not named:
        raise _wrong(folder / "tokenizer_config.json", "chat_template", template, "a text, or a list of named ones")
    for file in (folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")):
        if isfile(file):
            read_text(file)


def _wrong(file: Path, key: str, value: object, needed: str) -> ValueError:
    return ValueError(f"{file}: {key} is {shown(value)}; {needed} is needed")
