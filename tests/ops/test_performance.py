"""De-chunking costs less than the dense formulation, and no operation costs more per position on a larger grid.

A time is processor time of one thread, the best of several runs. Only ratios within one run are compared.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.dense_dechunk import IMPLEMENTATIONS, arguments, dense_dechunk_spatial, forward_backward
from support.inputs import randn, random_probs

from dcdit import ops

pytestmark = pytest.mark.perf
SIDE, WIDTH = 128, 384


def best_time(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def test_the_baseline_is_the_same_function() -> None:
    args = arguments(24, 16)
    grad = randn(1, 24 * 24, 16, seed=2)
    torch.testing.assert_close(dense_dechunk_spatial(*args), ops.dechunk_spatial(*args), rtol=1e-5, atol=1e-5)
    for dense, linear in zip(
        forward_backward(dense_dechunk_spatial, args, grad),
        forward_backward(ops.dechunk_spatial, args, grad),
        strict=True,
    ):
        torch.testing.assert_close(dense, linear, rtol=1e-4, atol=1e-4)


def test_ten_times_faster_than_dense() -> None:
    args, grad = arguments(SIDE, WIDTH), randn(1, SIDE * SIDE, WIDTH, seed=2)
    for dense, linear in (
        (lambda: dense_dechunk_spatial(*args), lambda: ops.dechunk_spatial(*args)),
        (
            lambda: forward_backward(dense_dechunk_spatial, args, grad),
            lambda: forward_backward(ops.dechunk_spatial, args, grad),
        ),
    ):
        ratio = best_time(dense, 1) / best_time(linear, 5)
        assert ratio >= 10, f"{ratio:.1f} times faster"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak resident size")
def test_a_tenth_of_the_memory_of_dense() -> None:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]),
        # Then the allocator returns large blocks to the system, and the resident size is that of the live tensors.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    peaks = {}
    for name in IMPLEMENTATIONS:
        command = [sys.executable, "-m", "support.dense_dechunk", name, str(SIDE), str(WIDTH)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[name] = int(done.stdout)
    assert peaks["linear"] <= peaks["dense"] / 10, (
        f"peaks in MB: { {name: peak >> 20 for name, peak in peaks.items()} }"
    )


def test_dechunk_spatial_costs_the_same_per_position_on_a_larger_grid() -> None:
    def per_position(side: int, repeats: int) -> float:
        args, grad = arguments(side, WIDTH), randn(1, side * side, WIDTH, seed=2)
        return best_time(lambda: forward_backward(ops.dechunk_spatial, args, grad), repeats) / side**2

    small, large = per_position(32, 20), per_position(SIDE, 7)
    assert large <= 1.5 * small, f"{large / small:.2f} times the cost per position"


def operations(side: int, width: int) -> dict[str, Callable[[], object]]:
    p = random_probs(1, side * side)
    sel = ops.select_tokens(p)
    x, tokens, row = randn(1, side * side, width), randn(sel.indices.numel(), width), randn(1, width)
    features, channels = randn(1, width, side, side), torch.ones(width)
    return {
        "boundary_prob_cosine": lambda: ops.boundary_prob_cosine(x, x),
        "boundary_prob_cosine2d": lambda: ops.boundary_prob_cosine2d(x, x, randn(width, 3, 3), (side, side)),
        "boundary_prob_predictability": lambda: ops.boundary_prob_predictability(
            features, channels, channels, channels, torch.zeros(1)
        ),
        "group_norm_silu": lambda: ops.group_norm_silu(x, 8, channels, channels, row),
        "select_tokens": lambda: ops.select_tokens(p, drop_fraction=0.3),
        "gather_tokens": lambda: ops.gather_tokens(x, sel),
        "scatter_tokens": lambda: ops.scatter_tokens(tokens, sel),
        "dechunk_ema": lambda: ops.dechunk_ema(tokens, p, sel, None, x),
        "ratio_loss": lambda: ops.ratio_loss(p, p > 0.5, 4.0),
        "modulated_layer_norm": lambda: ops.modulated_layer_norm(tokens, row, row, sel.cu_seqlens),
        "gated_add": lambda: ops.gated_add(tokens, tokens, row, sel.cu_seqlens),
    }


@pytest.mark.parametrize("name", operations(1, 8))
def test_cost_is_linear(name: str) -> None:
    # A quadratic cost gives a ratio of 16. Data that no longer fit the caches raise it too, but less than the bound.
    small, large = (best_time(operations(side, 64)[name], 10) / side**2 for side in (64, 256))
    assert large <= 4 * small, f"{large / small:.2f} times the cost per position"
