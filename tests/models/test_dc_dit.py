import copy
from pathlib import Path

import pytest
import torch
from support.small import batch, small_dc_dit
from torch import Tensor, nn

import dcdit.models.dc_dit as module
from dcdit import ops
from dcdit.checkpoint import load_model, save_model
from dcdit.models import DCDiT, DCDiTConfig, create_model, load_official, to_official
from dcdit.nn.memory_format import channels_last


def keeps_some(routing) -> bool:
    return all(1 < length < routing.prob.shape[1] for length in routing.selection.lengths.tolist())


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    (out * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("router", ["predictability", "dithered", "cosine2d", "cosine1d", "uniform"])
@pytest.mark.parametrize("dechunk", ["spatial", "ema"])
def test_every_variant_runs_on_both_backends(router: str, dechunk: str) -> None:
    model = small_dc_dit(router=router, dechunk=dechunk, cell_context=router == "dithered")
    inputs = batch(model.config)
    found = {}
    for backend in ("torch", "reference"):
        with ops.use_backend(backend):
            out, routing = model(*inputs, drop_fraction=0.2, return_routing=True)
            found[backend] = (out, gradients(model, out), routing)
    (out, grads, routing), (expected, expected_grads, _) = found["torch"], found["reference"]
    assert out.shape == (3, 8, 8, 12)
    assert out.is_contiguous()
    assert routing.prob.shape == routing.mask.shape == routing.natural_mask.shape == (3, 96)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        assert grad is not None, name
        torch.testing.assert_close(
            grad, expected_grads[name], rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_routing_is_the_selection() -> None:
    model = small_dc_dit()
    inputs = batch(model.config)
    rho = torch.tensor([0.0, 0.5, 0.9])
    out, routing = model(*inputs, drop_fraction=rho, return_routing=True)
    _, natural = model(*inputs, return_routing=True)
    assert keeps_some(natural)
    assert torch.equal(routing.natural_mask, routing.prob > 0.5)
    assert torch.equal(natural.mask, natural.natural_mask)
    assert torch.equal(routing.mask, routing.selection.mask)
    kept = natural.mask.sum(1)
    assert routing.mask.sum(1).tolist() == [int(n) - int(n * r) for n, r in zip(kept, rho, strict=True)]
    assert torch.equal(out, model(*inputs, drop_fraction=rho))
    assert routing.prob.requires_grad


def test_images_do_not_see_each_other() -> None:
    """Packed or alone, with its own drop fraction: the same image gives the same output."""
    model = small_dc_dit().double()
    x, t, y = batch(model.config)
    rho = torch.tensor([0.0, 0.3, 0.7])
    together = model(x, t, y, drop_fraction=rho)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], drop_fraction=float(rho[i]))
        torch.testing.assert_close(alone[0], together[i])


