"""Edits of logits in kernels, bit by bit those of the sampler in PyTorch; log-probabilities; all options at once."""

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from eagleray.workers.protocol.messages import Sampling
from support.interpreter import RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    from support.redraw import Kernels, Line, assert_same, by_reference, small

    VOCAB = 150

    @pytest.fixture(autouse=True)
    def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
        small(monkeypatch)

    def noise(seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
        return logits.to(dtype)

    def greedy(**options: Any) -> Sampling:
        return Sampling(temperature=0.0, **options)

    def assert_same_edits(lines: list[Line]) -> Tensor:
        """The edited logits of greedy `lines` are equal to the last bit; those of the kernels, [n, vocab]."""
        drawn, expected = Kernels(lines).draw(), by_reference(lines)
        for line, ours, theirs in zip(lines, drawn.edited, expected.edited, strict=True):
            assert torch.equal(ours + 0.0, theirs + 0.0), line  # zeros have one sign
        assert drawn.token_ids == expected.token_ids
        return drawn.edited

    def test_penalties_of_long_histories_with_repeated_tokens() -> None:
        """The prompt and the output have tokens in common, and tokens of their own; a whole history is one token."""
        rng = np.random.default_rng(0)
        prompt, output = rng.integers(0, 60, 90).tolist(), rng.integers(30, 100, 110).tolist()
        kinds: list[dict[str, float]] = [
            {"repetition_penalty": 1.3},
            {"repetition_penalty": 0.7},
            {"frequency_penalty": 0.13},
            {"presence_penalty": -1.7},
            {"repetition_penalty": 1.1, "frequency_penalty": -0.3, "presence_penalty": 0.9},
        ]
        lines = [Line(greedy(**kind), noise(seed), prompt, output) for seed, kind in enumerate(kinds)]
        lines += [Line(greedy(**kinds[4]), noise(7), [5] * 40, [5] * 50), Line(greedy(**kinds[4]), noise(8), [149], [])]
        edited = assert_same_edits(lines)
        assert [(each != line.logits).sum() for each, line in zip(edited, lines, strict=True)][-2:] == [1, 1]

    def test_a_bad_word_is_not_completed() -> None:
        best = 9
        cases: list[tuple[list[list[int]], list[int], list[int], bool]] = [
            ([[best]], [], [7, 8], True),
            ([[7, 8, best]], [7, 8], [], False),  # the prompt is not a part of a word
            ([[7, 8, best]], [7], [8], False),
            ([[7, 8, best]], [], [8], False),
            ([[7, 8, best]], [], [7, 8], True),
            ([[7, 8, best]], [7, 8], [7, 8], True),
            ([[7, 8, best]], [], [9, 7, 8], True),
            ([[7, 8, best]], [], [7, 8, 9], False),
            ([[7, best], [8, best], [6, 8, best]], [], [6, 8], True),  # one that is masked twice
            ([[best, 8]], [], [best], False),
            ([[1], [2, 3], *([[4, token] for token in range(20, 140)]), [7, best]], [], [7], True),  # many
        ]
        lines = [
            Line(greedy(bad_words=words), noise(index), [1, *prompt], output)
            for index, (words, prompt, output, _) in enumerate(cases)
        ]
        edited = assert_same_edits(lines)
        assert (edited[:, best] == -torch.inf).tolist() == [is_masked for *_, is_masked in cases]

    def test_bias_masks_and_minimum() -> None:
        bias = {
            int(token): float(value) for token, value in zip(range(0, 150, 7), np.linspace(-100, 100, 22), strict=True)
        }
        everything: dict[str, Any] = {
            "logit_bias": bias, "min_tokens": 3, "stop_token_ids": [0, 7, 8], "bad_words": [[14], [2, 21]],
            "allowed_token_ids": list(range(0, 150, 2)), "repetition_penalty": 1.2, "presence_penalty": 0.5,
        }  # fmt: skip
        kinds: list[dict[str, Any]] = [
            {"logit_bias": bias},
            {"logit_bias": dict.fromkeys(range(VOCAB), 0.1)},
            {"allowed_token_ids": [149]},
            {"allowed_token_ids": [0, 31, 32, 63, 64, 149]},
            everything,
        ]
        lines = [Line(greedy(**kind), noise(seed), [3, 0], [7, 2]) for seed, kind in enumerate(kinds)]
        edited = assert_same_edits(lines)
        assert (edited[3] > -torch.inf).nonzero().flatten().tolist() == [0, 31, 32, 63, 64, 149]

    def test_stop_tokens_are_masked_until_min_tokens_were_generated() -> None:
        logits = noise()
        logits[80], logits[81], logits[20] = 50.0, 40.0, 30.0
        sampling = greedy(min_tokens=3, stop_token_ids=[80, 81])
        lines = [Line(sampling, logits, output=[7] * num_generated) for num_generated in range(5)]
        assert assert_same(lines).token_ids == [20, 20, 20, 80, 80]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_logits_of_16_bits(dtype: torch.dtype) -> None:
        kinds = [greedy(logit_bias={3: 1.0}), greedy(repetition_penalty=1.5), greedy(allowed_token_ids=[5, 6])]
        assert_same_edits([Line(kind, noise(seed, dtype=dtype)) for seed, kind in enumerate(kinds)])

    def test_logits_are_capped_first() -> None:
        """Within the accuracy of the kernels' hyperbolic tangent; bias comes on top."""
        lines = [Line(greedy(logit_bias={3: 90.0}), 20 * noise(seed)) for seed in range(3)]
        drawn, expected = Kernels(lines, 30.0).draw(), by_reference(lines, 30.0)
        torch.testing.assert_close(drawn.edited, expected.edited, rtol=2e-6, atol=2e-6)
        assert drawn.token_ids == expected.token_ids == [3, 3, 3]
        assert float(drawn.edited.amax()) > 30.0

    def test_top_n_sigma_drops_the_same_tokens() -> None:
        """Also beside masked ones, which do not count, and one outlier, which does. Ties at the cut are all alike."""
        outlier = noise(3)
        outlier[7] = -1e30
        logits = [noise(0), noise(1).round(), outlier, torch.full((VOCAB,), 2.5), 1e30 * noise(4)]
        some = list(range(0, VOCAB, 3))
        kinds: list[dict[str, Any]] = [{}, {"allowed_token_ids": some}, {"temperature": 0.3, "repetition_penalty": 1.3}]
        lines = [
            Line(Sampling(seed=3, top_n_sigma=[0.1, 1.0, 2.5][number % 3], **kind), each)
            for number, (each, kind) in enumerate((each, kind) for each in logits for kind in kinds)
        ]
        drawn, expected = Kernels(lines).draw(), by_reference(lines)
        assert drawn.token_ids == expected.token_ids
        for line, ours in zip(lines, drawn.edited, strict=True):
            if line.logits is not logits[4]:  # which overflow once they are divided
                wide = by_reference([Line(msgspec.structs.replace(line.sampling, temperature=1.0), line.logits)])
                assert ((ours > -torch.inf) == (wide.edited[0] > -torch.inf)).all(), line.sampling

    def test_log_probabilities_are_of_the_raw_logits() -> None:
        """float32 sums of exponentials in another order: within 1e-5. Ids and ranks are equal, with ties everywhere."""
        late = torch.full((VOCAB,), 3.0)  # so many ties that the likeliest, which come last, find no place among them
        late[130:140] = 5.0
        logits = [noise(0), noise(1).round(), torch.full((VOCAB,), 3.0), late]
        kinds = [
            Sampling(seed=1, logprobs=5, allowed_token_ids=[3, 4, 5]),
            Sampling(seed=2, logprobs=20, top_p=0.5),
            Sampling(seed=3, logprobs=0, top_k=3),
            greedy(logprobs=1, logit_bias={120: 100.0}),
        ]
        lines = [Line(kind, each) for each in logits for kind in kinds]
        lines.append(Line(kinds[1], noise(2, dtype=torch.bfloat16).float()))
        order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))
        spread = [Line(kind, torch.linspace(-4, 4, VOCAB)[order]) for kind in kinds]
        ours, theirs = Kernels(lines).draw().logprobs, by_reference(lines).logprobs
        assert_same_logprobs(ours, theirs, ranked=range(len(lines)))
        capped = [*lines, *spread]  # a cap may make ties or undo them, but not where logits lie so far apart
        ours, theirs = Kernels(capped, 5.0).draw().logprobs, by_reference(capped, 5.0).logprobs
        assert_same_logprobs(ours, theirs, ranked=range(len(lines), len(capped)))

    def assert_same_logprobs(ours: dict[int, Any], theirs: dict[int, Any], ranked: range) -> None:
        """Ids and ranks are compared for the lines that are `ranked`."""
        assert list(ours) == list(theirs) == list(range(ranked.stop))
        for line in ours:
            np.testing.assert_allclose(ours[line].logprobs, theirs[line].logprobs, rtol=1e-5, atol=1e-5)
        for line in ranked:
            assert ours[line].token_ids == theirs[line].token_ids
            assert ours[line].rank == theirs[line].rank

    def random_line(rng: np.random.Generator) -> Line:
        """A request with every option on or off by chance."""

        def some_ids(most: int) -> list[int]:
            return [int(x) for x in rng.choice(VOCAB, rng.integers(1, most), replace=False)]

        options: dict[str, Any] = {
            "temperature": float(rng.choice([0.0, 0.3, 2.0])),
            "top_k": int(rng.choice([1, 2, 20, 100])),
            "top_p": float(rng.choice([1e-6, 0.3, 0.9, 0.999])),
            "min_p": float(rng.choice([1e-4, 0.1, 1.0])),
            "top_n_sigma": float(rng.choice([0.1, 1.0, 2.5])),
            "presence_penalty": 0.7,
            "frequency_penalty": -0.3,
            "repetition_penalty": 1.3,
            "logit_bias": {token_id: float(rng.uniform(-20, 20)) for token_id in some_ids(9)},
            "allowed_token_ids": some_ids(100),
            "min_tokens": int(rng.integers(1, 8)),
            "logprobs": int(rng.integers(0, 21)),
            "bad_words": [some_ids(3) for _ in range(5)],
        }
        chosen = {name: value for name, value in options.items() if rng.random() < 0.35}
        sampling = Sampling(**chosen, stop_token_ids=some_ids(8), seed=int(rng.integers(0, 2**64, dtype=np.uint64)))
        step, logits = float(rng.choice([1.0, 0.25, 2.0**-20])), noise(int(rng.integers(1000)))
        prompt, output = rng.integers(0, VOCAB, rng.integers(1, 40)), rng.integers(0, 20, rng.integers(0, 40))
        return Line(sampling, (logits / step).round() * step, prompt.tolist(), output.tolist())

    def test_random_requests() -> None:
        rng = np.random.default_rng(5)
        lines: list[Line] = []
        while len(lines) < 40:
            line = random_line(rng)
            set_by = set(msgspec.to_builtins(line.sampling)) - {"temperature", "seed", "stop_token_ids", "logprobs"}
            lines += [line] * (len(set_by - {"min_tokens"}) > 1)
        drawn, expected = assert_same(lines), by_reference(lines)
        for index, ours in drawn.logprobs.items():
            assert (ours.token_ids, ours.rank) == (expected.logprobs[index].token_ids, expected.logprobs[index].rank)
