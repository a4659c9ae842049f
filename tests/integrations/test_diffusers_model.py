"""Our models as models of diffusers: the same outputs, configuration and weights, and what diffusers does with them."""

import copy
import dataclasses
import inspect
import json

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from safetensors import safe_open
from support.small import batch, small_dc_dit, small_dit

from dcdit import checkpoint as ckpt
from dcdit.integrations.diffusers import DCDiTTransformer2DModel, StaticDiTTransformer2DModel
from dcdit.models import DCDiTConfig, DiTConfig, KeptShare

NOTES = {"class_names": json.dumps(["bird", "cat"]), "latent_range": "[[0.5], [2.0]]"}
SHARE = KeptShare(mean=0.3, std=0.02, largest=0.4, images=100)


def dynamic(**overrides):
    model = small_dc_dit(grid=(4, 6), dechunk_sigma=1.5, **overrides)
    model.objective, model.kept_share = "flow", SHARE
    return model


def wrapped(**overrides):
    return DCDiTTransformer2DModel.from_dcdit(dynamic(**overrides), NOTES)


@pytest.mark.parametrize(
    ("transformer", "config"), [(DCDiTTransformer2DModel, DCDiTConfig), (StaticDiTTransformer2DModel, DiTConfig)]
)
def test_the_configuration_is_ours(transformer, config):
    """Every field, in order, with its default where it has one."""
    parameters = list(inspect.signature(transformer.__init__).parameters.values())[1:]
    fields = dataclasses.fields(config)
    assert [p.name for p in parameters] == [field.name for field in fields] + ["notes"]
    for parameter, field in zip(parameters, fields, strict=False):
        if field.default is not dataclasses.MISSING:
            assert parameter.default == field.default


@pytest.mark.parametrize(
    "options", [{}, {"drop_fraction": 0.4}, {"budget": 5}, {"drop_fraction": torch.tensor([0, 0.5, 0.9])}]
)
def test_outputs_are_those_of_the_model(options):
    transformer = wrapped()
    model = transformer.to_dcdit()
    x, t, y = batch(model.config)
    with torch.no_grad():
        expected = model(x, t, y, **options)
        assert torch.equal(transformer(x, t, y, **options).sample, expected)
        one_time = transformer(hidden_states=x, timestep=t[0], class_labels=y, return_dict=False, **options)[0]
        assert torch.equal(one_time, model(x, t[:1].expand(3), y, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [None, 200_000])
def test_saved_and_loaded(tmp_path, dtype, shards):
    transformer = wrapped().to(dtype)
    transformer.save_pretrained(tmp_path, **({} if shards is None else {"max_shard_size": shards}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards is not None)
    loaded = DCDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert (loaded.dtype, loaded.device, loaded.training) == (dtype, torch.device("cpu"), False)
    assert loaded.notes == {**NOTES, "objective": "flow", "kept_share": json.dumps(dataclasses.asdict(SHARE))}
    model = loaded.to_dcdit()
    assert (model.config, model.objective, model.kept_share) == (dynamic().config, "flow", SHARE)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert type(diffusers.AutoModel.from_pretrained(str(tmp_path))) is DCDiTTransformer2DModel


def test_checkpoints_lose_nothing(tmp_path):
    """Ours to theirs to ours: the same weights and the same metadata."""
    ckpt.save_model(tmp_path / "a.safetensors", dynamic(), notes=NOTES)
    notes = ckpt.read_metadata(tmp_path / "a.safetensors")
    transformer = DCDiTTransformer2DModel.from_dcdit(ckpt.load_model(tmp_path / "a.safetensors"), notes)
    transformer.save_pretrained(tmp_path / "theirs")
    loaded = DCDiTTransformer2DModel.from_pretrained(tmp_path / "theirs")
    ckpt.save_model(tmp_path / "b.safetensors", loaded.to_dcdit(), notes=loaded.notes)
    with safe_open(tmp_path / "a.safetensors", "pt") as a, safe_open(tmp_path / "b.safetensors", "pt") as b:
        assert a.metadata() == b.metadata() and set(NOTES) < set(a.metadata())
        assert list(a.keys()) == list(b.keys())
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118


def test_names_of_weights_are_stable():
    """Ours behind ``model.``: the blocks that caches see own nothing."""
    transformer = wrapped()
    assert list(transformer.state_dict()) == [f"model.{name}" for name in dynamic().state_dict()]
    assert [name for name, _ in transformer.named_parameters()] == [
        f"model.{name}" for name, _ in dynamic().named_parameters()
    ]


def test_models_of_the_other_class_and_bad_values_are_refused():
    with pytest.raises(ValueError, match="the model is a DiT; accepted: DCDiT"):
        DCDiTTransformer2DModel.from_dcdit(small_dit())
    with pytest.raises(ValueError, match="the model is a DCDiT; accepted: DiT"):
        StaticDiTTransformer2DModel.from_dcdit(small_dc_dit())
    with pytest.raises(ValueError, match="router is 'best'; accepted: predictability"):
        DCDiTTransformer2DModel(hidden_size=128, num_heads=4, router="best")
    with pytest.raises(ValueError, match="the configuration of the DCDiTTransformer2DModel is damaged: its kept_share"):
        DCDiTTransformer2DModel(hidden_size=128, num_heads=4, notes={"kept_share": "1"})


def test_the_static_model():
    transformer = StaticDiTTransformer2DModel.from_dcdit(small_dit(grid=(4, 6)))
    x, t, y = batch(transformer.model.config)
    with torch.no_grad():
        assert torch.equal(transformer(x, t, y).sample, transformer.to_dcdit()(x, t, y))


@pytest.mark.parametrize("transformer", [wrapped(), StaticDiTTransformer2DModel.from_dcdit(small_dit(grid=(4, 6)))])
def test_gradient_checkpointing(transformer):
    """The same gradients, from activations that are computed again: each block runs twice."""
    x, t, y = batch(transformer.model.config)
    calls = []
    handles = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in transformer.model.blocks]
    gradients = []
    for enabled in (False, True):
        transformer.enable_gradient_checkpointing() if enabled else transformer.disable_gradient_checkpointing()
        assert transformer.is_gradient_checkpointing == enabled
        transformer.zero_grad()
        transformer(x, t, y).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None})
    for handle in handles:
        handle.remove()
    assert len(calls) == 3 * len(transformer.model.blocks)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(tmp_path, offload_type):
    """On a disk, where what is not there when it is used cannot be used."""
    transformer = wrapped()
    x, t, y = batch(transformer.model.config)
    with torch.no_grad():
        expected = transformer(x, t, y, drop_fraction=0.3).sample
        transformer.enable_group_offload(
            onload_device="cpu",
            offload_device="cpu",
            offload_type=offload_type,
            num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path),
        )
        blocks = [block.qkv.weight for block in transformer.model.blocks]
        for weight in blocks:  # what is loaded later overwrites it
            weight.data.fill_(torch.nan)
        torch.testing.assert_close(transformer(x, t, y, drop_fraction=0.3).sample, expected)
    with pytest.raises(ValueError, match="a cache and group offloading do not go together"):
        transformer.enable_cache(FirstBlockCacheConfig())
    cached = wrapped()
    cached.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="a cache and group offloading do not go together"):
        cached.enable_group_offload(onload_device="cpu", offload_type=offload_type)


