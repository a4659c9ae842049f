"""Caches of diffusers on a DC-DiT and a static DiT: exact at threshold 0, and what they leave out at others."""

import math
from collections import Counter

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from support.small import batch, small_dc_dit, small_dit

from dcdit.integrations.diffusers import (
    DCDiTPipeline,
    DCDiTTransformer2DModel,
    StaticDiTTransformer2DModel,
    TeaCacheConfig,
    fit_tea_cache,
)
from dcdit.nn.memory_format import to_grid, to_tokens

STEPS = 4
PIXELS = {"grid": (4, 6), "in_channels": 3, "num_classes": 3, "learn_sigma": False}
NEVER = {
    "first block": FirstBlockCacheConfig(threshold=0.0),
    "mag": MagCacheConfig(threshold=0.0, mag_ratios=[1.1] * STEPS, num_inference_steps=STEPS),
    "taylor": TaylorSeerCacheConfig(cache_interval=1),
    "tea": TeaCacheConfig(threshold=0.0),
}
ALWAYS = {
    "first block": FirstBlockCacheConfig(threshold=math.inf),
    "mag": MagCacheConfig(
        threshold=math.inf, mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, max_skip_steps=STEPS, retention_ratio=0
    ),
    "taylor": TaylorSeerCacheConfig(
        cache_interval=100, disable_cache_before_step=1, max_order=0, taylor_factors_dtype=torch.float32
    ),
    "tea": TeaCacheConfig(threshold=math.inf),
}
"""The first step is computed, and no other (TaylorSeer: the first and the third)."""


def pipeline(model):
    model.objective = "flow"
    pipe = DCDiTPipeline.from_dcdit(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def dynamic():
    return pipeline(small_dc_dit(**PIXELS))


@pytest.fixture(scope="module")
def static():
    return pipeline(small_dit(**PIXELS))


@pytest.fixture
def pipe(request):
    """A pipeline without a cache, before and after."""
    chosen = request.getfixturevalue(request.param)
    yield chosen
    if chosen.transformer.is_cache_enabled:
        chosen.transformer.disable_cache()


both = pytest.mark.parametrize("pipe", ["dynamic", "static"], indirect=True)
on_dynamic = pytest.mark.parametrize("pipe", ["dynamic"], indirect=True)


def drawn(pipe, **options):
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(0), **options}
    return pipe([1, 2], output_type="latent", **options).images


def counted(pipe, **options):
    """The images, and how often each layer ran."""
    calls, model = Counter(), pipe.transformer.to_dcdit()
    layers = {"first": model.blocks[0], "last": model.blocks[-1]}
    if hasattr(model, "encoder"):
        layers |= {"encoder": model.encoder.blocks[0], "decoder": model.decoder.blocks[-1]}
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update([name])) for name, layer in layers.items()
    ]
    images = drawn(pipe, **options)
    for handle in handles:
        handle.remove()
    return images, calls


@both
@pytest.mark.parametrize("cache", NEVER)
def test_exact_where_nothing_is_left_out(pipe, cache):
    expected = {scale: drawn(pipe, guidance_scale=scale) for scale in (1.0, 3.0)}
    pipe.transformer.enable_cache(NEVER[cache])
    assert torch.equal(drawn(pipe, guidance_scale=1.0), expected[1.0])
    guided, calls = counted(pipe, guidance_scale=3.0)
    torch.testing.assert_close(guided, expected[3.0], rtol=1e-4, atol=1e-4)  # the branches are calls of their own
    assert calls["last"] == 2 * STEPS
    pipe.transformer.disable_cache()
    assert torch.equal(drawn(pipe, guidance_scale=3.0), expected[3.0])


