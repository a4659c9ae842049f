"""``dcdit sample``: budgets on the command line, what they cost, and the report."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.small import save_diverged, small_dc_dit, small_dit

from dcdit import checkpoint as ckpt
from dcdit.cli import main
from dcdit.cli.profile import DTYPES
from dcdit.models import DCDiT, KeptShare, count_flops

GRID = {"grid": (8, 8), "in_channels": 3, "num_classes": 3}
STEPS = 6
IMAGES = 4


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    path = tmp_path_factory.mktemp("dynamic") / "model.safetensors"
    ckpt.save_model(path, small_dc_dit(**GRID))
    return path


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    path = tmp_path_factory.mktemp("static") / "model.safetensors"
    ckpt.save_model(path, small_dit(**GRID))
    return path


@pytest.fixture
def draw(tmp_path, capsys):
    """Run the command; its samples.json and what it printed."""

    def draw(checkpoint, *flags):
        common = ["--checkpoint", checkpoint, "--steps", STEPS, "--num", IMAGES, "--device", "cpu", "--out", tmp_path]
        assert main(["sample", *map(str, [*common, *flags])]) == 0
        return json.loads((tmp_path / "samples.json").read_text()), capsys.readouterr().out

    return draw


@pytest.fixture
def fails(capsys):
    def fails(checkpoint, flags, match):
        assert main(["sample", "--checkpoint", str(checkpoint), "--device", "cpu", *flags.split()]) == 2
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]  # a pilot has shown its progress before
        assert out == "" and last.startswith("dcdit: error: ")
        assert re.search(match, last), err

    return fails


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def test_flops_of_a_static_model(static, draw):
    report, out = draw(static, "--cfg-scale", 2, "--cfg-interval", 0.3, 0.7)
    (run,) = report["runs"]
    guided = sum(0.3 <= call["t"] / 1000 <= 0.7 for call in run["calls"])
    assert 0 < guided < STEPS
    each = count_flops(ckpt.load_model(static).config)["total"]
    assert run["tflops_per_image"] == pytest.approx((STEPS + guided) * each / 1e12)
    assert f"{run['tflops_per_image']:.4g} TFLOPs" in out
    assert report["cfg_interval"] == [0.3, 0.7]


def test_lite_cfg_is_one_forward_that_costs_what_each_branch_keeps(dynamic, draw, monkeypatch):
    """Every step is one call of the model. Each branch drops its own fraction of its natural tokens. The FLOPs are
    those of all these lengths."""
    calls, forward = [], DCDiT.forward

    def recording(self, x, t, y, *args, **options):
        out, routing = forward(self, x, t, y, *args, **options)
        calls.append((y.tolist(), routing.natural_mask.sum(1), routing.selection.lengths))
        return out, routing

    monkeypatch.setattr(DCDiT, "forward", recording)
    report, _ = draw(dynamic, "--drop-fraction", 0.25, "--null-drop-fraction", 0.9, "--cfg-scale", 2)
    (run,) = report["runs"]
    assert len(calls) == STEPS
    total = 0
    for labels, natural, lengths in calls:
        assert labels == [0, 1, 2, 0, 3, 3, 3, 3]
        rho = torch.tensor([0.25] * IMAGES + [0.9] * IMAGES)
        assert torch.equal(lengths, (natural - (natural * rho).int()).clamp(min=1).int())
        total += count_flops(ckpt.load_model(dynamic).config, lengths.tolist())["total"]
    assert run["tflops_per_image"] == pytest.approx(total / IMAGES / 1e12)
    assert all(0 < call["gflops_null"] < call["gflops"] / 2 for call in run["calls"])


def test_outside_the_cfg_interval_there_is_one_branch(dynamic, draw):
    report, _ = draw(dynamic, "--cfg-scale", 2, "--cfg-interval", 0.3, 0.7)
    for call in report["runs"][0]["calls"]:
        assert ("kept_null" in call) == ("gflops_null" in call) == (0.3 <= call["t"] / 1000 <= 0.7)


def test_batches_cost_what_they_cost_together(dynamic, draw):
    together, apart = (draw(dynamic, "--batch-size", size)[0]["runs"][0] for size in (4, 3))
    for name in ("tflops_per_image", "kept", "natural"):
        assert apart[name] == pytest.approx(together[name], rel=1e-3)


# --- schedules ------------------------------------------------------------------------------------------------------


def test_drop_schedules(dynamic, draw):
    report, _ = draw(dynamic, "--drop-schedule", "linear:0.9:0", "steps:0,0.5=0.9")
    falling, rising = report["runs"]
    assert falling["drop_schedule"] == "linear:0.9:0" and "drop_fraction" not in falling
    first, second = ([call["kept"] / call["natural"] for call in run["calls"]] for run in (falling, rising))
    assert first[-1] == 1 and first == sorted(first) and first[0] < 0.25
    assert [fraction == 1 for fraction in second] == [call["t"] > 500 for call in rising["calls"]]


# --- capacities -----------------------------------------------------------------------------------------------------


def test_a_capacity_says_what_it_lost(dynamic, draw, tmp_path):
    """None lost: the numbers of exact mode. Else the router's tokens are those kept and those lost."""
    exact, _ = draw(dynamic, "--batch-size", 3)
    enough, out = draw(dynamic, "--batch-size", 3, "--capacity", 3 * 64)
    assert enough["capacity"] == 192 and "lost 0 of them to the capacity" in out
    assert enough["runs"][0]["kept"] == exact["runs"][0]["kept"]
    report, out = draw(dynamic, "--batch-size", 4, "--capacity", 40, "--report")
    (run,) = report["runs"]
    assert f"drop_0 lost {run['overflow']} tokens to its capacity (40)." in (tmp_path / "report.md").read_text()
    lost = sum(IMAGES * (64 * (call["natural"] - call["kept"])) for call in run["calls"])
    assert run["overflow"] == pytest.approx(lost) and run["overflow"] > 0
    assert f"lost {run['overflow']} of them to the capacity" in out


