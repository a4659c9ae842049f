"""A few images and an untrained autoencoder that encodes them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 16
PER_CLASS = (4, 3)


def write_images(path: Path) -> Path:
    """Seven images of unequal sizes in two class folders."""
    rng = np.random.default_rng(0)
    for name, count in zip(("birds", "cats"), PER_CLASS, strict=True):
        (path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (SIZE + 4 * i, 2 * SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return path


def save_autoencoder(path: Path) -> Path:
    """An untrained autoencoder of stride 2 with a shift, whose posterior is wide enough to see the noise."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    autoencoder.save_pretrained(path)
    return path


def flip_last_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
