"""select_tokens equals its definition in every field, whatever the mode and the ties."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import cases
from support.accuracy import assert_same_selection
from support.inputs import random_cu_seqlens, random_probs
from torch import Tensor

from dcdit import ops
from dcdit.ops import reference

examples = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@examples
@pytest.mark.parametrize("mode", cases.SELECTION_MODES)
@given(data=st.data())
def test_matches_the_definition(host_reads: None, mode: str, data: st.DataObject) -> None:
    p, cu_seqlens, arguments = data.draw(cases.select_tokens(mode, [*cases.DTYPES, torch.float64]))
    sel = ops.select_tokens(p, cu_seqlens, **arguments)
    assert_same_selection(sel, reference.select_tokens(p, cu_seqlens, **arguments))
    if "capacity" in arguments:
        assert sel.indices.shape[0] == arguments["capacity"]
        assert int(sel.cu_seqlens[-1]) <= arguments["capacity"]
    if "budget" in arguments:
        assert sel.indices.shape[0] == sel.lengths.shape[0] * sel.max_seqlen


def test_fields_by_hand() -> None:
    p = torch.tensor([[0.9, 0.2, 0.5, 0.7], [0.1, 0.3, 0.3, 0.2]])
    sel = ops.select_tokens(p)
    assert sel.indices.tolist() == [0, 3, 6]  # exactly 0.5 is not kept; the best of the second image is
    assert sel.natural_mask.tolist() == [[True, False, False, True], [False] * 4]
    assert sel.packed_rows.tolist() == [[0, -1, -1, 1], [-1, -1, 2, -1]]
    assert (sel.cu_seqlens.tolist(), sel.lengths.tolist(), sel.max_seqlen) == ([0, 2, 3], [2, 1], 2)
    assert (sel.overflow.item(), sel.prob_floor, sel.source_cu_seqlens) == (0, 0.5, None)


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        # Among equal p the lower raster index goes first.
        ({"drop_fraction": 0.5}, [2, 3]),
        ({"drop_fraction": 0.74}, [2, 3]),  # floor(4 * 0.74) = 2
        ({"drop_fraction": 0.75}, [3]),
        ({"drop_fraction": 0.99}, [3]),
        ({"budget": 3}, [1, 2, 3]),
        ({"capacity": 2}, [2, 3]),
        ({"capacity": 1}, [3]),
    ],
)
@pytest.mark.usefixtures("host_reads")
def test_ties_drop_the_lower_index_first(mode: dict[str, Any], kept: list[int]) -> None:
    p = torch.full((1, 4), 0.75)
    assert ops.select_tokens(p, **mode).indices.tolist() == kept
    packed = ops.select_tokens(p[0], random_cu_seqlens(4), **mode)
    assert packed.indices.tolist() == kept


def test_no_token_above_the_threshold_keeps_the_last_of_the_best() -> None:
    assert ops.select_tokens(torch.tensor([[0.2, 0.4, 0.4, 0.1]])).indices.tolist() == [2]


def test_capacity_spares_the_best_of_every_image() -> None:
    # The second image holds the lowest p of the batch, and its only token.
    p = torch.tensor([[0.9, 0.8, 0.7], [0.1, 0.6, 0.1]])
    sel = ops.select_tokens(p, capacity=2)
    assert sel.indices.tolist() == [0, 4]
    assert sel.overflow.item() == 2


@pytest.mark.usefixtures("host_reads")
def test_max_seqlen_limits_each_image_before_the_capacity() -> None:
    p = torch.tensor([[0.9, 0.6, 0.8, 0.7], [0.1, 0.95, 0.2, 0.55]])
    sel = ops.select_tokens(p, max_seqlen=3)
    assert sel.indices.tolist() == [0, 2, 3, 5, 7]
    assert (sel.overflow.item(), sel.max_seqlen) == (1, 3)
    sel = ops.select_tokens(p, max_seqlen=3, capacity=4)
    assert sel.indices.tolist() == [0, 2, 3, 5]  # 0.55 is the lowest of the batch once 0.6 is gone
    assert (sel.overflow.item(), sel.max_seqlen) == (2, 3)
    assert ops.select_tokens(p, max_seqlen=9, capacity=8).max_seqlen == 4
    # A drop fraction comes first: of 4 tokens 2 go, and nothing overflows.
    sel = ops.select_tokens(p, drop_fraction=0.5, max_seqlen=2)
    assert (sel.indices.tolist(), sel.overflow.item()) == ([0, 2, 5], 0)


def test_capacity_padding() -> None:
    sel = ops.select_tokens(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), capacity=4)
    assert sel.indices.tolist() == [0, 3, -1, -1]
    assert (sel.cu_seqlens.tolist(), sel.max_seqlen, sel.overflow.item()) == ([0, 1, 2], 2, 0)


@pytest.mark.parametrize(("count", "fraction", "kept"), [(100, 0.29, 71), (10, 0.7, 3), (10, 0.69, 4)])
def test_drop_count_is_taken_in_float32(count: int, fraction: float, kept: int) -> None:
    # 100 * 0.29 is 29 in float32 and 28.999... in float64; so is 10 * 0.7 once 0.7 has been through float32.
    p = torch.linspace(0.6, 0.9, count)[None]
    assert ops.select_tokens(p, drop_fraction=fraction).indices.numel() == kept
    assert ops.select_tokens(p, drop_fraction=torch.tensor([fraction])).indices.numel() == kept


def test_images_are_independent() -> None:
    p = random_probs(4, 30, pattern="ties")
    together = ops.select_tokens(p, drop_fraction=0.3)
    for image in range(4):
        alone = ops.select_tokens(p[image : image + 1], drop_fraction=0.3)
        assert torch.equal(together.mask[image], alone.mask[0])


def test_selection_is_not_differentiable_and_keeps_p() -> None:
    p = random_probs(2, 9).requires_grad_()
    before = p.detach().clone()
    sel = ops.select_tokens(p, drop_fraction=0.5)
    assert not any(field.requires_grad for field in sel if isinstance(field, Tensor))
    assert torch.equal(p.detach(), before)


@examples
@given(data=st.data())
def test_a_mask_is_kept_as_it_is(host_reads: None, data: st.DataObject) -> None:
    mask, cu_seqlens, arguments = data.draw(cases.select_from_mask())
    sel = ops.select_from_mask(mask, cu_seqlens, **arguments)
    assert_same_selection(sel, reference.select_from_mask(mask, cu_seqlens, **arguments))
    if not arguments:
        assert torch.equal(sel.mask, mask) and torch.equal(sel.natural_mask, mask)


@examples
@given(data=st.data(), extra=st.integers(1, 3), mode=st.sampled_from([*cases.SELECTION_MODES, "mask"]))
def test_extra_tokens_come_first(host_reads: None, data: st.DataObject, extra: int, mode: str) -> None:
    made = cases.select_from_mask() if mode == "mask" else cases.select_tokens(mode)
    p, _, arguments = data.draw(made.filter(lambda call: call[1] is None))
    op = ops.select_from_mask if mode == "mask" else ops.select_tokens
    arguments = cases.with_extra_tokens(arguments, p.shape[0], extra)
    sel = op(p, **arguments)
    assert_same_selection(sel, getattr(reference, op.__name__)(p, **arguments))
    assert (sel.extra_tokens, sel.natural_mask.shape) == (extra, p.shape)
    assert sel.packed_rows[:, :extra].equal(sel.cu_seqlens[:-1, None] + torch.arange(extra, dtype=torch.int32))
    assert sel.indices.shape[0] == arguments.get("capacity", int(sel.cu_seqlens[-1]))
    assert max(sel.lengths.tolist(), default=0) <= sel.max_seqlen


@pytest.mark.usefixtures("host_reads")
def test_tokens_that_always_stay() -> None:
    p = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.2], [0.3, 0.4, 0.1, 0.2, 0.0]])
    always = torch.tensor([[False, True, False, False, False], [False, False, True, False, True]])
    sel = ops.select_tokens(p, always=always)
    assert sel.mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 0, 1]]  # the second image needs no best one
    assert torch.equal(sel.natural_mask, p > 0.5)
    assert sel.prob_floor == 0
    # Of the three that the router chose two are dropped; what always stays is neither counted nor dropped.
    assert ops.select_tokens(p, always=always, drop_fraction=0.9).mask[0].int().tolist() == [1, 1, 0, 0, 0]
    # They count in a budget, in max_seqlen and in a capacity.
    assert ops.select_tokens(p, always=always, budget=2).indices.tolist() == [0, 1, 7, 9]
    assert ops.select_tokens(p, always=always, max_seqlen=2).indices.tolist() == [0, 1, 7, 9]
    tight = ops.select_tokens(p, always=always, capacity=3)
    assert (tight.indices.tolist(), tight.overflow.item()) == ([1, 7, 9], 3)
    # Where they alone are too many, those of lowest p go, and overflow says so.
    tight = ops.select_tokens(p, always=always, max_seqlen=1)
    assert (tight.indices.tolist(), tight.overflow.item()) == ([1, 7], 4)


def test_an_image_of_a_mask_may_keep_nothing() -> None:
    sel = ops.select_from_mask(torch.tensor([[False, False], [True, True]]), capacity=3)
    assert (sel.indices.tolist(), sel.lengths.tolist(), sel.overflow.item()) == ([2, 3, -1], [0, 2], 0)
    sel = ops.select_from_mask(torch.tensor([[True, False, True, True]]), max_seqlen=2)
    assert (sel.indices.tolist(), sel.overflow.item()) == ([2, 3], 1)
