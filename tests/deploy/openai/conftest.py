"""One engine with a tiny model behind a server, and one real tokenizer, for all tests of the HTTP API."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from eagleray.cluster.async_llm import AsyncLLM
from eagleray.cluster.frontend.tokenizer import Tokenizer
from support.http_server import Server, serving
from support.tiny_model import write_tiny_model

MAX_MODEL_LEN = 512


@pytest.fixture(scope="package")
def tiny(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model, "tiny", takes bytes for tokens; up to 8 sequences run at once."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    engine = AsyncLLM(
        path,
        max_model_len=MAX_MODEL_LEN,
        block_size=16,
        kv_cache_bytes=4_000_000,
        max_num_seqs=8,
        threads_per_rank=1,
    )
    with serving(engine, "tiny", MAX_MODEL_LEN) as server:
        yield server


@pytest.fixture(scope="package")
def demo_tokenizer(demo_model_dir: Path) -> Tokenizer:
    """The demo model's, which takes longer to read than most tests here."""
    return Tokenizer.from_dir(demo_model_dir)
