"""The engine on Ray on GPUs in bfloat16 against transformers, for every family and tensor-parallel size.

The measure is transformers' own error in bfloat16 against itself in float32, with the same weights, on the same GPU. An
engine that computes the same network rounds about as often, so its error has about the same size: `RMS_RATIO` leaves
room for other places of rounding (a sum over ranks is rounded once more) and for chance. The greatest error of some
thousand is a matter of a few places where the network is sensitive, so it may differ by more: `MAX_RATIO`. A mistake
in a single feature gives more than that, see `test_a_mistake_would_be_seen`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray import LLM, RequestOutput, SamplingParams
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import Logprob
from support.gpu import needs_gpus
from support.random_checkpoint import make_model, save_in_bfloat16
from support.teacher import Judged, Teacher, root_mean_square

pytestmark = [pytest.mark.engine, needs_gpus(1), pytest.mark.usefixtures("ray_cluster")]

DEVICE = "cuda"
RMS_RATIO = 1.5
MAX_RATIO = 3.0
SLACK = 2e-3  # where bfloat16 happens to be nearly exact
PROMPT_LENGTHS = (1, 2, 17, 64, 127, 128, 129, 200, 255, 256, 300, 513, 700, 1300)  # 14 rows use the graph for 16
NUM_NEW_TOKENS = 48
CHUNK = 256  # tokens of a step, so that longer prompts run in chunks
WINDOW = 100

COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def shape(hidden: int, heads: int, kv_heads: int, head_size: int | None) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**shape(512, 8, 4, 64), "rope_parameters": LLAMA3_ROPE},
    "mistral": {**shape(1024, 8, 2, 128), "sliding_window": WINDOW},
    "qwen2": shape(896, 14, 2, None),  # heads of 64, seven for each KV head, with biases
    "qwen3": shape(1024, 16, 8, 128),
    "gemma2": {  # tied, random weights would repeat the last token for ever
        **shape(512, 8, 4, 256),
        "query_pre_attn_scalar": 100,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
    },
}
DEMO = "demo model"
ON_SIZES = [
    pytest.param((model, size), id=f"{model} on {size}", marks=needs_gpus(size))
    for model in (*FAMILIES, DEMO)
    for size in (1, 2, 4)
]


@dataclass(frozen=True)
class Subject:
    """A checkpoint, prompts for it, and its judge."""

    path: Path
    prompts: list[list[int]]
    teacher: Teacher


def random_prompts() -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(COMMON["vocab_size"]) for _ in range(length)] for length in PROMPT_LENGTHS]


def text_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Parts of a text, each from another place on."""
    days = (f"On day {day} the crew measured {day * 37 % 101} metres of ice and wrote it down. " for day in range(200))
    token_ids = tokenizer.encode("".join(days))
    return [token_ids[31 * i : 31 * i + length] for i, length in enumerate(PROMPT_LENGTHS)]


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def make(model: str) -> Subject:
        if model in made:
            return made[model]
        if model == DEMO:
            path: Path = request.getfixturevalue("demo_model_dir")
            prompts = text_prompts(Tokenizer.from_dir(path))
        else:
            path, prompts = tmp_path_factory.mktemp("checkpoint"), random_prompts()
            save_in_bfloat16(make_model({"model_type": model, **COMMON, **FAMILIES[model]}, head_gain=3.0), path)
        made[model] = Subject(path, prompts, Teacher(path, torch.device(DEVICE)))
        return made[model]

    return make


@pytest.fixture(scope="module", params=ON_SIZES)
def served(request: pytest.FixtureRequest, subject_of: Callable[[str], Subject]) -> Iterator[tuple[Subject, LLM]]:
    """An engine for each model and size, which all tests use."""
    model, size = request.param
    subject = subject_of(model)
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "device": DEVICE,
        "kv_cache_bytes": 1 << 28,
        "max_model_len": 1536,
        "max_num_seqs": 32,
        "max_num_batched_tokens": CHUNK,
    }
    with LLM(subject.path, size, skip_tokenizer_init=True, **options) as llm:
        yield subject, llm


