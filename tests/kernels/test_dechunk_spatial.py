"""Spatial de-chunking kernels: the definition, ties, Voronoi regions, bitwise independence, padding, and tracing."""

import itertools
import math
from typing import Any

import pytest
import torch
import triton
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import (
    assert_close_to_reference,
    check_against_reference,
    check_rms_against_reference,
    cotangent,
    differentiate,
    to_float64,
)
from support.inputs import PATTERNS, randn
from torch import Tensor

from dcdit import ops
from dcdit.kernels import dechunk_spatial, launch, nearest
from dcdit.kernels.dechunk_spatial import Geometry
from dcdit.ops import TokenSelection, reference
from dcdit.ops._triton.dechunk_spatial import _dechunk, _gradients
from dcdit.ops._triton.nested import leaves
from dcdit.ops.numerics import window_radius

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES: list[dict[str, Any]] = [{}, {"drop_fraction": 0.4}, {"capacity": 60}, {"budget": 1}, {"threshold": 0.2}]
SMOOTH = {"BAND_H": 4, "STRIP_W": 4, "BM": 16, "BJ": 16, "LINES": 4, "BLOCK_D": 16, "num_warps": 4}
SMALL_BLOCKS = {
    "kept_index": {"LINES": 2, "BLOCK": 4, "num_warps": 1},
    "nearest": {"BLOCK": 16, "num_warps": 1},
    "smooth_bf16": SMOOTH,
    "smooth_float32": SMOOTH,
    "plug_back_fwd": {"ROWS": 16, "num_warps": 1},
    "bounding_box": {"BLOCK": 16, "num_warps": 1},
    "plug_back_bwd": {"BLOCK_D": 16, "num_warps": 1},
    "dechunk_scalar_gradients": {"BLOCK": 16, "num_warps": 1},
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, windows and slices that are smaller than a small grid."""
    monkeypatch.setattr(launch, "config_for", lambda kernel, *_, **__: SMALL_BLOCKS[kernel])


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks, as the interpreter takes as long for many elements as for few. Compiled kernels keep their own."""
    large = {
        "kept_index": {"LINES": 64, "BLOCK": 64},
        "nearest": {"BLOCK": 4096},
        "smooth_float32": {"BAND_H": 64, "STRIP_W": 64, "BM": 256, "BJ": 256, "LINES": 64, "BLOCK_D": 16},
        "plug_back_fwd": {"ROWS": 4096},
    }
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(launch, "config_for", lambda kernel, *_, **__: large[kernel])


def hand_made(mask: Tensor, grid: tuple[int, int], width: int, device: torch.device) -> tuple[Any, ...]:
    """Arguments for a kept mask that no selection would make."""
    args = cases.dechunk_ema(torch.where(mask, 0.8, 0.2), ops.select_from_mask(mask), width, device=device)
    return *args[:3], grid, 1.0, *args[3:]


def run(*args: Any) -> list[Tensor | None]:
    """Output and gradients of h, p, gate and residual (those given)."""
    with ops.use_backend("triton"):
        outputs, grads = differentiate(ops.dechunk_spatial, args)
    return [*outputs, *grads]


def check(*args: Any) -> None:
    """Output and gradients against the definition; that of p is a small difference of large numbers."""
    terms = {"p": largest_term_of_grad_p(*args[:5])}
    check_against_reference(ops.dechunk_spatial, *args, backend="triton", terms=terms)


def largest_term_of_grad_p(h: Tensor, p: Tensor, sel: TokenSelection, grid: tuple[int, int], sigma: float) -> float:
    """The largest gradient of p, if all its terms had one sign."""
    of_output = cotangent(h.new_empty((*p.shape, h.shape[1])), (h, p)).double().abs()
    index = torch.arange(p.shape[1], device=h.device)
    position = torch.stack([index // grid[1], index % grid[1]], 1).double()
    starts, largest = sel.cu_seqlens.tolist(), 0.0
    for image, (start, end) in enumerate(itertools.pairwise(starts)):
        kept = sel.mask[image].nonzero().squeeze(1)
        q = p[image, kept].double().clamp(1e-4, 1 - 1e-4)
        kernel = torch.exp(-torch.cdist(position[kept], position[kept]).square() / (2 * sigma**2))
        norm = kernel @ q
        owner = torch.cdist(position, position[kept]).argmin(1)
        grad = torch.zeros(end - start, h.shape[1], dtype=torch.float64, device=h.device)
        product = grad.index_add(0, owner, of_output[image]) @ h[start:end].double().abs().T
        g_dot_s = (kernel * q * product).sum(1) / norm
        of_neighbors = (kernel * ((1 - q) / norm)[:, None] * (product + g_dot_s[:, None])).sum(0)
        largest = max(largest, float((product.diagonal() + g_dot_s + of_neighbors).max()))
    return largest


@given(
    images=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    width=st.sampled_from([8, 24]),
    dtype=st.sampled_from(DTYPES),
    sigma=st.sampled_from([0.5, 1.0, 2.0, 16.0]),
    pattern=st.sampled_from(PATTERNS),
    gate=st.booleans(),
    residual=st.booleans(),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
@example(
    images=3, grid=(5, 7), width=24, dtype=torch.bfloat16, sigma=1.0, pattern="random", gate=True, residual=True,
    mode={"capacity": 40}, seed=1,
)  # fmt: skip
@example(
    images=2, grid=(4, 4), width=8, dtype=torch.float32, sigma=1.0, pattern="ties", gate=True, residual=True,
    mode={"budget": 5}, seed=2,
)  # fmt: skip
def test_matches_the_definition(
    images: int, grid: tuple[int, int], width: int, dtype: torch.dtype, sigma: float, pattern: str, gate: bool,
    residual: bool, mode: dict[str, Any], seed: int, device: torch.device,
) -> None:  # fmt: skip
    args = cases.dechunk_spatial(images, grid, width, dtype, sigma, pattern, gate, residual, seed, device, **mode)
    check(*args)


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    width=st.sampled_from([8, 24, 1152]),
    dtype=st.sampled_from(DTYPES),
    residual=st.sampled_from([None, *DTYPES]),
    pattern=st.sampled_from(PATTERNS),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 99),
)
@example(
    grid=(5, 7), width=24, dtype=torch.bfloat16, residual=torch.bfloat16, pattern="random", mode={"capacity": 60},
    seed=1,
)  # fmt: skip
@example(grid=(4, 7), width=1152, dtype=torch.bfloat16, residual=torch.float32, pattern="random", mode={}, seed=2)
def test_without_a_backward(
    grid: tuple[int, int], width: int, dtype: torch.dtype, residual: torch.dtype | None, pattern: str,
    mode: dict[str, Any], seed: int, device: torch.device,
) -> None:  # fmt: skip
    """In inference h' is stored in the dtype of the result: one more rounding of it, and no other difference."""
    h, p, sel, _, sigma, gate, added = cases.dechunk_spatial(
        2, grid, width, dtype, 1.0, pattern, True, residual is not None, seed, device, **mode
    )
    added = None if residual is None else added.to(residual)
    args = h, p, sel, grid, sigma, gate, added
    with ops.use_backend("triton"), torch.no_grad():
        out = ops.dechunk_spatial(*args)
    expected = reference.dechunk_spatial(*args)
    exact = reference.dechunk_spatial(*(to_float64(a) for a in args))
    assert_close_to_reference(out, exact, expected)
    rounding = torch.finfo(out.dtype).eps / 2
    smoothed = reference.dechunk_spatial(*(to_float64(a) for a in args[:6]), None).abs()
    slack = 2e-5 * float(smoothed.abs().max().clamp(min=1))
    assert ((out.double() - exact).abs() <= rounding * (1.1 * exact.abs() + 1.1 * smoothed) + slack).all()


def test_a_gradient_takes_the_way_that_has_a_backward(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    args = cases.dechunk_spatial(1, (3, 4), 8, device=device)
    run(*args)
    with ops.use_backend("triton"):
        grads = torch.func.grad(lambda h: ops.dechunk_spatial(h, *args[1:]).square().sum())(args[0])
        assert grads.any()
        monkeypatch.setattr(dechunk_spatial, "dechunk_spatial_fwd", None)
        monkeypatch.setattr(_dechunk, "launcher", None)
        assert ops.dechunk_spatial(*args).isfinite().all(), "no argument wants a gradient"
        with torch.no_grad():
            ops.dechunk_spatial(args[0].clone().requires_grad_(), *args[1:])


@pytest.mark.parametrize(("grid", "pattern"), [((7, 9), "random"), ((2, 11), "all"), ((13, 3), "ties")])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_grids_larger_than_the_blocks(
    grid: tuple[int, int], pattern: str, dtype: torch.dtype, device: torch.device, small_blocks: None
) -> None:
    args = cases.dechunk_spatial(1, grid, 24, dtype, device=device, sigma=0.5, pattern=pattern, seed=4)
    check(*args)


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    images=st.integers(1, 3),
    kept=st.sampled_from([0, 1, 2, 5, 144]),
    seed=st.integers(0, 999),
)
def test_nearest_is_exact_and_ties_go_to_the_lowest_index(
    grid: tuple[int, int], images: int, kept: int, seed: int, device: torch.device
) -> None:
    length = grid[0] * grid[1]
    order = torch.rand(images, length, generator=torch.Generator().manual_seed(seed)).argsort(1)
    mask = (order < kept).to(device)
    packed_rows = torch.where(mask, mask.flatten().cumsum(0).view_as(mask) - 1, -1).to(torch.int32)
    kept_index = nearest.kept_index_fwd(packed_rows, mask.float(), grid, int(mask.sum()))
    found = nearest.nearest_fwd(kept_index, grid).view(images, length)
    index = torch.arange(length, device=device)
    row, col = index // grid[1], index % grid[1]
    distance = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2
    key = torch.where(mask[:, None, :], distance * length + index, length**3)
    owner = packed_rows.gather(1, key.argmin(-1))
    assert torch.equal(found, torch.where(mask.any(1, keepdim=True), owner, -1).to(torch.int32))


@pytest.mark.parametrize("kept", [[37], [0, 98], [60, 61], []], ids=str)
def test_huge_voronoi_regions(kept: list[int], device: torch.device) -> None:
    """Regions that hold whole tiles, next to an image in which no region does; also an image that keeps nothing."""
    grid = (9, 11)
    mask = torch.zeros(2, grid[0] * grid[1], dtype=torch.bool)
    mask[0, kept] = True
    mask[1, ::25] = True
    h, p, sel, _, sigma, gate, residual = hand_made(mask, grid, 8, device)
    out, grad_h, grad_p, grad_gate, grad_residual = run(h, p, sel, grid, sigma, gate, residual)
    assert all(x is not None and x.isfinite().all() for x in (out, grad_h, grad_p, grad_gate, grad_residual))
    if not kept:
        assert torch.equal(out[0], residual[0])
        assert not grad_p[0].any() and not grad_gate[0].any()
        return
    check(h, p, sel, grid, sigma, gate, residual)


def gradients(args: tuple[Any, ...], cotangent: Tensor) -> list[Tensor]:
    """Output and the gradients of h, p, gate and residual for a given cotangent."""
    args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args)
    with ops.use_backend("triton"):
        out = ops.dechunk_spatial(*args)
    return [out, *torch.autograd.grad(out, [a for a in args if isinstance(a, Tensor)], cotangent)]


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
def test_an_image_does_not_depend_on_its_batch(mode: dict[str, Any], device: torch.device, small_blocks: None) -> None:
    grid, images = (4, 7), 2
    h, p, sel, _, sigma, gate, residual = cases.dechunk_spatial(images, grid, 24, device=device, seed=3, **mode)
    cotangent = randn(*residual.shape, seed=9).to(device)
    whole = gradients((h, p, sel, grid, sigma, gate, residual), cotangent)
    starts = sel.cu_seqlens.tolist()
    for i in range(images):
        tokens, image = slice(starts[i], starts[i + 1]), slice(i, i + 1)
        alone = sel._replace(
            indices=sel.indices[tokens] - i * p.shape[1],
            cu_seqlens=sel.cu_seqlens[i : i + 2] - starts[i],
            mask=sel.mask[image],
            natural_mask=sel.natural_mask[image],
            packed_rows=torch.where(sel.mask[image], sel.packed_rows[image] - starts[i], -1).to(torch.int32),
        )
        parts = gradients(
            (h[tokens], p[image], alone, grid, sigma, gate[image], residual[image]), cotangent[image]
        )  # fmt: skip
        for name, part, batch in zip(("out", "h", "p", "gate", "residual"), parts, whole, strict=True):
            assert torch.equal(part, batch[tokens if name == "h" else image]), name


def test_nan_stays_in_its_image(device: torch.device) -> None:
    h, p, sel, grid, sigma, _, residual = cases.dechunk_spatial(2, (4, 5), 8, device=device)
    first = int(sel.cu_seqlens[1])
    broken = h.clone()
    broken[:first] = float("nan")
    clean, dirty = (gradients((x, p, sel, grid, sigma, None, residual), torch.ones_like(residual)) for x in (h, broken))
    assert dirty[0][0].isnan().all()
    assert torch.equal(dirty[0][1], clean[0][1])
    assert torch.equal(dirty[1][first:], clean[1][first:])
    assert torch.equal(dirty[2][1], clean[2][1])


def test_repeats_to_the_bit(device: torch.device) -> None:
    args = cases.dechunk_spatial(2, (6, 7), 24, torch.bfloat16, device=device)
    assert all(torch.equal(a, b) for a, b in zip(run(*args), run(*args), strict=True))


def test_garbage_in_padding_rows_stays_there(device: torch.device) -> None:
    h, *rest = cases.dechunk_spatial(2, (4, 5), 8, device=device, capacity=30)
    real = int(rest[1].cu_seqlens[-1])
    clean = run(h.nan_to_num(), *rest)
    dirty = h.clone()
    dirty[real:] = float("nan")
    assert real < 30
    assert all(torch.equal(a, b) for a, b in zip(clean, run(dirty, *rest), strict=True))
    assert not clean[1][real:].any()


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted: int, device: torch.device) -> None:
    args = cases.dechunk_spatial(1, (4, 4), 8, device=device)
    expected = run(*args)[1 + wanted]
    with ops.use_backend("triton"):
        _, (alone,) = differentiate(ops.dechunk_spatial, args, wanted=[[0, 1, 5, 6][wanted]])
    assert torch.equal(alone, expected)


