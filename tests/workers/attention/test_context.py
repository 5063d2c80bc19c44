"""The forward context: one pass at a time, layers of the kind that an op needs, and scratch that ends with the pass."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.context import (
    ForwardContext,
    PagedKVLayer,
    current_context,
    current_layer,
    forward_context,
)
from support.attention_requests import Requests

SPEC = AttentionSpec(num_heads=2, num_kv_heads=2, head_size=8, scale=0.4)


@dataclass(frozen=True)
class RecurrentLayer:
    """A layer whose state is not a paged cache; there are none yet."""

    state: Tensor


def paged_layer() -> PagedKVLayer:
    return Requests([(1, 9), (6, 6)], SPEC).layer()


def test_a_forward_pass_without_context_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="only inside `with forward_context"):
        current_layer(0, PagedKVLayer)
    with pytest.raises(RuntimeError, match="only inside `with forward_context"):
        current_context()


def test_contexts_are_never_nested_and_end_with_their_block() -> None:
    layer = paged_layer()
    context = ForwardContext([layer])
    with forward_context(context):
        assert current_context() is context
        assert current_layer(0, PagedKVLayer) is layer
        for absent in (1, -1):
            with pytest.raises(RuntimeError, match=f"has 1 layers, so no layer {absent}"):
                current_layer(absent, PagedKVLayer)
        with pytest.raises(RuntimeError, match="never nested"), forward_context(context):
            pass
        assert current_layer(0, PagedKVLayer) is layer
    with pytest.raises(RuntimeError, match="only inside"):
        current_layer(0, PagedKVLayer)


def test_an_error_in_a_forward_pass_ends_its_context() -> None:
    context = ForwardContext([], {"masks": 1})
    with pytest.raises(ZeroDivisionError), forward_context(context):
        raise ZeroDivisionError
    assert context.scratch == {}
    with forward_context(ForwardContext([])):
        pass


def test_a_layer_with_another_kind_of_state_is_an_error() -> None:
    recurrent = RecurrentLayer(torch.zeros(1))
    with forward_context(ForwardContext([paged_layer(), recurrent])):  # type: ignore[list-item]
        assert current_layer(1, RecurrentLayer) is recurrent
        with pytest.raises(RuntimeError, match="op of layer 1 needs a PagedKVLayer, and finds a RecurrentLayer"):
            torch.ops.eagleray.attention(*torch.zeros(3, 1, 2, 8), 1)


def test_layers_share_what_they_work_out_until_the_pass_ends() -> None:
    context = ForwardContext([])
    for _ in range(2):  # also a context that is used again begins with nothing
        with forward_context(context):
            assert current_context().scratch == {}
            current_context().scratch["masks"] = 1
            assert current_context().scratch == {"masks": 1}
    with forward_context(ForwardContext([])):
        assert current_context().scratch == {}
