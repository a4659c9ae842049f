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
    def entries(rows: int) -> list[dict]:
        return [{"shape": {"D": 64}, "config": {"ROWS": rows, "BLOCK_D": 64, "num_warps": 2}}]

    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "cpu.json").write_text(json.dumps({"gather": entries(2), "scatter": entries(4)}))
    monkeypatch.setattr(launch, "CONFIG_FOLDER", tmp_path / "package")
    user_folder({"gather": entries(8)})
    assert [launch.config_for(kernel, CPU, D=64)["ROWS"] for kernel in ("gather", "scatter")] == [8, 4]
    assert entries(8)[0] not in launch.shipped_configs()["gather"]


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
