"""Text that grows after a prompt, against everything decoded at once by the library."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from eagleray.cluster.frontend.text_stream import TextStream
from eagleray.cluster.frontend.tokenizer import Tokenizer

LOST = "\ufffd"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", *BYTES, "▁", "▁▁", "a", "▁a", "é", "\ufffd", "\n", "日本", "##c", ".", "▁.", ""]
SPECIAL = ["<s>", "</s>"]


def made(vocab: list[str], decoder: decoders.Decoder | None, added: list[str] | None = None) -> Tokenizer:
    backend = Backend(models.BPE(vocab={piece: index for index, piece in enumerate(vocab)}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken(text) for text in added or []])
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer(backend, {}, {})


def byte_level() -> Tokenizer:
    """A token for each byte, a few of several bytes, and added tokens, which the library reads as letters of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return made([*letters, "Ġæ", "æĹ", "ï¿½", "Ġï¿½", "½a"], decoders.ByteLevel(), ["日", "<x>", "Ã"])


def llama(strip: int = 1) -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return made(PIECES, decoders.Sequence(steps + [decoders.Strip(" ", strip, 0)] * (strip > 0)), ["▁q", "<0x41>"])


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "bytes beside pieces": llama,
    "bytes beside pieces, nothing stripped": lambda: llama(0),
    "bytes beside pieces, two stripped": lambda: llama(2),
    "metaspace": lambda: made(PIECES, decoders.Metaspace()),
    "metaspace after bytes": lambda: made(
        PIECES, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    ),
    "word pieces with cleanup": lambda: made(PIECES, decoders.WordPiece(cleanup=True)),
    "word ends": lambda: made([*PIECES, "a</w>", "b</w>"], decoders.BPEDecoder()),
    "no decoder": lambda: made(PIECES, None),
    "a replacement across tokens": lambda: made(
        PIECES, decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    ),
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
kinds = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
skips = pytest.mark.parametrize("skip_special", [True, False])


def streamed(stream: TextStream, token_ids: list[int]) -> list[str]:
    """The text after each token, and at the end."""
    texts = [""]
    for token_id in token_ids:
        texts.append(texts[-1] + stream.push(token_id))
    return [*texts, texts[-1] + stream.flush()]


def drawn_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Some of all, with unknown ones, and more of those that are interesting at either end of the vocabulary."""
    size = tokenizer.backend.get_vocab_size()
    likely = st.integers(max(0, size - 25), size)
    return data.draw(st.lists(st.one_of(st.integers(0, size + 1), likely, likely), max_size=12))


def library_takes_back(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> bool:
    """Whether it makes U+FFFD of a complete character, as a byte was wrong later in the row: no stream can do that."""
    start = [tokenizer.backend.token_to_id("a") or 0]  # after which no space is stripped
    texts = [tokenizer.decode(start + ids[:end], skip_special_tokens=skip_special) for end in range(len(ids) + 1)]
    return not all(texts[-1].startswith(text.rstrip(LOST)) for text in texts)


@pytest.mark.parametrize("kind", ["bytes beside pieces", "bytes beside pieces, nothing stripped"])
@pytest.mark.parametrize("first", [0x00, 0x20, 0x41])
def test_a_prompt_of_bytes_that_ends_within_a_character_is_read_anew_with_what_follows(kind: str, first: int) -> None:
    """As it is, all of its bytes are U+FFFD, those of complete characters, too."""
    tokenizer, prompt, last = TOKENIZERS[kind], [1 + first, 1 + 0xC2], [1 + 0x80]
    stream = TextStream(tokenizer, prompt, skip_special_tokens=True)
    assert tokenizer.decode(prompt) == LOST * stream.num_owed == LOST * 2
    assert streamed(stream.copy(), last)[-1] == tokenizer.decode(prompt + last)
    stream.push(1 + 0x41)  # which spoils the row
    assert stream.num_kept == 2


@kinds
@skips
@given(data=st.data())
def test_prompt_and_output_are_the_text_of_all_tokens(
    tokenizer: Tokenizer, skip_special: bool, data: st.DataObject
) -> None:
    prompt, ids = drawn_ids(data, tokenizer), drawn_ids(data, tokenizer)
    if library_takes_back(tokenizer, prompt + ids, skip_special):
        return
    before = tokenizer.decode(prompt, skip_special_tokens=skip_special)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip_special)
    stream = TextStream(tokenizer, prompt, skip_special)
    certain = before[: len(before) - stream.num_owed]
    assert before == certain + LOST * stream.num_owed
    texts = streamed(stream.copy(), ids)
    assert (before if whole.startswith(before) else certain) + texts[-1] == whole
    assert texts == streamed(stream, ids), "a copy goes on alike"


WITH_BYTES = [name for name in KINDS if "byte" in name]
with_bytes = pytest.mark.parametrize("tokenizer", [TOKENIZERS[name] for name in WITH_BYTES], ids=WITH_BYTES)


@with_bytes
@given(data=st.data())
def test_only_what_may_become_a_character_is_held_back(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = drawn_ids(data, tokenizer)
    stream = TextStream(tokenizer, [], False)
    for token_id in ids:
        stream.push(token_id)
        assert stream.copy().flush() in ("", LOST, LOST * 2, LOST * 3)


@with_bytes
@pytest.mark.parametrize("byte", [0x80, 0xBF, 0xC0, 0xF5, 0xFF])
def test_a_byte_that_begins_no_character_is_shown_at_once(tokenizer: Tokenizer, byte: int) -> None:
    (token_id,) = [i for i in range(300) if tokenizer.token_bytes.of(i) == bytes([byte])]
    stream = TextStream(tokenizer, [token_id], True)
    assert [stream.push(token_id) for _ in range(1000)] == [LOST] * 1000


@pytest.mark.parametrize("text", ["The text is broken here: \ufffd", "\ufffd", "a \ufffd\ufffd", "\ufffda"])
def test_a_prompts_own_replacement_character_does_not_come_again(text: str) -> None:
    tokenizer = TOKENIZERS["byte level"]
    letters = {tokenizer.token_bytes.of(i): i for i in range(256)}
    prompt = [letters[bytes([byte])] for byte in text.encode()]
    assert tokenizer.decode(prompt) == text
    assert streamed(TextStream(tokenizer, prompt, True), [letters[b"b"]])[-1] == "b"
