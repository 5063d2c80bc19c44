"""Bounds on what a request may hold, counted before anything slow is done with it."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as Backend

from eagleray.cluster.frontend.prompts import TokensPrompt
from eagleray.cluster.frontend.token_bytes import BYTE_OF
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.sampling_params import MAX_N, SamplingParams
from eagleray.deploy.openai.errors import ApiError, too_long
from eagleray.deploy.openai.truncate import MAX_SHOWN, truncate

MAX_DEPTH = 64  # levels of lists and objects; Python's own stack ends at a few hundred
MAX_PARTS = 500_000  # lists, objects and fields of objects in a body: a token's bias each, and many messages
MAX_ARGUMENTS = 100_000  # lists, objects and fields in the arguments of all calls of tools, which are JSON in texts
MAX_MESSAGES = 10_000  # and as many parts of their contents
MAX_FIELDS = 100  # of one object, where more than all that there are must hold unknown ones
MAX_CHARACTERS = 1_000_000  # of a text that is only to be counted: a second or so
MAX_TOKENIZED = 500_000  # tokens of one
MAX_LISTED = 1_000_000  # token ids, biases and letters of bad words that ranks are told, for each choice anew
MAX_ECHOED = 1_000_000  # tokens of prompts in an answer
MAX_ANSWER_LOGPROBS = 1_000_000  # in an answer: as many as there can be of 47,000 tokens
MAX_ECHOED_LOGPROBS = 100_000  # of prompts in a stream, whose events are written at one go
CHARACTERS_A_TOKEN = 32  # that a longer text than that may have for each token of a prompt, on average
NFC_FACTOR = 4  # characters that normalization makes one of, at most (Unicode's stability limits: U+1F82 is four)

MARKS = re.compile(rb'\\.|["\[{:]', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """The limits of one model. None stands for what is not bounded."""

    max_model_len: int  # tokens
    max_characters: int | None  # of a text that may fit
    num_tokens: int | None  # in the vocabulary

    @classmethod
    def of(cls, max_model_len: int, tokenizer: Tokenizer | None) -> "Limits":
        """Reads the whole vocabulary."""
        if tokenizer is None:
            return cls(max_model_len, None, None)
        longest = max_characters_of_a_token(tokenizer.backend)
        most = max(MAX_CHARACTERS, max_model_len * CHARACTERS_A_TOKEN)
        max_characters = most if longest is None else min(most, max_model_len * longest)
        return cls(max_model_len, max_characters, tokenizer.backend.get_vocab_size())

    def check_prompts(self, body: dict[str, Any]) -> None:
        """Raise `ApiError` 400 for more choices than there may be, and prompts and lists of ids that cannot fit."""
        prompt, n = body.get("prompt"), body.get("n")
        n = n if type(n) is int and 1 <= n <= MAX_N else 1
        prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if len(prompts) * n > MAX_N:
            choices = f"{len(prompts)} prompts with n {n} are {len(prompts) * n} choices"
            raise ApiError(400, f"{choices}; ask for at most {MAX_N}", param="n" if n > 1 else "prompt")
        for each in prompts:
            self._check_prompt(each, body.get("truncate_prompt_tokens") is not None)
        if isinstance(biases := body.get("logit_bias"), dict):
            wrong = next((item for item in biases.items() if type(item[1]) not in (int, float)), None)
            if wrong is not None:
                body["logit_bias"] = dict([wrong])  # one is enough to be told of, where all would take long
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = body.get(name)
            if isinstance(ids, list) and self.num_tokens is not None and len(ids) > self.num_tokens:
                message = f"{name} has {len(ids)} token ids, but there are {self.num_tokens}; give each once"
                raise ApiError(400, message, param=name)

    def check_tokens(self, body: dict[str, Any]) -> None:
        """Raise `ApiError` 400 for more than is made into tokens, or of tokens into a text."""
        tokens, prompt = body.get("tokens"), body.get("prompt")
        if isinstance(tokens, list) and len(tokens) > MAX_TOKENIZED:
            raise ApiError(400, f"tokens has {len(tokens)} token ids; send at most {MAX_TOKENIZED}", param="tokens")
        if isinstance(prompt, str):
            check_length(prompt)

    def check_reply(
        self,
        prompts: Sequence[TokensPrompt],
        params: SamplingParams,
        *,
        echo: bool = False,
        ids: bool = False,
        stream: bool = False,
    ) -> None:
        """Raise `ApiError` 400 for an answer that may have too many log-probabilities, or repeats too much.

        `echo` repeats a prompt for each choice, in log-probabilities, too, and `ids` its token ids.
        """
        num_echoed = num_logprobs = num_at_once = 0
        for prompt in prompts:
            num_prompt = len(prompt["prompt_token_ids"])
            num_repeated = params.n * num_prompt if echo else 0
            num_new = params.n * (self.max_model_len - num_prompt if params.max_tokens is None else params.max_tokens)
            num_echoed += num_repeated + (params.n * num_prompt if ids else 0)
            if params.logprobs is not None:
                num_logprobs += (num_repeated + num_new) * (params.logprobs + 1)
                num_at_once += num_repeated * (params.logprobs + 1) if stream else 0
            if params.prompt_logprobs is not None and not echo:
                num_logprobs += params.n * num_prompt * (params.prompt_logprobs + 1)
        if num_echoed > MAX_ECHOED:
            name = "echo" if echo else "return_token_ids"
            message = f"{name} would repeat {num_echoed} tokens of prompts; lower n or send fewer, {MAX_ECHOED} at most"
            raise ApiError(400, message, param=name)
        if num_at_once > MAX_ECHOED_LOGPROBS:
            message = f"echo with logprobs would put {num_at_once} log-probabilities of prompts into a stream"
            raise ApiError(400, f"{message}, {MAX_ECHOED_LOGPROBS} at most; set stream to false", param="echo")
        if num_logprobs > MAX_ANSWER_LOGPROBS:
            asked = f"{num_logprobs} log-probabilities may be in the answer, of all choices and tokens"
            raise ApiError(
                400,
                f"{asked}; ask for at most {MAX_ANSWER_LOGPROBS}: lower n, max_tokens or logprobs",
                param="logprobs",
            )

    def _check_prompt(self, prompt: object, truncates: bool) -> None:
        if isinstance(prompt, list) and len(prompt) > self.max_model_len and not truncates:
            message = f"a prompt has {len(prompt)} tokens, but the model holds {self.max_model_len}; shorten it"
            raise too_long(message)
        if isinstance(prompt, str):
            self.check_text(prompt)

    def check_text(self, text: str) -> None:
        """Raise `ApiError` 400 for a text whose tokens must be more than the model holds."""
        if self.max_characters is not None and len(text) > self.max_characters:
            message = (
                f"a prompt has {len(text)} characters, but the model holds {self.max_model_len} tokens, which are at "
                f"most {self.max_characters} characters; shorten it"
            )
            raise too_long(message)


def check_lists(params: SamplingParams, num_choices: int) -> None:
    """Raise `ApiError` 400 for more ids, biases and bad words than ranks should be told for all choices together."""
    sizes = {name: len(getattr(params, name) or ()) for name in ("logit_bias", "allowed_token_ids", "stop_token_ids")}
    sizes["bad_words"] = sum(map(len, params.bad_words or ()))
    if (num_listed := num_choices * sum(sizes.values())) > MAX_LISTED:
        longest = max(sizes, key=lambda name: sizes[name])
        message = f"{longest} and the like are {num_listed} token ids, biases and letters for {num_choices} choices"
        raise ApiError(400, f"{message}; lower n, or send fewer, {MAX_LISTED} at most", param=longest)


def check_length(text: str) -> None:
    """Raise `ApiError` 400 for a text that is too long to be counted."""
    if len(text) > MAX_CHARACTERS:
        raise too_long(f"a text has {len(text)} characters; send at most {MAX_CHARACTERS} at once")


def check_bytes(body: bytes, most: int = MAX_PARTS, what: str = "the body has") -> None:
    """Raise `ApiError` 400 for JSON of too many parts, which would take long to read. Never holds others up."""
    if sum(body.count(mark) for mark in (b"[", b"{", b":")) <= most:  # in texts, too, so at most so many
        return
    in_text, num_parts = False, 0
    for found in MARKS.finditer(body):
        mark = found[0]
        if mark == b'"':
            in_text = not in_text
        elif not in_text and len(mark) == 1 and (num_parts := num_parts + 1) > most:
            raise ApiError(400, f"{what} more than {most} lists, objects and fields; send less")


def check_shape(body: object) -> None:
    """Raise `ApiError` 400 for what is nested too deeply, and for too many fields, messages and parts of messages."""
    if not isinstance(body, dict):
        check_depth(body, None)
        return
    _check_num_fields(body, None)
    for name, value in body.items():
        check_depth(value, name)
    _check_num_fields(body.get("chat_template_kwargs"), "chat_template_kwargs")
    if isinstance(messages := body.get("messages"), list):
        _check_num(len(messages), "messages", "messages")
        num_parts = 0
        _check_arguments(messages)
        for index, message in enumerate(messages):
            where = f"messages.{index}"
            _check_num_fields(message, where)
            if isinstance(message, dict) and isinstance(parts := message.get("content"), list):
                num_parts += len(parts)
                _check_num(num_parts, "messages", "parts of content")
                for part in parts:
                    _check_num_fields(part, f"{where}.content")


def _check_arguments(messages: list[Any]) -> None:
    """Those of calls of tools are JSON of their own."""
    texts = bytearray()
    for message in messages:
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        for call in calls if isinstance(calls, list) else []:
            called = call.get("function") if isinstance(call, dict) else None
            if isinstance(called, dict) and isinstance(arguments := called.get("arguments"), str):
                texts += arguments.encode("utf-8", "surrogatepass") + b"\n"
    check_bytes(bytes(texts), MAX_ARGUMENTS, "arguments of tool_calls have")


def check_depth(value: object, name: str | None) -> None:
    """Raise `ApiError` 400 for lists and objects nested more than `MAX_DEPTH` deep."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (list, dict))]
        if not level:
            return
    raise too_deep(name)


