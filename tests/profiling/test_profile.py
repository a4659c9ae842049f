"""`dcdit profile`: what it reports about a small model, its hints, its files, and how it takes bad input."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support import capturable_attention, fake_device
from support.small import batch as batch_of
from support.small import small_dy_dit, small_dynamic_dc_dit, small_sparse_dit

from dcdit.cli import main
from dcdit.models import DCDiT, DCDiTConfig, SlicedModel, count_flops, create_model
from dcdit.nn import STAGES
from dcdit.nn.memory_format import channels_last
from dcdit.profiling import profile as profile_module
from dcdit.profiling import subject
from dcdit.profiling.calibrate import calibrate_router, varied_latents
from dcdit.profiling.plots import plot_profile
from dcdit.profiling.profile import Profile, Variant, advice, markdown_table, profile
from dcdit.profiling.rounds import Rounds
from dcdit.profiling.subject import static_counterparts
from dcdit.sample.model_calls import ModelCalls

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


DYNAMIC = {
    "DyDiT": small_dy_dit,
    "DC-DiT of dynamic width": small_dynamic_dc_dit,
    "SparseDiT": lambda: small_sparse_dit(router="predictability", noisy_grid=(2, 2)),
}


@pytest.mark.parametrize("kind", DYNAMIC)
def test_every_dynamic_model_is_timed_as_it_draws(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its slices, which is what the counted FLOPs are those of."""
    dynamic = DYNAMIC[kind]()
    x, _, y = batch_of(dynamic.config)
    t = torch.full((3,), 250)
    drops = (0.0, 0.4) if isinstance(dynamic, DCDiT) else (0.0,)
    cut = []
    monkeypatch.setattr(subject, "SlicedModel", lambda *args: cut.append(args[1]) or SlicedModel(*args))
    found = profile(dynamic, kind, x, t, y, drops, seconds=0.01)
    assert cut == ([] if kind == "SparseDiT" else [[250]])
    statics = [variant for variant in found.variants if variant.drop_fraction is None]
    assert len(statics) == (2 if isinstance(dynamic, DCDiT) else 1)
    calls = ModelCalls(SlicedModel(dynamic, [250]) if cut else dynamic, 3)
    for variant, rho in zip(found.variants[len(statics) :], drops, strict=True):
        calls(x, t, y, **({"drop_fraction": rho} if isinstance(dynamic, DCDiT) else {}))
        record = calls.records()[-1]
        assert variant.gflops == pytest.approx(record["gflops"])
        share = {"DyDiT": "tokens", "SparseDiT": "sparse"}.get(kind, "kept")
        assert variant.kept_fraction == pytest.approx(record[share])
        assert variant.stage_ms["transformer"] > 0 and variant.stage_ms["router"] > 0
    if not isinstance(dynamic, DCDiT):
        with pytest.raises(ValueError, match=f"drop fraction 0.4 of a {kind}; accepted: 0, it drops none"):
            profile(dynamic, kind, x, t, y, (0.4,), seconds=0.01)
    if cut:
        with pytest.raises(ValueError, match="t holds 3 timesteps; accepted: one"):
            profile(dynamic, kind, x, torch.arange(3), y, (0.0,), seconds=0.01)


@pytest.mark.parametrize("name", ["DyDiT-S/2", "SparseDiT-S/2"])
def test_the_command_times_presets_of_other_methods(name: str, tmp_path: Path, capsys, monkeypatch) -> None:
    from dcdit.cli import profile as module

    sizes = {"depth": 5, "num_heads": 4, "hidden_size": 64}
    if name.startswith("Sparse"):
        sizes |= {"modules": 1, "sparse_depth": 1}
    monkeypatch.setattr(module, "create_model", lambda name, size: create_model(name, size, **sizes))
    arguments = ["profile", "--model", name, "--image-size", "64", "--batch", "2", "--seconds", "0.02", "--keep", "0.5"]
    files = ["--out", str(tmp_path / "p"), "--trace", str(tmp_path / "t.json")]
    assert main([*arguments, "--device", "cpu", *files]) == 0
    (static, dynamic) = json.loads((tmp_path / "p" / "profile.json").read_text())["variants"]
    assert static["name"] == "static DiT, patch 2"
    assert 0.2 < dynamic["gflops"] / static["gflops"] < 0.9


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


def test_a_real_run_is_judged(result: Profile) -> None:
    """Whatever this machine is doing now."""
    assert result.rounds >= 3
    assert result.reliable or result.warnings
    assert result.waited is None or 0 <= result.waited <= 1
    for variant in result.variants[2:]:
        for name, (low, high) in variant.eta_interval.items():
            assert low <= variant.eta[name] <= high


