"""Calls of operations, forward and backward, by whatever package has them. Nothing of dcdit is imported.

``python packaged_calls.py VARIANT FILE`` loads the package in the folder VARIANT as Hugging Face's ``kernels`` does,
where dcdit cannot be imported, and writes the results to FILE.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

B, H, W, D = 2, 4, 6, 16


def load(variant: Path, name: str | None = None) -> ModuleType:
    """The package in a folder, as a module of a name that nobody else has."""
    name = name or json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def results(ops: Any, backend: str) -> list[Tensor]:
    """Results and gradients."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).requires_grad_()

    q, k, x, shift, scale = randn(B, H * W, D), randn(B, H * W, D), randn(B, H * W, D), randn(B, D), randn(B, D)
    images, weight, bias = randn(B, D, H, W), randn(D), randn(D)
    inputs = [q, k, x, shift, scale, images, weight, bias]
    with ops.use_backend(backend):
        p = ops.boundary_prob_cosine(q, k)
        sel = ops.select_tokens(p, drop_fraction=0.25)
        tokens = ops.gather_tokens(x, sel)
        t = ops.modulated_layer_norm(tokens, shift, scale, sel.cu_seqlens)
        heads = t.unflatten(1, (2, D // 2))
        a = ops.varlen_attention(heads, heads, heads, sel.cu_seqlens, sel.max_seqlen).flatten(1)
        h = ops.gated_add(tokens, a, scale, sel.cu_seqlens)
        y = ops.dechunk_spatial(h, p, sel, (H, W), gate=p, residual=x)
        z = ops.dechunk_ema(h, p, sel)
        norm = ops.group_norm_silu(images, 4, weight, bias)
        loss = ops.ratio_loss(p, sel.natural_mask, 4.0)
        outputs = [p, t, h, y, z, norm, loss]
        total = sum((out.double().sin().sum() for out in outputs), torch.zeros((), dtype=torch.float64))
        return [*(out.detach() for out in outputs), *torch.autograd.grad(total, inputs)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["dcdit"] = None  # type: ignore[assignment]
    package = load(Path(sys.argv[1]))
    torch.save({backend: results(package, backend) for backend in ("torch", "triton", "reference")}, sys.argv[2])