def too_deep(name: str | None = None) -> ApiError:
    """What is said of a field, or of the body."""
    short = None if name is None else truncate(name, MAX_SHOWN)
    message = f"{short or 'the body'} is nested too deeply; nest lists and objects at most {MAX_DEPTH} deep"
    return ApiError(400, message, param=short)


def max_characters_of_a_token(backend: Backend) -> int | None:
    """The most characters of text that one token can stand for; None if there is no bound.

    It has none where the tokenizer leaves some of a text out, or makes one unknown token of a whole word. So only
    byte-level BPE, and BPE over sentencepiece's pieces with all bytes beside them, are known to have a bound.
    """
    kept = 1
    for normalizer in _steps(backend.normalizer, "normalizers"):
        if normalizer["type"] == "NFC":
            kept *= NFC_FACTOR
        elif normalizer["type"] not in ("Prepend", "ByteLevel") and not _keeps_length(normalizer):
            return None
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    if any(step.get("behavior") == "Removed" or step["type"] not in KEEPING for step in _pre_tokenizers(backend)):
        return None
    vocabulary = backend.get_vocab()
    by_letters = any(step["type"] == "ByteLevel" for step in _pre_tokenizers(backend))
    alphabet: Iterable[str] = BYTE_OF if by_letters else (f"<0x{byte:02X}>" for byte in range(256))
    whole = by_letters or getattr(backend.model, "byte_fallback", False)
    if not whole or not all(letter in vocabulary for letter in alphabet):
        return None
    return kept * max(map(len, vocabulary))  # a byte-level piece has a letter a byte, so at least one a character


