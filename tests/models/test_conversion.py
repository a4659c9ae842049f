"""Checkpoints of other code bases: numerical agreement, lossless round trips, clear refusals."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.golden import NUM_HEADS, Golden
from support.small import batch, randomize_zero_weights, small_dc_dit, small_dit
from torch import Tensor

from dcdit.models import DiT, load_dit, load_official, to_dit, to_official


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


# --- facebookresearch/DiT -----------------------------------------------------------------------------------------


def facebook_forward(state: dict[str, Tensor], heads: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """DiT (arXiv 2212.09748) written against the names of a facebookresearch/DiT state dict."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patch = state["x_embedder.proj.weight"].shape[-1]
    x = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    rows, cols = x.shape[2:]
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    angles = t[:, None].double() * 10000.0 ** -(torch.arange(128) / 128).double()
    features = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
    cond = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", features)))
    cond = F.silu(cond + state["y_embedder.embedding_table.weight"][y])
    block = 0
    while f"blocks.{block}.attn.qkv.weight" in state:
        name = f"blocks.{block}"
        rows6 = linear(f"{name}.adaLN_modulation.1", cond).chunk(6, dim=1)
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2)
            for part in linear(f"{name}.attn.qkv", modulated(x, *rows6[:2])).chunk(3, dim=2)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        attended = linear(f"{name}.attn.proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + rows6[2][:, None] * attended
        hidden = F.gelu(linear(f"{name}.mlp.fc1", modulated(x, *rows6[3:5])), approximate="tanh")
        x = x + rows6[5][:, None] * linear(f"{name}.mlp.fc2", hidden)
        block += 1
    x = linear("final_layer.linear", modulated(x, *linear("final_layer.adaLN_modulation.1", cond).chunk(2, dim=1)))
    return torch.einsum("bhwpqc->bchpwq", x.view(len(x), rows, cols, patch, patch, -1)).flatten(4).flatten(2, 3)


def test_facebook_layout_matches_the_definition() -> None:
    state = to_dit(small_dit(grid=(8, 8)).double())
    state = {key: torch.randn_like(value) * 0.1 if "embedding_table" in key else value for key, value in state.items()}
    model = load_dit(state, num_heads=4).eval()
    assert model.config == small_dit(grid=(8, 8)).config
    inputs = batch(model.config)
    expected = facebook_forward(state, 4, inputs[0].double(), *inputs[1:])
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert_same_state(to_dit(model), state)


def test_facebook_keys_are_those_of_the_published_checkpoints() -> None:
    keys = set(to_dit(small_dit(depth=1)))
    assert keys == {
        "pos_embed",
        *(f"x_embedder.proj.{part}" for part in ("weight", "bias")),
        *(f"t_embedder.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
        "y_embedder.embedding_table.weight",
        *(f"blocks.0.{layer}.{part}" for layer in ("attn.qkv", "attn.proj") for part in ("weight", "bias")),
        *(f"blocks.0.{layer}.{part}" for layer in ("mlp.fc1", "mlp.fc2") for part in ("weight", "bias")),
        *(f"blocks.0.adaLN_modulation.1.{part}" for part in ("weight", "bias")),
        *(f"final_layer.{layer}.{part}" for layer in ("linear", "adaLN_modulation.1") for part in ("weight", "bias")),
    }


# --- diffusers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_model():
    transformer = pytest.importorskip("diffusers.models.transformers.dit_transformer_2d")
    torch.manual_seed(0)
    model = transformer.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    randomize_zero_weights(model)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def trained_in_diffusers(diffusers_model):
    model = copy.deepcopy(diffusers_model)
    torch.manual_seed(1)
    for name, parameter in model.transformer_blocks[1].norm1.emb.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "embedding_table" in name else 0.1)
    return model


def test_diffusers_layout_matches_diffusers(diffusers_model) -> None:
    state = diffusers_model.state_dict()
    model = load_dit(state, num_heads=4, grid=(8, 8)).eval()
    x, t, y = batch(model.config)
    y[0] = 10  # the null class
    expected = diffusers_model(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(to_dit(model, "diffusers"), state)


def test_the_two_conventions_differ_by_what_is_documented(diffusers_model) -> None:
    """Weights stored by diffusers, run as the original: the frequencies and one eps are all that changes."""
    state = diffusers_model.state_dict()
    original = load_dit(state, num_heads=4, grid=(8, 8), frequency_shift=0, mlp_norm_eps=1e-6).eval()
    x, t, y = batch(original.config)
    torch.testing.assert_close(load_dit(to_dit(original), num_heads=4).eval()(x, t, y), original(x, t, y))
    theirs = diffusers_model(x, timestep=t, class_labels=y).sample
    assert not torch.allclose(original(x, t, y), theirs, rtol=1e-4, atol=1e-5)


def test_diffusers_needs_a_grid(diffusers_model) -> None:
    with pytest.raises(ValueError, match=r"diffusers stores no position table; accepted: grid=\(sample_size"):
        load_dit(diffusers_model.state_dict(), num_heads=4)


def test_blocks_that_diffusers_trained_have_embedders_of_their_own(trained_in_diffusers) -> None:
    """Their timestep and class embedders differ from block to block, and the final layer reads the first one's."""
    state = trained_in_diffusers.state_dict()
    model = load_dit(state, num_heads=4, grid=(8, 8)).eval()
    assert model.config.separate_embedders
    x, t, y = batch(model.config)
    y[0] = 10  # the null class
    expected = trained_in_diffusers(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(to_dit(model, "diffusers"), state)
    with pytest.raises(ValueError, match="facebookresearch/DiT has no such model; accepted: 'diffusers'"):
        to_dit(model)
    shared = load_dit({**state, **{k: state[first_block(k)] for k in state if ".norm1.emb." in k}}, 4, grid=(8, 8))
    assert not shared.config.separate_embedders
    assert not torch.allclose(shared.eval()(x, t, y), expected, rtol=1e-2, atol=1e-2)


def first_block(key: str) -> str:
    return re.sub(r"blocks\.\d+\.", "blocks.0.", key)


def test_a_label_is_dropped_for_all_blocks_or_none(trained_in_diffusers) -> None:
    model = load_dit(trained_in_diffusers.state_dict(), num_heads=4, grid=(8, 8)).train()
    labels = torch.zeros(200, dtype=torch.long)
    tables = model.y_embedder.table.weight.view(2, 11, -1)
    torch.manual_seed(0)
    dropped = (model.y_embedder(labels) == tables[:, None, 10]).all(-1)
    assert torch.equal(dropped[0], dropped[1]) and 5 < dropped[0].sum() < 60


@pytest.mark.parametrize("layout", ["facebook", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_round_trips_are_bitwise(layout: str, dtype: torch.dtype) -> None:
    model = small_dit(grid=(8, 8)).to(dtype)
    grid = {"grid": (8, 8)} if layout == "diffusers" else {}
    back = load_dit(to_dit(model, layout), num_heads=4, **grid)
    assert isinstance(back, DiT)
    if layout == "diffusers":  # which stores no position table; it is computed anew, in float32
        back.pos_embed = back.pos_embed.to(dtype)
    assert_same_state(back.state_dict(), model.state_dict())


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="unknown layout 'timm'; accepted: facebook, diffusers"):
        to_dit(small_dit(), "timm")


# --- the reference implementation of DC-DiT -----------------------------------------------------------------------


def test_sizes_come_from_the_shapes() -> None:
    for overrides in ({}, {"in_channels": 3, "learn_sigma": False}, {"mlp_ratio": 2.0, "depth": 3, "num_classes": 4}):
        model = small_dc_dit(grid=(8, 8), **overrides)
        back = load_official(to_official(model), num_heads=4)
        assert back.config == model.config
        assert_same_state(back.state_dict(), model.state_dict())


def test_what_the_weights_do_not_tell() -> None:
    model = small_dc_dit(dechunk_sigma=2.0, class_dropout_prob=0.0)
    back = load_official(to_official(model), 4, dechunk_sigma=2.0, grid=(8, 12), class_dropout_prob=0.0)
    assert back.config == model.config
    assert_same_state(back.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"pos_embed has 96 positions, which is no square; accepted: grid=\(H, W\)"):
        load_official(to_official(model), 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router": "cosine2d"}, "router is 'cosine2d'"),
        ({"dechunk": "ema"}, "dechunk 'ema'"),
        ({"adapt_conditioning": True}, "adapt_conditioning is True"),
        ({"cell_context": True}, "cell_context is True; accepted: False"),
    ],
)
def test_models_without_an_official_counterpart(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_official(small_dc_dit(**overrides))


def test_a_diverged_checkpoint_still_loads() -> None:
    state = {key: torch.full_like(value, float("nan")) for key, value in Golden().state.items()}
    assert all(value.isnan().all() for value in to_official(load_official(state, NUM_HEADS)).values())


# --- refusals -----------------------------------------------------------------------------------------------------


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


REFUSED = {
    "missing": (
        lambda s: without(s, "hnet.residual_proj.bias"),
        "the state dict lacks hnet.residual_proj.bias; accepted: exactly the keys",
    ),
    "unexpected": (
        lambda s: {**s, "extra.a": s["pos_embed"]},
        "the state dict also holds extra.a; accepted: exactly the keys",
    ),
    "many": (
        lambda s: {**s, **{f"e{i}": s["pos_embed"] for i in range(5)}},
        "also holds e0, e1, e2 and 2 more",
    ),
    "shape": (
        lambda s: {**s, "hnet.residual_proj.weight": s["hnet.residual_proj.weight"][:3]},
        r"hnet.residual_proj.weight has shape \(3, 128\); accepted: \(128, 128\)",
    ),
    "checkpoint": (
        lambda s: {"ema": s, "model": s, "opt": s},
        "is missing, found ema, model, opt, ...; accepted: the keys of its model.state_dict",
    ),
    "wrapped": (
        lambda s: {f"module.{key}": value for key, value in s.items()},
        "found module.pos_embed, ",
    ),
    "static": (
        lambda s: to_dit(small_dit()),
        "not a DC-DiT state dict of the reference implementation: .*fc1.weight is missing",
    ),
    "empty": (
        lambda s: {},
        "found nothing",
    ),
    "channels": (
        lambda s: {**s, "final_layer.linear.bias": torch.zeros(5)},
        "the final layer predicts 5 channels; accepted: 4 or 8",
    ),
}


@pytest.mark.parametrize(("edit", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_official_state_dicts(edit, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_official(edit(Golden().state), NUM_HEADS)
    assert "\n" not in str(error.value)


def test_refused_head_count() -> None:
    with pytest.raises(ValueError, match="num_heads is 3; accepted: a divisor"):
        load_official(Golden().state, num_heads=3)


def test_refused_mixed_dtypes_in_one_matrix() -> None:
    state = dict(Golden().state)
    key = "hnet.main_network.main_network.layers.1.adaLN_modulation.1.weight"
    state[key] = state[key].bfloat16()
    with pytest.raises(ValueError, match=r"have several dtypes; accepted: one, for they become modulation"):
        load_official(state, NUM_HEADS)


def test_refused_static_state_dicts() -> None:
    state = to_dit(small_dit(grid=(8, 8)))
    with pytest.raises(ValueError, match=r"the state dict lacks blocks.1.mlp.fc2.bias"):
        load_dit(without(state, "blocks.1.mlp.fc2.bias"), num_heads=4)
    with pytest.raises(ValueError, match="not a DiT state dict of facebookresearch/DiT or diffusers"):
        load_dit(Golden().state, num_heads=4)
