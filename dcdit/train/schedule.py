"""Learning rate, budgets and seeds of a step. They depend only on the step, so a resumed run continues exactly."""

import numpy as np

from dcdit.config import OptimSection, RouterSection, WidthSection

NOISE, DROP = 0, 1
"""Independent streams of random numbers."""


def seed_of(seed: int, stream: int, *position: int) -> int:
    """A seed for one position (step, rank, ...) of one stream."""
    return int(np.random.SeedSequence([seed, stream, *position]).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(optim: OptimSection, step: int) -> float:
    """Linear from lr / warmup_steps at step 0 to lr, then constant."""
    return optim.lr * min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else optim.lr


def drop_fraction(router: RouterSection, seed: int, step: int) -> float:
    """0 during the warm-up, then one of the list, the same on every rank (arXiv 2603.06351: elastic budgets)."""
    if step < router.drop_warmup_steps:
        return 0.0
    return router.drop_fractions[seed_of(seed, DROP, step) % len(router.drop_fractions)]


def compression_target(router: RouterSection, step: int) -> float:
    """N of the ratio loss: linear from ``target_start`` at step 0 to ``target``, then constant.

    This is the curriculum of the reference implementation (github AMD-AGI/DynamicChunkingDiT, ``train.py``), which
    starts dropping tokens at its end.
    """
    if router.target_start is None or step >= router.target_warmup_steps:
        return router.target
    return router.target_start + (router.target - router.target_start) * step / router.target_warmup_steps


def width_target(width: WidthSection, step: int) -> float:
    """The share of the FLOPs that the gates should leave: linear from 1 at step 0 to ``target``, then constant."""
    if step >= width.warmup_steps:
        return width.target
    return 1 - (1 - width.target) * step / width.warmup_steps


def trains_complete(width: WidthSection, step: int) -> bool:
    """Whether a step of a model of dynamic width also trains the complete model."""
    return step < width.complete_steps