class PoisonedPadding(torch.autograd.Function):
    """Puts NaN into every padding row in the forward pass. In the backward pass none may arrive there."""

    @staticmethod
    def forward(ctx, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return poison(tokens, cu_seqlens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        padding = grad[cu_seqlens[-1] :]
        assert not padding.isnan().any()
        return grad, None


def poison(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    tokens = tokens.clone()
    tokens[cu_seqlens[-1] :] = float("nan")
    return tokens


@pytest.mark.parametrize(("dechunk", "cell_context"), [("spatial", False), ("ema", False), ("spatial", True)])
@pytest.mark.parametrize("poisoned", [False, True], ids=["zero padding", "NaN padding"])
def test_capacity_with_padding_is_exact_mode(dechunk: str, cell_context: bool, poisoned: bool) -> None:
    model = small_dc_dit(dechunk=dechunk, cell_context=cell_context).double()
    inputs = batch(model.config)
    out, routing = model(*inputs, drop_fraction=0.2, return_routing=True)
    assert keeps_some(routing)
    grads = gradients(model, out)

    kept = int(routing.mask.sum())
    if poisoned:

        class PoisonedBlock(module.PackedDiTBlock):
            def forward(self, x, pending, mod, varlen):
                x, (branch, gate) = super().forward(x, pending, mod, varlen)
                return x, (PoisonedPadding.apply(branch, varlen.cu_seqlens), gate)

        for block in model.blocks:
            block.__class__ = PoisonedBlock
    with_padding, padding_routing = model(*inputs, drop_fraction=0.2, capacity=kept + 13, return_routing=True)
    assert padding_routing.selection.indices.shape == (kept + 13,)
    assert int(padding_routing.selection.overflow) == 0
    assert torch.equal(padding_routing.mask, routing.mask)
    torch.testing.assert_close(with_padding, out)
    for name, grad in gradients(model, with_padding).items():
        torch.testing.assert_close(grad, grads[name], msg=lambda text, n=name: f"{n}: {text}")


def test_capacity_overflow_drops_the_least_probable() -> None:
    model = small_dc_dit()
    inputs = batch(model.config)
    _, natural = model(*inputs, return_routing=True)
    kept = int(natural.mask.sum())
    _, routing = model(*inputs, capacity=kept - 5, return_routing=True)
    assert int(routing.selection.overflow) == 5
    assert int(routing.mask.sum()) == kept - 5
    assert natural.prob[natural.mask & ~routing.mask].max() <= routing.prob[routing.mask].min()


def test_a_budget_of_the_natural_count_is_exact_mode() -> None:
    """For one image, keeping as many as the router would is keeping the same tokens."""
    model = small_dc_dit().double()
    x, t, y = (tensor[:1] for tensor in batch(model.config))
    out, routing = model(x, t, y, return_routing=True)
    kept = int(routing.mask.sum())
    budgeted, budget_routing = model(x, t, y, budget=kept, return_routing=True)
    assert torch.equal(budget_routing.mask, routing.mask)
    torch.testing.assert_close(budgeted, out)
    grads, expected = gradients(model, budgeted), gradients(model, model(x, t, y))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


def test_bfloat16_weights_and_autocast_stay_close() -> None:
    model = small_dc_dit()
    inputs = batch(model.config)
    # Every token is kept. Otherwise rounding could select another token where p is near one half: a large difference.
    budget = 96
    exact, routing = model(*inputs, budget=budget, return_routing=True)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, autocast_routing = model(*inputs, budget=budget, return_routing=True)
        grads = gradients(model, autocast)
    half = copy.deepcopy(model).bfloat16()
    converted, half_routing = half(*inputs, budget=budget, return_routing=True)
    assert autocast.dtype == converted.dtype == torch.bfloat16
    assert routing.prob.dtype == autocast_routing.prob.dtype == half_routing.prob.dtype == torch.float32
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and grad.isfinite().all(), name
    for other in (autocast_routing, half_routing):
        assert (other.prob - routing.prob).abs().max() < 0.05
    for out in (autocast, converted):
        assert ((out.float() - exact).norm() / exact.norm()).item() < 0.05


def test_parameters_are_contiguous_and_channels_last_changes_no_bit(tmp_path: Path) -> None:
    """``fully_shard`` takes contiguous parameters only, whether a model is created, loaded or converted."""
    model = small_dc_dit()
    save_model(tmp_path / "model.safetensors", model)
    official = load_official(to_official(small_dc_dit(grid=(8, 8))), num_heads=4)
    for each in (model, load_model(tmp_path / "model.safetensors"), official):
        assert all(parameter.is_contiguous() for parameter in each.parameters())
    inputs = batch(model.config)
    expected = model(*inputs)
    assert torch.equal(channels_last(model)(*inputs), expected)
    assert not model.encoder.blocks[0].conv1.weight.is_contiguous()


def test_null_class() -> None:
    model = small_dc_dit(num_classes=5)
    x, t, _ = batch(model.config)
    null = torch.full((3,), 5)
    out = model(x, t, null)
    with torch.no_grad():
        model.y_embedder.table.weight[5] += 1.0
    assert not torch.allclose(model(x, t, null), out)
    with pytest.raises(ValueError, match="0 to 5 \\(5 is the null class\\)"):
        model(x, t, null + 1)


def test_labels_drop_in_training_only() -> None:
    model = small_dc_dit(class_dropout_prob=0.99).train()
    x, t, y = batch(model.config)
    torch.manual_seed(0)
    torch.testing.assert_close(model(x, t, y), model(x, t, torch.full((3,), 10)))
    assert not torch.allclose(model.eval()(x, t, y), model(x, t, torch.full((3,), 10)))


def test_pixels_without_sigma() -> None:
    model = small_dc_dit(in_channels=3, learn_sigma=False, grid=(6, 5))
    x, t, y = batch(model.config)
    assert model(x, t, y).shape == (3, 3, 6, 5)


def test_empty_batch() -> None:
    model = small_dc_dit()
    x, t, y = batch(model.config)
    out, routing = model(x[:0], t[:0], y[:0], return_routing=True)
    assert out.shape == (0, 8, 8, 12)
    assert routing.prob.shape == (0, 96)


def test_conditioning_adaptor_touches_encoder_and_decoder_only() -> None:
    model = small_dc_dit(adapt_conditioning=True)
    seen: dict[str, Tensor] = {}
    for name in ("encoder", "decoder", "final_layer", "modulation"):
        getattr(model, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[-1]}))
    x, t, y = batch(model.config)
    model(x, t, y)
    embedded = model.t_embedder(t) + model.y_embedder(y)
    adapted = nn.functional.silu(model.cond_adaptor(embedded))
    for name, cond in seen.items():
        expected = adapted if name in ("encoder", "decoder") else nn.functional.silu(embedded)
        torch.testing.assert_close(cond, expected)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(grid=(8, 8), hidden_size=256, depth=2, num_heads=4))
    for layer in (model.modulation.linear, model.final_layer.modulation, model.final_layer.linear, model.residual_proj):
        assert not layer.weight.any() and not layer.bias.any()
    assert model.router.out.bias.item() == pytest.approx(-1.1)
    for weight in (model.t_embedder.fc1.weight, model.t_embedder.fc2.weight, model.y_embedder.table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for linear in (model.blocks[0].qkv, model.blocks[1].fc2, model.encoder.blocks[0].cond_proj):
        xavier = (6 / sum(linear.weight.shape)) ** 0.5
        assert linear.weight.abs().max().item() == pytest.approx(xavier, rel=0.01)
        assert not linear.bias.any()
    patch = (6 / (4 * 9 + 64)) ** 0.5
    assert model.x_embedder.weight.abs().max().item() == pytest.approx(patch, rel=0.01)
    # Projections that are 1x1 convolutions there keep the convolution's default.
    for linear in (model.router.proj, model.encoder.blocks[1].skip):
        default = linear.weight.shape[1] ** -0.5
        assert linear.weight.abs().max().item() == pytest.approx(default, rel=0.01)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1, 2])
    assert not model(x, t, y).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 3, 8, 12)}, r"x has shape \(3, 3, 8, 12\); accepted: \(B, 4, 8, 12\)"),
        ({"x": torch.zeros(3, 4, 12, 8)}, r"accepted: \(B, 4, 8, 12\)"),
        ({"x": torch.zeros(4, 8, 12)}, r"accepted: \(B, 4, 8, 12\)"),
        ({"t": torch.zeros(2)}, r"t has shape \(2\); accepted: \(3,\)"),
        ({"y": torch.zeros(3, 1, dtype=torch.long)}, r"y has shape \(3, 1\)"),
        ({"y": torch.zeros(3)}, "y has dtype torch.float32; accepted: int64 or int32"),
        ({"y": torch.tensor([0, 1, 11])}, "y holds labels 0 to 11; accepted: 0 to 10"),
        ({"y": torch.tensor([-1, 1, 1])}, "y holds labels -1 to 1"),
        ({"drop_fraction": 1.0}, r"drop_fraction is 1.0; accepted: a number in \[0, 1\)"),
        ({"drop_fraction": torch.zeros(2)}, "drop_fraction has shape"),
        ({"budget": 97}, "budget is 97"),
        ({"capacity": 2}, "capacity is 2"),
        ({"budget": 5, "drop_fraction": 0.1}, "excludes drop_fraction"),
    ],
)
def test_bad_inputs(change: dict, message: str) -> None:
    model = small_dc_dit()
    x, t, y = batch(model.config)
    with pytest.raises(ValueError, match=message):
        model(**{"x": x, "t": t, "y": y, **change})


@pytest.mark.parametrize(("name", "value"), [("x", [[0.0]]), ("t", 500), ("y", [1, 2, 3])])
def test_what_is_no_tensor(name: str, value: object) -> None:
    inputs = {"x": torch.zeros(3, 4, 8, 12), "t": torch.zeros(3), "y": torch.tensor([0, 1, 2]), name: value}
    with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}; accepted: a tensor"):
        small_dc_dit(grid=(8, 12))(**inputs)


@pytest.mark.parametrize("mode", [{"budget": 30}, {"capacity": 200}], ids=["budget", "capacity"])
@torch.no_grad()
def test_one_graph(mode: dict) -> None:
    """The modes of static shape compile without a break."""
    model = small_dc_dit(depth=1)
    inputs = batch(model.config)
    expected = model(*inputs, **mode)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs, **mode), expected)


def test_state_dict_loads_into_a_preset_of_the_same_sizes() -> None:
    model = create_model("DC-DiT-S", image_size=(64, 96), num_classes=10, hidden_size=128, depth=2, num_heads=4)
    model.load_state_dict(small_dc_dit().state_dict())