# --- on a clock of our own --------------------------------------------------------------------------------------------

TRUE_MS = {
    "static DiT, patch 1": 100.0,
    "static DiT, patch 2": 30.0,
    "small at drop 0": 50.0,
    "small at drop 0.5": 40.0,
}
STAGE_SHARES = dict(zip(STAGES, (0.01, 0.1, 0.04, 0.01, 0.01, 0.6, 0.1, 0.1, 0.03), strict=True))


@pytest.fixture
def timed(model: DCDiT, batch, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Profile]:
    """A profile whose times are those above, each multiplied by what ``noise(call, round)`` gives."""

    def timed(
        noise: Callable[[str, int], float] = lambda *_: 1.0, waited: float | None = 0.0, count: int = 20
    ) -> Profile:
        def rounds(calls: dict, device: torch.device, seconds: float, *, staged, least, warmup, enough) -> Rounds:
            found = Rounds({call: [] for call in calls}, seconds=seconds, waited=waited)
            for number in range(count):
                for call in calls:
                    whole = TRUE_MS[call.removesuffix(" with its stages timed")] * noise(call, number)
                    shares = STAGE_SHARES if call in staged else {}
                    found.passes[call].append({"whole": whole, **{s: whole * share for s, share in shares.items()}})
            return found

        monkeypatch.setattr(profile_module, "time_rounds", rounds)
        return profile(model, "small", *batch, drop_fractions=(0.0, 0.5))

    return timed


def test_eta_follows_from_times_and_flops(timed) -> None:
    quiet = timed()
    static, _, dynamic, _ = quiet.variants
    expected = (100 / 50) / (static.gflops / dynamic.gflops)
    assert dynamic.eta[static.name] == pytest.approx(expected)
    assert dynamic.eta_interval[static.name] == pytest.approx((expected, expected))
    assert not static.eta and not static.eta_interval
    assert (quiet.reliable, quiet.warnings, quiet.narrow, quiet.rounds) == (True, [], True, 20)
    assert "unreliable" not in quiet.table()
    assert quiet.caution() == ""


def test_eta_comes_from_the_ratios_of_the_rounds(timed) -> None:
    """The machine gets slower by 9 % during the run, and its times are those of the middle."""
    found = timed(lambda call, number: 1 + 0.09 * number / 19)
    static, _, dynamic, _ = found.variants
    assert dynamic.eta[static.name] == pytest.approx((100 / 50) / (static.gflops / dynamic.gflops))
    assert dynamic.ms == pytest.approx(50 * 1.045)
    assert dynamic.spread == pytest.approx(0.09 / 4 / 1.045, rel=0.01)
    assert found.reliable


