"""What the device can do at most, measured in this report: the floors of all other cases come from it."""

import argparse
import platform
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.figures import figure
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.setting import Setting
from dcdit.kernels.launch import table_for
from dcdit.profiling.device_timing import copy_bandwidth, gemm_rate
from dcdit.utils.environment import package_versions


class Ceilings:
    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def run(self, case: str) -> Mapping[str, Any]:
        setting = self.setting
        if case == "product":
            return {"tflops": figure(gemm_rate(setting.device, setting.dtype, setting.gemm_side, setting.seconds))}
        return {"gbps": figure(copy_bandwidth(setting.device, seconds=setting.seconds)), "machine": _machine(setting)}


def create(group: str, setting: Setting, lines: Lines, arguments: argparse.Namespace) -> Ceilings:
    return Ceilings(setting)


def _machine(setting: Setting) -> dict[str, Any]:
    """What a reader must know of the machine."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **package_versions(["triton", "numpy"]),
    }
    if not setting.rehearsal:
        properties = torch.cuda.get_device_properties(setting.device)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "L2 MB": round(properties.L2_cache_size / 1e6, 1),
            "launch configurations": table_for(setting.device) or "defaults",
        }
    return found
