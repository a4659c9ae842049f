"""Analytic FLOPs of a forward pass, stage by stage."""

from collections.abc import Sequence

from dcdit.models.config import DCDiTConfig, DiTConfig
from dcdit.nn import STAGES
from dcdit.nn.embedding import TimestepEmbedder

SOFTMAX_FLOPS = 3
"""Per attention score, as the papers count: scale, exponential, division."""


def count_flops(
    config: DCDiTConfig | DiTConfig, lengths: int | Sequence[int] | None = None, batch: int = 1
) -> dict[str, int]:
    """FLOPs of one forward pass, twice the multiply-adds.

    Counted: linear layers, convolutions (padding included) and attention, which takes
    ``heads * sum of M_b^2 * (4 d_h + 3)``. Not counted: norms, activations and the other elementwise work, selection,
    gather, and the smoothing of the de-chunk, whose cost depends on the implementation.

    Args:
        config: of the model.
        lengths: kept tokens of each image, or one number for all ``batch`` images. None is every position, and the
            only value that a static DiT accepts.
        batch: number of images. With one length per image it may stay at 1.

    Returns:
        Stage name (see ``dcdit.nn.STAGES``) to FLOPs of the whole batch, and their sum under ``"total"``.

    Raises:
        ValueError: lengths for a static DiT, outside 1 to L, or not one per image.
    """
    if isinstance(config, DiTConfig):
        if lengths is not None:
            raise ValueError(f"lengths is {lengths!r}; a static DiT keeps every token, accepted: None")
        stages = _static(config, batch)
    else:
        kept = _kept_lengths(config, lengths, batch)
        stages = _dynamic(config, kept)
    return {**dict.fromkeys(STAGES, 0), **stages, "total": sum(stages.values())}


def _kept_lengths(config: DCDiTConfig, lengths: int | Sequence[int] | None, batch: int) -> list[int]:
    positions = config.grid[0] * config.grid[1]
    if lengths is None or isinstance(lengths, int):
        kept = [positions if lengths is None else lengths] * batch
    else:
        kept = [int(length) for length in lengths]
        if batch not in (1, len(kept)):
            raise ValueError(f"lengths has {len(kept)} entries for a batch of {batch}; accepted: one per image")
    wrong = [length for length in kept if not 1 <= length <= positions]
    if wrong:
        raise ValueError(f"lengths holds {wrong[0]}; accepted: 1 to {positions} kept tokens per image")
    return kept


def _dynamic(config: DCDiTConfig, kept: list[int]) -> dict[str, int]:
    batch, length = len(kept), config.grid[0] * config.grid[1]
    dim, narrow = config.hidden_size, config.hidden_size // 4

    def stack(*widths: tuple[int, int]) -> int:
        return sum(_conv_block(length, before, after, dim) for before, after in widths)

    per_image = {
        "embed": _conv(length, config.in_channels, narrow, 3) + _timestep(config),
        "encoder": stack((narrow, narrow), (narrow, dim)),
        "router": _router(config, length),
        "dechunk": _linear(length, dim, dim),
        "decoder": stack((dim, narrow), (narrow, narrow)),
        "final": _final(length, narrow, config.out_channels, dim),
    }
    return {**{name: batch * flops for name, flops in per_image.items()}, "transformer": _transformer(config, kept)}


def _static(config: DiTConfig, batch: int) -> dict[str, int]:
    dim, patch = config.hidden_size, config.patch_size
    length = (config.grid[0] // patch) * (config.grid[1] // patch)
    return {
        "embed": batch * (_conv(length, config.in_channels, dim, patch) + _timestep(config)),
        "transformer": _transformer(config, [length] * batch),
        "final": batch * _final(length, dim, patch**2 * config.out_channels, dim),
    }


def _transformer(config: DCDiTConfig | DiTConfig, kept: list[int]) -> int:
    dim, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    tokens = sum(kept)
    scores = config.num_heads * sum(length**2 for length in kept)
    attention = scores * (4 * dim // config.num_heads + SOFTMAX_FLOPS)
    linears = _linear(tokens, dim, 4 * dim) + 2 * _linear(tokens, dim, hidden) + _linear(len(kept), dim, 6 * dim)
    return config.depth * (linears + attention)


def _router(config: DCDiTConfig, length: int) -> int:
    dim, narrow = config.hidden_size, config.hidden_size // 4
    if config.router == "predictability":
        return _linear(length, dim, narrow) + 2 * _conv(length, narrow, narrow, 3) + _linear(length, narrow, 1)
    depthwise = dim * _conv(length, 1, 1, 3) if config.router == "cosine2d" else 0
    return 2 * _linear(length, dim, dim) + depthwise + _linear(length, dim, 1)


def _conv_block(length: int, before: int, after: int, cond_dim: int) -> int:
    inner = min(before, after)
    skip = _linear(length, before, after) if before != after else 0
    return _conv(length, before, inner, 3) + _conv(length, inner, after, 3) + _linear(1, cond_dim, inner) + skip


def _timestep(config: DCDiTConfig | DiTConfig) -> int:
    embedders, dim = config.depth if config.separate_embedders else 1, config.hidden_size
    return embedders * (_linear(1, 2 * TimestepEmbedder.FREQUENCIES, dim) + _linear(1, dim, dim))


def _final(length: int, dim: int, out_dim: int, cond_dim: int) -> int:
    return _linear(1, cond_dim, 2 * dim) + _linear(length, dim, out_dim)


def _linear(rows: int, in_dim: int, out_dim: int) -> int:
    return 2 * rows * in_dim * out_dim


def _conv(positions: int, in_dim: int, out_dim: int, side: int) -> int:
    return 2 * positions * side**2 * in_dim * out_dim
