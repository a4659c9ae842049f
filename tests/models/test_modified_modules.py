"""Every layer of a model can be hooked, reparametrised and replaced, and what was put there has its effect."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support import unwritten
from support.small import batch, small_dc_dit, small_dit
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import remove_spectral_norm, spectral_norm
from torch.nn.utils.weight_norm import remove_weight_norm, weight_norm

from dcdit.nn import ConvBlock, PredictabilityRouter, linear_gelu

# A group norm of one channel per group would remove what the conditioning adds, so there are two.
SMALL = {"grid": (4, 6), "depth": 1, "hidden_size": 256}
VARIANTS = {
    "predictability": lambda: small_dc_dit(**SMALL, adapt_conditioning=True),
    "cosine2d": lambda: small_dc_dit(**SMALL, router="cosine2d"),
    "cosine1d": lambda: small_dc_dit(**SMALL, router="cosine1d", dechunk="ema"),
    "static": lambda: small_dit(**SMALL),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str) -> nn.Module:
    """In float64, so that another order of the same sums neither selects other tokens nor hides a difference."""
    model = VARIANTS[variant]().double()
    if variant.startswith("cosine"):
        # With identity projections hardly any token is kept, and of a single token p does not matter.
        nn.init.normal_(model.router.query.weight)
    return model


def call(model: nn.Module, config) -> Tensor:
    x, t, y = batch(config, size=2)
    return model(x, t, y)


def backward(out: Tensor) -> None:
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number. Rounding makes 1e-13 of it."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def layers(model: nn.Module, kinds=(nn.Linear, nn.Conv2d), at_least: int = 10) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert len(names) >= at_least
    return names


def with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def stretched(x: Tensor) -> Tensor:
    """Another factor for each number, because one factor for all would not change a cosine."""
    return x * torch.linspace(1, 2, x.numel(), dtype=x.dtype).view(x.shape)


def stretch(module, args, out):
    """A hook. It is a function of this file so that it can be pickled."""
    return stretched(out)


@every_variant
def test_hooks_that_observe_see_every_module_and_change_nothing(variant):
    model = build(variant)
    expected = call(model, model.config)
    backward(expected)
    expected_gradients = gradients(model)
    model.zero_grad()
    before, after, back = Counter(), Counter(), Counter()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: before.update([name]))
        module.register_forward_hook(lambda *_, name=name: after.update([name]))
        if name in with_parameters(model):
            module.register_full_backward_hook(lambda *_, name=name: back.update([name]))
    out = call(model, model.config)
    backward(out)
    called = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert before == after == Counter(called)
    assert back == Counter(with_parameters(model).keys())
    assert difference(out, expected) < 1e-9
    for name, grad in gradients(model).items():
        assert difference(grad, expected_gradients[name]) < 1e-9, name


@every_variant
def test_global_hooks_see_every_module(variant):
    model = build(variant)
    expected, seen = call(model, model.config), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert difference(call(model, model.config), expected) < 1e-9
    finally:
        handle.remove()
    assert set(with_parameters(model).values()) <= set(seen)
    assert torch.equal(call(model, model.config), expected)


@every_variant
@torch.no_grad()
def test_a_changed_output_of_any_module_changes_the_result(variant):
    model = build(variant)
    expected = call(model, model.config)
    for name, module in with_parameters(model).items():
        if module is model or name == "router":  # a hook of these two always ran
            continue
        handle = module.register_forward_hook(stretch)
        assert difference(call(model, model.config), expected) > 1e-7, name
        handle.remove()
    assert torch.equal(call(model, model.config), expected)


@torch.no_grad()
def test_a_changed_gradient_of_any_module_reaches_what_is_before_it():
    model = build("predictability").requires_grad_(False)
    weight = model.x_embedder.weight.requires_grad_()
    with torch.enable_grad():
        backward(call(model, model.config))
    expected = weight.grad.clone()
    for name in ("encoder.blocks.0.conv1", "router.predictor", "router.norm", "router.out", "decoder.blocks.1.conv1"):
        module, weight.grad = model.get_submodule(name), None
        handle = module.register_full_backward_hook(lambda _, before, after: tuple(2 * grad for grad in before))
        with torch.enable_grad():
            backward(call(model, model.config))
        assert difference(weight.grad, expected) > 1e-7, name
        handle.remove()


def test_a_class_patched_for_the_whole_process(monkeypatch):
    """Some web interfaces apply LoRA by replacing the forward of PyTorch's classes."""
    model, seen = build("predictability"), []

    def observed(original):
        def forward(self, *args):
            seen.append(self)
            return original(self, *args)

        return forward

    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm)
    for kind in kinds:
        monkeypatch.setattr(kind, "forward", observed(kind.forward))
    call(model, model.config)
    assert set(seen) == {module for module in model.modules() if type(module) in kinds}


