"""The whole model on the Triton backend: parity with the reference implementation, compilation, captured shapes."""

import os

import pytest
import torch
from models.golden import CASES, NUM_HEADS, RATIO_WEIGHT, TARGET, Golden
from models.small import batch, small_dc_dit
from models.test_parity import NOISE, gradients, relative

from dcdit import ops
from dcdit.models import load_official


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


# One fraction per image is the case that holds the others; the interpreter takes its time over each.
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
        assert relative(grads[key], grad) < 1e-3, key


OPTIONS = [{"budget": 9}, {"capacity": 90}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_without_a_graph_break(options: dict[str, int], device: torch.device) -> None:
    """Forward and backward, traced once, equal eager."""
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
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
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
