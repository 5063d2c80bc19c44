"""The constructors of `LLM` and `AsyncLLM`, which start engines."""

from pathlib import Path

import pytest

from eagleray import LLM, AsyncLLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 2}, "no such option: tensor_parallel; the options are block_size, compile"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        ({"model": "/nowhere"}, "there is no model directory /nowhere"),
        ({"tokenizer": "/nowhere"}, "there is no directory /nowhere; name a directory with a tokenizer.json"),
        ({"tokenizer": "/nowhere", "skip_tokenizer_init": True}, "leave one of them out"),
    ],
)
@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_bad_options_are_refused_before_anything_starts(
    demo_model_dir: Path, kind: type[LLM] | type[AsyncLLM], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"model": demo_model_dir} | options)  # type: ignore[arg-type]
