"""A patched DC-DiT of the reference implementation's build: same results, gradients and surroundings."""

import copy
import io
import pickle

import pytest
import torch
from support import other_dc_dit
from support.other_dc_dit import OtherDCDiT
from torch import nn

import dcdit
from dcdit import ops
from dcdit.integrations.patching import is_patched

PATCHED = {"hnet": "HNet", **{f"hnet.main_network.main_network.layers.{n}": "HNetDiTBlock" for n in range(2)}}


@pytest.fixture
def model():
    return OtherDCDiT()


@pytest.fixture(scope="module")
def inputs():
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 3, *other_dc_dit.GRID, generator=rng, dtype=torch.float64),
        torch.randn(3, 32, generator=rng, dtype=torch.float64),
    )


def run(model, inputs, drop):
    """Output, prediction and gradients of a loss that reads both."""
    model.zero_grad()
    out = model(*inputs, tail_dropping_fraction=drop)
    (prediction,) = model._last_boundary_predictions
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    ((out * weight).sum() + prediction.boundary_prob[..., 1].square().sum()).backward()
    return out, prediction, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("drop", [0.0, 0.4, torch.tensor([0.0, 0.3, 0.9])])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_results_and_gradients(model, inputs, drop, backend):
    fast = dcdit.patch(copy.deepcopy(model))
    expected, theirs, grads = run(model, inputs, drop)
    with ops.use_backend(backend):
        found, ours, fast_grads = run(fast, inputs, drop)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert type(ours) is type(theirs)
    for name, value in vars(theirs).items():
        assert getattr(ours, name).dtype == value.dtype, name
        torch.testing.assert_close(getattr(ours, name), value, rtol=1e-9, atol=1e-9)
    assert 0.1 < theirs.boundary_mask_natural.float().mean() < 0.9
    for name, grad in grads.items():
        torch.testing.assert_close(fast_grads[name], grad, rtol=1e-7, atol=1e-9, msg=name)


def test_training_takes_the_same_steps(model, inputs):
    """Twenty AdamW steps with the averaged weights of a copy, as ``train.py`` makes it."""
    pair = []
    for one in (model, dcdit.patch(copy.deepcopy(model))):
        average = copy.deepcopy(one)
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(20):
            rng = torch.Generator().manual_seed(step)
            x, noise = (torch.randn(inputs[0].shape, generator=rng, dtype=torch.float64) for _ in range(2))
            loss = (one(x, inputs[1], 0.1 * (step % 4)) - noise).square().mean()
            loss = loss + 0.03 * one._last_boundary_predictions[0].boundary_prob[..., 1].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), one.parameters(), strict=True):
                    mean.lerp_(weight, 0.1)
            losses.append(loss.item())
        pair.append((losses, average(*inputs)))
    (expected, average), (found, fast_average) = pair
    assert found == pytest.approx(expected, rel=1e-8) and expected[-1] < expected[0]
    torch.testing.assert_close(fast_average, average, rtol=1e-6, atol=1e-6)


def test_nothing_else_changes(model, inputs):
    """Names, weights, the classes that ``isinstance`` and names ask for, and the way back."""
    before, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    classes = {name: type(module) for name, module in before.items()}
    with torch.no_grad():
        expected = model(*inputs)
        assert dcdit.patch(model) is model
        assert {n: type(m).__name__ for n, m in model.named_modules() if is_patched(m)} == PATCHED
        assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        patched = {name: type(module) for name, module in model.named_modules()}
        dcdit.patch(model)
        assert {name: type(module) for name, module in model.named_modules()} == patched
        assert dcdit.unpatch(model) is model
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert torch.equal(model(*inputs), expected)
        dcdit.unpatch(model)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch"])
def test_copies_are_patched_and_their_own(model, inputs, through):
    dcdit.patch(model)
    if through == "torch":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)  # this very test wrote it
    else:
        twin = through(model)
    with torch.no_grad():
        expected = model(*inputs)
        assert torch.equal(twin(*inputs), expected)
        assert {n for n, m in twin.named_modules() if is_patched(m)} == set(PATCHED)
        for weight in twin.parameters():
            weight.add_(1)
        assert torch.equal(model(*inputs), expected)
    dcdit.unpatch(twin)
    assert any(map(is_patched, model.modules())) and not any(map(is_patched, twin.modules()))


def test_a_hook_on_a_bypassed_module_is_seen(model, inputs):
    """There its own forward runs, with the same result."""
    expected = model(*inputs)
    for name in ("routing_module", "chunk_layer", "dechunk_layer"):
        seen = []
        fast = dcdit.patch(copy.deepcopy(OtherDCDiT()))
        getattr(fast.hnet, name).register_forward_hook(lambda *args, seen=seen: seen.append(args))
        torch.testing.assert_close(fast(*inputs), expected, rtol=1e-9, atol=1e-9)
        assert len(seen) == 1
    scaled = dcdit.patch(copy.deepcopy(OtherDCDiT()))
    scaled.hnet.main_network.main_network.layers[0].norm1 = nn.LayerNorm(32, dtype=torch.float64)
    torch.nn.init.constant_(scaled.hnet.main_network.main_network.layers[0].norm1.weight, 3.0)
    assert (scaled(*inputs) - expected).abs().max() > 1e-3


def test_every_other_module_is_called(model, inputs):
    """Encoder, decoder, the convolutions of the router, the attention whose hook counts FLOPs, adaLN, MLP."""
    called = []
    dcdit.patch(model)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *args, name=name: called.append(name), always_call=False)
    model(*inputs)
    part = "hnet.main_network.main_network.layers.1"
    for name in ("hnet.encoder", "hnet.decoder", "hnet.residual_proj", "hnet.routing_module.proj", f"{part}.attn",
                 f"{part}.adaLN_modulation.1", f"{part}.mlp.fc1"):  # fmt: skip
        assert name in called
    assert model.get_submodule(f"{part}.attn")._last_attn_flops > 0


def test_compiled(model, inputs):
    """A model that is patched first can be compiled."""
    with torch.no_grad():
        expected = model(*inputs)
        compiled = torch.compile(dcdit.patch(model), backend="eager")
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-9, atol=1e-9)


def test_what_is_refused():
    nested = OtherDCDiT(stages=2)
    with pytest.raises(ValueError, match="this DC-DiT has more than one chunking stage; accepted: one"):
        dcdit.patch(nested)
    assert not any(map(is_patched, nested.modules()))
    with pytest.raises(ValueError, match="no module of Linear is known; accepted: the DC-DiT of AMD-AGI"):
        dcdit.patch(nn.Linear(2, 2))
