"""Deferred initialisation: a model is built on ``meta``, gets memory with any content, and is filled afterwards."""

import pytest
import torch
import torch.multiprocessing
from support.sharded import check_sharded_model
from support.small import GRID, SIZES, SPARSE, small_dit
from torch import Tensor, nn

from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig, DyDiT, DyDiTConfig, SparseDiT, SparseDiTConfig
from dcdit.models.upcycle import upcycle, upcycled_fields
from dcdit.nn import ROUTERS, ConvStack, DenseFinalLayer, LabelEmbedder, StackedModulation, TimestepEmbedder, hnet

MODELS = {
    "dc-dit": lambda: DCDiT(DCDiTConfig(grid=GRID, **SIZES)),
    "no null class": lambda: DCDiT(DCDiTConfig(grid=GRID, class_dropout_prob=0.0, learn_sigma=False, **SIZES)),
    "cosine2d": lambda: DCDiT(DCDiTConfig(grid=GRID, router="cosine2d", adapt_conditioning=True, **SIZES)),
    "cosine1d": lambda: DCDiT(DCDiTConfig(grid=GRID, router="cosine1d", dechunk="ema", **SIZES)),
    "dithered": lambda: DCDiT(DCDiTConfig(grid=GRID, router="dithered", cell_context=True, start="share", **SIZES)),
    "dit": lambda: DiT(DiTConfig(grid=GRID, patch_size=2, **SIZES)),
    "dynamic width": lambda: DCDiT(DCDiTConfig(grid=GRID, dynamic_width=True, **SIZES)),
    "dydit": lambda: DyDiT(DyDiTConfig(grid=GRID, **SIZES)),
    "sparsedit": lambda: SparseDiT(SparseDiTConfig(grid=GRID, **{**SIZES, **SPARSE})),
    "routed": lambda: SparseDiT(SparseDiTConfig(grid=GRID, router="predictability", **{**SIZES, **SPARSE})),
    "separate": lambda: DiT(DiTConfig(grid=GRID, patch_size=2, separate_embedders=True, **SIZES)),
}
MODULES = {
    **{name: lambda router=router: router(64, GRID) for name, router in ROUTERS.items()},
    "hnet": lambda: hnet.RoutingModule(64),
    "conv": lambda: ConvStack((64, 32), 16),
    "time": lambda: TimestepEmbedder(32),
    "label": lambda: LabelEmbedder(10, 32, 0.1),
    "modulation": lambda: StackedModulation(32, 2),
    "final": lambda: DenseFinalLayer(32, 8, 32),
}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def with_any_content(create) -> nn.Module:
    with torch.device("meta"):
        module = create()
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(module).values():
            tensor.fill_(float("nan"))
    return module


def reset_each(module: nn.Module) -> None:
    for submodule in reversed(list(module.modules())):
        if hasattr(submodule, "reset_parameters"):
            submodule.reset_parameters()


@pytest.mark.parametrize("create", [*MODELS.values(), *MODULES.values()], ids=[*MODELS, *MODULES])
def test_every_module_fills_what_it_holds(create):
    module = with_any_content(create)
    reset_each(module)
    assert not [name for name, tensor in tensors(module).items() if not tensor.isfinite().all()]


@pytest.mark.parametrize("create", MODELS.values(), ids=MODELS)
def test_a_model_fills_its_submodules_as_a_new_one_does(create):
    model = with_any_content(create)
    torch.manual_seed(5)
    model.reset_parameters()
    torch.manual_seed(5)
    fresh = create()
    for name, tensor in tensors(fresh).items():
        assert torch.equal(tensors(model)[name], tensor), name
        assert tensors(model)[name].stride() == tensor.stride(), name
    torch.manual_seed(5)
    fresh.bfloat16().reset_parameters()
    assert torch.equal(fresh.pos_embed, model.pos_embed.bfloat16())


def test_an_upcycled_model_becomes_a_new_one():
    """The source is not known any more: neither its weights nor the patches in which it counted positions."""
    source = small_dit()
    config = DCDiTConfig(**upcycled_fields(source.config))
    torch.manual_seed(5)
    fresh = DCDiT(config)
    model = DCDiT(config)
    upcycle(model, source)
    assert not torch.equal(model.pos_embed, fresh.pos_embed)
    torch.manual_seed(5)
    model.reset_parameters()
    assert all(torch.equal(tensor, tensors(fresh)[name]) for name, tensor in tensors(model).items())
    upcycle(model, source)  # and it can be upcycled again
    assert torch.equal(model.blocks[0].qkv.weight, source.blocks[0].qkv.weight)


def test_sharded_models(tmp_path):
    torch.multiprocessing.spawn(check_sharded_model, args=(str(tmp_path / "store"), 2), nprocs=2)
