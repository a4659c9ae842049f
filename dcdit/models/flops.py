"""Analytic FLOPs of a forward pass, stage by stage."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dcdit.models.config import DCDiTConfig, DyDiTConfig, ModelConfig, PatchModelConfig, SparseDiTConfig
from dcdit.nn import STAGES, Gates
from dcdit.nn.cells import cells_of
from dcdit.nn.embedding import TimestepEmbedder
from dcdit.nn.gates import TOKEN_GATE_SHARE, GateCounts

SOFTMAX_FLOPS = 3
"""Per attention score, as the papers count: scale, exponential, division."""


def count_flops(
    config: ModelConfig, lengths: int | Sequence[int] | None = None, batch: int = 1, gates: GateCounts | None = None
) -> dict[str, int]:
    """FLOPs of one forward pass, twice the multiply-adds.

    Counted: linear layers, convolutions (padding included) and attention, which takes
    ``heads * sum of M_b^2 * (4 d_h + 3)``. Not counted: norms, activations and the other elementwise work, selection,
    gather, and the smoothing of the de-chunk, whose cost depends on the implementation. Nor are the width gates, one
    row of a product per image, which sampling computes beforehand.

    Args:
        config: of the model.
        lengths: kept tokens of each image, or one number for all ``batch`` images; of a SparseDiT its sparse tokens.
            None is every position, the most sparse tokens of a SparseDiT, and the only value that a DiT and a DyDiT
            accept.
        batch: number of images. With one length per image it may stay at 1.
        gates: how many are open in each image of a model of dynamic width. What they close is not counted: a model that
            masks computes it all the same, a :class:`dcdit.models.SlicedModel` does not. None: all are open.

    Returns:
        Stage name (see ``dcdit.nn.STAGES``) to FLOPs of the whole batch, and their sum under ``"total"``.

    Raises:
        ValueError: lengths for a static DiT, outside 1 to L, or not one per image; gates for a model of fixed width, or
            not one set per image.

    Example:
        >>> from dcdit.models import count_flops, create_config
        >>> round(count_flops(create_config("DiT-XL/2"))["total"] / 1e9, 1)  # 118.6 billion multiply-adds
        237.3
        >>> config = create_config("DC-DiT-S")
        >>> everything, quarter = count_flops(config), count_flops(config, 256)
        >>> round(quarter["transformer"] / everything["transformer"], 2)  # attention shrinks by more than a quarter
        0.19
        >>> quarter["encoder"] == everything["encoder"]
        True
    """
    if isinstance(config, DCDiTConfig):
        positions = config.grid[0] * config.grid[1]
        kept = _kept_lengths(lengths, batch, positions, positions)
    elif isinstance(config, SparseDiTConfig):
        kept = _kept_lengths(lengths, batch, config.most_sparse_tokens, config.tokens)
    else:
        if lengths is not None:
            raise ValueError(f"lengths is {lengths!r}; a static DiT keeps every token, accepted: None")
        kept = [config.tokens] * batch
    if gates is not None and (config.gate_shape is None or len(gates.heads) != len(kept)):
        raise ValueError(
            f"gates are those of {len(gates.heads)} images for {len(kept)}; accepted: one set for each image of a model"
            " of dynamic width"
        )
    outer = _dynamic(config, len(kept)) if isinstance(config, DCDiTConfig) else _static(config, len(kept))
    inner = _sparse(config, kept) if isinstance(config, SparseDiTConfig) else _transformer(config, kept, gates)
    stages = {**outer, **inner}
    return {**dict.fromkeys(STAGES, 0), **stages, "total": sum(stages.values())}


def _kept_lengths(lengths: int | Sequence[int] | None, batch: int, default: int, positions: int) -> list[int]:
    if lengths is None or isinstance(lengths, int):
        kept = [default if lengths is None else lengths] * batch
    else:
        kept = [int(length) for length in lengths]
        if batch not in (1, len(kept)):
            raise ValueError(f"lengths has {len(kept)} entries for a batch of {batch}; accepted: one per image")
    wrong = [length for length in kept if not 1 <= length <= positions]
    if wrong:
        raise ValueError(f"lengths holds {wrong[0]}; accepted: 1 to {positions} kept tokens per image")
    return kept


def _dynamic(config: DCDiTConfig, batch: int) -> dict[str, int]:
    length = config.grid[0] * config.grid[1]
    dim, narrow = config.hidden_size, config.hidden_size // 4

    def stack(*widths: tuple[int, int]) -> int:
        return sum(_conv_block(length, before, after, dim) for before, after in widths)

    per_image = {
        "embed": _conv(length, config.in_channels, narrow, 3) + _timestep(config),
        "encoder": stack((narrow, narrow), (narrow, dim)),
        "router": _router(config, config.grid),
        "gather": _linear(math.prod(cells_of(config.grid)), dim, dim) if config.cell_context else 0,
        "dechunk": _linear(length, dim, dim),
        "decoder": stack((dim, narrow), (narrow, narrow)),
        "final": _final(length, narrow, config.out_channels, dim),
    }
    return {name: batch * flops for name, flops in per_image.items()}


def _static(config: PatchModelConfig, batch: int) -> dict[str, int]:
    dim, patch, length = config.hidden_size, config.patch_size, config.tokens
    return {
        "embed": batch * (_conv(length, config.in_channels, dim, patch) + _timestep(config)),
        "final": batch * _final(length, dim, patch**2 * config.out_channels, dim),
    }


def _transformer(config: ModelConfig, kept: list[int], gates: GateCounts | None) -> dict[str, int]:
    """Its own stage, and that of its token gates."""
    dim, heads, lengths = config.hidden_size, config.num_heads, torch.tensor(kept, device="cpu")
    shape = (len(kept), config.depth)
    # Of each image and block: open heads, open groups (as many as heads), and tokens in the MLP.
    every_head = torch.full(shape, heads, device="cpu")
    all_open = every_head, every_head, lengths[:, None].expand(shape)
    given = all_open if gates is None else gates
    counts = [every if count is None else count.cpu() for count, every in zip(given, all_open, strict=True)]
    attention, mlp = _block_parts(config, lengths)
    flops = attention[:, None] * counts[0] // heads + (mlp // lengths)[:, None] * counts[1] * counts[2] // heads
    stages = {"transformer": int(flops.sum()) + len(kept) * config.depth * _linear(1, dim, 6 * dim)}
    if isinstance(config, DyDiTConfig):
        narrow = max(1, dim // TOKEN_GATE_SHARE)
        stages["router"] = config.depth * (_linear(sum(kept), dim, narrow) + _linear(sum(kept), narrow, 1))
    return stages


def _sparse(config: SparseDiTConfig, kept: list[int]) -> dict[str, int]:
    """The stages between the embedding and the final layer of a SparseDiT with so many sparse tokens in each image."""
    dim, full = config.hidden_size, config.tokens
    adaln, row = _linear(1, dim, 6 * dim), _linear(1, dim, dim)
    mlp = 2 * _linear(1, dim, int(dim * config.mlp_ratio))

    def block(queries: int, keys: int) -> int:
        scores = config.num_heads * queries * keys * (4 * (dim // config.num_heads) + SOFTMAX_FLOPS)
        return queries * (2 * row + mlp) + keys * 2 * row + scores + adaln

    def blocks(few: int) -> int:
        kinds = {
            "pooled": 2 * row + full * mlp + adaln,
            "merge": block(few, full),
            "sparse": block(few, few),
            "recover": block(full, few),
            "dense": block(full, full),
        }
        return sum(kinds[kind] for kind in config.kinds)

    stages = {
        "transformer": sum(images * blocks(few) for few, images in Counter(kept).items()),
        "dechunk": config.modules * (sum(kept) + len(kept) * full) * row,
    }
    if config.router is not None:
        stages["router"] = len(kept) * config.modules * _router(config, config.patches)
    return stages


def flops_share(config: ModelConfig, gates: Gates, lengths: Tensor | None = None) -> Tensor:
    """What the attention and MLPs of the blocks cost with these gates, over what they cost complete.

    Args:
        config: of a model of dynamic width.
        gates: of B images.
        lengths: (B,) integer, the tokens that a DC-DiT keeps of each image. None: those of a DyDiT.

    Returns:
        (B,) float32, differentiable in the gates.
    """
    if lengths is None:
        assert not isinstance(config, DCDiTConfig)
        lengths = torch.full(gates.heads.shape[:1], config.tokens, device=gates.heads.device)
    # A share needs no more digits than float32 has.
    attention, mlp = (part.float() for part in _block_parts(config, lengths))
    groups = gates.groups.mean(2)
    if gates.tokens is not None:
        groups = groups * gates.tokens.mean(2)
    return (attention * gates.heads.mean((1, 2)) + mlp * groups.mean(1)) / (attention + mlp)


def _block_parts(config: ModelConfig, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) int64 each: FLOPs of the attention and of the MLP of a complete block for images of M_b tokens."""
    dim, hidden, lengths = config.hidden_size, int(config.hidden_size * config.mlp_ratio), lengths.long()
    scores = config.num_heads * lengths**2 * (4 * (dim // config.num_heads) + SOFTMAX_FLOPS)
    return lengths * _linear(1, dim, 4 * dim) + scores, 2 * lengths * _linear(1, dim, hidden)


def _router(config: DCDiTConfig | SparseDiTConfig, grid: tuple[int, int]) -> int:
    dim, narrow, length = config.hidden_size, config.hidden_size // 4, math.prod(grid)
    if config.router == "dithered":  # scores cells
        length = math.prod(cells_of(grid))
    if config.router in ("predictability", "dithered"):
        return _linear(length, dim, narrow) + 2 * _conv(length, narrow, narrow, 3) + _linear(length, narrow, 1)
    if config.router not in ("cosine2d", "cosine1d"):  # a fixed choice
        return 0
    depthwise = dim * _conv(length, 1, 1, 3) if config.router == "cosine2d" else 0
    return 2 * _linear(length, dim, dim) + depthwise + _linear(length, dim, 1)


def _conv_block(length: int, before: int, after: int, cond_dim: int) -> int:
    inner = min(before, after)
    skip = _linear(length, before, after) if before != after else 0
    return _conv(length, before, inner, 3) + _conv(length, inner, after, 3) + _linear(1, cond_dim, inner) + skip


def _timestep(config: ModelConfig) -> int:
    embedders, dim = config.depth if config.separate_embedders else 1, config.hidden_size
    return embedders * (_linear(1, 2 * TimestepEmbedder.FREQUENCIES, dim) + _linear(1, dim, dim))


def _final(length: int, dim: int, out_dim: int, cond_dim: int) -> int:
    return _linear(1, cond_dim, 2 * dim) + _linear(length, dim, out_dim)


def _linear(rows: int, in_dim: int, out_dim: int) -> int:
    return 2 * rows * in_dim * out_dim


def _conv(positions: int, in_dim: int, out_dim: int, side: int) -> int:
    return 2 * positions * side**2 * in_dim * out_dim