class Adapter(nn.Module):
    """A low-rank adapter. It has no attribute ``weight``: nothing but calling it is right."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
            up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        else:
            down, up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.down, self.up = down.to(base.weight.dtype), up.to(base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Module:
        product = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        base = copy.deepcopy(self.base)
        base.weight.data += product.view_as(base.weight)
        return base


@torch.no_grad()
def check_effect(weight: Tensor, model: nn.Module, config, before: Tensor, name: str) -> None:
    found = weight.clone()
    weight.copy_(stretched(weight))
    assert difference(call(model, config), before) > 1e-7, name
    weight.copy_(found)


@every_variant
def test_adapters_on_every_layer(variant):
    model = build(variant)
    names = layers(model)
    torch.manual_seed(0)
    for name in names:
        replace(model, name, Adapter(model.get_submodule(name)))
    out = call(model, model.config)
    backward(out)
    merged = copy.deepcopy(model)
    for name in names:
        adapter = model.get_submodule(name)
        for weight in (adapter.up.weight, adapter.down.weight):
            assert weight.grad is not None and weight.grad.any(), name
        check_effect(adapter.up.weight, model, model.config, out, name)
        replace(merged, name, merged.get_submodule(name).merged())
    assert difference(call(merged, model.config), out) < 1e-9


@pytest.mark.parametrize(("variant", "dora"), [*((variant, False) for variant in VARIANTS), ("predictability", True)])
def test_peft_on_every_layer(variant, dora):
    peft = pytest.importorskip("peft")
    model = build(variant)
    expected = call(model, model.config)
    names = layers(model, (nn.Linear, nn.Conv2d, nn.Embedding))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False, use_dora=dora)
    adapted = peft.get_peft_model(model, config).double().eval()
    out = call(adapted, model.config)
    backward(out)
    trainable = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(trainable) == (3 if dora else 2) * len(names)
    for name, weight in trainable.items():
        assert weight.grad is not None and weight.grad.any(), name
        if "lora_B" in name:
            check_effect(weight, adapted, model.config, out, name)
    with adapted.disable_adapter():
        assert difference(call(adapted, model.config), expected) < 1e-9
    assert difference(call(adapted.merge_and_unload(), model.config), out) < 1e-9


# --- what only inference on a GPU takes -----------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """GELU inside the product, and attention that leaves padding rows unwritten. Holds results of the former."""
    results: list[Tensor] = []

    def product(bias: Tensor, x: Tensor, weight: Tensor, use_gelu: bool) -> Tensor:
        results.append(F.gelu(torch.addmm(bias, x, weight), approximate="tanh"))
        return results[-1]

    monkeypatch.setattr(linear_gelu, "_is_on_cuda", lambda x: True)
    monkeypatch.setattr(linear_gelu, "DTYPES", (torch.float64,))
    monkeypatch.setattr(torch, "_addmm_activation", product)
    unwritten.install(monkeypatch)
    return results


def infer(model: nn.Module) -> Tensor:
    """With padding rows, where the model can have them."""
    x, t, y = batch(model.config, size=2)
    return model(x, t, y) if type(model).__name__ == "DiT" else model(x, t, y, capacity=48)


@pytest.mark.parametrize("variant", ["predictability", "static"])
@torch.no_grad()
def test_inference_on_a_gpu_sees_hooks(variant: str, fused: list[Tensor]) -> None:
    model = build(variant)
    with pytest.MonkeyPatch.context() as undone:
        undone.setattr(linear_gelu, "_is_on_cuda", lambda x: False)
        two_steps = infer(model)
    assert not fused
    expected = infer(model)
    assert len(fused) == 1 and difference(expected, two_steps) < 1e-9
    for name, module in with_parameters(model.blocks).items():
        handle = module.register_forward_hook(stretch)
        assert difference(infer(model), expected) > 1e-7, name
        handle.remove()
    fused.clear()
    handle = register_module_forward_hook(lambda *_: None)
    infer(model)
    handle.remove()
    assert not fused


@pytest.mark.parametrize("variant", ["predictability", "static"])
@torch.no_grad()
def test_inference_on_a_gpu_with_adapters(variant: str, fused: list[Tensor]) -> None:
    model = build(variant)
    names = [f"blocks.{name}" for name in layers(model.blocks, nn.Linear, at_least=4)]
    torch.manual_seed(0)
    for name in names:
        replace(model, name, Adapter(model.get_submodule(name)))
    out = infer(model)
    assert not fused
    for name in names:
        replace(model, name, model.get_submodule(name).merged())
    assert difference(infer(model), out) < 1e-9
    assert len(fused) == 1


def remove_parametrization(module: nn.Module) -> None:
    parametrize.remove_parametrizations(module, "weight")


REPARAMETRISATIONS = {
    "weight_norm, by a hook": (weight_norm, remove_weight_norm),
    "spectral_norm, by a hook": (spectral_norm, remove_spectral_norm),
    "weight_norm": (parametrizations.weight_norm, remove_parametrization),
    "spectral_norm": (parametrizations.spectral_norm, remove_parametrization),
    "prune": (
        lambda module: prune.custom_from_mask(module, "weight", torch.rand_like(module.weight) > 0.3),
        lambda module: prune.remove(module, "weight"),
    ),
}


@every_variant
@pytest.mark.parametrize("kind", REPARAMETRISATIONS)
def test_reparametrised_weights(variant, kind):
    apply, remove = REPARAMETRISATIONS[kind]
    model, baked = build(variant), build(variant)
    for name in layers(model):
        torch.manual_seed(0)
        apply(model.get_submodule(name))
        torch.manual_seed(0)
        apply(baked.get_submodule(name))
        remove(baked.get_submodule(name))
    assert difference(call(model, model.config), call(baked, model.config)) < 1e-9
    model.train()
    for _ in range(2):
        model.zero_grad()
        backward(call(model, model.config))
        assert all(parameter.grad is not None for parameter in model.parameters())


class Counted(nn.Module):
    """A parametrisation that counts how often the weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.times += 1
        return 1.5 * weight


