"""The tiny random DC-DiT of the reference implementation: weights, inputs, outputs, masks and gradients."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).with_name("dc_dit_tiny.npz")
CASES = (0, 1, 2)
TARGET = 4.0
RATIO_WEIGHT = 0.03
NUM_HEADS = 4


class Golden:
    def __init__(self) -> None:
        with np.load(PATH) as archive:
            self.tensors = {key: torch.from_numpy(archive[key]) for key in archive.files}

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def state(self) -> dict[str, Tensor]:
        return self.group("state/")

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["x"], self.tensors["t"], self.tensors["y"]

    def drop(self, case: int) -> float | Tensor:
        rho = self.tensors[f"case{case}/drop"]
        return rho.float() if rho.dim() else float(rho)
