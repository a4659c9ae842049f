"""Random inputs of tests: the same for the same seed, on the CPU."""

from typing import Any

import torch
from torch import Tensor

from dcdit.ops import TokenSelection, reference

PATTERNS = ("random", "ties", "one", "none", "all", "extreme", "long")
"""Patterns of probabilities; see :func:`random_probs`."""
ODD_PATTERNS = ("equal", "half", "signed")
"""More of them, on which selections go wrong first."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, drawn in float32 and then rounded."""
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def random_probs(
    *shape: int, pattern: str = "random", keep: float = 0.25, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Probabilities of one pattern.

    - ``random``: about the fraction ``keep`` of them above 0.5.
    - ``ties``: multiples of 1/8, among them exactly 0.5.
    - ``one``: one per row above 0.5.
    - ``none``: all below 0.5. ``all``: all above.
    - ``extreme``: exactly 0 or 1.
    - ``long``: all above 0.5 in the first row, all below in the others.
    - ``equal``: all 0.75.
    - ``half``: 0.5 and the two numbers of ``dtype`` next to it.
    - ``signed``: a little outside [0, 1] too, and both zeros.
    """
    rng = generator(seed)
    if pattern == "equal":
        return torch.full(shape, 0.75, dtype=dtype)
    if pattern == "half":
        half = torch.tensor(0.5, dtype=dtype)
        below, above = (torch.nextafter(half, torch.tensor(end, dtype=dtype)) for end in (0.0, 1.0))
        return torch.stack([below, half, above])[torch.randint(0, 3, shape, generator=rng)]
    if pattern == "signed":
        return torch.tensor([-0.25, -0.125, -0.0, 0.0, 1.0, 1.125])[torch.randint(0, 6, shape, generator=rng)].to(dtype)
    low, high = (torch.rand(shape, generator=rng) * 0.49 + offset for offset in (0.005, 0.505))
    if pattern == "random":
        p = torch.where(torch.rand(shape, generator=rng) < keep, high, low)
    elif pattern == "ties":
        p = torch.randint(0, 9, shape, generator=rng) / 8.0
    elif pattern == "extreme":
        p = torch.randint(0, 2, shape, generator=rng).float()
    elif pattern == "none":
        p = low
    elif pattern == "all":
        p = high
    elif pattern == "one":
        index = torch.randint(0, shape[-1], (*shape[:-1], 1), generator=rng)
        p = low.scatter(-1, index, 0.75)
    elif pattern == "long":
        p = low
        p[..., 0, :] = high[..., 0, :]
    else:
        raise ValueError(f"unknown pattern {pattern!r}; accepted: {', '.join(PATTERNS + ODD_PATTERNS)}")
    return p.to(dtype)


def random_cu_seqlens(*lengths: int) -> Tensor:
    """int32 (B+1,): starts of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_selection(*shape: int, pattern: str = "random", seed: int = 0, **mode: Any) -> tuple[Tensor, TokenSelection]:
    """Probabilities of a grid batch, and what the reference selects of them in one mode of ``select_tokens``."""
    p = random_probs(*shape, pattern=pattern, seed=seed)
    return p, reference.select_tokens(p, **mode)


def packed_selection(
    *lengths: int, pattern: str = "random", seed: int = 0, **mode: Any
) -> tuple[Tensor, TokenSelection]:
    """The same of packed sequences of these lengths."""
    p = random_probs(max(1, sum(lengths)), pattern=pattern, seed=seed)[: sum(lengths)]
    return p, reference.select_tokens(p, random_cu_seqlens(*lengths), **mode)


def ste_coefficient(p: Tensor) -> Tensor:
    """c of the straight-through gate: p where the natural mask keeps a position, 1 - p elsewhere."""
    return torch.where(p > 0.5, p, 1 - p)