def test_capacity_auto_measures_the_router_once(dynamic, draw, tmp_path, monkeypatch):
    """And not at all where the checkpoint knows its share. Every fraction gets its own capacity."""
    flags = ["--capacity", "auto", "--drop-fraction", 0, 0.6, "--cfg-scale", 2, "--null-drop-fraction", 0.9]
    report, _ = draw(dynamic, *flags)
    assert report["capacity"] == "auto" and report["kept_share"]["images"] == 2 * 16
    assert len(report["runs"]) == 2 and all("overflow" in run for run in report["runs"])
    model = ckpt.load_model(dynamic)
    model.kept_share = KeptShare(0.9, 0.01, 0.95, 100)
    ckpt.save_model(tmp_path / "known.safetensors", model)
    planned, plan = [], DCDiT.plan_capacity
    monkeypatch.setattr(DCDiT, "plan_capacity", lambda self, *args: planned.append(args) or plan(self, *args))
    report, _ = draw(tmp_path / "known.safetensors", *flags)
    assert report["kept_share"]["mean"] == 0.9
    assert planned == [(8, [rho] * 4 + [pytest.approx(0.9)] * 4) for rho in (0, pytest.approx(0.6))]


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [[], ["--cfg-scale", 2, "--null-drop-fraction", 0.8, "--cfg-interval", 0, 0.6]])
def test_target_flops(dynamic, draw, guidance):
    """A target between the costs of two runs: the chosen fraction costs about that, within the precision of a pilot."""
    ends = [run["tflops_per_image"] for run in draw(dynamic, "--drop-fraction", 0, 0.9, *guidance)[0]["runs"]]
    assert ends[1] < ends[0]
    target = (ends[0] + ends[1]) / 2
    report, out = draw(dynamic, "--target-flops", target, *guidance)
    (run,) = report["runs"]
    assert 0.1 < run["drop_fraction"] < 0.9
    assert abs(run["tflops_per_image"] - target) < 0.1 * (ends[0] - ends[1])
    choice = run["target"]
    assert (choice["unit"], choice["target"]) == ("TFLOPs", target) and choice["expected"] == pytest.approx(target)
    assert choice["drop_fractions"] == [0, 0.3, 0.6, 0.9]
    assert f"drop fraction {run['drop_fraction']:.3f}, which should take {choice['expected']:.4g}" in out


def test_a_generous_target_drops_nothing(dynamic, draw):
    (run,) = draw(dynamic, "--target-flops", 5)[0]["runs"]
    assert run["drop_fraction"] == 0 and run["target"]["expected"] < 5


