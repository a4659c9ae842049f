"""adaLN modulation of packed tokens against the float64 definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import cases
from support.accuracy import check_against_reference, differentiate
from support.inputs import randn, random_cu_seqlens

from dcdit import ops

LENGTHS = [(), (1,), (5, 0, 3), (40, 1, 1, 1), (7, 7, 7)]
NORM, ADD, PAIR = ops.modulated_layer_norm, ops.gated_add, ops.gated_add_modulated_layer_norm
RMS = ops.modulated_rms_norm
AFFINE = [(NORM, "shift weight bias"), (NORM, "shift weight"), (NORM, "shift bias"), (NORM, "shift")]
AFFINE += [(RMS, "shift weight"), (RMS, "weight"), (RMS, "shift"), (RMS, "")]
TOKENS = {NORM: 1, ADD: 2, PAIR: 2}
"""How many of the arguments are packed tokens; tables of the modulation follow."""
TABLES = {NORM: 2, ADD: 1, PAIR: 3}
Op = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("host_reads")
every_op = pytest.mark.parametrize("op", [NORM, ADD, PAIR], ids=lambda op: op.__name__)


@every_op
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(op: Op, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_reference(op, *cases.modulation(op, lengths, 24, dtype, dtype))


@every_op
@pytest.mark.parametrize("width", [8, 384, 1152])
def test_widths(op: Op, width: int) -> None:
    check_against_reference(op, *cases.modulation(op, (9, 2, 30), width))


@every_op
def test_mixed_dtypes(op: Op) -> None:
    check_against_reference(op, *cases.modulation(op, (9, 2, 30), 24, torch.bfloat16, torch.float32))


def test_columns_of_a_wide_modulation() -> None:
    lengths = (9, 2, 30)
    shift, scale, gate = randn(3, 6 * 24)[:, 24:96].split(24, dim=1)
    t = randn(41, 48)[:, ::2]
    cu_seqlens = random_cu_seqlens(*lengths)
    check_against_reference(ops.modulated_layer_norm, t, shift, scale, cu_seqlens, 1e-6)
    check_against_reference(ops.gated_add, t, randn(24, 41).t(), gate, cu_seqlens)


@every_op
def test_images_are_independent(op: Op) -> None:
    tokens, tables = TOKENS[op], TABLES[op]
    args = cases.modulation(op, (9, 2, 30), 24)
    together = op(*args)
    together = together if isinstance(together, tuple) else (together,)
    for b, (lo, hi) in enumerate([(0, 9), (9, 11), (11, 41)]):
        rows = [x[lo:hi] for x in args[:tokens]]
        modulation = [x[b : b + 1] for x in args[tokens : tokens + tables]]
        alone = op(*rows, *modulation, random_cu_seqlens(hi - lo))
        alone = alone if isinstance(alone, tuple) else (alone,)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[lo:hi], part)


@every_op
def test_padding_rows(op: Op, dtype: torch.dtype) -> None:
    args = cases.modulation(op, (5, 0, 3), 24, dtype, dtype, padding=4)
    check_against_reference(op, *args)
    outputs, grads = differentiate(op, args)
    # NaN in a padding row of the last tokens argument reaches no output and no gradient.
    dirty = list(args)
    last = TOKENS[op] - 1
    dirty[last] = args[last].clone()
    dirty[last][8:] = float("nan")
    dirty_outputs, dirty_grads = differentiate(op, tuple(dirty))
    for clean, other in zip(outputs + grads, dirty_outputs + dirty_grads, strict=True):
        assert torch.equal(clean, other)
    if op is NORM:
        assert not outputs[0][8:].any()
    else:
        assert torch.equal(outputs[0][8:], args[0][8:])
        assert not grads[1][8:].any()


def test_gated_add_leaves_x_alone_under_a_zero_gate() -> None:
    x, y, _, cu_seqlens = cases.modulation(ADD, (9, 2, 30), 24)
    assert torch.equal(ops.gated_add(x, y, torch.zeros(3, 24), cu_seqlens), x)


def test_norm_of_constant_rows_is_the_shift() -> None:
    _, shift, scale, cu_seqlens, _ = cases.modulation(NORM, (5, 0, 3), 24)
    out = ops.modulated_layer_norm(torch.full((8, 24), 3.0), shift, scale, cu_seqlens)
    assert torch.equal(out, shift.repeat_interleave(torch.tensor([5, 0, 3]), 0))


@pytest.mark.parametrize(("op", "parts"), AFFINE, ids=lambda value: getattr(value, "__name__", value))
def test_norms_with_their_own_weights(op: Op, parts: str, dtype: torch.dtype) -> None:
    for lengths, width, padding in (((), 8, 2), ((5, 0, 3), 24, 0), ((40, 1), 33, 7), ((9, 2), 1152, 0)):
        check_against_reference(op, *cases.affine_norm(op, lengths, width, dtype, dtype, padding, parts))
    check_against_reference(op, *cases.affine_norm(op, (9, 2), 24, torch.bfloat16, torch.float32, 3, parts))


def test_small_weights_are_exact() -> None:
    """A factor far below 1 is not taken as 1 plus something."""
    for op in (NORM, RMS):
        x, shift, scale, cu_seqlens, eps, weight, *_ = cases.affine_norm(op, (9, 2), 24, parts="weight")
        shift = None if shift is None else shift * 1e-6
        check_against_reference(op, x, shift, scale, cu_seqlens, eps, weight * 1e-6)


@pytest.mark.parametrize(("op", "parts"), AFFINE, ids=lambda value: getattr(value, "__name__", value))
def test_affine_gradients_repeat(op: Op, parts: str) -> None:
    args = cases.affine_norm(op, (9, 2, 30), 24, parts=parts)
    first, second = (differentiate(op, args)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
