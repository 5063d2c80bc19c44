"""What the kernels read of each row: which features it asks for, its lists of tokens, and a mask of allowed ones."""

from collections.abc import Mapping

import numpy as np
import torch

from eagleray.workers.arrays import BoolArray, IntArray
from eagleray.workers.pinned_copy import PinnedCopy
from eagleray.workers.protocol.messages import MAX_LOGPROBS, Sampling
from eagleray.workers.sampling.table import Feature, features_of

IN_KERNELS = (  # what the kernels know; a row with any other feature is left to the reference
    Feature.RANDOM | Feature.RESTRICTED | Feature.MIN_P | Feature.TOP_N_SIGMA | Feature.ALLOWED | Feature.MIN_TOKENS
    | Feature.BIAS | Feature.BAD_WORDS | Feature.PENALTIES | Feature.LOGPROBS
)  # fmt: skip
CAPACITY = 1024  # numbers in a row's lists
# the columns of `RowLists.fields`
WORD, PROMPT_LENGTH, MIN_TOKENS, NUM_LOGPROBS, NUM_BIAS, NUM_STOP, NUM_BAD_WORDS, LONGEST_BEGINNING = range(8)
NUM_FIELDS = 8


class RowLists:
    """Device tables of `max_rows` rows and the spare one, which is plain and greedy. Only started rows are written.

    A row's numbers stand in `lists` one after another: tokens with a bias, the bias of each (the bits of a float32),
    stop tokens if there is a minimum of tokens, where each bad word ends among the tokens of all, and these.

    A row takes 4 KB and a bit of each token of the vocabulary: 23 KB with 152 thousand tokens.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.beyond: BoolArray = np.zeros(max_rows, dtype=np.bool_)  # on the host: rows that do not fit here
        self.may_be_wide: BoolArray = np.zeros(max_rows, dtype=np.bool_)  # likewise: top-p and no top-k
        width = -(-vocab_size // 32)
        self.fields = torch.zeros(max_rows + 1, NUM_FIELDS, dtype=torch.int32, device=device)
        self.lists = torch.zeros(max_rows + 1, CAPACITY, dtype=torch.int32, device=device)
        self.masks = torch.zeros(max_rows + 1, width, dtype=torch.int32, device=device)  # bit t % 32 of t // 32
        self._staging = PinnedCopy(device)

    def set(self, samplings: Mapping[int, Sampling], prompt_lengths: Mapping[int, int]) -> None:
        """Requests enter rows, in one copy to the device that nobody waits for.

        A row that does not fit has the word of a plain greedy one, so that kernels leave it alone.
        """
        rows = np.fromiter(samplings, np.int64, len(samplings))
        fields = np.zeros((len(rows), NUM_FIELDS), np.int64)
        lists: dict[int, IntArray] = {}
        masks: dict[int, IntArray] = {}
        for line, (row, sampling) in enumerate(samplings.items()):
            numbers, counts = self._lists_of(sampling)
            features, num_logprobs = features_of(sampling), sampling.logprobs or 0
            self.may_be_wide[row] = sampling.top_k <= 0 and sampling.top_p < 1
            is_known = not features & ~IN_KERNELS
            self.beyond[row] = not is_known or len(numbers) > CAPACITY or num_logprobs > MAX_LOGPROBS
            if self.beyond[row]:
                continue
            fields[line] = features, prompt_lengths[row], sampling.min_tokens, num_logprobs, *counts
            if len(numbers):
                lists[row] = numbers
            if sampling.allowed_token_ids:
                masks[row] = self._mask_of(sampling.allowed_token_ids)
        self._write(rows, fields, lists, masks)

    def _write(self, rows: IntArray, fields: IntArray, lists: dict[int, IntArray], masks: dict[int, IntArray]) -> None:
        width = max(map(len, lists.values()), default=0)
        padded = [np.pad(numbers, (0, width - len(numbers))) for numbers in lists.values()]
        empty = np.empty(0, np.int64)
        packed = (
            rows,
            fields.ravel(),
            np.fromiter(lists, np.int64, len(lists)),
            np.concatenate(padded or [empty]),
            np.fromiter(masks, np.int64, len(masks)),
            np.concatenate(list(masks.values()) or [empty]),
        )
        of_rows, of_fields, list_rows, of_lists, mask_rows, of_masks = self._staging.send(packed)
        self.fields[of_rows.long()] = of_fields.view(-1, NUM_FIELDS)
        if lists:
            self.lists[list_rows.long(), :width] = of_lists.view(-1, width)
        if masks:
            self.masks[mask_rows.long()] = of_masks.view(len(masks), -1)

    def _lists_of(self, sampling: Sampling) -> tuple[IntArray, tuple[int, ...]]:
        """A row's numbers, and the last fields, which say how many there are of each kind.

        Tokens beyond the vocabulary are left out.
        """
        bias = {token: value for token, value in sampling.logit_bias.items() if self._is_known(token)}
        values = np.fromiter(bias.values(), np.float32, len(bias)).view(np.int32)
        stop = [token for token in sampling.stop_token_ids if self._is_known(token)] if sampling.min_tokens else []
        words = [word for word in sampling.bad_words if self._is_known(word[-1])]
        ends = np.cumsum([len(word) for word in words])
        tokens = [token for word in words for token in word]
        numbers = np.concatenate([np.asarray(part, np.int64) for part in (list(bias), values, stop, ends, tokens)])
        longest = max((len(word) - 1 for word in words), default=0)
        return numbers, (len(bias), len(stop), len(words), longest)

    def _is_known(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size

    def _mask_of(self, token_ids: list[int]) -> IntArray:
        allowed = np.zeros(32 * self.masks.shape[1], np.bool_)
        allowed[[token_id for token_id in token_ids if self._is_known(token_id)]] = True
        return np.packbits(allowed, bitorder="little").view("<i4").astype(np.int64)


def asks_for_redraw(features: IntArray) -> BoolArray:
    """Which rows with these `features` [n] a kernel of plain rows does not draw; log-probabilities change no draw."""
    drawn_anew: BoolArray = (features & ~int(Feature.RANDOM | Feature.LOGPROBS)) != 0
    return drawn_anew
