"""Sizes of 0, 1 and 2, down to no image, no position and no channel: the right value, or one error for all backends."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import interpreter_launch, interpreter_scan
from support.accuracy import differentiate, to_float64
from support.inputs import randn, random_cu_seqlens, random_probs
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads import CASES, Inputs, Shape

BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_launch.install(monkeypatch)
    interpreter_scan.install(monkeypatch)


def outcome(backend: str, op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Outputs and gradients (of a selection its fields, of noise no gradients), or the error."""
    with ops.use_backend(backend):
        try:
            if op in (ops.select_tokens, ops.select_from_mask):
                sel = op(*args, **kwargs)
                return [*sel[:-1], *(sel.grid_selection or ())]
            if op is ops.philox_normal:
                return [op(*args, **kwargs)]
            outputs, grads = differentiate(lambda *a: op(*a, **kwargs), args)
        except (ValueError, TypeError) as error:
            return type(error), str(error)
    return [*outputs, *grads]


def check(op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Every backend against the reference: the same errors, else shapes and dtypes, and the values in float64."""
    expected = outcome("reference", op, args, kwargs)
    exact = outcome("reference", op, tuple(to_float64(a) for a in args), kwargs)
    for backend in BACKENDS:
        found = outcome(backend, op, args, kwargs)
        if isinstance(expected, tuple):
            assert found == expected
            continue
        assert isinstance(found, list), f"{backend}: {found}"
        for actual, like, value in zip(found, expected, exact, strict=True):
            if isinstance(like, Tensor):
                assert (actual.shape, actual.dtype) == (like.shape, like.dtype), backend
                # With one or two channels gradients are differences of equal numbers, so ulps of a result mean little.
                torch.testing.assert_close(actual.double(), value.double(), rtol=2e-5, atol=2e-5)
            else:
                assert actual == like, backend


def shape(batch: int, grid: tuple[int, int], width: int) -> Shape:
    return Shape(batch, grid, width, 0.4, torch.float32, torch.device("cpu"))


ARGUMENTS = [
    name for name, (_, case) in CASES.items() if case.gradients is case.outputs is None and "float32" not in name
]
"""The cases that differ in their arguments; all gradients are wanted here anyway."""
SHAPES = [
    shape(0, (1, 2), 2),
    shape(2, (0, 2), 2),
    shape(1, (2, 0), 1),
    shape(0, (0, 0), 1),
    shape(1, (2, 2), 0),
    shape(2, (1, 1), 1),
    shape(1, (1, 2), 2),
    shape(2, (2, 1), 1),
    shape(2, (2, 2), 2),
]


@pytest.mark.parametrize("size", SHAPES, ids=lambda s: f"{s.batch}-{s.grid[0]}x{s.grid[1]}-{s.width}")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_operation_of_the_registry(name: str, size: Shape) -> None:
    operation, case = CASES[name]
    try:
        arguments = case.arguments(Inputs(size, seed=0))
    except ValueError as error:
        assert "capacity is" in str(error) and size.length == 0  # which counts as one token of each image all the same
        return
    bound = inspect.signature(operation.op).bind(**arguments)
    bound.apply_defaults()
    check(operation.op, *bound.args)


LENGTHS = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0, 2), (2, 2)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_selections_of_packed_sequences(lengths: tuple[int, ...]) -> None:
    p, cu_seqlens = (
        random_probs(max(1, sum(lengths)), pattern="ties", keep=0.5)[: sum(lengths)],
        random_cu_seqlens(*lengths),
    )
    modes: list[dict[str, Any]] = [{}, {"drop_fraction": 0.5}, {"drop_fraction": torch.full((len(lengths),), 0.9)}]
    modes += [{"budget": n} for n in (1, 2)] + [{"capacity": n} for n in range(5)]
    modes += [{"threshold": 0.0}, {"threshold": 1.0, "capacity": len(lengths)}, {"max_seqlen": 1}]
    always = torch.arange(sum(lengths)) % 2 == 1
    modes += [{**mode, "always": always} for mode in modes]
    for mode in modes:
        check(ops.select_tokens, p, cu_seqlens, **mode)
    for mode in ({}, {"max_seqlen": 1}, *({"capacity": n} for n in range(5))):
        check(ops.select_from_mask, always, cu_seqlens, **mode)
    for mode in ({}, {"capacity": len(lengths) + 2}):
        sel = ops.select_tokens(p, cu_seqlens, **mode)
        rows = randn(sel.indices.shape[0], 2)
        check(ops.dechunk_ema, rows, p, sel, p.clone(), randn(sum(lengths), 2))
        check(ops.gather_tokens, randn(sum(lengths), 1), sel)
        check(ops.scatter_tokens, rows, sel, 3.0)
    check(ops.boundary_prob_cosine, randn(sum(lengths), 2), randn(sum(lengths), 2, seed=1), cu_seqlens)


@pytest.mark.parametrize("length", [0, 1, 2])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_selections_of_a_grid(images: int, length: int) -> None:
    p = random_probs(images, length, pattern="ties") if images * length else torch.zeros(images, length)
    modes: list[dict[str, Any]] = [{}, {"drop_fraction": 0.9}, {"drop_fraction": torch.zeros(images)}]
    modes += [{"budget": n} for n in range(4)] + [{"capacity": n} for n in range(6)]
    modes += [{"max_seqlen": 1}, {"max_seqlen": 9}]
    modes += [{**mode, "extra_tokens": 1} for mode in modes] + [{"extra_tokens": 2, "capacity": 7}]
    modes += [{**mode, "always": p > 0.3} for mode in modes]
    for mode in modes:
        check(ops.select_tokens, p, **mode)
    for mode in ({}, {"max_seqlen": 1}, {"extra_tokens": 2}, *({"capacity": n} for n in range(5))):
        check(ops.select_from_mask, p > 0.3, **mode)
    for group_size in (None, 0, 1, 2, 3):
        check(ops.ratio_loss, p, p > 0.5, 2.0, group_size)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_every_mask(grid: tuple[int, int]) -> None:
    """Hand-made selections, also of images that keep nothing."""
    length = grid[0] * grid[1]
    for bits in itertools.product([False, True], repeat=length):
        mask = torch.tensor([bits, [False] * length])
        sel, p = ops.select_from_mask(mask), random_probs(2, length)
        h, residual = randn(sel.indices.shape[0], 2), randn(2, length, 2, seed=1)
        check(ops.dechunk_spatial, h, p, sel, grid, 1.0, p.clone(), residual)
        check(ops.dechunk_ema, h, p, sel, p.clone(), residual)
        check(ops.gather_tokens, residual, sel, residual[0])
        check(ops.scatter_tokens, h, sel)


@pytest.mark.parametrize("channels", [0, 1, 2])
@pytest.mark.parametrize("groups", [0, 1, 2, 3])
def test_groups(groups: int, channels: int) -> None:
    parameters = [randn(channels, seed=seed) for seed in range(3)]
    for images, height, width in ((0, 1, 1), (1, 1, 1), (2, 1, 2), (1, 0, 2), (2, 2, 2)):
        features = randn(images, channels, height, width, seed=3)
        check(ops.boundary_prob_predictability, features, *parameters, torch.ones(()), groups)
        for x, shift in itertools.product((features, features.flatten(2).mT), (None, randn(images, channels))):
            check(ops.group_norm_silu, x, groups, *parameters[:2], shift)


@pytest.mark.parametrize("lengths", [*LENGTHS, (1, 1)], ids=str)
@pytest.mark.parametrize(("heads", "channels"), [(0, 1), (1, 0), (1, 1), (2, 1), (1, 2)])
def test_attention(heads: int, channels: int, lengths: tuple[int, ...]) -> None:
    for causal, padding in itertools.product([False, True], [0, 2]):
        q, k, v = (randn(sum(lengths) + padding, heads, channels, seed=seed) for seed in range(3))
        longest = max(lengths, default=0)
        check(ops.varlen_attention, q, k, v, random_cu_seqlens(*lengths), longest, causal, padding=padding > 0)
