"""Weights of a static DiT in a DC-DiT: some are copied exactly, the others stay, and a bad source is refused."""

import dataclasses

import pytest
import torch
from support.small import GRID, SIZES, batch, small_dc_dit, small_dit

from dcdit import checkpoint
from dcdit.models import DCDiT, DCDiTConfig, DiTConfig
from dcdit.models.upcycle import check_source, freeze_embedders, upcycle, upcycled_fields
from dcdit.nn import VarlenMeta, sincos_position
from dcdit.train.distill import block_outputs

COPIED = ("blocks.", "modulation.", "t_embedder.", "y_embedder.")


def upcycled(source, seed=1, **overrides):
    torch.manual_seed(seed)
    model = DCDiT(DCDiTConfig.from_dict({**upcycled_fields(source.config), **overrides}))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    upcycle(model, source)
    return model, fresh


def test_the_transformer_is_copied_bit_for_bit_and_nothing_else():
    source = small_dit()
    model, fresh = upcycled(source)
    theirs, ours = source.state_dict(), model.state_dict()
    copied = {name for name in ours if name.startswith(COPIED)}
    assert copied == {name for name in theirs if name.startswith(COPIED)}
    for name in copied:
        assert torch.equal(ours[name], theirs[name]) and not torch.equal(ours[name], fresh[name]), name
    for name in ours.keys() - copied - {"pos_embed"}:
        assert torch.equal(ours[name], fresh[name]), name


def test_half_precision_sources_keep_the_model_in_float32():
    source = small_dit().half()
    model, _ = upcycled(source)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert torch.equal(model.blocks[1].qkv.weight, source.blocks[1].qkv.weight.float())


def test_positions_are_counted_in_patches_of_the_source():
    """The cells of a patch lie around the position that the source gives the patch."""
    source = small_dit(patch_size=2)
    model, _ = upcycled(source)
    height, width = GRID
    for row, col in [(0, 0), (1, 5), (7, 11)]:
        frequencies = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
        x, y = ((cell + 0.5) / 2 - 0.5 for cell in (col, row))
        wanted = torch.cat([f(position * frequencies) for position in (x, y) for f in (torch.sin, torch.cos)])
        torch.testing.assert_close(model.pos_embed[row * width + col].double(), wanted, rtol=0, atol=1e-6)
    patches = model.pos_embed.view(height // 2, 2, width // 2, 2, -1).mean((1, 3)).flatten(0, 1)
    low = slice(24, 32)  # at low frequencies, the mean over a patch is the value at its centre
    torch.testing.assert_close(patches[:, low], source.pos_embed[:, low], rtol=0, atol=1e-4)


def test_patch_size_one_has_the_usual_positions():
    model, fresh = upcycled(small_dit(patch_size=1))
    assert torch.equal(model.pos_embed, fresh["pos_embed"])
    assert torch.equal(sincos_position(32, (4, 6), 1), sincos_position(32, (4, 6)))


def test_an_upcycled_model_is_an_ordinary_checkpoint(tmp_path):
    model, _ = upcycled(small_dit())
    checkpoint.save_model(tmp_path / "model.safetensors", model.eval())
    loaded = checkpoint.load_model(tmp_path / "model.safetensors")
    inputs = batch(model.config)
    assert loaded.config == model.config and torch.equal(loaded.pos_embed, model.pos_embed)
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_a_source_whose_blocks_have_embedders_of_their_own(tmp_path):
    """As diffusers trains them. The blocks then compute what they did in the source, and so does the teacher."""
    source = small_dit(separate_embedders=True, frequency_shift=1, mlp_norm_eps=0.1, patch_size=1)
    model, _ = upcycled(source)
    x, t, y = batch(model.config)
    _, _, states = model(x, t, y, return_states=True)
    assert states.cond.shape == (2, 3, 128) and not torch.equal(states.cond[0], states.cond[1])
    theirs = block_outputs(source, x, states.cond)
    tokens = (source.x_embedder(x).flatten(2).mT + source.pos_embed).flatten(0, 1)
    length, ours = len(model.pos_embed), []
    varlen = VarlenMeta(torch.arange(4, dtype=torch.int32) * length, length, padding=False)
    model.transform(tokens, model.modulation(states.cond), varlen, ours)
    for packed, dense in zip(ours, theirs, strict=True):
        torch.testing.assert_close(packed, dense.flatten(0, 1), rtol=1e-4, atol=1e-4)
    freeze_embedders(model)
    assert not any(p.requires_grad for p in (*model.t_embedder.parameters(), *model.y_embedder.parameters()))
    checkpoint.save_model(tmp_path / "model.safetensors", model.eval())
    assert torch.equal(checkpoint.load_model(tmp_path / "model.safetensors")(x, t, y), model(x, t, y))


def test_frozen_embedders():
    model, _ = upcycled(small_dit())
    freeze_embedders(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("t_embedder.", "y_embedder."))}
    assert "cond_adaptor.weight" in dict(model.named_parameters())


def test_fields_of_the_same_transformer():
    source = DiTConfig(grid=(16, 16), patch_size=4, mlp_ratio=2.0, learn_sigma=False, in_channels=3, **SIZES)
    config = DCDiTConfig(**upcycled_fields(source))
    check_source(config, source)
    shared = ("grid", "mlp_ratio", "learn_sigma", "in_channels", *SIZES)
    assert all(getattr(config, name) == getattr(source, name) for name in shared)
    assert config.adapt_conditioning and config.router == "predictability"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 256}, "the pretrained DiT has hidden_size 256, the DC-DiT 128"),
        ({"depth": 3}, "depth 3, the DC-DiT 2"),
        ({"num_heads": 2}, "num_heads 2, the DC-DiT 4"),
        ({"mlp_ratio": 2.0}, "mlp_ratio 2.0, the DC-DiT 4.0"),
        ({"in_channels": 3}, "in_channels 3, the DC-DiT 4"),
        ({"grid": (8, 8)}, r"grid \(8, 8\), the DC-DiT \(8, 12\)"),
        ({"num_classes": 12}, r"13 rows of labels \(null class included\), the DC-DiT 11"),
        ({"num_classes": 9}, r"no null class beside its 10 labels and the DC-DiT has class_dropout_prob 0\.1"),
        ({"class_dropout_prob": 0.0}, r"no null class beside its 10 labels .*; accepted: 0$"),
        ({"class_dropout_prob": 0.0, "num_classes": 11}, "no null class beside its 11 labels"),
        ({"frequency_shift": 1}, "frequency_shift 1, the DC-DiT 0; accepted: equal ones"),
        ({"mlp_norm_eps": 1e-5}, "mlp_norm_eps 1e-05, the DC-DiT 1e-06"),
        ({"separate_embedders": True}, "separate_embedders True, the DC-DiT False"),
    ],
)
def test_misfits(change, message):
    source = DiTConfig(**{"grid": GRID, **SIZES, **change})
    with pytest.raises(ValueError, match=message) as error:
        check_source(small_dc_dit().config, source)
    assert "\n" not in str(error.value)


def test_no_null_class_on_either_side():
    source = small_dit(class_dropout_prob=0.0)
    fields = upcycled_fields(source.config)
    assert "class_dropout_prob" not in fields  # a model without a null class has to be asked for
    model, _ = upcycled(source, class_dropout_prob=0.0)
    assert torch.equal(model.y_embedder.table.weight, source.y_embedder.table.weight)


def test_a_refused_source_changes_nothing():
    model = small_dc_dit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = dataclasses.replace(small_dit().config, depth=3)
    with pytest.raises(ValueError, match="depth"):
        upcycle(model, type(small_dit())(other))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
