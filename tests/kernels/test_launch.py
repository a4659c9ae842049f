"""Where a launch configuration comes from: the device's file, else the defaults in the kernel files."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dcdit.kernels import launch

CPU = torch.device("cpu")


CACHED = (launch._lookup, launch._tuned_configs, launch.table_for, launch.device_slug)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tuned configurations."""
    monkeypatch.setattr(launch, "CONFIG_FOLDER", tmp_path)
    for cached in CACHED:
        cached.cache_clear()
    yield tmp_path
    for cached in CACHED:
        cached.cache_clear()


def write(folder: Path, name: str, *configs: tuple[int, launch.Config]) -> None:
    entries = [{"shape": {"D": width}, "config": config} for width, config in configs]
    (folder / f"{name}.json").write_text(json.dumps({"gather": entries}))


NARROW, WIDE = ({"ROWS": rows, "BLOCK_D": 64, "num_warps": 2} for rows in (2, 4))


def test_tuned_entries_win_over_defaults(tables: Path) -> None:
    default = launch.shipped_configs()["ratio_loss"][0]["config"]
    write(tables, "cpu", (64, NARROW), (2048, WIDE))
    launch.table_for.cache_clear()
    assert launch.config_for("gather", CPU, D=1024) == WIDE
    assert launch.config_for("gather", CPU, D=72) == NARROW
    assert launch.config_for("ratio_loss", CPU) == default
    assert [entry["config"] for entry in launch.shipped_configs()["gather"][-2:]] == [NARROW, WIDE]


@pytest.mark.parametrize(
    ("shipped", "used"),
    [
        (["NVIDIA_H100_80GB_HBM3.sm_90"], "NVIDIA_H100_80GB_HBM3.sm_90"),
        (["NVIDIA_H100_80GB_HBM3.sm_90", "NVIDIA_H200.sm_90"], "NVIDIA_H200.sm_90"),
        (["NVIDIA_A100-SXM4-80GB.sm_80"], None),
        ([], None),
    ],
)
def test_a_table_serves_its_architecture(
    shipped: list[str], used: str | None, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H200 takes its own table, else that of an H100, and never that of an A100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    for name in shipped:
        write(tables, name, (1152, WIDE if name == used else NARROW))
    h200 = torch.device("cuda", 0)
    assert launch.table_for(h200) == used
    default = launch._defaults["gather"]
    expected = WIDE if used else min(default, key=lambda entry: abs(entry["shape"]["D"] - 1152))["config"]
    assert launch.config_for("gather", h200, D=1152) == expected


def test_a_taken_name_is_refused() -> None:
    launch.shipped_configs()  # imports all kernel files
    with pytest.raises(ValueError, match="'gather'"):
        launch.set_default_configs("gather", {"ROWS": 1, "num_warps": 1})
