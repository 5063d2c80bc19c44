"""The bytes of tokens add up to the text, in every kind of tokenizer that our models have."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from eagleray.cluster.frontend import tokenizer as cluster
from eagleray.cluster.frontend.token_bytes import TokenBytes

TEXTS = ["Hello there", "🦅🐟🦅 and 👩\u200d👧", "日本語のテキスト", "naïve\n\tcafé  two", "\x00\x7f\xad\u0120"]


def joined(tokens: TokenBytes, ids: Sequence[int]) -> bytes:
    found = [tokens.of(token_id) for token_id in ids]
    return b"".join(each for each in found if each is not None)


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_add_up_to_the_text(demo_model_dir: Path, text: str) -> None:
    tokenizer = cluster.Tokenizer.from_dir(demo_model_dir)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert joined(tokenizer.token_bytes, ids) == text.encode()


def test_every_byte_has_its_letter(demo_model_dir: Path) -> None:
    """As the library itself has them."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.decoder = decoders.ByteLevel()
    tokens = TokenBytes(backend)
    assert sorted(joined(tokens, [i]) for i in range(256)) == [bytes([byte]) for byte in range(256)]
    for token_id in range(256):
        (byte,) = joined(tokens, [token_id])
        if byte < 128:
            assert backend.decode([token_id]) == chr(byte)


@pytest.fixture
def sentencepiece() -> Tokenizer:
    """As Llama 2's: pieces with marks for spaces, bytes for all else."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Helothr", "▁t"]
    merges = [("▁", "t")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    return backend


@pytest.mark.parametrize("text", ["Hello there", "Hell 🦅", "日本"])
def test_bytes_that_are_no_piece_add_up_too(sentencepiece: Tokenizer, text: str) -> None:
    """The tokenizer puts a space before a text, which is there in the middle of one."""
    ids = sentencepiece.encode(text).ids
    assert sentencepiece.decode(ids) == text
    assert joined(TokenBytes(sentencepiece), ids) == f" {text}".encode()


def test_added_tokens_stand_for_themselves_and_strangers_for_nothing(sentencepiece: Tokenizer) -> None:
    assert TokenBytes(sentencepiece).of(1) == b"<s>"
    assert TokenBytes(sentencepiece).of(5000) is None


def test_pieces_that_depend_on_their_neighbours_have_none() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert TokenBytes(backend).of(1) is None
