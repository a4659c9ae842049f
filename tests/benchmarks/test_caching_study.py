"""The study of caches end to end, on models that nobody trained."""

import json
from pathlib import Path

import pytest
from support.small import small_dc_dit, small_dit

from benchmarks.studies import caching
from dcdit import checkpoint as ckpt

PIXELS = {"grid": (4, 4), "in_channels": 3, "num_classes": 3}


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.importlib.util, "find_spec", lambda name: None)  # without cache-dit
    for name, model in (("dynamic", small_dc_dit(**PIXELS)), ("static", small_dit(**PIXELS))):
        model.objective = "flow"
        ckpt.save_model(tmp_path / f"{name}.safetensors", model)
    files = [str(tmp_path / f"{name}.safetensors") for name in ("dynamic", "static")]
    caching.main([*files, "--out", str(tmp_path / "out"), "--images", "1", "--steps", "4", "--rounds", "1"])
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    assert list(study) == ["dynamic.safetensors", "static.safetensors"]
    page = (tmp_path / "out" / "report.md").read_text()
    for name, rows in study.items():
        assert f"## {name}: " in page
        assert {row["cache"] for row in rows} == {"FirstBlockCache", "TeaCache", "MagCache", "TaylorSeer"}
        for row in rows:
            assert 0 <= row["left_out"] < 1 and len(row["times"]) == 1
            if row["left_out"] == 0:
                assert row["error"] < 1e-4 and row["flops"] == pytest.approx(1, abs=0.1)
            else:
                assert row["error"] > 0 and row["flops"] < 1
        assert any(row["left_out"] > 0 for row in rows)
    assert capsys.readouterr().out.strip().endswith("report.md")
