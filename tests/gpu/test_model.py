"""What only a GPU can show of the whole model: no graph break, no recompilation, no sync, capture, repeatability."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.small import randomize_zero_weights
from torch import Tensor

from benchmarks.harness.equality import check_kept
from dcdit import ops
from dcdit.diffusion import SamplerGraphs, sample
from dcdit.graphs import CaptureError, ExactGraphedDenoiser, GraphedDenoiser
from dcdit.models import DCDiT, DCDiTConfig

BATCH = 4


@pytest.fixture
def model() -> DCDiT:
    torch.manual_seed(0)
    config = DCDiTConfig(grid=(16, 16), hidden_size=256, depth=2, num_heads=4, num_classes=10)
    model = DCDiT(config).to("cuda", torch.bfloat16).eval()
    randomize_zero_weights(model)
    model.router.out.bias.data.fill_(0.0)
    return model


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(BATCH, 4, 16, 16, device="cuda", dtype=torch.bfloat16, generator=generator)
    return x, torch.full((BATCH,), 100.0 * seed, device="cuda"), torch.arange(BATCH, device="cuda")


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


STATIC_SHAPES = [{"capacity": BATCH * 256}, {"budget": 64}]


@pytest.mark.parametrize("options", STATIC_SHAPES, ids=str)
@torch.inference_mode()
def test_forward_never_syncs(model: DCDiT, options: dict[str, int]) -> None:
    x, t, y = batch(1)
    model(x, t, y, **options)
    torch.cuda.synchronize()
    with no_sync():
        model(x, t, y, **options)


@torch.inference_mode()
def test_exact_mode_waits_for_an_event_only(model: DCDiT) -> None:
    """Its one size is copied to pinned memory. Any other read would be an error here."""
    x, t, y = batch(1)
    model(x, t, y)
    torch.cuda.synchronize()
    with no_sync():
        model(x, t, y)


@pytest.mark.parametrize("options", STATIC_SHAPES, ids=str)
def test_compiles_without_a_break(model: DCDiT, options: dict[str, int]) -> None:
    """The compiler rounds elsewhere, which decides about a token at the cut: images with such a token are left out."""
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        out, routing = compiled(*batch(1), **options, return_routing=True)
        expected, right = model(*batch(1), **options, return_routing=True)
    same = check_kept("compiled", routing.prob, routing.mask, right.prob, right.mask, 0.05)
    torch.testing.assert_close(out[same], expected[same], rtol=0.05, atol=0.05)


def test_twenty_kept_counts_compile_once(model: DCDiT) -> None:
    import triton

    compiled = []
    x, t, y = batch(1)
    with torch.inference_mode():
        model(x, t, y)
        triton.knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["repr"])
        try:
            for step in range(20):
                model(x, t, y, drop_fraction=0.04 * step)
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


@torch.inference_mode()
def test_captured_graph_follows_the_mask(model: DCDiT) -> None:
    graphed = GraphedDenoiser(model, BATCH, capacity=BATCH * 256)
    kept_counts = set()
    for seed in range(5):
        x, t, y = batch(seed)
        expected, routing = model(x, t, y, drop_fraction=0.1 * seed, capacity=BATCH * 256, return_routing=True)
        kept_counts.add(int(routing.mask.sum()))
        assert torch.equal(graphed(x, t, y, drop_fraction=0.1 * seed), expected)
    assert len(kept_counts) > 1
    assert int(graphed.overflow) == 0


@torch.no_grad()
def test_exact_graphs_are_the_model_with_padding_rows(model: DCDiT) -> None:
    """The kept tokens are the same; products of another number of rows may round differently."""
    graphed = ExactGraphedDenoiser(model)
    for seed in range(5):
        x, t, y = batch(seed)
        expected, routing = model(x, t, y, drop_fraction=0.1 * seed, return_routing=True)
        out, found = graphed(x, t, y, drop_fraction=0.1 * seed, return_routing=True)
        assert torch.equal(found.mask, routing.mask)
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_graph_of_autocast_outlives_the_block_that_it_was_captured_in(model: DCDiT) -> None:
    """It holds its own conversions of the weights: those of the block are freed, and their memory is written to."""
    model.float()
    x, t, y = batch(1)
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(x, t, y, budget=64)
        graphed = GraphedDenoiser(model, BATCH, budget=64)
    written = torch.full((2**28,), torch.nan, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(graphed(x, t, y), expected)
    del written


@pytest.mark.parametrize("options", STATIC_SHAPES, ids=str)
def test_a_captured_sampler_step_draws_the_images_of_the_eager_one(model: DCDiT, options: dict[str, int]) -> None:
    graphs, labels = SamplerGraphs(), torch.arange(BATCH // 2, device="cuda")
    for seed in range(2):
        calls = {"num_steps": 6, "cfg_scale": 2.0, "cfg_interval": (0.3, 1.0), "seed": seed, "progress": False}
        eager, graphed = (sample(model, labels, graph=graph, **calls, **options) for graph in (False, graphs))
        assert torch.equal(graphed, eager)


def test_a_failed_capture_leaves_the_device_usable(model: DCDiT) -> None:
    forward = model.decoder.forward
    model.decoder.forward = lambda x, *rest: forward(x * float(x.isfinite().all()), *rest)
    stream = torch.cuda.current_stream()
    with pytest.raises(CaptureError):
        GraphedDenoiser(model, BATCH, budget=64)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(3, device="cuda").isfinite().all(), "the generator is not part of a capture any more"
    model.decoder.forward = forward
    with torch.no_grad():
        x, t, y = batch(1)
        assert torch.equal(GraphedDenoiser(model, BATCH, budget=64)(x, t, y), model(x, t, y, budget=64))


def test_training_step_repeats_bit_for_bit(model: DCDiT) -> None:
    x, t, y = batch(1)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            out, routing = model(x, t, y, return_routing=True)
            loss = out.float().square().mean() + ops.ratio_loss(routing.prob, routing.natural_mask, 4.0)
            loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
