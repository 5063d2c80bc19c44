"""What a checkpoint's generation_config.json would have where a request does not say."""

import json
from pathlib import Path

import pytest

from eagleray.cluster.generation_config import chosen_defaults, sampling_defaults

LLAMA = {  # Llama-3.1-8B-Instruct's, but for min_p
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "min_p": None,
    "transformers_version": "4.42.3",
}


def written(folder: Path, text: str) -> Path:
    (folder / "generation_config.json").write_text(text)
    return folder


def test_what_we_have_is_taken_and_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = written(tmp_path, json.dumps(LLAMA))
    with caplog.at_level("INFO"):
        assert chosen_defaults(model, "auto") == {"temperature": 0.6, "top_p": 0.9}
    assert caplog.messages == ["sampling defaults of the model's generation_config.json: temperature 0.6, top_p 0.9"]
    everything = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    assert sampling_defaults(written(tmp_path, json.dumps(everything))) == everything


def test_without_a_file_or_a_wish_there_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert chosen_defaults(tmp_path, "auto") == {}
        assert chosen_defaults(written(tmp_path, json.dumps(LLAMA)), "none") == {}
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"temperature": -1}',
            "temperature is -1; .*; mend the file, or leave it alone with generation_config 'none'",
        ),
        ('{"top_k": "many"}', "top_k is 'many'"),
        ("{", "is no valid JSON"),
        ("[]", "holds list and no object"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{words}"):
        sampling_defaults(written(tmp_path, text))
