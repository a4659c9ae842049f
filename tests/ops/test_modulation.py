"""adaLN modulation of packed tokens against the float64 definition."""

from typing import Any

import pytest
import torch
from support.helpers import check_against_reference, differentiate, randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops

LENGTHS = [(), (1,), (5, 0, 3), (40, 1, 1, 1), (7, 7, 7)]
OPS = {
    "norm": (ops.modulated_layer_norm, 1, 2),
    "add": (ops.gated_add, 2, 1),
    "both": (ops.gated_add_modulated_layer_norm, 2, 3),
}
pytestmark = pytest.mark.usefixtures("host_reads")


def arguments(
    name: str, lengths: tuple[int, ...], width: int, dtype: torch.dtype = torch.float32, padding: int = 0
) -> tuple[Any, ...]:
    _, tokens, tables = OPS[name]
    rows = [randn(sum(lengths) + padding, width, dtype=dtype, seed=seed) for seed in range(tokens)]
    modulation = [randn(len(lengths), width, dtype=dtype, seed=10 + seed) for seed in range(tables)]
    eps = () if name == "add" else (1e-6,)
    return *rows, *modulation, random_cu_seqlens(*lengths), *eps


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(name: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_reference(OPS[name][0], *arguments(name, lengths, 24, dtype))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("width", [8, 384, 1152])
def test_widths(name: str, width: int) -> None:
    check_against_reference(OPS[name][0], *arguments(name, (9, 2, 30), width))


@pytest.mark.parametrize("name", OPS)
def test_mixed_dtypes(name: str) -> None:
    args = arguments(name, (9, 2, 30), 24, torch.bfloat16)
    tokens = OPS[name][1]
    tables = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args[tokens:]]
    check_against_reference(OPS[name][0], *args[:tokens], *tables)


def test_columns_of_a_wide_modulation() -> None:
    lengths = (9, 2, 30)
    shift, scale, gate = randn(3, 6 * 24)[:, 24:96].split(24, dim=1)
    t = randn(41, 48)[:, ::2]
    cu_seqlens = random_cu_seqlens(*lengths)
    check_against_reference(ops.modulated_layer_norm, t, shift, scale, cu_seqlens, 1e-6)
    check_against_reference(ops.gated_add, t, randn(24, 41).t(), gate, cu_seqlens)


@pytest.mark.parametrize("name", OPS)
def test_images_are_independent(name: str) -> None:
    op, tokens, tables = OPS[name]
    lengths = (9, 2, 30)
    args = arguments(name, lengths, 24)
    together = op(*args)
    together = together if isinstance(together, tuple) else (together,)
    for b, (lo, hi) in enumerate([(0, 9), (9, 11), (11, 41)]):
        rows = [x[lo:hi] for x in args[:tokens]]
        modulation = [x[b : b + 1] for x in args[tokens : tokens + tables]]
        alone = op(*rows, *modulation, random_cu_seqlens(hi - lo))
        alone = alone if isinstance(alone, tuple) else (alone,)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[lo:hi], part)


@pytest.mark.parametrize("name", OPS)
def test_padding_rows(name: str, dtype: torch.dtype) -> None:
    op, tokens, _ = OPS[name]
    args = arguments(name, (5, 0, 3), 24, dtype, padding=4)
    check_against_reference(op, *args)
    outputs, grads = differentiate(op, args)
    # NaN in a padding row of y reaches neither an output nor a gradient. (x comes back as it is.)
    dirty = list(args)
    last = tokens - 1
    dirty[last] = args[last].clone()
    dirty[last][8:] = float("nan")
    dirty_outputs, dirty_grads = differentiate(op, tuple(dirty))
    for clean, other in zip(outputs + grads, dirty_outputs + dirty_grads, strict=True):
        assert torch.equal(clean, other)
    if name == "norm":
        assert not outputs[0][8:].any()
    else:
        assert torch.equal(outputs[0][8:], args[0][8:])
        assert not grads[1][8:].any()


def test_gated_add_leaves_x_alone_under_a_zero_gate() -> None:
    x, y, _, cu_seqlens = arguments("add", (9, 2, 30), 24)
    assert torch.equal(ops.gated_add(x, y, torch.zeros(3, 24), cu_seqlens), x)


def test_norm_of_constant_rows_is_the_shift() -> None:
    _, shift, scale, cu_seqlens, _ = arguments("norm", (5, 0, 3), 24)
    out = ops.modulated_layer_norm(torch.full((8, 24), 3.0), shift, scale, cu_seqlens)
    assert torch.equal(out, shift.repeat_interleave(torch.tensor([5, 0, 3]), 0))
