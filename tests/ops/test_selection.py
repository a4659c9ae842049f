"""select_tokens equals its definition in every field, whatever the mode and the ties."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.helpers import generator, random_cu_seqlens, random_probs
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection, reference

PATTERNS = ["random", "ties", "one", "none", "all", "extreme"]
examples = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_same(actual: TokenSelection, expected: TokenSelection) -> None:
    for name, got, wanted in zip(TokenSelection._fields, actual, expected, strict=True):
        if isinstance(wanted, Tensor):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
            assert torch.equal(got, wanted), f"{name}: {got.tolist()}, expected {wanted.tolist()}"
        else:
            assert got == wanted, f"{name}: {got}, expected {wanted}"


def check(p: Tensor, cu_seqlens: Tensor | None = None, **mode: Any) -> TokenSelection:
    actual = ops.select_tokens(p, cu_seqlens, **mode)
    assert_same(actual, reference.select_tokens(p, cu_seqlens, **mode))
    return actual


@st.composite
def sources(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, int, int]:
    """p, cu_seqlens or None, number of images, length of the shortest."""
    pattern, seed = draw(st.sampled_from(PATTERNS)), draw(st.integers(0, 1000))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    if draw(st.booleans()):
        images, length = draw(st.integers(0, 5)), draw(st.integers(1, 40))
        return random_probs(images, length, pattern=pattern, keep=0.5, seed=seed).to(dtype), None, images, length
    lengths = draw(st.lists(st.integers(0, 30), min_size=0, max_size=6))
    p = random_probs(max(1, sum(lengths)), pattern=pattern, keep=0.5, seed=seed).to(dtype)[: sum(lengths)]
    return p, random_cu_seqlens(*lengths), len(lengths), min(lengths, default=0)


@examples
@given(source=sources(), data=st.data())
def test_drop(host_reads: None, source: Any, data: st.DataObject) -> None:
    p, cu_seqlens, images, _ = source
    fraction = data.draw(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 0.9999999]))
    if data.draw(st.booleans()):
        fraction = torch.rand(images, generator=generator(data.draw(st.integers(0, 99))))
    check(p, cu_seqlens, drop_fraction=fraction, threshold=data.draw(st.sampled_from([0.5, 0.5, 0.25, 0.3, 1.0])))


@examples
@given(source=sources(), data=st.data())
def test_capacity(host_reads: None, source: Any, data: st.DataObject) -> None:
    p, cu_seqlens, images, _ = source
    capacity = data.draw(st.integers(images, max(images, p.numel()) + 3))
    sel = check(p, cu_seqlens, capacity=capacity, drop_fraction=data.draw(st.sampled_from([0.0, 0.4])))
    assert sel.indices.shape[0] == capacity
    assert int(sel.cu_seqlens[-1]) <= capacity


@examples
@given(source=sources(), data=st.data())
def test_budget(host_reads: None, source: Any, data: st.DataObject) -> None:
    p, cu_seqlens, images, shortest = source
    if shortest and images:
        sel = check(p, cu_seqlens, budget=data.draw(st.integers(1, shortest)))
        assert sel.indices.shape[0] == images * sel.max_seqlen


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
