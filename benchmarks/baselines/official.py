"""The reference implementation (github AMD-AGI/DynamicChunkingDiT) as a baseline, from the checkout DCDIT_OFFICIAL.

Its modules are imported unchanged and get our weights through :func:`dcdit.models.to_official`; none of its code is
copied here. It needs timm and flash_attn: the stand-ins below replace them where they are not installed. Its attention
rounds float32 to bfloat16, so float32 outputs agree to that precision only.
"""

import copy
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.equality import check_equal, check_kept
from dcdit.models import DCDiT, to_official
from dcdit.ops import varlen_attention

VARIABLE = "DCDIT_OFFICIAL"
TOP_LEVEL = ("config", "models", "hnet")
AGREEMENT = 1e-3
"""Relative tolerance: its attention rounds to bfloat16, the rest is float32."""


def reason_unavailable() -> str | None:
    """Why this baseline cannot run; None where it can.

    Raises:
        ValueError: the variable names a folder that is not a checkout.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return f"{VARIABLE} does not name a checkout of AMD-AGI/DynamicChunkingDiT"
    if not (Path(path) / "hnet" / "hnet" / "models" / "hnet.py").is_file():
        raise ValueError(f"{VARIABLE} is {path}; accepted: a checkout of AMD-AGI/DynamicChunkingDiT")
    return None


def build(model: DCDiT) -> nn.Module:
    """The reference implementation of a model, with its weights, on its device, in evaluation mode."""
    config_module, models = _checkout(os.environ[VARIABLE])
    config = model.config
    hnet = config_module.HNetConfig(
        arch_layout=["c2", [f"D{config.depth}"], "c2"],
        d_model=[config.hidden_size] * 2,
        num_heads=[config.num_heads] * 2,
        enc_dec_dim_factor=[4, None],
        dechunk_kernel_sigma=config.dechunk_sigma,
    )
    official = models.create_dit(
        config_module.ModelConfig(hnet=hnet, mlp_ratio=config.mlp_ratio),
        input_size=config.grid[0],
        in_channels=config.in_channels,
        num_classes=config.num_classes,
        class_dropout_prob=config.class_dropout_prob,
        learn_sigma=config.learn_sigma,
    )
    official.load_state_dict(to_official(model))
    return official.to(model.x_embedder.weight.device).eval()


def build_verified(model: DCDiT, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float) -> nn.Module:
    """The reference implementation of a model, after a check that both compute the same on a batch in float32.

    The masks must be equal but for tokens at the cut, whose probability rounding decides (:func:`check_kept`), and the
    outputs of images with equal masks must be equal to the precision of its attention. For a model in half precision
    the reference implementation runs under autocast, as its authors mean it to.

    Raises:
        NotEqualError: they differ.
    """
    in_float32 = model if x.dtype == torch.float32 else copy.deepcopy(model).float()
    official = build(in_float32)
    # Convolutions of PyTorch's own: cuDNN may choose others for each of the two, which differ by more than rounding.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
        expected, info = official(x.float(), t, y, return_chunking_info=True, tail_dropping_fraction=drop_fraction)
        out, routing = in_float32(x.float(), t, y, drop_fraction=drop_fraction, return_routing=True)
    what, prob = "kept tokens of the reference implementation", info[0].boundary_prob[..., 1]
    same = check_kept(what, prob, info[0].boundary_mask, routing.prob, routing.mask, AGREEMENT)
    check_equal("output of the reference implementation", [expected[same]], [out[same]], AGREEMENT)
    return official if x.dtype == torch.float32 else _Autocast(official, x.dtype)


class _Autocast(nn.Module):
    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, x: Tensor, *args: Tensor, **options: Any) -> Any:
        with torch.autocast(x.device.type, self.dtype):
            return self.module(x.float(), *args, **options)


def randomize_zeros(model: nn.Module) -> None:
    """Give a value to every parameter that starts at zero; else a comparison would not see what it multiplies."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@functools.cache
def _checkout(root: str) -> tuple[Any, Any]:
    """Its modules config and models. They leave sys.modules again, because their names are so common."""
    provide_stand_ins()
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in TOP_LEVEL}
    sys.path.insert(0, root)
    try:
        return importlib.import_module("config"), importlib.import_module("models")
    finally:
        sys.path.remove(root)
        for name in [name for name in sys.modules if name.partition(".")[0] in TOP_LEVEL]:
            del sys.modules[name]
        sys.modules.update(others)


# --- stand-ins ----------------------------------------------------------------------------------------------------


def provide_stand_ins() -> None:
    """What the checkout imports and is not installed, in ``sys.modules``."""
    if not _installed("timm"):
        _insert("timm.models.vision_transformer", PatchEmbed=_PatchEmbed, Mlp=_Mlp)
    if not _installed("flash_attn"):
        _insert("flash_attn", flash_attn_varlen_func=_varlen, flash_attn_qkvpacked_func=_absent)
        _insert("flash_attn.bert_padding", unpad_input=_absent, pad_input=_absent)
        _insert("flash_attn.ops.triton.layer_norm", RMSNorm=_RMSNorm)


def _installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _insert(name: str, **members: Any) -> None:
    """A module of that name, and its parents, in sys.modules."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        sys.modules.setdefault(path, ModuleType(path))
        sys.modules[path].__path__ = []  # type: ignore[attr-defined]
    vars(sys.modules[name]).update(members)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, longest: int, __: int, dropout_p: float = 0.0
) -> Tensor:
    return varlen_attention(q, k, v, starts, longest)


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(
        "the reference implementation of DC-DiT packs its tokens: only varlen attention is needed"
    )


class _RMSNorm(nn.Module):
    """Root mean square norm without a residual."""

    def __init__(self, width: int, eps: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.eps = eps

    def forward(self, x: Tensor, residual: None, prenorm: bool, residual_in_fp32: bool) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class _Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _PatchEmbed(nn.Module):
    """Convolution, then (B, L, D); the checkout puts a convolution of its own in place of ``proj``."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)
