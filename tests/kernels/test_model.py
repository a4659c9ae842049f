"""The whole model on the Triton backend: parity with the reference implementation, compilation, captured shapes."""

import os

import pytest
import torch
from models.test_parity import NOISE, gradients, relative
from support.golden import CASES, NUM_HEADS, RATIO_WEIGHT, TARGET, Golden
from support.inputs import random_probs
from support.small import batch, small_dc_dit
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dcdit import ops
from dcdit.models import load_official
from dcdit.nn.dit_block import PackedDiTBlock, VarlenMeta
from dcdit.nn.modulation import Modulation


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


# The interpreter is slow, so it runs one case only: one fraction per image, which covers the others.
EVERY_CASE = torch.cuda.is_available() or os.environ.get("DCDIT_FULL") == "1"


@pytest.mark.parametrize("case", CASES if EVERY_CASE else CASES[-1:])
def test_official_parity(golden: Golden, case: int, device: torch.device) -> None:
    model = load_official(golden.state, NUM_HEADS).to(device).eval()
    expected = {name: value.to(device) for name, value in golden.group(f"case{case}/").items()}
    drop = golden.drop(case)
    with ops.use_backend("triton"):
        x, t, y = (value.to(device) for value in golden.inputs)
        rho = drop.to(device) if isinstance(drop, torch.Tensor) else drop
        out, routing = model(x, t, y, drop_fraction=rho, return_routing=True)
        ratio = ops.ratio_loss(routing.prob, routing.natural_mask, TARGET)
        ((out * expected["loss_weights"]).mean() + RATIO_WEIGHT * ratio).backward()
    assert torch.equal(routing.mask, expected["mask"].bool())
    assert torch.equal(routing.natural_mask, expected["mask_natural"].bool())
    torch.testing.assert_close(routing.prob, expected["prob"], rtol=0, atol=1e-5)
    assert relative(out, expected["out"]) < 1e-4
    torch.testing.assert_close(ratio, expected["ratio_loss"], rtol=1e-5, atol=0)
    grads = gradients(model)
    for key, norm in golden.group(f"case{case}/gradnorm/").items():
        assert grads[key].norm().item() == pytest.approx(norm.item(), rel=1e-3, abs=NOISE), key
    for key, grad in golden.group(f"case{case}/grad/").items():
        assert relative(grads[key], grad.to(device)) < 1e-3, key


def test_twenty_kept_counts_share_one_graph_of_a_block(device: torch.device) -> None:
    """Route, pack, a DiT block, unpack, forward and backward: one graph for every kept count."""
    torch.manual_seed(0)
    block = PackedDiTBlock(16, 2, 4.0).to(device)
    modulation = Modulation(*torch.randn(6, 2, 16, device=device))

    def route(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        sel = ops.select_tokens(p, capacity=60)
        tokens = ops.gather_tokens(x, sel)
        tokens, pending = block(tokens, None, modulation, VarlenMeta(sel.cu_seqlens, sel.max_seqlen, padding=True))
        tokens = ops.gated_add(tokens, *pending, sel.cu_seqlens)
        return ops.dechunk_ema(tokens, p, sel, None, x), sel.cu_seqlens[-1]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(route, fullgraph=True, backend=counter)
    x, kept = torch.randn(2, 30, 16, device=device), set()
    with ops.use_backend("triton"):
        for step in range(20):
            results = []
            for forward in (compiled, route) if step % 9 == 0 else (compiled,):
                leaf = x.clone().requires_grad_()
                p = random_probs(2, 30, keep=0.04 * (step + 1), seed=step).to(device).requires_grad_()
                out, total = forward(leaf, p)
                results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, p])])
            kept.add(int(total))
            for traced, eager in zip(results[0], results[-1], strict=True):
                torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
    assert len(kept) >= 15
    assert counter.frame_count == 1


OPTIONS = [{"budget": 9}, {"capacity": 90}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_without_a_graph_break(options: dict[str, int], device: torch.device) -> None:
    """Forward and backward under torch.compile equal the eager ones."""
    model = small_dc_dit(depth=1, grid=(6, 7)).to(device)
    inputs = [value.to(device) for value in batch(model.config)]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    with ops.use_backend("triton"):
        for forward in (model, compiled):
            model.zero_grad()
            out = forward(*inputs, **options)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_another_mask_compiles_nothing_new(options: dict[str, int], device: torch.device) -> None:
    model = small_dc_dit(depth=1, grid=(6, 7)).to(device)
    x, t, y = (value.to(device) for value in batch(model.config))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    lengths = set()
    with ops.use_backend("triton"), torch.no_grad():
        for step in range(3):
            _, routing = compiled(x * (0.25 + step), t, y, **options, return_routing=True)
            lengths.add(tuple(routing.mask.flatten().nonzero().flatten().tolist()))
    assert len(lengths) > 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("options", [{"router": "cosine2d"}, {"router": "cosine1d", "dechunk": "ema"}], ids=str)
def test_other_routers_and_the_ema_match_the_torch_backend(options: dict[str, str], device: torch.device) -> None:
    model = small_dc_dit(depth=1, grid=(6, 7), **options).to(device)
    inputs = [value.to(device) for value in batch(model.config)]
    results = []
    for backend in ("torch", "triton"):
        model.zero_grad()
        with ops.use_backend(backend):
            out = model(*inputs, drop_fraction=0.3)
            out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
