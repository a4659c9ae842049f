"""The static DiT in its fastest form, so that a comparison with it is honest: compiled by block, and graphed.

Compiling the whole model unrolls all blocks into one program and takes minutes. All that it could fuse beyond single
blocks is the residual addition at the end of a block with the norm at the start of the next; here each compiled piece
reaches from one block into the next, so nothing is lost.
"""

import contextlib
import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcdit.models import DiT, DiTConfig
from dcdit.nn.dit_block import DenseDiTBlock, modulate
from dcdit.nn.memory_format import to_tokens
from dcdit.nn.modulation import Modulation
from dcdit.profiling.device_timing import time_kernels


class CompiledDiT:
    """A static DiT that computes in a few compiled pieces, each compiled once for all blocks. Called like the model.

    Args:
        model: the static DiT, whose weights are used.
        backend: of ``torch.compile``.
    """

    def __init__(self, model: DiT, backend: str = "inductor") -> None:
        self.module, self.config = model, model.config
        options: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
        self._begin, self._block, self._end = (torch.compile(piece, **options) for piece in (_begin, _block, _end))

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        model = self.module
        tokens, cond = self._begin(model, x, t, y)
        branch = gate = None
        for block, mod in zip(model.blocks, model.modulation(cond), strict=True):
            tokens, branch = self._block(block, tokens, branch, gate, mod)
            gate = mod.mlp_gate
        return self._end(model, tokens, branch, gate, cond)


def choose_sdpa(config: DiTConfig, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Time PyTorch's attention kernels at the shape of a static DiT, and use the fastest from now on in this process.

    Returns:
        Milliseconds by kernel; empty without a GPU, where there is no choice.
    """
    if device.type != "cuda":
        return {}
    patches = math.prod(config.grid) // config.patch_size**2
    head_dim = config.hidden_size // config.num_heads
    qkv = torch.randn(batch, patches, 3, config.num_heads, head_dim, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    found = {}
    for backend in SDPA:
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):  # not every kernel takes every head dimension
            times = time_kernels(lambda: F.scaled_dot_product_attention(q, k, v), device)
            found[backend] = math.inf if times is None else median(times)
    if found:
        fastest = min(found, key=lambda backend: found[backend])
        for backend, enable in SDPA.items():
            enable(backend is fastest)
    return {backend.name: ms for backend, ms in found.items()}


SDPA: dict[SDPBackend, Callable[[bool], None]] = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.enable_flash_sdp,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.enable_cudnn_sdp,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.enable_mem_efficient_sdp,
}


def _begin(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    cond = F.silu(model.t_embedder(t) + model.y_embedder(y))
    tokens = to_tokens(model.x_embedder(x.to(model.x_embedder.weight.dtype))) + model.pos_embed
    return tokens, cond


def _block(
    block: DenseDiTBlock, x: Tensor, branch: Tensor | None, gate: Tensor | None, mod: Modulation
) -> tuple[Tensor, Tensor]:
    """The end of the block before, whose MLP made ``branch``, and this block up to its own MLP."""
    shift, scale, attn_gate, mlp_shift, mlp_scale, _ = (row[:, None] for row in mod)
    if branch is not None and gate is not None:
        x = x + gate[:, None] * branch
    x = x + attn_gate * block.attention(modulate(x, shift, scale))
    return x, block.mlp(modulate(x, mlp_shift, mlp_scale, block.mlp_norm_eps))


def _end(model: DiT, x: Tensor, branch: Tensor, gate: Tensor, cond: Tensor) -> Tensor:
    return model.unpatchify(model.final_layer(x + gate[:, None] * branch, cond))