def test_target_latency(dynamic, draw):
    """A target in the middle of what the pilot measured is met by a fraction that drops something."""
    table = draw(dynamic, "--target-latency", 100)[0]["runs"][0]["target"]
    assert table["unit"] == "seconds" and all(0 < cost < 100 for cost in table["costs"])
    assert table["source"] == "a pilot of 4 images on this machine"


def test_unreachable_targets(dynamic, fails):
    fails(
        dynamic,
        "--steps 2 --target-flops 1e-9",
        r"target is 1e-09 TFLOPs per image; reachable: .* \(drop fraction 0.9\)",
    )
    fails(dynamic, "--steps 2 --target-latency 1e-9", r"target is 1e-09 seconds per image; reachable: ")


@pytest.fixture
def profile(tmp_path):
    """A profile whose rows cost 10 ms at no drop and 4 ms at 0.6."""

    def write(name="variants", **changes):
        variants = [
            {"drop_fraction": None, "ms": 1.0},
            {"drop_fraction": 0.6, "ms": 32.0},
            {"drop_fraction": 0.0, "ms": 80.0},
        ]
        conditions = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(), "batch": 8}
        path = tmp_path / "profile.json"
        path.write_text(json.dumps({**conditions, name: variants, **changes}))
        return path

    return write


@pytest.mark.parametrize("name", ["variants", "sides"])
def test_target_latency_from_a_profile(dynamic, draw, profile, name):
    """6 calls of 10 ms to 4 ms per row: 42 ms is the middle, drop fraction 0.3. Older files call the variants sides."""
    (run,) = draw(dynamic, "--target-latency", 0.042, "--profile", profile(name))[0]["runs"]
    assert run["drop_fraction"] == pytest.approx(0.3) and run["target"]["costs"] == pytest.approx([0.06, 0.024])
    # Guidance doubles the rows; a null branch at 0.45 costs 5.5 ms each time.
    options = ["--cfg-scale", 2, "--null-drop-fraction", 0.45, "--target-latency", 0.075, "--profile", profile()]
    (run,) = draw(dynamic, *options)[0]["runs"]
    assert run["target"]["costs"] == pytest.approx([0.093, 0.057]) and run["drop_fraction"] == pytest.approx(0.3)


def test_a_choice_by_an_unreliable_profile_says_so_first(dynamic, draw, profile):
    path = profile(reliable=False, warnings=["threads waited"])
    report, out = draw(dynamic, "--target-latency", 0.042, "--profile", path)
    assert out.startswith(
        f"warning: the target may be missed: {path} is unreliable: threads waited\ntarget 0.042 seconds"
    )
    assert report["runs"][0]["target"]["warnings"] == [f"{path} is unreliable: threads waited"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"reliable": False}, r"is no profile .*; accepted: the profile.json of dcdit profile"),
        ({"dtype": "bfloat16"}, r"was measured on cpu, bfloat16, \d+ threads; this run has cpu, float32"),
        ({"threads": 99}, r"was measured on cpu, float32, 99 threads; this run has cpu, float32"),
        ({"variants": []}, r"holds the drop fractions \[\]; accepted: at least two"),
        ({"variants": [{}]}, r"is no profile .*; accepted: the profile.json of dcdit profile"),
        ({"variants": 3}, "is no profile"),
        ({"name": "others"}, "is no profile"),
        ({"name": "others", "sides": []}, r"holds the drop fractions \[\]; accepted: at least two"),
    ],
)
def test_profiles_that_do_not_fit(dynamic, fails, profile, changes, match):
    fails(dynamic, f"--target-latency 1 --profile {profile(**changes)}", match)


