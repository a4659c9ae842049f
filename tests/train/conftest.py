"""The images and the configuration that the tests of training runs share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.runs import TINY

from dcdit.config import TrainConfig, override


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 8 x 8 in three classes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), labels=np.arange(12) % 3)
    return path


@pytest.fixture
def config(archive: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Four steps of a tiny DC-DiT, with overrides."""

    def config(*overrides: str, out: str | Path = "run") -> TrainConfig:
        data = {
            "model": {"name": "DC-DiT-S", "num_classes": 3, "overrides": TINY},
            "data": {"kind": "npz", "path": str(archive), "held_out": 0.25},
            "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "device": "cpu"},
            "router": {"group_size": 2, "target": 2.0, "drop_fractions": [0.0, 0.5], "drop_warmup_steps": 1},
            "run": {"out": str(tmp_path / out), "log_every": 1, "eval_every": 0, "eval_images": 3},
        }
        return override(data, overrides)

    return config
