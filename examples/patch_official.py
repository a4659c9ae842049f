"""The reference implementation's DC-DiT, before and after ``dcdit.patch``: the same masks and numbers, less work.

    git clone https://github.com/AMD-AGI/DynamicChunkingDiT
    python examples/patch_official.py DynamicChunkingDiT

It needs what the checkout needs: timm and flash-attn.
"""

import copy
import importlib
import sys
import time

import torch
from torch import nn

import dcdit


def build(checkout: str, size: int = 32, width: int = 384, depth: int = 12, heads: int = 6) -> nn.Module:
    """A DC-DiT of the checkout with random weights (S by default), as its ``train.py`` makes it."""
    sys.path.insert(0, checkout)
    config, models = importlib.import_module("config"), importlib.import_module("models")
    hnet = config.HNetConfig(
        arch_layout=["c2", [f"D{depth}"], "c2"],
        d_model=[width] * 2,
        num_heads=[heads] * 2,
        enc_dec_dim_factor=[4, None],
        dechunk_kernel_sigma=1.0,
    )
    torch.manual_seed(0)
    return models.create_dit(
        config.ModelConfig(hnet=hnet, mlp_ratio=4.0),
        input_size=size,
        in_channels=4,
        num_classes=1000,
        class_dropout_prob=0.1,
        learn_sigma=True,
    ).eval()


@torch.no_grad()
def compare(model: nn.Module, x: torch.Tensor, drop_fraction: float = 0.3) -> tuple[bool, float, dict[str, float]]:
    """Whether the masks are equal, the relative difference of the outputs, and the seconds of both."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"as published": model.to(device), "patched": dcdit.patch(copy.deepcopy(model)).to(device)}
    x, t, y = x.to(device), torch.full((len(x),), 500, device=device), torch.arange(len(x), device=device)
    found, seconds = {}, {name: float("inf") for name in models}
    for _ in range(3):
        for name, one in models.items():
            began = time.perf_counter()
            out, info = one(x, t, y, return_chunking_info=True, tail_dropping_fraction=drop_fraction)
            out.sum().item()  # waits for the device
            seconds[name] = min(seconds[name], time.perf_counter() - began)
            found[name] = out, info[0].boundary_mask
    (out, mask), (fast_out, fast_mask) = found.values()
    return torch.equal(mask, fast_mask), float((out - fast_out).norm() / out.norm()), seconds


def main(checkout: str) -> None:
    model = build(checkout)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)  # it starts at zero, and would hide every difference
    same, difference, seconds = compare(model, torch.randn(2, 4, 32, 32))
    print(f"masks {'equal' if same else 'DIFFERENT'}, outputs differ by {difference:.1e}")
    for name, value in seconds.items():
        print(f"{name}: {1e3 * value:.0f} ms")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
