"""goombalab's H-Net, before and after ``dcdit.patch``: routing, chunking and the moving average run on ``dcdit.ops``.

    git clone https://github.com/goombalab/hnet && pip install -e hnet
    python examples/patch_hnet.py

It needs what the checkout needs: mamba-ssm and flash-attn, and so a GPU. ``dcdit.patch`` finds the three modules of
each stage wherever they are in a model, so a whole language model is patched by the same call.
"""

import copy
import importlib

import torch
from torch import Tensor, nn

import dcdit


class Stage(nn.Module):
    """One stage of H-Net around an inner network: route, chunk, run it on the chunks, spread them again."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        dc = importlib.import_module("hnet.modules.dc")
        self.routing_module, self.chunk_layer = dc.RoutingModule(dim), dc.ChunkLayer()
        self.dechunk_layer = dc.DeChunkLayer(dim)
        self.inner = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Packed tokens (S, D) to the same, and the mask (S,) of the tokens that open a chunk."""
        seen = self.routing_module(x, cu_seqlens=cu_seqlens)
        chunks, inner_seqlens = self.chunk_layer(x, seen.boundary_mask, cu_seqlens)[:2]
        out = self.dechunk_layer(self.inner(chunks), seen.boundary_mask, seen.boundary_prob, inner_seqlens)
        return out, seen.boundary_mask


@torch.no_grad()
def main(dim: int = 256, lengths: tuple[int, ...] = (300, 1, 211), dtype: torch.dtype = torch.float32) -> float:
    """The relative difference of the outputs of both, over tokens of some sequences."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    theirs = Stage(dim)
    for weight in theirs.routing_module.parameters():
        nn.init.normal_(weight, std=dim**-0.5)  # at its start, the identity opens hardly any chunk in random tokens
    theirs = theirs.to(device, dtype)
    fast = dcdit.patch(copy.deepcopy(theirs))
    x = torch.randn(sum(lengths), dim, device=device, dtype=dtype)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    (expected, mask), (found, fast_mask) = theirs(x, cu_seqlens), fast(x, cu_seqlens)
    difference = float((expected - found).norm() / expected.norm())
    same = "equal" if torch.equal(mask, fast_mask) else "different"
    print(f"{mask.sum()} of {len(x)} tokens open a chunk; masks are {same}, outputs differ by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