@every_variant
def test_a_parametrised_weight_is_computed_once_in_a_forward_pass(variant):
    """A second time would advance the power iteration of spectral_norm twice."""
    model = build(variant)
    counts = {name: Counted() for name in layers(model)}
    for name, count in counts.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", count)
        count.times = 0
    call(model, model.config)
    assert {name: count.times for name, count in counts.items()} == dict.fromkeys(counts, 1)


@every_variant
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_hooks_and_adapters(variant, copied):
    model = build(variant)
    plain = call(model, model.config)
    assert torch.equal(call(copied(model), model.config), plain)
    for index, name in enumerate(layers(model)):
        module = model.get_submodule(name)
        replace(model, name, Adapter(module)) if index % 2 else module.register_forward_hook(stretch)
    changed = call(model, model.config)
    assert difference(changed, plain) > 1e-7
    assert torch.equal(call(copied(model), model.config), changed)


@torch.no_grad()
def test_one_graph_for_all_calls_and_another_after_a_replacement():
    torch.manual_seed(0)
    router, x = PredictabilityRouter(32, (4, 6)).double(), torch.randn(2, 24, 32).double()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(router, fullgraph=True, backend=counter)
    for _ in range(3):
        assert difference(compiled(x), router(x)) < 1e-9  # the compiler sums over channels in another order
    assert counter.frame_count == 1
    for graphs, name in enumerate(("predictor", "out"), 2):
        before = router(x)
        replace(router, name, Adapter(router.get_submodule(name)))
        for _ in range(2):
            assert difference(compiled(x), before) > 1e-7 and difference(compiled(x), router(x)) < 1e-9
        assert counter.frame_count == graphs


@torch.no_grad()
def test_hooks_are_in_the_graph():
    torch.manual_seed(0)
    block, x, cond = ConvBlock(64, 64, 16).double(), torch.randn(2, 64, 4, 6).double(), torch.randn(2, 16).double()
    before = block(x, cond)
    block.conv1.register_forward_hook(stretch)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=CompileCounter())
    assert difference(compiled(x, cond), before) > 1e-7 and difference(compiled(x, cond), block(x, cond)) < 1e-9


@torch.no_grad()
def test_circular_padding():
    """Images that tile: people set the padding mode of every convolution."""
    model = build("predictability")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    block, router = model.encoder.blocks[0], model.router
    x, cond = torch.randn(2, 64, 4, 6).double(), torch.randn(2, 256).double()
    moved = torch.roll(block(x, cond), (1, 2), (2, 3))
    torch.testing.assert_close(block(torch.roll(x, (1, 2), (2, 3)), cond), moved)
    z = torch.randn(2, 64, 4, 6).double()
    moved = torch.roll(router.prediction_error(z), (1, 2), (2, 3))
    torch.testing.assert_close(router.prediction_error(torch.roll(z, (1, 2), (2, 3))), moved)
