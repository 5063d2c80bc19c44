"""The HTTP application over an engine in this process, whose tokens are bytes that can be foretold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagleray.cluster.async_llm import AsyncLLM
from eagleray.cluster.front_end import FrontEnd
from eagleray.cluster.submission import ModelLimits
from eagleray.cluster.tokenizer import Tokenizer
from support.http_server import Server, serving
from support.local_engine import LocalEngine
from support.tiny_model import VOCAB_SIZE, write_tokenizer
from support.toy_rank import generate

MAX_MODEL_LEN = 1024


@contextmanager
def local_server(path: Path) -> Iterator[Server]:
    """Its model is "toy"; `path` is a folder for its tokenizer."""
    limits = ModelLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset())
    front_end = FrontEnd(Tokenizer.from_dir(write_tokenizer(path)), limits)
    with serving(AsyncLLM.attach(LocalEngine(), front_end), "toy", MAX_MODEL_LEN) as server:
        yield server


def continuation(prompt: list[int], num_tokens: int) -> list[int]:
    """What the engine generates."""
    return generate(prompt, num_tokens)
