"""Selection kernels: every field equals the definition exactly, for all ties, modes and tile sizes."""

from functools import partial
from typing import Any

import pytest
import torch
import triton
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import assert_same_selection
from support.inputs import generator, random_cu_seqlens, random_probs
from torch import Tensor

from dcdit import ops
from dcdit.kernels import launch
from dcdit.ops import TokenSelection, reference
from dcdit.ops._triton import selection

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
probs = partial(random_probs, keep=0.5)


def tiles(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Set another tile size. With a small one, every loop over tiles runs more than once."""
    monkeypatch.setattr(launch, "config_for", lambda *_: {"BLOCK": block, "num_warps": 1})


def check(p: Tensor, cu_seqlens: Tensor | None = None, **mode: Any) -> TokenSelection:
    with ops.use_backend("reference"):
        expected = ops.select_tokens(p, cu_seqlens, **mode)
    with ops.use_backend("triton"):
        actual = ops.select_tokens(p, cu_seqlens, **mode)
    assert_same_selection(actual, expected)
    return actual


@pytest.mark.parametrize("mode", cases.SELECTION_MODES)
@given(data=st.data())
def test_matches_the_definition(
    mode: str, data: st.DataObject, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles(monkeypatch, 16)
    p, cu_seqlens, arguments = data.draw(cases.select_tokens(mode))
    if isinstance(arguments.get("drop_fraction"), Tensor):
        arguments["drop_fraction"] = arguments["drop_fraction"].to(device)
    if "always" in arguments:
        arguments["always"] = arguments["always"].to(device)
    check(p.to(device), None if cu_seqlens is None else cu_seqlens.to(device), **arguments)


@given(data=st.data())
def test_keeps_a_mask(data: st.DataObject, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles(monkeypatch, 16)
    mask, cu_seqlens, arguments = data.draw(cases.select_from_mask())
    mask, cu_seqlens = cases.moved(mask, device), cases.moved(cu_seqlens, device)
    with ops.use_backend("triton"):
        sel = ops.select_from_mask(mask, cu_seqlens, **arguments)
    assert_same_selection(sel, reference.select_from_mask(mask, cu_seqlens, **arguments))


@given(threshold=st.floats(0, 1, width=32), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@example(threshold=0.3, dtype=torch.float32, seed=0)
@example(threshold=0.3, dtype=torch.bfloat16, seed=0)
@example(threshold=0.7, dtype=torch.float16, seed=0)
def test_any_threshold(threshold: float, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    """Also a threshold that the dtype of p cannot hold, beside a p that is its rounding."""
    p = torch.rand(2, 20, generator=generator(seed)).to(dtype)
    p[0, 7] = threshold
    sel = check(p.to(device), threshold=threshold)
    assert bool(sel.natural_mask[0, 7]) == (float(p[0, 7]) > float(torch.tensor(threshold)))


@pytest.mark.parametrize("pattern", ["random", "equal", "signed"])
def test_every_budget(pattern: str, device: torch.device) -> None:
    p = probs(2, 7, pattern=pattern).to(device)
    for budget in range(1, 8):
        assert check(p, budget=budget).lengths.tolist() == [budget, budget]


@pytest.mark.parametrize("pattern", ["random", "equal"])
def test_every_capacity(pattern: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles(monkeypatch, 4)
    p = probs(2, 6, pattern=pattern).to(device)
    for capacity in range(2, 13):
        sel = check(p, capacity=capacity)
        assert int(sel.cu_seqlens[-1]) <= capacity
        assert int(sel.lengths.min()) >= 1


@pytest.mark.parametrize(
    "mode", [{"drop_fraction": 0.4}, {"budget": 1000}, {"capacity": 30_000, "max_seqlen": 31_000}], ids=str
)
def test_long_image(mode: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if triton.knobs.runtime.interpret:
        tiles(monkeypatch, 8192)
    check(probs(1, 65_536, pattern="random").to(device), **mode)


def test_more_images_than_a_tile(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles(monkeypatch, 4)
    check(probs(11, 2, pattern="ties").to(device), capacity=14)
    # More than there are programs that list candidates, and more than the histograms that one of them reads at a time.
    check(probs(300, 6, pattern="random").to(device), capacity=700, drop_fraction=0.1)


@pytest.mark.parametrize("mode", [{}, {"capacity": 5}, {"max_seqlen": 3}], ids=str)
def test_no_images(mode: dict[str, Any], device: torch.device) -> None:
    check(torch.empty(0, 7, device=device), **mode)
    check(torch.empty(0, device=device), torch.zeros(1, dtype=torch.int32, device=device), **mode)
    check(torch.empty(2, 0, device=device), **mode)


def test_strided_source(device: torch.device) -> None:
    wide = probs(3, 40, pattern="random").to(device)
    check(wide[:, ::2])
    check(wide.t()[:3])
    check(wide[:, 5:], drop_fraction=torch.tensor([0.1, 0.2] * 3, device=device)[::2])


def test_an_image_does_not_depend_on_the_others(device: torch.device) -> None:
    p = probs(3, 30, pattern="random").to(device)
    with ops.use_backend("triton"):
        together = ops.select_tokens(p, drop_fraction=0.3)
        alone = [ops.select_tokens(row[None], drop_fraction=0.3).mask for row in p]
    assert torch.equal(together.mask, torch.cat(alone))


def test_unchecked_fractions_end(device: torch.device) -> None:
    """On a GPU nothing checks a fraction per image. Outside [0, 1) it must neither hang nor empty an image."""
    p = probs(4, 9, pattern="all").to(device)
    fractions = torch.tensor([-1.0, 1.0, 7.0, float("nan")], device=device)
    lengths = selection.select_tokens(p, None, 0.5, fractions, None, None, None, None).wait().lengths
    assert lengths[:3].tolist() == [9, 1, 1]
    assert 1 <= int(lengths[3]) <= 9


@pytest.mark.parametrize("mode", [(0.2, None, None, None), (0.0, 3, None, None), (0.2, None, 12, 5)], ids=str)
def test_unchecked_nan_stays_in_bounds(mode: tuple[Any, ...], device: torch.device) -> None:
    """On a GPU nothing refuses NaN. The result is some selection that is consistent with itself."""
    p = probs(3, 9, pattern="random").to(device)
    p[0, 2:6], p[1] = float("nan"), float("nan")
    p[2, 4] = -torch.tensor(float("nan"))
    sel = selection.select_tokens(p, None, 0.5, *mode, None).wait()
    total = int(sel.cu_seqlens[-1])
    assert torch.equal(sel.mask.sum(1).to(torch.int32), sel.lengths)
    assert torch.equal(sel.indices[:total], sel.mask.flatten().nonzero().flatten())
    assert sel.indices[total:].eq(-1).all()
    assert torch.equal(
        sel.packed_rows.flatten()[sel.indices[:total]], torch.arange(total, dtype=torch.int32, device=device)
    )


def test_float64_is_refused() -> None:
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        ops.select_tokens(torch.rand(2, 4, dtype=torch.float64))


SAMPLES = [
    (0.0, None, None, None, None),
    (0.2, None, None, 14, 5),
    (0.0, torch.tensor([0.1, 0.6]), None, None, None),
    (0.0, None, 3, None, None),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=["exact", "capacity", "per-image", "budget"])
def test_registration(sample: tuple[Any, ...], device: torch.device) -> None:
    rho, fractions, *sizes = sample
    cu_seqlens = random_cu_seqlens(5, 7).to(device)
    fractions = None if fractions is None else fractions.to(device)
    p = probs(12, pattern="random").to(device)
    always = (p > 0.9).view(torch.uint8)
    for fixed, keep_best in ((None, True), (always, True), (None, False)):
        args = p, cu_seqlens, 0.5, rho, fractions, *sizes, fixed, keep_best
        torch.library.opcheck(selection._select.op._opoverload, args)


@pytest.mark.parametrize("mode", [{"capacity": 14, "drop_fraction": 0.2}, {"budget": 4}, {}], ids=str)
def test_fullgraph(mode: dict[str, Any], device: torch.device) -> None:
    """The exact mode too is one graph, if torch.compile may capture the one size that it reads."""

    def route(p: Tensor) -> TokenSelection:
        with ops.use_backend("triton"):
            return ops.select_tokens(p, **mode)

    torch._dynamo.reset()
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=not mode):
        for seed in range(2):
            p = probs(2, 12, pattern="random", seed=seed).to(device)
            assert_same_selection(compiled(p), route(p))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("mode", [{"capacity": 14, "drop_fraction": 0.2}, {"budget": 4}], ids=str)
def test_no_sync(mode: dict[str, Any], device: torch.device) -> None:
    p = probs(2, 12, pattern="random").to(device)
    with ops.use_backend("triton"):
        ops.select_tokens(p, **mode)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.select_tokens(p, **mode)
        finally:
            torch.cuda.set_sync_debug_mode("default")
