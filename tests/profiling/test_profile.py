"""`dcdit profile`: what it reports about a small model, its hints, its files, and how it takes bad input."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcdit.cli import main
from dcdit.models import DCDiT, DCDiTConfig, count_flops
from dcdit.nn import STAGES
from dcdit.nn.memory_format import channels_last
from dcdit.profiling.calibrate import calibrate_router, varied_latents
from dcdit.profiling.profile import Profile, Variant, advice, markdown_table, profile, static_counterparts

CONFIG = {"grid": (8, 12), "hidden_size": 128, "depth": 2, "num_heads": 4, "num_classes": 10}


@pytest.fixture(scope="module")
def model() -> DCDiT:
    torch.manual_seed(0)
    return channels_last(DCDiT(DCDiTConfig(**CONFIG))).eval()


@pytest.fixture(scope="module")
def batch(model: DCDiT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return varied_latents(3, 4, model.config.grid), torch.tensor([5, 300, 900]), torch.tensor([0, 4, 9])


@pytest.fixture(scope="module")
def result(model: DCDiT, batch) -> Profile:
    calibrate_router(model, *batch, 0.3)
    return profile(model, "small", *batch, drop_fractions=(0.0, 0.5), seconds=0.05)


def test_variants_are_the_statics_and_the_budgets(result: Profile) -> None:
    assert [variant.drop_fraction for variant in result.variants] == [None, None, 0.0, 0.5]
    assert [variant.name for variant in result.variants[:2]] == ["static DiT, patch 1", "static DiT, patch 2"]
    assert result.batch == 3
    assert result.channels_last


def test_flops_are_per_image_and_counted_once(result: Profile, model: DCDiT) -> None:
    static = next(iter(static_counterparts(model.config).values()))
    assert result.variants[0].gflops == pytest.approx(count_flops(static)["total"] / 1e9)
    dynamic = result.variants[-1]
    assert dynamic.gflops == pytest.approx(sum(dynamic.stage_gflops.values()))


def test_eta_follows_from_times_and_flops(result: Profile) -> None:
    static, _, dynamic, _ = result.variants
    expected = (static.ms / dynamic.ms) / (static.gflops / dynamic.gflops)
    assert dynamic.eta[static.name] == pytest.approx(expected)
    assert not static.eta


def test_dropping_halves_the_kept_fraction(result: Profile) -> None:
    full, half = result.variants[2:]
    assert half.kept_fraction == pytest.approx(full.kept_fraction / 2, abs=0.02)
    assert half.stage_gflops["transformer"] < full.stage_gflops["transformer"]
    assert half.stage_gflops["encoder"] == full.stage_gflops["encoder"]


def test_every_stage_is_timed(result: Profile) -> None:
    for variant in result.variants[2:]:
        assert set(variant.stage_ms) == {*STAGES, "whole"}


def test_tables_hold_every_variant_and_stage(result: Profile) -> None:
    assert result.table().count("\n") == 1 + len(result.variants)
    assert result.stage_table().count("\n") == 1 + len(STAGES) + 1


def test_calibration_keeps_the_fraction_and_varies_between_images(model: DCDiT, batch) -> None:
    for fraction in (0.2, 0.6):
        calibrate_router(model, *batch, fraction)
        with torch.no_grad():
            kept = model(*batch, return_routing=True)[1].natural_mask.float().mean(1)
        assert float(kept.mean()) == pytest.approx(fraction, abs=0.03)
        assert float(kept.max() - kept.min()) > 0.01


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 3.0])
def test_calibration_refuses_a_fraction(model: DCDiT, batch, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"kept_fraction is {fraction}; accepted"):
        calibrate_router(model, *batch, fraction)


def test_calibration_refuses_a_router_without_a_bias(batch) -> None:
    other = DCDiT(DCDiTConfig(**CONFIG, router="cosine2d"))
    with pytest.raises(ValueError, match="router is 'cosine2d'"):
        calibrate_router(other, *batch, 0.3)


def test_latents_get_rougher_through_the_batch() -> None:
    x = varied_latents(4, 4, (16, 16))
    rough = (x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3)) / x.square().mean((1, 2, 3))
    assert rough.tolist() == sorted(rough.tolist())


def test_an_odd_grid_has_only_the_patch_that_divides_it() -> None:
    config = DCDiTConfig(**{**CONFIG, "grid": (7, 8)})
    assert list(static_counterparts(config)) == ["static DiT, patch 1"]


def test_markdown_table_aligns() -> None:
    assert markdown_table(["a", "bb"], [["ccc", "1"]]).splitlines() == ["| a   | bb |", "|-----|---:|", "| ccc |  1 |"]


def low(**changes: object) -> Profile:
    """A profile whose eta is low because its de-chunk is slow."""
    stages = {"transformer": 10.0, "dechunk": 8.0, "whole": 18.0}
    variant = Variant("dynamic", 0.3, 0.2, 10.0, 18.0, 1.0, {"static": 0.5}, stages, {"transformer": 10.0})
    base = Profile("m", "NVIDIA X", "bfloat16", 64, 1, "2", "flash3", True, True, [variant])
    return replace(base, **changes)


def test_no_hints_where_eta_is_high(result: Profile) -> None:
    good = replace(low().variants[0], eta={"static": 0.95})
    assert advice(low(variants=[good])) == []


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({}, "stage 'dechunk' takes 8.0 ms"),
        ({"batch": 1}, "--batch above 1"),
        ({"attention": "sdpa"}, "sdpa fallback"),
        ({"channels_last": False}, "channels-last"),
        ({"dtype": "float32"}, "--dtype bfloat16"),
        ({"compiled": False}, "--compile"),
    ],
)
def test_hints_name_the_cause(changes: dict, hint: str) -> None:
    assert any(hint in line for line in advice(low(**changes)))
    assert changes == {} or not any(hint in line for line in advice(low()))


def test_command_writes_json_picture_and_trace(tmp_path: Path, capsys, monkeypatch) -> None:
    from dcdit.cli import profile as module

    monkeypatch.setattr(module, "create_model", lambda name, size: DCDiT(DCDiTConfig(**CONFIG)))
    trace = tmp_path / "traces" / "trace.json"
    arguments = ["profile", "--batch", "2", "--seconds", "0.02", "--drop-fraction", "0.2", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "p"), "--trace", str(trace)]) == 0
    printed = capsys.readouterr().out
    assert "eta vs static DiT, patch 1" in printed
    assert str(trace) in printed
    stored = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert [variant["drop_fraction"] for variant in stored["variants"]] == [None, None, 0.2]
    assert (tmp_path / "p" / "profile.png").read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(STAGES) <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "banana"], "device is 'banana'; accepted here: auto, cpu"),
        (["--batch", "0"], "--batch is 0"),
        (["--keep", "3"], "kept_fraction is 3.0"),
        (["--seconds", "0"], "--seconds is 0.0"),
        (["--drop-fraction", "1.5"], "drop_fraction is 1.5"),
        (["--model", "DC-DiT-Q"], "unknown preset 'DC-DiT-Q'"),
        (["--model", "DiT-S/2"], "DiT-S/2 is a static DiT"),
        (["--image-size", "100"], "image_size is 100"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys, tmp_path: Path) -> None:
    base = ["profile", "--device", "cpu", "--batch", "1", "--image-size", "64", "--out", str(tmp_path)]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcdit: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_named(capsys) -> None:
    assert main(["profile", "--device", "cuda"]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err