def test_a_written_profile_is_read(dynamic, draw, tmp_path):
    """What `dcdit profile` really writes, besides the files made up here."""
    command = ["profile", "--checkpoint", str(dynamic), "--batch", "2", "--seconds", "0.01", "--device", "cpu"]
    assert main([*command, "--drop-fraction", "0", "0.5", "--out", str(tmp_path / "profile")]) == 0
    (run,) = draw(dynamic, "--target-latency", 100, "--profile", tmp_path / "profile" / "profile.json")[0]["runs"]
    assert run["drop_fraction"] == 0 and run["target"]["drop_fractions"] == [0, 0.5]
    assert set(DTYPES) >= {"float32", "bfloat16"}


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--drop-fraction", 0, 0.5, "--cfg-scale", 2], ["--method", "heun", "--budget", 9]])
def test_report(dynamic, draw, tmp_path, flags):
    report, out = draw(dynamic, *flags, "--report", "--batch-size", 3)
    page = (tmp_path / "report.md").read_text()
    assert f"wrote {tmp_path / 'report.md'}" in out
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert pictures == ["sampling.png"] + [
        file.format(run["name"]) for run in report["runs"] for file in ("{}.png", "steps_{}.webp", "maps_{}.png")
    ]
    for picture in pictures:
        with Image.open(tmp_path / picture) as image:
            image.verify()
    for run in report["runs"]:
        assert f"{run['tflops_per_image']:.4g}" in page and f"{run['kept']:.1%}" in page
        with Image.open(tmp_path / f"steps_{run['name']}.webp") as animation:
            assert animation.n_frames == STEPS


def test_the_page_stands_alone_and_shows_what_was_kept(dynamic, draw, tmp_path):
    """Each step of each run: the images, what the router saw, and what tints the kept tokens and darkens the others."""
    report, _ = draw(dynamic, "--drop-fraction", 0, 0.5, "--report")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", re.sub(r"\.src = ", "", text))
    data = page_data(tmp_path)
    assert data["names"] == ["class 0", "class 1", "class 2", "class 0"]
    for run, shown in zip(report["runs"], data["runs"], strict=True):
        assert [frame["t"] for frame in shown["frames"]] == [call["t"] / 1000 for call in run["calls"]]
        for frame, call in zip(shown["frames"], run["calls"], strict=True):
            image, prob, overlay = (pixels_of(frame[name]) for name in ("images", "prob", "overlay"))
            assert image.shape == prob.shape == overlay.shape == (8, 9 * IMAGES - 1, 4)  # a gap between images
            orange = overlay[..., 0] == 255
            assert orange.sum() == round(64 * sum(frame["kept"]))
            assert (overlay[orange, 3] == 128).all() and (overlay[~orange & (image[..., 3] > 0), 3] == 191).all()
            assert sum(frame["kept"]) / IMAGES == pytest.approx(call["kept"], abs=1e-3)


def page_data(folder):
    text = (folder / "report.html").read_text()
    return json.loads(re.search(r'type="application/json">(.*)</script>', text)[1])


def pixels_of(url):
    assert re.match("data:image/(webp|png);base64,", url)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))


def test_names_of_classes_are_text_in_the_page(draw, tmp_path):
    names = ["cat & dog", "</script><b>", "a very long name of a class that fits nowhere"]
    ckpt.save_model(tmp_path / "named.safetensors", small_dc_dit(**GRID), notes={"class_names": json.dumps(names)})
    report, _ = draw(tmp_path / "named.safetensors", "--report")
    text = (tmp_path / "report.html").read_text()
    assert report["class_names"] == names and text.count("</script>") == 2
    assert page_data(tmp_path)["names"] == [*names, names[0]]


def test_a_long_run_is_shown_in_twenty_frames(dynamic, draw, tmp_path):
    draw(dynamic, "--steps", 70, "--num", 1, "--report")
    with Image.open(tmp_path / "steps_drop_0.webp") as animation:
        assert animation.n_frames == 20
    times = [frame["t"] for frame in page_data(tmp_path)["runs"][0]["frames"]]
    assert times[0] > 0.98 and times[-1] == 0 and times == sorted(times, reverse=True)


def test_report_of_latents(tmp_path, draw):
    """There are no pixels to show: the first latent channels are shown instead."""
    path = tmp_path / "latent.safetensors"
    ckpt.save_model(path, small_dc_dit(**{**GRID, "in_channels": 4}))
    draw(path, "--report")
    assert "samples.png" not in (tmp_path / "report.md").read_text()
    with Image.open(tmp_path / "maps_drop_0.png") as image:
        image.verify()


