"""Our tokenizer against transformers' AutoTokenizer, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eagleray.cluster.frontend.generation_config import eos_token_ids
from eagleray.cluster.frontend.text_stream import TextStream
from eagleray.cluster.frontend.tokenizer import Tokenizer

TEXTS = [
    "What is the capital of France?",
    "  leading, trailing and\n\n  newlines\t",
    "Straße, façade, naïve — “quotes”",
    "日本語のテキスト, 한국어, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, 🏽 tone",
    "def f(x):\n    return x ** 2  # 12345",
    "<|im_start|>user\nspecial inside<|im_end|>",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße! 👋"},
    {"role": "assistant", "content": "Hi"},
]


def small_tokenizer(**config: Any) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer of bytes, with the flags that move special tokens about."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config
    )


def both(path: Path) -> tuple[Tokenizer, Any]:
    """A folder's tokenizer: ours, and transformers'."""
    return Tokenizer.from_dir(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def ours(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(demo_model_dir)


@pytest.fixture(scope="module")
def theirs(demo_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"continue_final_message": True}])
def test_chats_are_those_of_transformers(ours: Tokenizer, theirs: Any, options: dict[str, Any]) -> None:
    generation_prompt = options.get("add_generation_prompt", not options.get("continue_final_message", False))
    expected = theirs.apply_chat_template(
        CHAT, tokenize=False, **options | {"add_generation_prompt": generation_prompt}
    )
    assert ours.apply_chat_template(CHAT, **options) == expected
    assert (ours.eos_token_id, ours.bos_token_id) == (theirs.eos_token_id, theirs.bos_token_id) == (2, 1)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_start_and_end_tokens_are_those_of_the_tokenizer_file(tmp_path: Path, bos: bool, eos: bool) -> None:
    small_tokenizer(add_bos_token=bos, add_eos_token=eos).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": not bos}))
    ours, theirs = both(tmp_path)
    assert ours.encode("ab é") == theirs("ab é")["input_ids"]
    assert ours.encode("a", add_special_tokens=False) == theirs("a", add_special_tokens=False)["input_ids"]
    assert (ours.encode("a")[0] == 1, ours.encode("a")[-1] == 2) == (bos, eos)


def test_the_template_sees_special_tokens_and_variables(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token }}{{ mood }}"
    small_tokenizer(chat_template=template).save_pretrained(tmp_path)
    ours, theirs = both(tmp_path)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, mood="calm")
    assert ours.apply_chat_template(CHAT, mood="calm") == expected == "<s>Be brief.Grüße! 👋Hi</s>calm"


def test_a_template_inside_the_tokenizers_config_is_found(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for chat_template, with_tools in ((named, "tools"), ("always", "always")):
        file.write_text(json.dumps(config | {"chat_template": chat_template}))
        ours, theirs = both(tmp_path)
        tools = [{"type": "function", "function": {"name": "f"}}]
        assert ours.apply_chat_template(CHAT, tools=tools) == with_tools
        assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)


ADDED = {
    "content": "<new>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<new>"}),
        ("tokenizer_config.json", {"eos_token": "<new>", "additional_special_tokens": ["<other>", "<new>"]}),
        ("tokenizer_config.json", {"eos_token": "<new>", "added_tokens_decoder": {"263": ADDED}}),
        ("special_tokens_map.json", {"eos_token": {**ADDED, "lstrip": True}}),
        ("added_tokens.json", {"<new>": 263}),
    ],
)
def test_tokens_that_tokenizer_json_lacks_are_those_of_the_files_beside_it(
    tmp_path: Path, file: str, content: dict[str, Any]
) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<new>"}')
    (tmp_path / file).write_text(json.dumps(content))
    ours, theirs = both(tmp_path)
    ids = ours.encode("a <new>b<other>")
    assert ids == theirs("a <new>b<other>")["input_ids"]
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.eos_token_id in ids, "it is one token and no pieces"
    assert eos_token_ids(tmp_path, ours) == {ours.eos_token_id}
    assert ours.decode([*ids, ours.eos_token_id]) == theirs.decode(ids, skip_special_tokens=True)


def test_an_end_that_tokenizer_json_calls_ordinary_is_left_out_of_the_text(tmp_path: Path) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for entry in content["added_tokens"]:
        entry["special"] = False
    file.write_text(json.dumps(content))
    ours, theirs = both(tmp_path)
    ids = [*ours.encode("ab"), 2, *ours.encode("a")]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert "</s>" not in ours.decode(ids)
    assert "</s>" in ours.decode(ids, skip_special_tokens=False)
    stream = TextStream(ours, [], skip_special_tokens=True)
    assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", {"eos_token": {"x": 1}}, r"eos_token is \{'x': 1\}; a token is needed"),
        ("tokenizer_config.json", {"eos_token": ""}, "eos_token is ''; a token of at least one character"),
        ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens is 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": ADDED}}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is 5; a text"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template is"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "tokenizer_class is 5; a tokenizer of transformers"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map is"),
        (
            "tokenizer_config.json",
            {"padding_side": "up"},
            "tokenizer.json cannot be read .* with tokenizer_config.json",
        ),
        ("special_tokens_map.json", {"bos_token": [1]}, r"bos_token is \[1\]"),
        ("added_tokens.json", {"<new>": "x"}, "<new> is 'x'; a token id is needed"),
        ("tokenizer.json", {"added_tokens": []}, "cannot be read as a tokenizer"),
    ],
)
def test_a_value_that_is_none_is_refused_by_file_and_key(
    tmp_path: Path, file: str, content: dict[str, Any], words: str
) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{file}.*{words}|{words}"):
        Tokenizer.from_dir(tmp_path)


def test_texts_that_transformers_would_clean_up_are_refused_by_key(tmp_path: Path) -> None:
    unigram = tmp_path / "unigram"
    unigram.mkdir()
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in "▁abc.")]
    Backend(models.Unigram(pieces, unk_id=0)).save(str(unigram / "tokenizer.json"))
    small_tokenizer().save_pretrained(bpe := tmp_path / "bpe")
    even_so = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    for folder, config, key in (
        (unigram, {"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces"),
        (bpe, {"clean_up_tokenization_spaces": True, even_so: True}, even_so),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key} is True; false is needed"):
            Tokenizer.from_dir(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {key: False}))
        Tokenizer.from_dir(folder)


@pytest.mark.parametrize("template", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_templates_in_files_of_their_own_are_found(tmp_path: Path, template: str) -> None:
    small_tokenizer(chat_template="usual").save_pretrained(tmp_path)
    (tmp_path / template).parent.mkdir(exist_ok=True)
    (tmp_path / template).write_text("in a file")
    ours, theirs = both(tmp_path)
    tools: list[Any] = [{"type": "function", "function": {"name": "f"}}]
    some: list[dict[str, Any]] = [{}, {"tools": tools}]
    for options in some:
        expected = theirs.apply_chat_template(CHAT, tokenize=False, **options)
        assert ours.apply_chat_template(CHAT, **options) == expected


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no directory .*nowhere; name a directory with a tokenizer\.json"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"there is no .*tokenizer\.json; name"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this model has no chat template; give plain prompts"):
        Tokenizer.from_dir(tmp_path).apply_chat_template(CHAT)


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "no role"}], [{"role": "user"}]])
def test_messages_that_are_none_are_refused(ours: Tokenizer, messages: list[Any]) -> None:
    with pytest.raises(ValueError, match="messages"):
        ours.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, {2, 5}),
        ({"eos_token_id": [5, 7]}, {"eos_token_id": 6}, {2, 5, 7}),
        ({}, {"eos_token_id": [6, 8]}, {2, 6, 8}),
        (None, {"eos_token_id": 0}, {0, 2}),
        (None, {}, {2}),
    ],
)
def test_every_end_of_sequence_is_found(
    tmp_path: Path, generation: dict[str, Any] | None, model: dict[str, Any], expected: set[int]
) -> None:
    small_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(tmp_path, Tokenizer.from_dir(tmp_path)) == expected
    assert eos_token_ids(tmp_path, None) == expected - {2}


def test_an_odd_end_of_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match=r"eos_token_id in .*generation_config.json is '</s>'"):
        eos_token_ids(tmp_path, None)


@pytest.mark.slow
def test_the_driver_needs_no_torch(demo_model_dir: Path) -> None:
    program = (
        "import sys, eagleray.cluster.llm, eagleray.cluster.async_llm\n"
        "from eagleray.cluster.frontend.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.from_dir(sys.argv[1])\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}])\n"
        "tokenizer.decode(tokenizer.encode(text))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(demo_model_dir)], check=True)


@pytest.mark.parametrize("last", [1, 2, 4, 7, 50])
@pytest.mark.parametrize(("bos", "eos"), [(True, False), (True, True), (False, False)])
def test_the_end_of_a_text_keeps_its_special_tokens(tmp_path: Path, bos: bool, eos: bool, last: int) -> None:
    """As transformers truncates from the left."""
    theirs = small_tokenizer(add_bos_token=bos, add_eos_token=eos, truncation_side="left")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    text = "some words of a longer text"
    if last > bos + eos:
        assert ours.encode(text, last=last) == theirs(text, truncation=True, max_length=last).input_ids
    plain = theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(text, add_special_tokens=False, last=last) == plain[-last:]
