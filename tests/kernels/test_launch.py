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


def config(rows: int, kernel: str = "gather") -> launch.Config:
    """The numbers that the kernel takes, with these rows, which no default has."""
    launch.shipped_configs()  # imports all kernel files
    return {**launch._defaults[kernel][0]["config"], "ROWS": rows}


NARROW, WIDE = config(1 << 10), config(1 << 11)


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


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the user's file for the CPU."""

    def write(content: object) -> Path:
        path = tmp_path / "cpu.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        for cached in (launch._lookup, launch._tuned_configs):
            cached.cache_clear()
        return path

    launch.shipped_configs()  # imports all kernel files
    monkeypatch.setenv("DCDIT_CONFIG_FOLDER", str(tmp_path))
    yield write
    for cached in (launch._lookup, launch._tuned_configs):
        cached.cache_clear()


def test_the_users_entries_win_over_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_folder) -> None:
    def entries(kernel: str, rows: int) -> list[dict]:
        return [{"shape": {"D": 64}, "config": config(rows, kernel)}]

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "cpu.json").write_text(
        json.dumps({"gather": entries("gather", 2), "scatter": entries("scatter", 4)})
    )
    monkeypatch.setattr(launch, "CONFIG_FOLDER", tmp_path / "package")
    user_folder({"gather": entries("gather", 8)})
    assert [launch.config_for(kernel, CPU, D=64)["ROWS"] for kernel in ("gather", "scatter")] == [8, 4]
    assert entries("gather", 8)[0] not in launch.shipped_configs()["gather"]


def test_entries_of_another_version_of_a_kernel_are_not_used(user_folder) -> None:
    user_folder({})
    default = launch.config_for("gather", CPU, D=64)
    entries = [{"shape": {"D": 64}, "config": {"ROWS": 2, "OLD": 64}}, {"shape": {"OLD": 1}, "config": {**default}}]
    user_folder({"gather": entries, "gone": entries})
    assert launch.config_for("gather", CPU, D=64) == default


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        '{"gather": [1]}',
        '{"gather": {"a": 1}}',
        '{"gather": [{"shape": {"D": "64"}, "config": {}}]}',
        '{"gather": [{"shape": {}, "config": {"ROWS": 0}}]}',
        '{"gather": [{"shape": {}}]}',
        "[" * 100_000,
    ],
)
def test_a_file_of_something_else(content: str, user_folder) -> None:
    path = user_folder(content)
    with pytest.raises(ValueError, match=f"^{path} holds no launch configurations; accepted: a file of dcdit tune"):
        launch.config_for("gather", CPU, D=64)


def test_where_tune_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DCDIT_CONFIG_FOLDER", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert launch.user_config_folder() == Path("/home/user/.cache/dcdit/configs")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert launch.user_config_folder() == Path("/cache/dcdit/configs")
    monkeypatch.setenv("DCDIT_CONFIG_FOLDER", "/mine")
    assert launch.user_config_folder() == Path("/mine")


def test_a_taken_name_is_refused() -> None:
    launch.shipped_configs()  # imports all kernel files
    with pytest.raises(ValueError, match="'gather'"):
        launch.set_default_configs("gather", {"ROWS": 1, "num_warps": 1})