def test_strided_inputs(device: torch.device) -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(2, (4, 5), 8, device=device)
    h, residual = h.contiguous(), residual.contiguous()
    strided = (
        torch.stack([h, h], 1).flatten(1)[:, :8], torch.stack([p, p], 2)[..., 0], sel, grid, sigma,
        gate.t().contiguous().t(), residual.transpose(1, 2).contiguous().transpose(1, 2),
    )  # fmt: skip
    plain = gradients((h, p, sel, grid, sigma, gate, residual), randn(*residual.shape, seed=9).to(device))
    cotangent = randn(*residual.shape, seed=9).to(device).transpose(0, 1).contiguous().transpose(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(strided, cotangent), strict=True))


def test_no_images(device: torch.device) -> None:
    outputs = run(*cases.dechunk_spatial(0, (3, 4), 8, device=device))
    assert [tuple(x.shape) for x in outputs] == [(0, 12, 8), (0, 8), (0, 12), (0, 12), (0, 12, 8)]


def test_gradient_of_p_is_as_accurate_as_pytorch(device: torch.device) -> None:
    """Chance averages out over many inputs, so the tolerance needs no minimum."""
    check_rms_against_reference(
        ops.dechunk_spatial,
        lambda seed: cases.dechunk_spatial(1, (4, 4), 24, device=device, gate=False, residual=False, seed=seed),
        seeds=10,
        backend="triton",
    )