def generate(subject: Subject, llm: LLM, **params: Any) -> list[RequestOutput]:
    """All prompts at once, each with its own seed."""
    each = [
        SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True, detokenize=False, seed=i, **params)
        for i in range(len(subject.prompts))
    ]
    outputs = llm.generate(subject.prompts, each, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [NUM_NEW_TOKENS] * len(outputs)
    return outputs


def of_token(entries: list[dict[int, Logprob]] | list[dict[int, Logprob] | None] | None, ids: list[int]) -> list[float]:
    """The log-probability of each of `ids`."""
    assert entries is not None
    return [(entry or {})[token_id].logprob for entry, token_id in zip(entries, ids, strict=True)]


def score(teacher: Teacher, output: RequestOutput) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Our errors and transformers': of the prompt's tokens, and of the generated ones."""
    prompt, answer = output.prompt_token_ids, output.outputs[0].token_ids
    assert output.prompt_logprobs is not None
    logprobs = of_token(output.prompt_logprobs[1:], prompt[1:]) + of_token(output.outputs[0].logprobs, answer)
    judged = teacher.judge(prompt + answer, len(logprobs))
    ours, theirs = judged.errors(prompt[1:] + answer, logprobs)
    cut = [len(prompt) - 1, len(answer)]
    (ours_prompt, ours_answer), (theirs_prompt, theirs_answer) = ours.split(cut), theirs.split(cut)
    return (ours_prompt, theirs_prompt), (ours_answer, theirs_answer)


def compare(what: str, errors: list[tuple[Tensor, Tensor]], say: Callable[[str], None]) -> None:
    ours, theirs = (torch.cat(side) for side in zip(*errors, strict=True))
    rms, their_rms, most, their_most = (f(x) for f in (root_mean_square, torch.max) for x in (ours, theirs))
    say(f"{what}: error rms {rms:.4f}, max {most:.3f}; of transformers {their_rms:.4f}, {their_most:.3f}")
    assert rms <= RMS_RATIO * their_rms + SLACK
    assert most <= MAX_RATIO * their_most + SLACK


def test_log_probabilities_of_prompts_and_of_sampled_tokens(
    served: tuple[Subject, LLM], say: Callable[[str], None]
) -> None:
    """Prompts run in chunks through one kernel, and sampled tokens one by one through graphs and another."""
    subject, llm = served
    outputs = generate(subject, llm, temperature=1.0, logprobs=0, prompt_logprobs=0)
    scores = [score(subject.teacher, output) for output in outputs]
    compare("prompts", [prompt for prompt, _ in scores], say)
    compare("sampled tokens", [answer for _, answer in scores], say)


def likeliest_errors(judged: Judged) -> Tensor:
    """transformers' errors for the tokens between which the arg-max is decided."""
    ids = judged.exact.topk(4, dim=-1).indices
    return (judged.short.gather(1, ids) - judged.exact.gather(1, ids)).flatten()


def test_greedy_tokens(served: tuple[Subject, LLM], say: Callable[[str], None]) -> None:
    """A token may fall short of float32's arg-max by the difference of two errors, its own and the arg-max's.

    With errors of up to `RMS_RATIO` times transformers', the difference has a standard deviation of 1.5 * sqrt(2) of
    their RMS error. It matters only where two tokens are nearly as likely, and there the greatest of some hundred is
    near three of those: 6 in all.
    """
    subject, llm = served
    judged = []
    shortfalls, theirs = [], []
    for output in generate(subject, llm, temperature=0.0):
        answer = output.outputs[0].token_ids
        verdict = subject.teacher.judge(output.prompt_token_ids + answer, len(answer))
        judged.append(likeliest_errors(verdict))
        shortfalls.append(verdict.shortfall(torch.tensor(answer, device=DEVICE)))
        theirs.append(verdict.shortfall(verdict.short.argmax(dim=-1)))
    ours, their = torch.cat(shortfalls), torch.cat(theirs)
    tolerance = 6 * root_mean_square(torch.cat(judged)) + SLACK
    exact, their_exact = float((ours == 0).float().mean()), float((their == 0).float().mean())
    say(f"greedy: {exact:.1%} exact, most short {ours.max():.3f} of {tolerance:.3f}; bf16 there {their_exact:.1%}")
    assert ours.max() <= tolerance
    assert exact >= their_exact - 0.05


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("llama", {"rms_norm_eps": 0.03}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": WINDOW + 1}),
    ("gemma2", {"sliding_window": WINDOW + 1}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 256}),
]


@pytest.mark.parametrize(("model", "changes"), MISTAKES)
def test_a_mistake_would_be_seen(
    model: str, changes: dict[str, Any], subject_of: Callable[[str], Subject], say: Callable[[str], None]
) -> None:
    """Even computed in float32, a network with one wrong number differs by more than the tolerance."""
    subject = subject_of(model)
    mistaken = Teacher(subject.path, torch.device(DEVICE), **changes)
    ours, theirs = [], []
    for prompt in subject.prompts[1:]:
        wrong = mistaken.judge(prompt, len(prompt) - 1).exact
        logprobs = wrong.gather(1, torch.tensor(prompt[1:], device=DEVICE).unsqueeze(1)).squeeze(1)
        error, their_error = subject.teacher.judge(prompt, len(prompt) - 1).errors(prompt[1:], logprobs.tolist())
        ours.append(error)
        theirs.append(their_error)
    rms, their_rms = root_mean_square(torch.cat(ours)), root_mean_square(torch.cat(theirs))
    say(f"{changes}: error rms {rms:.3f}, of bfloat16 {their_rms:.3f}")
    assert rms > RMS_RATIO * their_rms + SLACK
