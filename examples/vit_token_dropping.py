"""A plain vision transformer that drops half of its tokens in the middle: one operation in a model of your own.

Tokens whose feature lies close to the mean of their image say little that others do not. So the first blocks run on all
patches, the others on those that differ most and on the class token, in a packed buffer that is really shorter.

    python examples/vit_token_dropping.py
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops


class Block(nn.Module):
    """Attention and MLP on packed tokens (T, D), the sequences of ``cu_seqlens`` one after another."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)
        x = x + self.proj(ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen).flatten(1))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, image: int = 224, patch: int = 16, dim: int = 384, depth: int = 12, heads: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1000)

    def forward(self, images: Tensor, keep: int | None = None, drop_after: int = 4) -> Tensor:
        """Logits (B, 1000). ``keep``: tokens per image, the class token among them, from block ``drop_after`` on."""
        patches = self.embed(images).flatten(2).transpose(1, 2)  # (B, L, D)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.position
        batch, length, _ = x.shape
        starts = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=x.device)
        tokens, longest = x.flatten(0, 1), length
        for number, block in enumerate(self.blocks):
            if keep is not None and number == drop_after:
                x = tokens.view(batch, length, -1)
                likeness = F.cosine_similarity(x[:, 1:], x[:, 1:].mean(1, keepdim=True), dim=-1)
                score = (1 - likeness) / 2  # (B, L), in [0, 1]
                sel = ops.select_tokens(score, budget=keep, extra_tokens=1)  # the class token has no score and stays
                tokens, starts, longest = ops.gather_tokens(x, sel), sel.cu_seqlens, keep
            tokens = block(tokens, starts, longest)
        return self.head(self.norm(tokens[starts[:-1].long()]))  # the class token is the first of each image


@torch.no_grad()
def main(images: int = 8, **size: int) -> dict[int | None, float]:
    """Seconds of a forward pass for each number of kept tokens; None keeps all."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, side, seconds = ViT(**size).to(device).eval(), size.get("image", 224), {}
    x = torch.randn(images, 3, side, side, device=device)
    for keep in (None, model.position.shape[1] // 2, model.position.shape[1] // 4):
        seconds[keep] = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            model(x, keep).sum().item()
            seconds[keep] = min(seconds[keep], time.perf_counter() - began)
        print(f"{keep or 'all'} tokens per image: {1e3 * seconds[keep] / images:.2f} ms per image")
    return seconds


if __name__ == "__main__":
    main()
