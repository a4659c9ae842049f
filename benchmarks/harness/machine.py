"""The conditions of a run, which every result carries."""

import functools
from statistics import median
from typing import Any

import torch

from benchmarks.harness import sets
from dcdit.profiling.device_timing import copy_bandwidth
from dcdit.profiling.rounds import spread
from dcdit.utils.environment import cpu_name


@functools.cache
def machine() -> dict[str, Any]:
    """Device, threads, versions, dtype, and the copy bandwidth measured in this run, with its spread."""
    device = sets.device()
    copies = copy_bandwidth(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(sets.dtype()).removeprefix("torch."),
        "set": sets.chosen_set(),
        "copy_gbps": median(copies),
        "copy_spread": spread(copies),
    }