@pytest.mark.parametrize(("width", "dtype"), [(1152, torch.bfloat16), (2048, torch.float16)])
def test_wide_rows(width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(*cases.dechunk_spatial(1, (3, 4), width, dtype, device=device))


def test_refuses_what_it_cannot_compute(device: torch.device) -> None:
    h, p, *rest = cases.dechunk_spatial(1, (3, 4), 8, device=device, residual=False)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        ops.dechunk_spatial(h.double(), p, *rest)
    packed_rows = torch.empty(1, 32768, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="32768"):
        nearest.kept_index_fwd(packed_rows, packed_rows.float(), (1, 32768), 0)


def test_the_window_reaches_as_far_as_float32_can_tell() -> None:
    assert [window_radius(sigma, 0.5) for sigma in (1.0, 2.0)] == [6, 12]
    offset = torch.arange(-400, 401, dtype=torch.float64)
    distance = offset[:, None] ** 2 + offset**2
    # A token of weight `own` alone in its window, in a plane that keeps every token outside.
    for own in (0.5, 1e-4):
        for sigma in (0.5, 1.0, 2.0, 3.0, 16.0):
            radius = window_radius(sigma, own)
            outside = (offset.abs()[:, None] > radius) | (offset.abs() > radius)
            assert float(torch.exp(-distance / (2 * sigma**2))[outside].sum()) * (1 - own) / own < 2.0**-24


@pytest.mark.parametrize("own", [0.5001, 1e-4], ids=["threshold", "budget"])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
def test_window_is_wide_enough_for_a_lone_token(
    sigma: float, own: float, device: torch.device, few_programs: None
) -> None:
    """A token of least p in a hole as wide as the window, all kept around it: the most that the kernels leave out."""
    radius = window_radius(sigma, own)
    side = 2 * (radius + math.ceil(sigma)) + 1  # farther rings weigh next to nothing beside these
    away = (torch.arange(side) - side // 2).abs()
    p = torch.where(torch.maximum(away[:, None], away) > radius, 1.0, 0.0)
    p[side // 2, side // 2] = own
    p = p.view(1, -1)
    sel = reference.select_tokens(p) if own > 0.5 else reference.select_tokens(p, budget=int((p > 0).sum()))
    lone = int(sel.packed_rows[0, side * side // 2])
    assert lone >= 0
    h = torch.full((sel.indices.numel(), 8), 1000.0)
    h[lone] = 1.0
    args = [cases.moved(x, device) for x in (h, p, sel, (side, side), sigma)]
    with ops.use_backend("triton"):
        found = ops.dechunk_spatial(*args)[0, side * side // 2]
    exact = reference.dechunk_spatial(*(to_float64(x) for x in args))[0, side * side // 2]
    # Of the far rows' 1000, at most half a unit in the last place comes through.
    assert float((found.double() - exact).abs().max()) <= 1000 * torch.finfo(torch.float32).eps / 2


def test_op_registration(device: torch.device) -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(2, (3, 4), 8, device=device)
    floats = [x.requires_grad_() for x in (h, p, gate, residual.flatten(0, 1))]
    geometry = Geometry(sel.packed_rows, sel.cu_seqlens, grid, sigma, 6)
    torch.library.opcheck(_dechunk.op._opoverload, (*floats, *leaves(geometry)))
    h, p, *others = (x.detach() for x in floats)
    _, saved = _dechunk(h, p, *others, geometry)
    grad_inputs = (randn(24, 8, seed=7).to(device), h, p, *leaves(geometry), *leaves(saved))
    for wanted in ((True, True, gate.dtype), (False, True, None)):
        torch.library.opcheck(_gradients.op._opoverload, (*grad_inputs, *wanted))


@pytest.mark.parametrize("options", [{"gate": True, "residual": True}, {"gate": False, "residual": False}], ids=str)
def test_compiles_without_a_break(options: dict[str, bool], device: torch.device) -> None:
    args = cases.dechunk_spatial(2, (3, 4), 8, device=device, **options)
    compiled = torch.compile(ops.dechunk_spatial, fullgraph=True, backend="aot_eager")
    with ops.use_backend("triton"):
        outputs, grads = differentiate(compiled, args)
    for a, b in zip([*outputs, *grads], run(*args), strict=True):
        assert torch.equal(a, b)