@on_dynamic
@pytest.mark.parametrize(("cache", "convolutions"), [("first block", 1), ("mag", 0), ("taylor", 2), ("tea", 0)])
def test_blocks_are_left_out(pipe, cache, convolutions):
    """The transformer runs in few steps of each branch. What runs in every step differs: the first block, or none, or
    the convolutions around. A second run begins anew."""
    uncached = drawn(pipe, guidance_scale=3.0, drop_fraction=0.3)
    pipe.transformer.enable_cache(ALWAYS[cache])
    images, calls = counted(pipe, guidance_scale=3.0, drop_fraction=0.3)
    assert calls["first"] == calls["last"] == (4 if cache == "taylor" else 2)
    assert calls["encoder"] == (2 * STEPS if convolutions else 2)
    assert calls["decoder"] == (2 * STEPS if convolutions == 2 else 2)
    assert images.isfinite().all() and not torch.allclose(images, uncached)
    assert torch.equal(drawn(pipe, guidance_scale=3.0, drop_fraction=0.3), images)


@pytest.mark.parametrize("pipe", ["static"], indirect=True)
@pytest.mark.parametrize(
    ("cache", "first", "last"), [("first block", STEPS, 1), ("mag", 1, 1), ("taylor", 2, 2), ("tea", 1, 1)]
)
def test_blocks_of_the_static_model_are_left_out(pipe, cache, first, last):
    pipe.transformer.enable_cache(ALWAYS[cache])
    _, calls = counted(pipe, guidance_scale=1.0)
    assert calls == {"first": first, "last": last}


@on_dynamic
@pytest.mark.parametrize("cache", ALWAYS)
def test_what_is_added_is_what_was_added(pipe, cache):
    """The second call, from the definition of each cache, while the number of kept tokens changes between the two."""
    transformer = pipe.transformer
    model = transformer.to_dcdit()
    x, t, y = batch(model.config, 2)
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))

    def parts(x, t, drop_fraction):
        """What enters the first block, leaves it, and leaves the encoder; and the conditionings."""
        entering, grid = model.embed(x, t, y), model.config.grid
        head = to_tokens(model.encoder.blocks[0](to_grid(entering.tokens, grid), entering.conv_cond))
        encoded = model.route(entering._replace(tokens=model.encoder(entering.tokens, grid, entering.conv_cond)))
        packed, sel = model.chunk(encoded.tokens, encoded.prob, model.pos_embed, drop_fraction)
        inner = model.transform_and_dechunk(encoded, model.prepare(encoded), packed, sel, False)
        return entering, head, inner, model.decoder(inner, grid, entering.conv_cond)

    transformer.enable_cache(ALWAYS[cache])
    with torch.no_grad(), transformer.cache_context("cond"):
        first = transformer(x, t, y).sample
        second = transformer(other, t - 50, y, drop_fraction=0.6).sample
    with torch.no_grad():
        before, after = parts(x, t, 0.0), parts(other, t - 50, 0.6)
        if cache == "taylor":  # the inner block's output is the one of before
            decoded = model.decoder(before[2], model.config.grid, after[0].conv_cond)
        else:
            entered, left = (before[1], after[1]) if cache == "first block" else (before[0].tokens, after[0].tokens)
            decoded = left + (before[3] - entered)
        torch.testing.assert_close(first, model.project(before[3], before[0].cond))
        torch.testing.assert_close(second, model.project(decoded, after[0].cond))
    transformer._reset_stateful_cache()


@both
def test_thresholds_are_gradual(pipe):
    """More is left out at a higher threshold: a third of all changes of a run is reached twice."""
    record = []
    pipe.transformer.enable_cache(TeaCacheConfig(record=record))
    drawn(pipe, guidance_scale=1.0, num_inference_steps=8)
    pipe.transformer.disable_cache()
    counts = []
    for threshold in (0.0, sum(change for change, _ in record) / 3, math.inf):
        pipe.transformer.enable_cache(TeaCacheConfig(threshold))
        counts.append(counted(pipe, guidance_scale=1.0, num_inference_steps=8)[1]["last"])
        pipe.transformer.disable_cache()
    assert counts[0] == 8 > counts[1] > counts[2] == 1


