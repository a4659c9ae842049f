"""Launches of an operation, recorded instead of started: what a GPU would run, known on any machine."""

from unittest.mock import patch

import torch

from dcdit import ops
from dcdit.kernels import launch
from dcdit.profiling.workloads import Workload


def recorded_launches(workload: Workload) -> list[launch.Launch]:
    """What a workload starts, forward and backward, on the Triton backend."""
    # Nothing runs, so memory that a kernel would write holds zeros. The exact mode of select_tokens reads two of them.
    with ops.use_backend("triton"), launch.record_launches() as recorded, patch.object(launch, "empty", _zeros):
        workload.run()
    return recorded


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)
