"""DyDiT and DC-DiT with dynamic width: what is skipped equals what is masked, and costs what is counted."""

import pytest
import torch
from support.small import SIZES, batch, small_dc_dit, small_dit, small_dy_dit, small_dynamic_dc_dit
from support.stages import counted_stages

from dcdit import ops
from dcdit.checkpoint import load_model, save_model
from dcdit.models import DCDiTConfig, DyDiT, DyDiTConfig, SlicedModel, count_flops, create_config, create_model
from dcdit.models.convert import to_official
from dcdit.models.flops import SOFTMAX_FLOPS, flops_share
from dcdit.models.upcycle import upcycle
from dcdit.nn import Gates
from dcdit.nn.gates import logistic_noise

TIMES = (0, 3, 250, 500, 999)
MODELS = {"dydit": small_dy_dit, "dc-dit": small_dynamic_dc_dit}
ASK = {"dydit": "return_gates", "dc-dit": "return_routing"}


def gates_of(kind: str, said) -> Gates:
    return said if kind == "dydit" else said.gates


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_sliced_equals_masked(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]().to(dtype)
    x, _, y = batch(model.config)
    x = x.to(dtype)
    sliced = SlicedModel(model, TIMES)
    seen = set()
    for time in TIMES:
        t = torch.full((3,), time)
        masked, said = model(x, t, y, **{ASK[kind]: True})
        ours, told = sliced(x, t, y, **{ASK[kind]: True})
        torch.testing.assert_close(ours, masked)
        for theirs, mine in zip(gates_of(kind, said), gates_of(kind, told), strict=True):
            assert (theirs is None and mine is None) or torch.equal(theirs, mine)
        seen.add(tuple(gates_of(kind, said).heads[0].flatten().tolist()))
    assert len(seen) > 1, "the widths never changed"


@torch.no_grad()
def test_routing_options_reach_a_sliced_dc_dit() -> None:
    model = small_dynamic_dc_dit()
    x, _, y = batch(model.config)
    t = torch.full((3,), 250)
    sliced = SlicedModel(model, TIMES)
    for options in ({"drop_fraction": 0.4}, {"budget": 7}, {"capacity": 200, "max_seqlen": 50}):
        torch.testing.assert_close(sliced(x, t, y, **options), model(x, t, y, **options))


@torch.no_grad()
def test_masked_heads_and_groups_have_no_effect() -> None:
    """What a gate closes may hold anything: its weights are out of the result."""
    for kind, create in MODELS.items():
        model = create(depth=1)
        x, _, y = batch(model.config)
        t = torch.full((3,), 500)
        out, said = model(x, t, y, **{ASK[kind]: True})
        gates, block = gates_of(kind, said), model.blocks[0]
        for gate, layer in ((gates.heads, block.proj), (gates.groups, block.fc2)):
            is_open = gate[0, 0].repeat_interleave(layer.in_features // gate.shape[2]).bool()
            assert not is_open.all()
            layer.weight[:, ~is_open] = 1e3
        torch.testing.assert_close(model(x, t, y), out)


@torch.no_grad()
def test_steps_share_slices_and_open_gates_take_no_memory() -> None:
    model = small_dy_dit()
    few, many = SlicedModel(model, [500]), SlicedModel(model, [500, 500.0, 500])
    assert 0 < few.nbytes == many.nbytes < SlicedModel(model, TIMES).nbytes
    gates = model.width_gates(model.t_embedder(torch.tensor([500.0]))).counts()
    width, hidden = 128 // 4, 512 // 4
    # Rows with their bias in front of what is cut, columns behind it, whose bias is no copy.
    numbers = sum(
        (heads < 4) * heads * width * (3 * 129 + 128) + (groups < 4) * groups * hidden * (129 + 128)
        for heads, groups in zip(gates.heads[0].tolist(), gates.groups[0].tolist(), strict=True)
    )
    assert few.nbytes == 4 * numbers
    torch.nn.init.constant_(model.width_gates.linear.bias, 1e4)
    assert SlicedModel(model, TIMES).nbytes == 0


@torch.no_grad()
def test_images_at_several_times_are_masked_each_by_its_own() -> None:
    model = small_dy_dit().double()
    x, t, y = batch(model.config)
    together = model(x.double(), t, y)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1].double(), t[i : i + 1], y[i : i + 1])[0], together[i])


