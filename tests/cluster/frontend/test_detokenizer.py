"""Text that grows token by token, against text decoded at once."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from eagleray.cluster.frontend.detokenizer import Detokenizer
from eagleray.cluster.frontend.stop_strings import StopStrings
from eagleray.cluster.frontend.text_stream import TextStream
from eagleray.cluster.frontend.tokenizer import Tokenizer

TEXTS = [
    "Plain English, with 12345 and punctuation.",
    "Ünïcödé — “quotes” … ½ ² ﬁ",
    "日本語のテキスト 한국어 العربية हिन्दी עברית ไทย",
    "👩‍👩‍👧‍👦 🇫🇷 🏽 ☺️ 𝄞𐍈 e\u0301",
    "<|im_start|>user\nspecial<|im_end|> after",
    "\n\n\t  white   space \n",
]


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(demo_model_dir)


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    """One token per character, so that a test can cut text where it likes; id 0 is a token of no text."""
    vocab = {"": 0} | {character: index for index, character in enumerate("abcdefgh", 1)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {}, {})


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """As Llama 2's: "▁" for a space, the first one stripped, and bytes for what has no piece. Piece of byte b: id b."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {}, {})


def streamed(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    """The text after each token, and at the end."""
    texts = []
    for token_id in token_ids:
        detokenizer.push(token_id)
        texts.append(detokenizer.text)
    detokenizer.flush()
    return [*texts, detokenizer.text]


def detokenizer_of(tokenizer: Tokenizer, prompt: list[int] | None = None, *, skip_special: bool = True) -> Detokenizer:
    return Detokenizer(TextStream(tokenizer, prompt or [], skip_special))


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole(tokenizer: Tokenizer, text: str, skip_special: bool) -> None:
    ids = tokenizer.encode(text)
    texts = streamed(detokenizer_of(tokenizer, skip_special=skip_special), ids)
    assert texts[-1] == tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert not any("\ufffd" in shown for shown in texts)


@pytest.mark.parametrize("text", TEXTS)
def test_text_cut_inside_a_character_ends_as_if_decoded_at_once(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for end in range(len(ids) + 1):
        texts = streamed(detokenizer_of(tokenizer), ids[:end])
        assert texts[-1] == tokenizer.decode(ids[:end])
        assert not any("\ufffd" in shown for shown in texts[:-1])


@given(ids=st.lists(st.integers(0, 49_151), max_size=40))
def test_random_tokens_end_as_if_decoded_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert streamed(detokenizer_of(tokenizer), ids)[-1] == tokenizer.decode(ids)


def test_ids_that_the_tokenizer_does_not_have_become_nothing(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), 49_999, *tokenizer.encode(" two")]
    assert streamed(detokenizer_of(tokenizer), ids)[-1] == "one two"


@pytest.mark.parametrize("prompt", ["a", "aa a", "a é"])
@pytest.mark.parametrize("text", ["a a", "é a", "a ひ", "  a"])
def test_prompt_and_output_make_the_text_of_both(sentencepiece: Tokenizer, prompt: str, text: str) -> None:
    before, after = sentencepiece.encode(prompt), sentencepiece.encode(text)
    output = streamed(detokenizer_of(sentencepiece, before), after)[-1]
    assert prompt + output == sentencepiece.decode(before + after) == f"{prompt} {text}"
    assert streamed(detokenizer_of(sentencepiece), after)[-1] == sentencepiece.decode(after) == text


def test_a_prompts_half_character_is_completed_in_the_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 日本")
    first = next(end for end in range(len(ids)) if tokenizer.decode(ids[:end]).endswith("\ufffd"))
    texts = streamed(detokenizer_of(tokenizer, ids[:first]), ids[first:])
    certain = tokenizer.decode(ids[:first]).removesuffix("\ufffd")
    assert certain + texts[-1] == "a 日本"
    assert not any("\ufffd" in shown for shown in texts)


def test_bytes_that_spoil_earlier_ones_do_not_end_the_stream(sentencepiece: Tokenizer) -> None:
    ids = [ord("x"), 0xE6, sentencepiece.encode("a")[0], ord("y")]
    assert streamed(detokenizer_of(sentencepiece), ids)[-1] == "x\ufffd ay"
    assert streamed(detokenizer_of(sentencepiece), ids[:2])[-1] == "x\ufffd"


def expected_end(text: str, stop: list[str], keep: bool, min_length: int = 0) -> tuple[str, str | None]:
    """The rule, told character by character."""
    for end in range(min_length + 1, len(text) + 1):
        ended = [string for string in stop if text[:end].endswith(string)]
        if ended:
            longest = max(ended, key=len)
            return text[: end if keep else end - len(longest)], longest
    return text, None


letters = st.text("abc", min_size=1, max_size=3)


@given(
    text=st.text("abc", max_size=12),
    stop=st.lists(letters, max_size=3),
    keep=st.booleans(),
    min_tokens=st.integers(0, 4),
)
def test_the_first_stop_string_ends_the_text_and_is_never_shown(
    characters: Tokenizer, text: str, stop: list[str], keep: bool, min_tokens: int
) -> None:
    detokenizer = Detokenizer(TextStream(characters, [], True), stop, keep_stop=keep)
    end, reason = expected_end(text, stop, keep, min_tokens)
    shown, found = [], None
    for count, character in enumerate(text, 1):
        found = detokenizer.push("abc".index(character) + 1, may_stop=count > min_tokens)
        shown.append(detokenizer.text)
        if found is not None:
            break
    else:
        detokenizer.flush()
    assert (detokenizer.text, found) == (end, reason)
    assert all(end.startswith(part) for part in shown)


def test_no_more_is_held_back_than_a_stop_string_could_need(characters: Tokenizer) -> None:
    detokenizer = Detokenizer(TextStream(characters, [], True), ["bcd", "abx"])
    ids = ["abcdefgh".index(character) + 1 for character in "abchab"]
    assert streamed(detokenizer, ids) == ["", "", "a", "abch", "abch", "abch", "abchab"]


@pytest.mark.parametrize("stop", ["capital of", "l of F", " of", "e capital"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_stop_string_may_lie_across_tokens(tokenizer: Tokenizer, stop: str, keep: bool) -> None:
    text = "The capital of France"
    detokenizer = Detokenizer(TextStream(tokenizer, [], True), [stop, "of Fr", "of Fra"], keep_stop=keep)
    found = next(filter(None, map(detokenizer.push, tokenizer.encode(text))))
    assert found == stop
    assert detokenizer.text == text[: text.index(stop) + len(stop) * keep]


class Counted(str):
    """A character that counts how often it is looked up."""

    looks = 0

    def __hash__(self) -> int:
        Counted.looks += 1
        return super().__hash__()


@pytest.mark.parametrize("stop", [["a" * 3900 + "b"] * 64, ["a" * length + "b" for length in range(1, 90)]])
def test_looking_for_stop_strings_takes_as_long_as_the_text_is_however_long_they_are(stop: list[str]) -> None:
    strings, state = StopStrings(stop), 0
    Counted.looks = 0
    text = "a" * 3899 + "cab" * 3 + "a" * 90 + "b"
    for character in map(Counted, text):
        state = strings.step(state, character)
    assert strings.found(state) == max((string for string in stop if text.endswith(string)), key=len, default=None)
    assert Counted.looks <= 4 * len(text)


@given(
    text=st.text("ab", max_size=40),
    stop=st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=6),
)
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(text: str, stop: list[str]) -> None:
    strings, state = StopStrings(stop), 0
    for end, character in enumerate(text, 1):
        state = strings.step(state, character)
        seen = text[:end]
        beginnings = [string[:length] for string in stop for length in range(len(string))]
        assert strings.num_held(state) == max(len(each) for each in beginnings if seen.endswith(each))
        assert strings.found(state) == max((s for s in stop if seen.endswith(s)), key=len, default=None)


def test_text_can_be_read_from_any_character_on(characters: Tokenizer) -> None:
    detokenizer = Detokenizer(TextStream(characters, [], True), ["bcd"])
    texts = []
    for letter in "abcabcaabbcef":
        detokenizer.push("abcdefgh".index(letter) + 1)
        texts.append((detokenizer.text, [detokenizer.shown(start) for start in range(15)]))
    for text, later in texts:
        assert [make() for make in later] == [text[start:] for start in range(15)]
