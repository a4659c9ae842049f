"""Where a report runs and how large its cases are: on a GPU in full, or as a rehearsal on a CPU."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Everything that differs between a report and its rehearsal."""

    device: torch.device
    dtype: torch.dtype
    """Of the weights in inference, and of autocast in training."""
    scale: str
    image_size: int
    overrides: dict[str, Any]
    """Fields of the model's configuration that replace the preset's."""
    batches: tuple[int, int]
    """The large batch and the small one."""
    op_batch: int
    op_width: int
    compiler: str
    """Backend of ``torch.compile``."""
    seconds: float
    """Timing budget of a case."""
    gemm_side: int

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"


def create_setting(rehearse: bool) -> Setting:
    """The setting of a report, or that of its rehearsal."""
    if rehearse:
        return Setting(
            torch.device("cpu"),
            torch.float32,
            scale="S",
            image_size=64,
            overrides={"depth": 2, "hidden_size": 128, "num_heads": 2},
            batches=(4, 1),
            op_batch=2,
            op_width=64,
            compiler="eager",
            seconds=0.05,
            gemm_side=128,
        )
    return Setting(
        torch.device("cuda", torch.cuda.current_device()),
        torch.bfloat16,
        scale="XL",
        image_size=256,
        overrides={},
        batches=(32, 1),
        op_batch=32,
        op_width=1152,
        compiler="inductor",
        seconds=2.0,
        gemm_side=8192,
    )


def device_name(rehearse: bool) -> str:
    """What the lines of a report call its device."""
    return "rehearsal on a CPU" if rehearse else torch.cuda.get_device_name()
