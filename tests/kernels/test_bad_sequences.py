"""cu_seqlens as callers bring them: strided ones give the same results, and wrong ones do no harm.

On a GPU a check would be a sync, so it needs ``DCDIT_CHECK=1``. Without it, wrong cu_seqlens give meaningless numbers,
but no kernel may touch memory outside of its tensors. ``interpreter_launch`` watches the accesses of the interpreter,
compute-sanitizer those of a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from support.accuracy import differentiate
from support.inputs import randn, random_probs
from torch import Tensor

from dcdit import ops
from dcdit.kernels import launch
from dcdit.ops import TokenSelection, _triton, reference

ROWS = 40
"""More than the rows of a tile or a chunk."""
BAD = {
    "late start": [3, 5, ROWS],
    "negative": [-70, 5, ROWS],
    "descending": [0, 35, 3, ROWS],
    "long": [0, 5, 400],
    "far": [0, 5, 2**31 - 1],
    "all of it": [2**31 - 1, -(2**31), 7, 2**31 - 1, -9],
}


def table(images: int, device: torch.device, seed: int = 0) -> Tensor:
    return randn(images, 8, seed=seed).to(device)


def norm(cu_seqlens: Tensor, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    images = cu_seqlens.shape[0] - 1
    x, y = (randn(ROWS, 8, seed=seed).to(device) for seed in range(2))
    modulation = (table(images, device, seed) for seed in range(3))
    return _triton.gated_add_modulated_layer_norm, (x, y, *modulation, cu_seqlens, 1e-6)


def cosine(cu_seqlens: Tensor, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    q, k = (randn(ROWS, 8, seed=seed).to(device) for seed in range(2))
    return _triton.boundary_prob_cosine, (q, k, cu_seqlens)


def ema_of_source(cu_seqlens: Tensor, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    p = random_probs(ROWS).to(device)
    good = torch.full_like(cu_seqlens, ROWS).index_fill(0, torch.zeros(1, dtype=torch.int64, device=device), 0)
    sel = reference.select_tokens(p, good)
    h = randn(sel.indices.shape[0], 8).to(device)
    return _triton.dechunk_ema, (h, p, sel._replace(source_cu_seqlens=cu_seqlens), p.clone(), None)


def ema_of_tokens(cu_seqlens: Tensor, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    images = cu_seqlens.shape[0] - 1
    p = random_probs(images, 6).to(device)
    sel = reference.select_tokens(p)
    h = randn(sel.indices.shape[0], 8).to(device)
    return _triton.dechunk_ema, (h, p, sel._replace(cu_seqlens=cu_seqlens), p.clone(), None)


def spatial(cu_seqlens: Tensor, device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    images = cu_seqlens.shape[0] - 1
    p = random_probs(images, 6).to(device)
    sel = reference.select_tokens(p)
    h = randn(sel.indices.shape[0], 8).to(device)
    return _triton.dechunk_spatial, (h, p, sel._replace(cu_seqlens=cu_seqlens), (2, 3), 1.0, p.clone(), None)


CASES = [norm, cosine, ema_of_source, ema_of_tokens, spatial]
MODES = [(0.2, None, None, None), (0.0, 3, None, None), (0.2, None, 12, 4)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("values", BAD.values(), ids=BAD.keys())
def test_touches_nothing_else(case: Callable[..., Any], values: list[int], device: torch.device) -> None:
    op, args = case(torch.tensor(values, dtype=torch.int32, device=device), device)
    with ops.use_backend("triton"):
        _, grads = differentiate(op, args)
    assert [x.shape for x in grads] == [x.shape for x in args if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("mode", MODES, ids=["exact", "budget", "capacity"])
@pytest.mark.parametrize("values", BAD.values(), ids=BAD.keys())
def test_selection_touches_nothing_else(mode: tuple[Any, ...], values: list[int], device: torch.device) -> None:
    cu_seqlens = torch.tensor(values, dtype=torch.int32, device=device)
    sel = _triton.select_tokens(random_probs(ROWS).to(device), cu_seqlens, 0.5, *mode, None).wait()
    assert isinstance(sel, TokenSelection)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x + 7], 1)[:, 0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_strided(case: Callable[..., Any], device: torch.device) -> None:
    of_tokens = reference.select_tokens(random_probs(2, 6)).cu_seqlens
    cu_seqlens = of_tokens if case in (ema_of_tokens, spatial) else torch.tensor([0, 5, ROWS])
    cu_seqlens = cu_seqlens.to(device, torch.int32)
    results = [differentiate(*case(given, device)) for given in (cu_seqlens, strided(cu_seqlens))]
    for plain, other in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("mode", MODES, ids=["exact", "budget", "capacity"])
def test_selection_of_strided(mode: tuple[Any, ...], device: torch.device) -> None:
    p, cu_seqlens = random_probs(ROWS).to(device), torch.tensor([0, 5, ROWS], dtype=torch.int32, device=device)
    plain, other = (
        _triton.select_tokens(p, given, 0.5, *mode, None).wait() for given in (cu_seqlens, strided(cu_seqlens))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True) if isinstance(a, Tensor))


@triton.jit
def _copy_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@pytest.mark.skipif(torch.cuda.is_available(), reason="only the interpreter is watched")
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 8), (8, 7)])
def test_the_watch_itself(inputs: int, outputs: int) -> None:
    memory = torch.zeros(64)
    launch.launch(_copy_kernel, (1,), memory[:8], memory[32:40], SIZE=8)
    with pytest.raises(Exception, match="outside of every argument"):
        launch.launch(_copy_kernel, (1,), memory[:inputs], memory[32 : 32 + outputs], SIZE=8)