@torch.no_grad()
def test_the_complete_model_is_the_static_dit() -> None:
    source = small_dit()
    model = small_dy_dit()
    gate = model.width_gates.linear.weight.clone()
    upcycle(model, source)
    inputs = batch(model.config)
    assert torch.equal(model(*inputs, complete=True), source(*inputs))
    assert torch.equal(model.width_gates.linear.weight, gate)
    fresh = DyDiT(model.config).eval()  # gates that are all open
    upcycle(fresh, source)
    torch.testing.assert_close(fresh(*inputs), source(*inputs))
    with pytest.raises(ValueError, match="has patch_size 4, the DyDiT 2"):
        upcycle(model, small_dit(patch_size=4))


def test_every_weight_gets_a_gradient() -> None:
    for kind, create in MODELS.items():
        model = create().train()
        out, said = model(*batch(model.config), **{ASK[kind]: True})
        gates = gates_of(kind, said)
        (out.square().mean() + sum(gate.mean() for gate in gates if gate is not None)).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == [], kind


def test_the_diffusion_loss_alone_reaches_the_gates() -> None:
    for create in MODELS.values():
        model = create().train()
        model(*batch(model.config)).square().mean().backward()
        assert model.width_gates.linear.weight.grad.abs().sum() > 0
        for gate in getattr(model, "token_gates", ()):
            assert gate.fc1.weight.grad.abs().sum() > 0