# --- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--drop-fraction 0.1 --drop-schedule constant:0.1", "--drop-fraction and --drop-schedule each say"),
        ("--target-flops 1 --target-latency 1", "--target-flops and --target-latency each say"),
        ("--drop-schedule ramp:0:1", r"drop schedule 'ramp:0:1'; accepted: constant:RHO, linear"),
        ("--drop-schedule linear:0:1", r"drop schedule holds 1; accepted: numbers in \[0, 1\)"),
        ("--cfg-interval 0.2 0.5", "--cfg-interval is for guidance"),
        ("--null-drop-fraction 0.5", "--null-drop-fraction is for guidance"),
        ("--cfg-scale 2 --cfg-interval 0.6 0.2", r"cfg interval is \(0.6, 0.2\); accepted: \(low, high\)"),
        ("--cfg-scale 2 --budget 5 --null-drop-fraction 0.5", "--budget 5 is for both branches"),
        ("--target-flops 0", "--target-flops is 0.0; accepted: a positive number"),
        ("--target-latency nan", "--target-latency is nan; accepted: a positive number"),
        ("--profile a.json", "--profile is for --target-latency"),
        ("--graph", "the model is on cpu; CUDA graphs need a CUDA device$"),
        ("--graph --budget 4", "the model is on cpu; CUDA graphs need a CUDA device$"),
        ("--graph --target-latency 1", "--graph changes the seconds that the pilot of --target-latency measures"),
        ("--target-latency 1 --profile nowhere.json", "no profile 'nowhere.json'"),
        ("--graph --capacity auto", "the model is on cpu; CUDA graphs need a CUDA device$"),
        (
            "--capacity 9 --target-latency 1",
            "--capacity changes the seconds that the pilot of --target-latency",
        ),
        ("--capacity 99 --budget 9", "--budget 9 fixes the size of the buffer too; leave --capacity out"),
        ("--capacity 15", "--capacity is 15; accepted: auto, or 16 to 1024, one token to all positions of 16 images"),
        ("--capacity 31 --cfg-scale 2", "--capacity is 31; accepted: auto, or 32 to 2048"),
        ("--capacity 1025", "--capacity is 1025; accepted: auto, or 16 to 1024"),
    ],
)
def test_budgets_that_do_not_fit(dynamic, fails, flags, match):
    fails(dynamic, flags, match)


@pytest.mark.parametrize("flags", ["--target-flops 1", "--drop-schedule constant:0", "--capacity auto", "--report"])
def test_a_static_model_has_no_budget(static, fails, flags):
    fails(static, flags, f"holds a static DiT, which drops no tokens; leave {flags.split()[0]} out")


@pytest.mark.parametrize(
    ("objective", "method"), [("flow", "ddim"), ("flow", "ddpm"), ("dit", "euler"), ("dit", "heun")]
)
def test_a_method_that_does_not_fit_the_objective(tmp_path, fails, objective, method):
    model = small_dit(**GRID)
    model.objective = objective
    ckpt.save_model(tmp_path / "a.safetensors", model)
    match = f"a.safetensors was trained with the objective '{objective}', which the method '{method}' does not fit; acc"
    fails(tmp_path / "a.safetensors", f"--method {method} --out {tmp_path / 'out'}", match)
    assert not (tmp_path / "out").exists()


def test_an_objective_of_another_version(tmp_path, fails):
    ckpt.save_model(tmp_path / "a.safetensors", small_dit(**GRID), notes={"objective": "edm"})
    for flags in ("", "--method ddim"):
        fails(tmp_path / "a.safetensors", flags, "was trained with the objective 'edm'; accepted: dit, flow")


@pytest.mark.parametrize("make", [small_dc_dit, small_dit])
def test_a_diverged_model_draws_nothing(tmp_path, fails, make):
    save_diverged(tmp_path / "a.safetensors", make(**GRID))
    match = r"a\.safetensors holds numbers that are not finite, in 'x_embedder\.bias' for one; its training diverged$"
    fails(tmp_path / "a.safetensors", f"--out {tmp_path / 'out'}", match)
    assert not (tmp_path / "out").exists()


# --- the documentation ------------------------------------------------------------------------------------------------


def test_the_documentation_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    blocks = [block for block in blocks if "runs/a" not in block]  # a trained run, with the names of its classes
    exec(compile("\n".join(blocks), "docs/sampling.md", "exec"), {})
    out = capsys.readouterr().out
    assert re.search(r"half way between no drop and 0\.9: drop fraction 0\.[2-7]\d, ", out)
    assert re.search(r"\d+ rows, at most 64 of an image; overflow in ", out)
