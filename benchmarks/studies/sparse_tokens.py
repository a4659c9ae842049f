"""Do sparse tokens become time? SparseDiT, pooled and routed, against the static DiT of the same size.

``python -m benchmarks.studies.sparse_tokens --out FILE`` checks that our SparseDiT equals a plain formulation, times
forward passes of all sides in turns (:mod:`benchmarks.studies.conversion`), and writes a page. The weights are random.

The plain formulation of a pooled model computes what the published code does: attention with a matrix of equal
weights, and a layer for the sparse tokens behind their upsampling. That of a routed model leaves nothing out: its
sparse blocks run on all tokens, and no token may see one that was not chosen.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.studies.conversion import Side, conditions, difference, fill_zero_weights, time_sides
from dcdit.models import SparseDiT, create_model
from dcdit.nn.dit_block import modulate
from dcdit.nn.memory_format import to_grid, to_tokens
from dcdit.profiling.calibrate import varied_latents
from dcdit.utils.files import write_text

TIMES = (750, 250)
"""Timesteps of the passes that are timed."""
BY_TIME = {"sparse_grid": [10, 10], "noisy_grid": [6, 6]}
MODELS: dict[str, dict[str, Any]] = {
    "pooled": {},
    "pooled, by timestep": BY_TIME,
    "routed": {"router": "predictability"},
    "routed, by timestep": {**BY_TIME, "router": "predictability"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="S", help="size of the models (default S)")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--rounds", type=int, default=15, help="passes of each side (default 15)")
    parser.add_argument("--out", required=True, metavar="FILE", help="page to write")
    args = parser.parse_args()
    flags = " ".join(f"--{name} {getattr(args, name)}" for name in ("scale", "batch", "rounds", "out"))
    head = f"{conditions(f'python -m benchmarks.studies.sparse_tokens {flags}', 'of the static DiT')} {COUNTED}"
    section = study(args.scale, args.batch, args.rounds)
    write_text(Path(args.out), "\n\n".join(["# Sparse tokens on a CPU", head, section]) + "\n")


COUNTED = "FLOPs are counted by the sparse tokens, also where a plain formulation computes more."


@torch.inference_mode()
def study(scale: str, batch: int, rounds: int) -> str:
    """The section of the page: what is equal, and what takes how long."""
    torch.manual_seed(0)
    static = create_model(f"DiT-{scale}/2").eval()
    fill_zero_weights(static)
    x, y = varied_latents(batch, 4, static.config.grid), torch.arange(batch)
    sides, notes = {"static DiT": Side(static, y, [(x, TIMES[0])])}, []
    for name, overrides in MODELS.items():
        model: Any = create_model(f"SparseDiT-{scale}/2", **overrides).eval()
        fill_zero_weights(model)
        plain = Plain(model)
        worst = max(difference(model, plain, x, t, y) for t in TIMES)
        notes.append(f"- {name}: ours and the plain formulation differ by at most {worst:.1e} of the largest number.")
        for t in TIMES if model.config.noisy_grid else TIMES[:1]:
            tokens = f"{model.config.sparse_tokens_at(t)} tokens"
            sides[f"{name}: {tokens}"] = Side(model, y, [(x, t)])
        if not model.config.noisy_grid:
            sides[f"{name}: {tokens}, plain"] = Side(plain, y, [(x, TIMES[0])])
    title = f"## SparseDiT-{scale}/2 against DiT-{scale}/2, batch {batch}"
    return "\n\n".join([title, time_sides(sides, rounds), "\n".join(notes)])


class Plain:
    """A SparseDiT by its plain formulation, on images that all have the same timestep. Called like the model."""

    def __init__(self, model: SparseDiT) -> None:
        self.model, self.config, self.objective = model, model.config, model.objective

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        model, few = self.model, self.config.sparse_grid_at(float(t[0]))
        tokens, cond = model.embed(x, t, y)
        modules: Any = iter(model.sparse_tokens)
        routed, mask = self.config.router is not None, None
        for kind, block, mod in zip(self.config.kinds, model.blocks, model.modulation(cond), strict=True):
            source = None
            if kind == "merge":
                module, full = next(modules), tokens
                sparse, chosen = module.sparsify(full, few)
                if routed:
                    mask = chosen.selection.mask
                else:
                    tokens = sparse
                source = full
            elif kind == "recover":
                sparse = source = tokens
                if routed:
                    tokens = module.restore(tokens[mask].unflatten(0, (len(x), -1)), full, few, chosen)
                else:
                    upsampled = to_tokens(F.interpolate(to_grid(sparse, few), model.patch_grid, mode="nearest"))
                    tokens = module.from_sparse(upsampled) + module.from_full(full)
            seen = mask if kind in ("sparse", "recover") else None
            tokens = _block(block, kind, tokens, mod, source, seen)
        return model.project(tokens, cond)


def _block(block: Any, kind: str, x: Tensor, mod: Any, source: Tensor | None, mask: Tensor | None) -> Tensor:
    """A block on x (B, L, D), which sees only the tokens of a mask (B, M)."""
    shift, scale, gate = (row[:, None] for row in mod[:3])
    h, heads = modulate(x, shift, scale), (block.num_heads, -1)
    if kind == "pooled":
        weights = x.new_ones(len(x), block.num_heads, x.shape[1], x.shape[1]).softmax(3)
        seen = weights @ block.value(h).unflatten(2, heads).transpose(1, 2)
    else:
        if source is None:
            q, k, v = (part.unflatten(2, heads).transpose(1, 2) for part in block.qkv(h).chunk(3, 2))
        else:
            q = block.query(h).unflatten(2, heads).transpose(1, 2)
            both = block.key_value(modulate(source, shift, scale)).chunk(2, 2)
            k, v = (part.unflatten(2, heads).transpose(1, 2) for part in both)
        allowed = None if mask is None else mask[:, None, None].expand(-1, -1, x.shape[1], -1)
        seen = F.scaled_dot_product_attention(q, k, v, allowed)
    x = x + gate * block.proj(seen.transpose(1, 2).flatten(2))
    return x + block.mlp_branch(x, mod)


if __name__ == "__main__":
    main()
