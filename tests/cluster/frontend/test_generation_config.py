"""What a checkpoint's generation_config.json would have where a request does not say."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from eagleray.cluster.frontend.generation_config import (
    DEFAULTED,
    UNSUPPORTED,
    chosen_defaults,
    default_params,
    drawable,
    eos_token_ids,
    sampling_defaults,
)
from eagleray.cluster.sampling_params import SamplingParams

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


def test_config_json_counts_where_there_is_no_file_as_in_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"temperature": 0.3, "model_type": "llama"}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.3}
    assert sampling_defaults(written(tmp_path, "{}")) == {}


LENGTHS = {"max_length", "max_new_tokens", "max_time", "num_return_sequences"}  # which requests say themselves
WITH_BEAMS = {"early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"}  # nothing without num_beams
SAME_ANSWER = {  # how fast it comes, what comes with it, and what is for other kinds of models
    *("use_mtp", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "renormalize_logits"),
    *("remove_invalid_values", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "pad_token_id", "bos_token_id", "decoder_start_token_id", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "_from_model_config", "transformers_version"),
}


def test_whatever_transformers_reads_is_held_refused_or_changes_no_answer() -> None:
    known = {*DEFAULTED, *UNSUPPORTED, "do_sample", "eos_token_id", *LENGTHS, *WITH_BEAMS, *SAME_ANSWER}
    assert vars(GenerationConfig()).keys() <= known


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_there_is_refused_unless_it_asks_for_nothing(tmp_path: Path, name: str) -> None:
    for nothing in UNSUPPORTED[name]:
        assert sampling_defaults(written(tmp_path, json.dumps({name: nothing}))) == {}
    model = written(tmp_path, json.dumps({name: [[5]]}))
    words = rf"generation_config\.json: {name} is \[\[5\]\], which Eagleray does not support; remove it; .* 'none'$"
    with pytest.raises(ValueError, match=words):
        default_params(model)
    assert default_params(model, "none") == SamplingParams()


def test_a_choice_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generation_config is 'vllm'; give 'auto'"):
        default_params(tmp_path, "vllm")


def test_a_model_that_is_not_to_sample_is_greedy(tmp_path: Path) -> None:
    assert sampling_defaults(written(tmp_path, '{"do_sample": false, "temperature": 0.7}')) == {"temperature": 0.0}
    assert sampling_defaults(written(tmp_path, '{"do_sample": null, "temperature": 0.7}')) == {"temperature": 0.7}


def test_an_end_that_no_model_can_draw_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert drawable(frozenset({2, 31}), 32) == {2, 31}
    assert not caplog.messages
    assert drawable(frozenset({2, 32, 10**18}), 32) == {2}
    assert caplog.messages == ["[32, 1000000000000000000] can end no sequence: the model's vocabulary ends at 31"]


@pytest.mark.parametrize("ids", [True, [True], -1, 1.0, "2", {"a": 1}, [[1]], [None], list(range(2000))])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_ends_that_are_no_token_ids_are_refused(tmp_path: Path, file: str, ids: object) -> None:
    written(tmp_path, '{"eos_token_id": 2}')
    (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(
        ValueError, match=rf"eos_token_id in .*{file} is .*; write one token id or a list of up to 1000"
    ):
        eos_token_ids(tmp_path, None)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "true", "[]", "{}", '"x"', "-1e400"])
@pytest.mark.parametrize("name", DEFAULTED)
def test_a_default_that_is_no_number_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} is"):
        sampling_defaults(written(tmp_path, f'{{"{name}": {value}}}'))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"temperature": -1}',
            "temperature is -1; .*; fix the file, or ignore it with generation_config 'none'",
        ),
        ('{"top_k": "many"}', "top_k is 'many'"),
        ("{", "is not valid JSON"),
        ("[]", "contains a list, not an object"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json.*{words}"):
        sampling_defaults(written(tmp_path, text))