def test_regional_compilation():
    """The backend counts graphs and runs them as they are."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    transformer = wrapped(depth=4)
    x, t, y = batch(transformer.model.config)
    with torch.no_grad():
        expected = transformer(x, t, y).sample
        transformer.compile_repeated_blocks(backend=count, fullgraph=True)
        torch.testing.assert_close(transformer(x, t, y).sample, expected)
        assert len(graphs) == 2  # the first block has no pending residual; the three others are one


def test_layerwise_casting():
    transformer = wrapped()
    x, t, y = batch(transformer.model.config)
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stored = {name: p.dtype for name, p in transformer.named_parameters()}
    assert stored["model.blocks.0.qkv.weight"] == torch.float8_e4m3fn
    assert stored["model.router.out.weight"] == stored["model.norm.weight"] == torch.float32
    with torch.no_grad():
        error = (transformer(x, t, y).sample - wrapped()(x, t, y).sample).abs().mean()
    assert 0 < error < 0.5


def test_attention_has_no_processors():
    transformer = wrapped()
    assert transformer.attn_processors == {}
    transformer.fuse_qkv_projections()
    for change in (
        lambda: transformer.set_attn_processor(object()),
        lambda: transformer.set_attention_backend("flash"),
    ):
        with pytest.raises(ValueError, match="takes no attention of diffusers"):
            change()


def test_other_caches_are_refused():
    with pytest.raises(ValueError, match="the cache is a PyramidAttentionBroadcastConfig; accepted: FirstBlockCache"):
        wrapped().enable_cache(PyramidAttentionBroadcastConfig())


def test_copies_are_models_of_their_own():
    transformer = wrapped()
    other = copy.deepcopy(transformer)
    assert all(block.model is other.model is not transformer.model for block in [*other.blocks, other.proj_out])


def test_pushed_to_the_hub(monkeypatch):
    """What would be uploaded is what is saved."""
    from diffusers.models import modeling_utils

    pushed = {}

    def upload(self, folder, repo_id, **_):
        pushed[repo_id] = DCDiTTransformer2DModel.from_pretrained(folder)

    monkeypatch.setattr(DCDiTTransformer2DModel, "_upload_folder", upload)
    from diffusers.utils import hub_utils

    class Made:
        repo_id = "someone/cats"

    for module in (modeling_utils, hub_utils):
        monkeypatch.setattr(module, "create_repo", lambda *_, **__: Made)
        monkeypatch.setattr(module, "load_or_create_model_card", lambda *_, **__: None)
        monkeypatch.setattr(module, "populate_model_card", lambda card, *_: type("Card", (), {"save": lambda *_: None}))
    transformer = wrapped()
    transformer.push_to_hub("cats")
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(pushed["someone/cats"].state_dict()[name], tensor)
