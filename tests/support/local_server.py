"""The HTTP application over an engine in this process, whose tokens are bytes that can be foretold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from support.http_server import Server, serving
from support.local_engine import LocalEngine
from support.tiny_model import CHAT_TEMPLATE, VOCAB_SIZE, write_tokenizer

MAX_MODEL_LEN = 1024


@contextmanager
def local_server(path: Path, chat_template: str = CHAT_TEMPLATE) -> Iterator[Server]:
    """Its model is "toy"; `path` is a folder for its tokenizer."""
    limits = ModelLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset())
    front_end = FrontEnd(Tokenizer.from_dir(write_tokenizer(path, chat_template)), limits)
    with serving(AsyncClient(LocalEngine(), front_end), "toy", MAX_MODEL_LEN) as server:
        yield server
