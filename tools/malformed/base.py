"""Small valid inputs, from which the malformed ones are made, and the command lines that read them."""

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dcdit.checkpoint import save_model
from dcdit.config import load_config
from dcdit.models import create_model, to_dit, to_official

SIZES = {"depth": 1, "hidden_size": 128, "num_heads": 2, "grid": (8, 8)}
CLASSES = 4


class _Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


class Base:
    """The inputs, each made when it is first asked for.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # --- the inputs ---------------------------------------------------------------------------------------------

    def _model(self, name: str, preset: str, **fields: Any) -> Path:
        torch.manual_seed(0)
        file = self.folder / f"{name}.safetensors"
        save_model(file, create_model(preset, 64, CLASSES, **SIZES, **fields), notes={"objective": "flow"})
        return file

    @cached_property
    def model(self) -> Path:
        """A DC-DiT on pixels."""
        return self._model("model", "DC-DiT-S", in_channels=3)

    @cached_property
    def latent_model(self) -> Path:
        return self._model("latent-model", "DC-DiT-S")

    @cached_property
    def static_state(self) -> dict[str, Tensor]:
        """Of a static DiT, in the names of facebookresearch/DiT."""
        torch.manual_seed(0)
        return to_dit(create_model("DiT-S/2", 64, CLASSES, **SIZES))

    @cached_property
    def official_state(self) -> dict[str, Tensor]:
        """Of a DC-DiT of a published width, in the names of the reference implementation."""
        torch.manual_seed(0)
        return to_official(create_model("DC-DiT-S", 64, CLASSES, depth=1))

    @cached_property
    def images(self) -> Path:
        """Twelve PNG files of 16 x 16 pixels."""
        folder = self.folder / "images"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number:02d}.png")
        return folder

    @cached_property
    def vae(self) -> Path:
        from diffusers import AutoencoderKL

        folder = self.folder / "vae"
        AutoencoderKL(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).save_pretrained(folder)  # fmt: skip
        return folder

    @cached_property
    def extractor(self) -> Path:
        file = self.folder / "extractor.pt"
        torch.jit.script(_Pooled()).save(str(file))
        return file

    @cached_property
    def latents(self) -> Path:
        rng = np.random.default_rng(0)
        file = self.folder / "latents.npz"
        arrays: dict[str, Any] = {
            "latents": rng.standard_normal((12, 4, 8, 8)).astype("f4"),
            "labels": np.arange(12) % CLASSES,
        }
        np.savez(file, **arrays)
        return file

    @cached_property
    def config(self) -> Path:
        """A training configuration of two steps."""
        file = self.folder / "config.yaml"
        settings: dict[str, Any] = {
            "model": {"name": "DC-DiT-S", "num_classes": CLASSES, "overrides": {**SIZES, "grid": [8, 8]}},
            "data": {"kind": "npz", "path": str(self.latents), "held_out": 0},
            "optim": {"steps": 2, "batch_size": 4, "device": "cpu"},
            "router": {"group_size": 4},
            "run": {"log_every": 1, "eval_every": 0, "checkpoint_every": 1},
        }
        file.write_text(yaml.safe_dump(settings))
        return file

    @cached_property
    def run(self) -> Path:
        """A finished run of that configuration."""
        from dcdit.train import train

        folder = self.folder / "run"
        train(load_config(self.config, {"run.out": str(folder)}))
        return folder

    # --- copies that are then damaged ---------------------------------------------------------------------------

    def copy_of_images(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.images, folder / "images"))

    def copy_of_run(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.run, folder / "run"))

    def copy_of_vae(self, folder: Path, **changes: Any) -> Path:
        """An autoencoder whose configuration has other values."""
        copy = Path(shutil.copytree(self.vae, folder / "vae"))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        return copy

    def changed_model(self, file: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
        """The model's file with other values in its configuration, or other tensors."""
        with safe_open(self.model, "pt") as opened:
            metadata = opened.metadata()
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **config})
        save_file({**stored, **(tensors or {})}, file, metadata)
        return file

    def noted_model(self, file: Path, source: Path, **notes: str) -> Path:
        """A model's file with other notes in its metadata."""
        with safe_open(source, "pt") as opened:
            metadata = {**opened.metadata(), **notes}
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        save_file(stored, file, metadata)
        return file

    # --- command lines ------------------------------------------------------------------------------------------

    def sample(self, checkpoint: Path, out: Path, *options: str) -> list[str]:
        common = ["--steps", "1", "--labels", "0", "--device", "cpu", "--out", str(out / "samples")]
        return ["sample", "--checkpoint", str(checkpoint), *common, *options]

    def upcycle(self, source: Path, out: Path) -> list[str]:
        return [
            "upcycle",
            "--from",
            str(source),
            "--num-heads",
            "2",
            "--config",
            str(self.config),
            "--out",
            str(out / "run"),
        ]

    def train_on(self, kind: str, path: Path, out: Path, *options: str) -> list[str]:
        data = ["--data", kind, "--data-path", str(path)]
        return ["train", "--config", str(self.config), *data, "--out", str(out / "run"), *options]

    def train_with(self, config: Path, out: Path, *options: str) -> list[str]:
        return ["train", "--config", str(config), "--out", str(out / "run"), *options]

    def evaluate(self, images: Path, out: Path, *options: str, extractor: Path | None = None) -> list[str]:
        network = ["--extractor", str(extractor or self.extractor), "--trust-extractor", "--device", "cpu"]
        places = ["--cache", str(out / "cache"), "--out", str(out / "evaluation")]
        return ["evaluate", "--images", str(images), *network, *places, *options]

    def draw(self, out: Path, *options: str) -> list[str]:
        """``dcdit evaluate`` of a checkpoint, without metrics."""
        common = ["--num", "2", "--steps", "1", "--batch-size", "1", "--device", "cpu", "--out", str(out)]
        return ["evaluate", "--checkpoint", str(self.model), *common, *options]

    def extract(self, images: Path, vae: Path, out: Path, *options: str) -> list[str]:
        common = ["--size", "16", "--workers", "0", "--device", "cpu", "--out", str(out / "latents")]
        return ["extract", "--images", str(images), "--vae", str(vae), *common, *options]
