"""Where a launch configuration comes from: the device's file, else the defaults in the kernel files."""

import json
from pathlib import Path

import pytest
import torch

from dcdit.kernels import launch

CPU = torch.device("cpu")


def test_tuned_entries_win_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = launch.shipped_configs()["ratio_loss"][0]["config"]
    narrow, wide = ({"ROWS": rows, "BLOCK_D": 64, "num_warps": 2} for rows in (2, 4))
    table = {"gather": [{"shape": {"D": 64}, "config": narrow}, {"shape": {"D": 2048}, "config": wide}]}
    (tmp_path / "cpu.json").write_text(json.dumps(table))
    monkeypatch.setattr(launch, "CONFIG_FOLDER", tmp_path)
    for cached in (launch._lookup, launch._tuned_configs):
        cached.cache_clear()
    try:
        assert launch.config_for("gather", CPU, D=1024) == wide
        assert launch.config_for("gather", CPU, D=72) == narrow
        assert launch.config_for("ratio_loss", CPU) == default
        assert launch.shipped_configs()["gather"][-2:] == table["gather"]
    finally:
        for cached in (launch._lookup, launch._tuned_configs):
            cached.cache_clear()


def test_a_taken_name_is_refused() -> None:
    launch.shipped_configs()  # imports all kernel files
    with pytest.raises(ValueError, match="'gather'"):
        launch.set_default_configs("gather", {"ROWS": 1, "num_warps": 1})
