"""H-Net's moving average through the chunk scan of mamba_ssm (arXiv 2507.07955, section 2.2), where it is installed.

The scan computes ``s_m = exp(-dt_m) s_{m-1} + dt_m b_m x_m``: with ``dt = -log(1 - q)``, ``b = q`` and ``x = h / dt``
it is the moving average.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dcdit.ops import TokenSelection
from dcdit.ops.numerics import PROB_EPS
from dcdit.profiling.workloads import Call
from dcdit.profiling.workloads.dechunk import pad_tokens, plug_back_last
from dcdit.profiling.workloads.packing import padded_positions, real_rows

CHUNK = 256
HEAD = 32


def reason_unavailable(device: torch.device) -> str | None:
    """Why this baseline cannot run here; None where it can."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed"
    if device.type != "cuda":
        return "mamba_ssm's chunk scan needs a CUDA device"
    return None


def create_call(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor, residual: Tensor) -> Call:
    """The call to time, on the arguments of the default case of :func:`dcdit.ops.dechunk_ema`."""
    scan: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    order, real = padded_positions(sel)
    rows = real_rows(real)
    heads = h.shape[1] // HEAD
    speed = -torch.ones(heads, device=h.device)

    def call() -> Tensor:
        tokens = pad_tokens(h, order.shape, rows).to(h.dtype)
        q = p.float().clamp(PROB_EPS, 1 - PROB_EPS).gather(1, order)
        dt = -torch.log1p(-q)
        x = (tokens / dt[:, :, None]).to(h.dtype).unflatten(2, (heads, HEAD))
        b = q.to(h.dtype)[:, :, None, None]
        dts = dt.to(h.dtype)[:, :, None].expand(-1, -1, heads)
        states = scan(x, dts, speed, b, torch.ones_like(b), chunk_size=CHUNK)
        return plug_back_last(states.flatten(2).float(), sel, gate, residual)

    return call