KEEPING = ("ByteLevel", "Split", "Digits", "Metaspace", "Punctuation")  # pre-tokenizers that leave nothing out


def _pre_tokenizers(backend: Backend) -> list[dict[str, Any]]:
    return _steps(backend.pre_tokenizer, "pretokenizers")


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """A tokenizer's part as the steps that it is made of."""
    return [] if part is None else _flat(json.loads(part.__getstate__()), name)


def _flat(step: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [each for inner in step[name] for each in _flat(inner, name)] if step["type"] == "Sequence" else [step]


def _keeps_length(normalizer: dict[str, Any]) -> bool:
    """Whether it writes at least a character for each."""
    if normalizer["type"] != "Replace" or "String" not in normalizer["pattern"]:
        return False
    return len(normalizer["content"]) >= len(normalizer["pattern"]["String"])


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_num(num: int, field: str, what: str) -> None:
    if num > MAX_MESSAGES:
        raise ApiError(400, f"{field} has {num} {what}; send at most {MAX_MESSAGES}", param=field)


def _check_num_fields(value: object, where: str | None) -> None:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        first = ", ".join(truncate(name, MAX_SHOWN) for name in islice(value, 3))
        message = f"{where or 'the body'} has {len(value)} fields, {first} among them; send those that are described"
        raise ApiError(400, message, param=where)
