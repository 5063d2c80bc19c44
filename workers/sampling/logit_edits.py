"""Edits single tokens' logits (biases, masks) for the few rows that ask for it."""

import torch
from torch import Tensor


def allow_only_(line: Tensor, columns: Tensor) -> None:
    """Masks all of `line` [shard] but `columns` [a]; a rank that holds none of the allowed tokens masks all."""
    kept = line[columns]
    line.fill_(-torch.inf)
    line[columns] = kept


def mask_(line: Tensor, columns: Tensor) -> None:
    """Makes the tokens in `columns` [s] impossible."""
    line[columns] = -torch.inf


def add_bias_(line: Tensor, columns: Tensor, bias: Tensor) -> None:
    """Adds `bias` [b] to the logits in `columns` [b], which are distinct. A masked token stays masked."""
    line.index_add_(0, columns, bias)