def test_the_whole_has_the_flops_of_its_stages(timed) -> None:
    found = timed()
    (row,) = (line for line in found.stage_table().splitlines() if line.startswith("| whole"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    expected = [
        cell for v in found.variants[2:] for cell in (f"{v.ms:.2f}", "±0.0%", f"{sum(v.stage_gflops.values()):.2f}")
    ]
    assert cells[1:] == expected
    assert "0.00" not in cells


def test_tables_carry_the_spread(timed) -> None:
    found = timed(lambda call, number: (0.96, 1.0, 1.04)[number % 3])
    assert [v.spread for v in found.variants] == pytest.approx([0.04] * 4)
    assert found.table().count("±4.0%") == 4
    assert found.stage_table().count("±4.0%") == 2 * (len(STAGES) + 1)


def test_a_noisy_run_says_so_first_and_prints_no_eta(timed, tmp_path: Path) -> None:
    source = random.Random(0)
    found = timed(lambda *_: source.uniform(0.5, 3.0), waited=0.6)
    assert not found.reliable and not found.narrow
    lines = found.caution().splitlines()
    assert lines[0] == "UNRELIABLE: these timings do not say what eta is."
    assert lines[2] == "- threads waited for a processor 60% of the time: other work runs on this machine"
    assert "Threads waited for a processor 60% of the time" in found.conditions()
    for variant in found.variants[2:]:
        low, high = variant.eta_interval["static DiT, patch 1"]
        assert f"unreliable ({low:.2f} to {high:.2f})" in found.table()
        assert f" {variant.eta['static DiT, patch 1']:.2f} (" not in found.table()
    assert advice(found) == []
    stored = json.loads(json.dumps(asdict(found)))
    assert (stored["reliable"], stored["warnings"]) == (False, found.warnings)


def test_two_measurements_that_disagree_make_eta_unreliable(timed) -> None:
    """Each of them is perfectly steady."""
    found = timed(lambda call, _: 2.26 if "stages" in call else 1.0)
    assert not found.reliable
    assert found.warnings[0].endswith("took 2.26 times as long as small at drop 0.5, which is the same work")


def test_budgets_within_the_spread_are_named(timed) -> None:
    """eta is known well enough, but not which of the two budgets is faster."""
    source = random.Random(0)
    found = timed(lambda call, _: source.gauss(1.25 if "0.5" in call else 1.0, 0.01))
    assert found.reliable
    (warning,) = found.warnings
    assert warning.startswith("drop 0.5 takes ") and warning.endswith("the spread is larger than the difference")
    assert found.caution().startswith("This run cannot tell some of its times apart:")
    assert f"{found.variants[2].eta['static DiT, patch 1']:.2f} (" in found.table()


@pytest.mark.parametrize("waited", [0.0, 0.5])
def test_the_picture_marks_what_is_unreliable(timed, waited: float, tmp_path: Path, monkeypatch) -> None:
    from dcdit.profiling import plots

    figures, new_figure = [], plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *a, **b: (made := new_figure(*a, **b), figures.append(made[0]))[0])
    plot_profile(timed(waited=waited), tmp_path / "profile.png")
    (figure,) = figures
    title = figure._suptitle
    hollow = {line.get_markerfacecolor() for line in figure.axes[2].lines if line.get_marker() == "o"}
    if waited:
        assert title.get_text().startswith("UNRELIABLE TIMINGS: threads waited") and title.get_color() == "red"
        assert hollow == {"white"}
    else:
        assert title.get_text().startswith("small on") and title.get_color() == "black"
        assert "white" not in hollow and hollow


def test_stops_when_certain_and_not_before(model: DCDiT, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the profile tells the clock: quiet rounds are enough from the ninth on, noisy ones never, and a crowded
    machine ends a run that is over its time."""
    asked: list[Callable[[Rounds], bool]] = []

    def rounds(calls: dict, device: torch.device, seconds: float, **options) -> Rounds:
        asked.append(options["enough"])
        return made(list(calls), options["least"])

    def made(calls: list[str], count: int, noise: float = 0.0, **facts: float) -> Rounds:
        passes = [{"whole": 10.0 * (1 + noise * (n % 3)), **dict.fromkeys(STAGES, 1.0)} for n in range(count)]
        shifted = passes[1:] + passes[:1]
        return Rounds({call: passes if n % 2 else shifted for n, call in enumerate(calls)}, **facts)

    monkeypatch.setattr(profile_module, "time_rounds", rounds)
    found = profile(model, "small", *batch, drop_fractions=(0.0,), seconds=2.0)
    calls = ["static DiT, patch 1", "static DiT, patch 2", "small at drop 0", "small at drop 0 with its stages timed"]
    (enough,) = asked
    assert found.rounds == 9
    assert enough(made(calls, 9, waited=0.0))
    assert not enough(made(calls, 8, waited=0.0))
    assert not enough(made(calls, 9, waited=0.5))
    assert not enough(made(calls, 30, noise=0.3, waited=0.0))
    assert not enough(made(calls, 3, waited=0.5, seconds=1.0))
    assert enough(made(calls, 3, waited=0.5, seconds=7.0))
    assert not enough(made(calls, 3, waited=0.0, seconds=7.0))


# --- calibration ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("router", ["dithered", "cosine2d", "cosine1d"])
def test_calibration_of_other_routers(batch, router: str) -> None:
    other = DCDiT(DCDiTConfig(**CONFIG, router=router)).eval()
    for fraction in (0.2, 0.6):
        calibrate_router(other, *batch, fraction)
        with torch.no_grad():
            kept = other(*batch, return_routing=True)[1].natural_mask.float().mean()
        assert float(kept) == pytest.approx(fraction, abs=0.03)


def test_the_uniform_router_keeps_a_quarter_only(batch) -> None:
    other = DCDiT(DCDiTConfig(**CONFIG, router="uniform"))
    calibrate_router(other, *batch, 0.25)
    with pytest.raises(ValueError, match=r"kept_fraction is 0\.3; accepted with the uniform router: 0\.25"):
        calibrate_router(other, *batch, 0.3)


@pytest.mark.parametrize(("flags", "shape"), [([], (3, 16, 16)), (["--image-size", "64"], (4, 8, 8))])
def test_a_recipe_of_pixels_is_timed_at_their_size(
    flags: list[str], shape: tuple[int, ...], tmp_path, monkeypatch
) -> None:
    seen = []

    def timed(model: DCDiT, name: str, x: torch.Tensor, t, y, *options) -> Profile:
        seen.append((tuple(x.shape[1:]), float(model(x, t, y, return_routing=True)[1].natural_mask.float().mean())))
        raise ValueError("enough")

    monkeypatch.setattr("dcdit.cli.profile.profile", timed)
    main(["profile", "--config", "digits-cpu", "--batch", "2", "--device", "cpu", "--out", str(tmp_path), *flags])
    assert seen == [(shape, pytest.approx(0.25, abs=0.05))]


def test_latents_get_rougher_through_the_batch() -> None:
    x = varied_latents(4, 4, (16, 16))
    rough = (x[..., 1:] - x[..., :-1]).square().mean((1, 2, 3)) / x.square().mean((1, 2, 3))
    assert rough.tolist() == sorted(rough.tolist())


def test_an_odd_grid_has_only_the_patch_that_divides_it() -> None:
    config = DCDiTConfig(**{**CONFIG, "grid": (7, 8)})
    assert list(static_counterparts(config)) == ["static DiT, patch 1"]


def test_markdown_table_aligns() -> None:
    assert markdown_table(["a", "bb"], [["ccc", "1"]]).splitlines() == ["| a   | bb |", "|-----|---:|", "| ccc |  1 |"]


def low(eta: float = 0.5, interval: tuple[float, float] = (0.48, 0.52), scatter: float = 0.02, **changes) -> Profile:
    """A profile whose eta is low because its de-chunk is slow."""
    stages = {"transformer": 10.0, "dechunk": 8.0, "whole": 18.0}
    variant = Variant(
        name="dynamic",
        drop_fraction=0.3,
        kept_fraction=0.2,
        gflops=10.0,
        ms=18.0,
        images_per_second=1.0,
        eta={"static": eta},
        stage_ms=stages,
        stage_gflops={"transformer": 10.0},
        spread=scatter,
        stage_spread=dict.fromkeys(stages, scatter),
        eta_interval={"static": interval},
    )
    base = Profile(
        model="m",
        device="NVIDIA X",
        dtype="bfloat16",
        batch=64,
        threads=1,
        torch="2",
        attention="flash3",
        compiled=True,
        graph=False,
        channels_last=True,
        variants=[variant],
        rounds=20,
        narrow=True,
        waited=0.0,
        reliable=True,
        warnings=[],
    )
    return replace(base, **changes)


def test_no_hints_where_eta_is_high() -> None:
    assert advice(low(0.95, (0.94, 0.96))) == []


def test_noise_is_not_explained() -> None:
    """Neither an eta that may be high, nor anything of an unreliable run, nor a stage that scatters that much."""
    assert advice(low(0.88, (0.86, 0.91))) == []
    assert advice(low(reliable=False, warnings=["noise"])) == []
    assert not any("dechunk" in line for line in advice(low(scatter=0.9)))


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
    assert "rounds in turns" in printed
    assert str(trace) in printed
    stored = json.loads((tmp_path / "p" / "profile.json").read_text())
    assert [variant["drop_fraction"] for variant in stored["variants"]] == [None, None, 0.2]
    assert stored["reliable"] == (not printed.startswith("UNRELIABLE"))
    assert set(stored["variants"][2]["eta_interval"]) == set(stored["variants"][2]["eta"])
    assert (tmp_path / "p" / "profile.png").read_bytes().startswith(b"\x89PNG")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(STAGES) <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "banana"], "device is 'banana'; accepted here: auto, cpu"),
        (["--batch", "0"], "--batch is 0"),
        (["--keep", "3"], "--keep is 3.0"),
        (["--seconds", "0"], "--seconds is 0.0"),
        (["--drop-fraction", "1.5"], "--drop-fraction is 1.5"),
        (["--model", "DC-DiT-Q"], "unknown preset 'DC-DiT-Q'"),
        (["--model", "DiT-S/2"], "DiT-S/2 is a static DiT; accepted: a DC-DiT, a DyDiT or a SparseDiT"),
        (["--model", "DyDiT-S/2", "--drop-fraction", "0.3"], "drop fraction 0.3 of a DyDiT; accepted: 0"),
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


def test_graphs_are_timed_where_they_are_asked_for(model: DCDiT, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for the device: every variant is replayed, and only the stages run without graphs."""
    with pytest.raises(ValueError, match="the model is on cpu; CUDA graphs need a CUDA device"):
        profile(model, "small", *batch, (0.5,), seconds=0.01, graph=True)
    capturable_attention.install(monkeypatch, model.config.grid[0] * model.config.grid[1])
    fake = fake_device.install(monkeypatch)
    found = profile(model, "small", *batch, (0.5,), seconds=0.01, graph=True)
    assert found.graph and all(graph.replays >= found.rounds for graph in fake.graphs)
    assert not any("which is the same work" in warning for warning in found.warnings)