@on_dynamic
def test_branches_have_states_of_their_own(pipe):
    transformer = pipe.transformer
    x, t, y = batch(transformer.to_dcdit().config, 2)
    transformer.enable_cache(TeaCacheConfig(threshold=0.01))
    calls = []
    handle = transformer.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for step in range(3):
            with transformer.cache_context("cond"):  # nothing changes here
                cond = transformer(x, t, y).sample
            with transformer.cache_context("uncond"):  # and everything here
                transformer(x + step, t - 100 * step, y)
    handle.remove()
    assert len(calls) == 1 + 3
    torch.testing.assert_close(cond, transformer.model(x, t, y).detach())
    transformer._reset_stateful_cache()


@both
def test_tea_cache_is_fitted(pipe):
    """The polynomial maps the recorded changes to those of the output; the last step is computed if it is known."""
    record = []
    pipe.transformer.enable_cache(TeaCacheConfig(threshold=math.inf, record=record))
    _, calls = counted(pipe, guidance_scale=3.0)
    pipe.transformer.disable_cache()
    assert calls["last"] == 2 * STEPS and len(record) == 2 * (STEPS - 1)
    seen, output = (torch.tensor(column, dtype=torch.float64) for column in zip(*record, strict=True))
    powers = torch.stack([seen**power for power in (2, 1, 0)], dim=1)
    best = torch.linalg.lstsq(powers, output[:, None]).solution[:, 0]
    fitted = torch.tensor(fit_tea_cache(record, degree=2), dtype=torch.float64)
    torch.testing.assert_close(powers @ fitted, powers @ best, rtol=1e-6, atol=1e-8)

    constant = TeaCacheConfig(threshold=2.5, coefficients=(1.0,), num_inference_steps=6)
    pipe.transformer.enable_cache(constant)  # every step counts 1: of six, the first, the fourth and the last
    assert counted(pipe, guidance_scale=1.0, num_inference_steps=6)[1]["last"] == 3


def test_what_is_refused():
    with pytest.raises(ValueError, match="threshold is -1; accepted: a number from 0"):
        TeaCacheConfig(-1)
    with pytest.raises(ValueError, match=r"coefficients are \(\); accepted: finite numbers"):
        TeaCacheConfig(coefficients=())
    with pytest.raises(ValueError, match="2 steps were recorded; accepted: more than the degree, 4"):
        fit_tea_cache([(0.1, 0.2)] * 2)
    transformer = DCDiTTransformer2DModel.from_dcdit(small_dc_dit(**PIXELS))
    transformer.enable_cache(FirstBlockCacheConfig())
    for config in (TeaCacheConfig(), MagCacheConfig(calibrate=True)):
        with pytest.raises(ValueError, match="already"):
            transformer.enable_cache(config)
    assert not StaticDiTTransformer2DModel.from_dcdit(small_dit(**PIXELS)).is_cache_enabled


@both
def test_blocks_in_the_place_of_ours_are_run(pipe):
    """As cache-dit puts them there: one that runs ours, each with the same arguments beside its input."""
    transformer, ours = pipe.transformer, pipe.transformer.blocks
    expected = drawn(pipe)

    class Around(torch.nn.Module):
        def forward(self, hidden_states, *args):
            calls.append(1)
            for block in ours:
                hidden_states = block(hidden_states, *args)
            return hidden_states

    calls = []
    transformer.blocks = torch.nn.ModuleList([Around()])
    images = drawn(pipe)
    transformer.blocks = ours
    assert len(calls) == STEPS
    assert torch.equal(images, expected) and torch.equal(drawn(pipe), expected)
    assert len(calls) == STEPS


@both
def test_lite_mode_of_taylor_seer(pipe):
    """diffusers' own name for the output layer is the one here: it is extrapolated and the blocks are left out."""
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(cache_interval=100, disable_cache_before_step=2, use_lite_mode=True)
    )
    images, calls = counted(pipe, guidance_scale=1.0)
    assert calls["last"] == 3 and images.isfinite().all()  # it computes steps 0, 1 and 3 of these four