def test_noise_decides_in_training() -> None:
    for create in MODELS.values():
        model = create().train()
        model.y_embedder.dropout_prob = 0.0
        inputs = batch(model.config)
        generator = torch.Generator().manual_seed(0)
        noise = [logistic_noise((3, *model.config.gate_shape), torch.device("cpu"), generator) for _ in range(2)]
        first, again, other = (model(*inputs, gate_noise=one) for one in (noise[0], noise[0], noise[1]))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_gradient_checkpointing_changes_nothing() -> None:
    for create in MODELS.values():
        gradients = []
        for recompute in (False, True):
            model = create().train()
            model.y_embedder.dropout_prob = 0.0
            model.gradient_checkpointing = recompute
            noise = logistic_noise((3, *model.config.gate_shape), torch.device("cpu"), torch.Generator().manual_seed(0))
            model(*batch(model.config), gate_noise=noise).square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_flops_of_a_sliced_model_match_pytorchs_counter(kind: str) -> None:
    model = MODELS[kind](**({"dechunk": "ema"} if kind == "dc-dit" else {}))
    x, _, y = batch(model.config)
    t = torch.full((3,), 250)
    sliced = SlicedModel(model, TIMES)
    options = {} if kind == "dydit" else {"budget": 17}
    with ops.use_backend("reference"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = counted_stages(lambda: sliced(x, t, y, **options))
        _, said = sliced(x, t, y, **options, **{ASK[kind]: True})
    counts = gates_of(kind, said).counts()
    ours = count_flops(model.config, options.get("budget"), 3, counts)
    length = 17 if options else model.config.tokens
    # The papers add 3 FLOPs per attention score for the softmax; PyTorch counts the two products only.
    ours["transformer"] -= int(counts.heads.sum()) * length**2 * SOFTMAX_FLOPS
    assert counted == {name: ours[name] for name in counted}
    assert ours["transformer"] < count_flops(model.config, options.get("budget"), 3)["transformer"]
    assert {name for name, flops in ours.items() if flops} - {"total"} <= counted.keys()


def test_the_share_of_the_flops_is_that_of_the_counts() -> None:
    """Against counted FLOPs of whole models, without the layers that no gate can close."""
    model = small_dy_dit()
    with torch.no_grad():
        _, gates = model(*batch(model.config), return_gates=True)
    share = flops_share(model.config, gates)
    complete = count_flops(model.config)["transformer"]
    adaln = model.config.depth * 2 * 128 * 6 * 128
    for image in range(3):
        counts = type(gates.counts())(*(count[image : image + 1] for count in gates.counts()))
        kept = count_flops(model.config, gates=counts)["transformer"]
        assert share[image].item() == pytest.approx((kept - adaln) / (complete - adaln), rel=1e-5)


def test_a_share_by_hand() -> None:
    """D = 8, 2 heads, L = 4, one block. Attention 2*4*8*32 + 2*16*(16 + 3) = 2656 FLOPs, MLP 2*4*8*32*2 = 4096."""
    config = DyDiTConfig(grid=(4, 4), hidden_size=8, depth=1, num_heads=2)
    heads, groups = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    tokens = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    share = flops_share(config, Gates(heads, groups, tokens))
    assert share.item() == pytest.approx((2656 / 2 + 4096 / 4) / (2656 + 4096))


@pytest.mark.parametrize("kind", MODELS)
def test_checkpoints(kind: str, tmp_path) -> None:
    model = MODELS[kind]()
    save_model(tmp_path / "m.safetensors", model)
    loaded = load_model(tmp_path / "m.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config
    inputs = batch(model.config)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_presets() -> None:
    with torch.device("meta"):
        model = create_model("DyDiT-S/2")
        static = create_model("DiT-S/2")
        dynamic = create_model("DC-DiT-S", dynamic_width=True)
    assert isinstance(model, DyDiT) and model.config.gate_shape == (12, 10 + 256)
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in static.parameters())
    assert extra == 12 * (10 * 385 + 384 * 24 + 24 + 24 + 1)
    assert dynamic.config.gate_shape == (12, 10)
    assert create_config("DC-DiT-S").gate_shape is None and create_config("DiT-S/2").gate_shape is None


@torch.no_grad()
def test_bad_use() -> None:
    model, static = small_dy_dit(), small_dit()
    x, t, y = batch(model.config)
    sliced = SlicedModel(model, TIMES)
    for wrong in (t, torch.full((3,), 7)):
        with pytest.raises(ValueError, match="one of the 5 timesteps that the model is sliced for"):
            sliced(x, wrong, y)
    with pytest.raises(ValueError, match="DiT has a fixed width"):
        SlicedModel(static, TIMES)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        SlicedModel(small_dy_dit().train(), TIMES)
    with pytest.raises(ValueError, match="times are empty"):
        SlicedModel(model, [])
    with pytest.raises(ValueError, match="which uses no gates"):
        model(x, t, y, complete=True, return_gates=True)
    with pytest.raises(ValueError, match=r"gate_noise has shape \(3, 1\); accepted: \(3, 2, 30\)"):
        model(x, t, y, gate_noise=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="are for dynamic_width=True"):
        small_dc_dit()(x, t, y, complete=True)
    with pytest.raises(ValueError, match="one set for each image of a model"):
        count_flops(model.config, batch=2, gates=model(x, t, y, return_gates=True)[1].counts())
    with pytest.raises(ValueError, match="the reference implementation has no gates"):
        to_official(small_dynamic_dc_dit())
    with pytest.raises(ValueError, match="num_heads is 1; accepted with dynamic width: at least 2"):
        DyDiTConfig(grid=(8, 8), **{**SIZES, "num_heads": 1})
    with pytest.raises(ValueError, match="129 hidden units fall into num_heads = 4"):
        DCDiTConfig(grid=(8, 8), dynamic_width=True, mlp_ratio=129 / 128, **SIZES)
    handle = model.blocks[1].fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks.1.fc1 is a Linear that may do more"):
        SlicedModel(model, TIMES)
    handle.remove()
    model.blocks[0].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks.0 has hooks"):
        SlicedModel(model, TIMES)
