"""The study of equal compute: its canvases, its order, its deadline, and all of it once with tiny models."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.studies import cifar10, equal_compute, frequencies, selection, training
from benchmarks.studies.digit_canvases import INK, held_out_ink, write_canvases
from benchmarks.studies.equal_compute_page import at_first_goal, crossings, lead, losses_at
from dcdit.checkpoint import load_model, save_model
from dcdit.config import TrainConfig, load_config
from dcdit.data import NpzDataset
from dcdit.diffusion import FlowMatchingObjective
from dcdit.models import create_model
from dcdit.nn import SpatialDeChunk
from dcdit.ops import select_tokens

HELD_OUT = 0.25
FLOPS = (4e9, 8e9)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scans, each of one brightness of its own."""
    file = tmp_path_factory.mktemp("scans") / "digits.csv"
    rows = np.stack([np.full(64, 6 + 10 * n / 39) for n in range(40)])
    np.savetxt(file, np.column_stack([rows, np.arange(40) % 10]), delimiter=",")
    return file


def test_canvases_know_their_ink_and_hold_out_digits(scans: Path, tmp_path: Path) -> None:
    path = tmp_path / "digits.npz"
    write_canvases(scans, path, 200, HELD_OUT)
    seen: dict[str, set[float]] = {}
    for split in ("train", "held_out"):
        images = NpzDataset(path, split, HELD_OUT, flip=False)
        seen[split] = {float(images[n][0].max()) for n in range(len(images.split))}
    assert len(seen["held_out"]) > 5 and not seen["train"] & seen["held_out"]
    ink = held_out_ink(path, 20, HELD_OUT)
    images = NpzDataset(path, "held_out", HELD_OUT, flip=False)
    x0 = torch.stack([images[n][0] for n in range(20)])
    assert torch.equal(ink, (x0[:, 0] + 1) / 2 > INK) and ink.sum((1, 2)).eq(16 * 16).all()


def test_a_clean_image_that_is_predicted_has_the_loss_of_its_velocity() -> None:
    x0, noise, out = torch.randn(3, 2, 3, 8, 8).unbind()
    t = torch.tensor([0.05, 0.7])
    clean, flow = selection.CleanImageObjective(), FlowMatchingObjective()
    noisy = clean.noise(x0, t, noise)
    velocity = (noisy.x_t - out) / t.view(-1, 1, 1, 1)
    torch.testing.assert_close(clean.loss(out, noisy)["loss"], flow.loss(velocity, flow.noise(x0, t, noise))["loss"])
    early = clean.noise(x0, torch.tensor([0.001, 0.05]), noise)
    losses = clean.loss(early.x0 + 1, early)["loss"]
    torch.testing.assert_close(losses, torch.full((2,), 1 / selection.LEAST_TIME**2))


def test_a_fixed_choice_drops_its_worst_positions_first() -> None:
    selection.OracleRouter.clean = torch.rand(2, 3, 8, 8)
    p = selection.OracleRouter(4, (8, 8))(torch.zeros(2, 64, 4))
    detail = selection.local_detail(selection.OracleRouter.clean).flatten(1)
    kept = p > 0.5
    assert kept.sum(1).tolist() == [16, 16]
    for image in range(2):
        order = detail[image][kept[image]].argsort()
        assert p[image][kept[image]][order].diff().gt(0).all()
        assert detail[image][kept[image]].min() >= detail[image][~kept[image]].max()


def test_a_shifted_regular_quarter_is_regular_and_uses_every_position() -> None:
    kept = selection.ShiftedRegularRouter(4, (6, 8))(torch.zeros(64, 48, 4)) > 0.5
    places = {tuple(image.nonzero().flatten().tolist()) for image in kept}
    positions = torch.arange(48).view(6, 8)
    assert places == {tuple(positions[r::2, c::2].flatten().tolist()) for r in (0, 1) for c in (0, 1)}


def test_rules_between_learned_and_fixed() -> None:
    x = torch.randn(2, 64, 32)
    routers = {rule: made(32, (8, 8)) for rule, made in selection.RULES.items()}
    torch.nn.init.constant_(routers["grid"].out.bias, 0)  # so that p is above one half at some positions
    for router in routers.values():
        router.load_state_dict(routers["grid"].state_dict())
    learned = selection.PredictabilityRouter.forward(routers["grid"], x)
    kept = {rule: router(x) > 0.5 for rule, router in routers.items()}
    on_grid = torch.zeros(8, 8, dtype=torch.bool)
    on_grid[::4, ::4] = True
    assert torch.equal(kept["grid"], (learned > 0.5) | on_grid.flatten())
    cells = kept["one-per-cell"].view(2, 4, 2, 4, 2).transpose(2, 3).flatten(3)
    assert cells.sum(3).eq(1).all()
    best = learned.view(2, 4, 2, 4, 2).transpose(2, 3).flatten(3).argmax(3)
    assert torch.equal(cells.int().argmax(3), best)
    assert torch.equal(routers["detached"](x), learned)
    threshold = (2 * torch.tensor([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) + 1) / 32
    assert torch.equal(kept["dithered-positions"], learned > threshold.repeat(2, 2).flatten())
    assert torch.equal(routers["grid+detached"](x), routers["grid"](x))
    for rule, router in routers.items():
        inputs = x.clone().requires_grad_()
        router(inputs).sum().backward()
        assert (inputs.grad is None) == ("detached" in rule), rule


def test_other_ways_from_pixels_to_tokens(tmp_path: Path) -> None:
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([500, 20]), torch.tensor([1, 2])
    variants = {name: equal_compute.WAYS[f"uniform+{name}"].variant for name in
                ("context", "patches", "context+skip", "context+image-norm", "context+groups-of-8")}  # fmt: skip
    preset, settings = cifar10.MODELS["dc-dit"]
    models = {}
    for name, variant in variants.items():
        with selection.installed(variant):
            torch.manual_seed(0)
            model = create_model(preset, num_classes=10, **settings, router="uniform", cell_context=True)
            torch.nn.init.normal_(model.final_layer.linear.weight)
            save_model(tmp_path / f"{name}.safetensors", model)
            models[name] = load_model(tmp_path / f"{name}.safetensors").eval()
            assert torch.equal(models[name](x, t, y), model.eval()(x, t, y))
    plain, skip = models["context"], models["context+skip"]
    skip.load_state_dict(
        plain.state_dict() | {"input_gain.weight": torch.zeros(3, 128), "input_gain.bias": torch.ones(3)}
    )
    assert torch.equal(skip(x, t, y), plain(x, t, y) + x)
    tokens = torch.randn(2, 1024, 128)
    scaled = models["context+image-norm"].encoder.norm(tokens)
    torch.testing.assert_close(scaled / tokens, (scaled / tokens)[:, :1, :1].expand_as(tokens))
    torch.testing.assert_close(scaled.square().mean((1, 2)), torch.ones(2))
    assert models["context+groups-of-8"].encoder.blocks[0].norm1.num_groups == 4
    chunk, zeros = models["patches"].chunk, torch.zeros(1, 1024, 128)
    chunk.pixels = torch.zeros(1, 3, 32, 32)
    chunk.pixels[0, 1, 5, 6] = 2.0
    packed, sel = chunk(zeros, models["patches"].router(zeros))
    added = packed - chunk.proj.bias
    in_cell = ((sel.indices // 32) // 4 == 1) & ((sel.indices % 32) // 4 == 1)
    assert not added[~in_cell].any() and in_cell.sum() == 4
    torch.testing.assert_close(added[in_cell], (2 * chunk.proj.weight[:, 1, 1, 2]).expand(4, -1))


def test_offsets_from_the_nearest_kept_token() -> None:
    grid, dim = (3, 8), 4
    kept = torch.zeros(1, *grid)
    kept[0, 1, 2] = kept[0, 1, 7] = 0.9
    sel = select_tokens(kept.flatten(1))
    h, p, residual = torch.randn(2, dim), kept.flatten(1), torch.randn(1, 24, dim)
    plain = SpatialDeChunk(grid, 1.0)(h, p, sel, residual)
    dechunk = selection.OffsetDeChunk(dim, grid, 1.0)
    assert torch.equal(dechunk(h, p, sel, residual), plain)
    torch.nn.init.normal_(dechunk.vectors)
    torch.nn.init.normal_(dechunk.factors)
    vectors, factors = (table.unflatten(0, (5, 5)) for table in (dechunk.vectors, dechunk.factors))
    added = (dechunk(h, p, sel, residual) - plain).view(*grid, dim)
    for row, col in product(range(3), range(8)):
        token = int(col >= 5)
        offset = row - 1 + 2, max(-2, min(2, col - (2, 7)[token])) + 2  # rows and columns from -2 to 2
        expected = vectors[offset] + dechunk.up(factors[offset] * dechunk.down(h[token]))
        torch.testing.assert_close(added[row, col], expected, msg=f"{row}, {col}")


def test_the_most_important_runs_come_first_and_none_twice() -> None:
    plan = equal_compute.plan(FLOPS, ("cifar", "digits"))
    assert len(set(plan)) == len(plan)
    models = {f"{data}-{model}-{seed}" for data in ("cifar", "digits") for model in equal_compute.MAIN for seed in "01"}
    assert {run for run, _ in plan[:12]} == models
    assert all(flops == FLOPS[0] for _, flops in plan[:12])


def test_only_parts_of_the_package_are_captured(tmp_path: Path) -> None:
    sources = dict.fromkeys(equal_compute.DATA, tmp_path / "data.npz")
    configs = {
        way: equal_compute.config_of(f"cifar-{way}-0", 1e15, "gpu", sources, tmp_path, {"optim.graph": True})
        for way in ("dc-dit", "dc-dit+clean", "oracle", "learned+cell")
    }
    assert [config.optim.graph for config in configs.values()] == [True, True, False, False]


def test_a_folder_waits_and_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    script = f"import sys,time; f=open({str(log)!r},'a'); f.write('+');f.flush(); time.sleep(.3); f.write('-')"
    configs = {
        name: load_config(None, {"run.out": str(tmp_path / "run"), "optim.flops": flops})
        for name, flops in (("short", 1e9), ("long", 2e9))
    }
    programs = dict.fromkeys(configs, ("-c", script))
    training.train_all(configs, 2, programs)
    assert log.read_text() == "+-+-"
    training.train_all(configs, 2, programs, until=0.0)
    assert log.read_text() == "+-+-"


def test_curves_are_compared_at_equal_flops_in_the_seeds_that_both_have() -> None:
    falls = np.array([1.0, 10.0, 100.0]), np.array([3.0, 2.0, 1.0])
    flat, short = (np.array([1.0, 100.0]), np.array([1.5, 1.5])), (np.array([1.0, 10.0]), np.array([9.0, 9.0]))
    assert losses_at({"0": falls, "1": flat}, 10.0) == pytest.approx({"0": 2.0, "1": 1.5})
    assert losses_at({"0": falls, "1": short}, 50.0).keys() == {"0"}
    assert lead({"0": falls, "1": short}, {"0": flat, "1": flat}, 100.0) == pytest.approx(1 / 1.5 - 1)
    assert lead({"0": falls}, {"1": flat}, 10.0) is None
    assert crossings({"0": falls}, {"0": flat}) == [100.0]
    assert crossings({"0": falls}, {"1": flat}) is None


def test_a_run_that_was_stopped_is_compared_where_it_stopped() -> None:
    def line(goal: float, flops: float, course: list[tuple[float, float]]) -> dict[str, Any]:
        return {"goal": goal, "training_flops": flops, "course": course}

    whole, further = line(4.0, 4.5, [(1.0, 2.0), (4.0, 1.0)]), line(8.0, 6.0, [(1.0, 2.0), (6.0, 0.5)])
    runs = {"one-0": [whole, further], "two-0": [line(4.0, 3.0, [(1.0, 4.0), (2.0, 3.0)])], "one-1": [whole]}
    shown = at_first_goal(runs, 4.0)
    assert shown == {"one-0": whole, "one-1": whole, "one to 6.0e+00-0": further, "two to 3.0e+00-0": runs["two-0"][0]}


def test_the_error_is_split_by_frequency() -> None:
    error = torch.randn(3, 2, 16, 16)
    bands = frequencies.power_by_band(error)
    assert sum(bands) == pytest.approx(float(error.square().mean()))
    assert bands[0] == pytest.approx(float(error.mean((2, 3)).square().mean()))
    along = torch.arange(16) * 2 * torch.pi / 16
    for cycles, band in ((1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (8, 3)):  # 8 of 16 pixels is the highest frequency
        wave = torch.cos(cycles * along)[None] * torch.cos(2 * along)[:, None]
        found = frequencies.power_by_band(wave[None, None])
        assert found[band] == pytest.approx(float(wave.square().mean())) and sum(found) == pytest.approx(found[band])


def run_here(configs: dict[str, TrainConfig], jobs: int, programs: dict[str, Any], until: float) -> None:
    """The processes of the study in this one."""
    for job, config in configs.items():
        assert programs[job][:2] == ("-m", "benchmarks.studies.equal_compute")
        assert equal_compute.main([*programs[job][2:], *training.run_arguments(config)]) == 0


def test_the_study_trains_measures_and_writes_its_page(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {**cifar10.COMMON, "hidden_size": 128, "depth": 1}
    models = {"dc-dit": ("DC-DiT-S", small), "static-flops": ("DiT-S/4", small)}
    monkeypatch.setitem(equal_compute.SCALES, "cpu", (models, {"optim.device": "cpu", "optim.precision": "fp32"}))
    settings = {"IMAGES": 40, "SEEDS": (0,), "SAMPLING_STEPS": 2, "train_all": run_here}
    for name, value in settings.items():
        monkeypatch.setattr(equal_compute, name, value)
    monkeypatch.setattr(cifar10, "NOISE_LEVELS", (0.2, 0.8))
    monkeypatch.setattr(cifar10, "DROPS", (0.0, 0.6))
    monkeypatch.setattr(equal_compute, "BAND_LEVELS", (0.2, 0.8))
    out = tmp_path / "lines"
    keys = ["optim.batch_size=2", "router.group_size=2"]
    keys += ["data.held_out=0.2", "run.log_every=1", "run.eval_every=1", "run.eval_images=2"]
    options: dict[str, Any] = {"--data": "unread.npz", "--digits": scans, "--runs": tmp_path / "runs", "--out": out}
    options |= {"--held-out": 4, "--minutes": 5, "--scale": "cpu", "--images": "digits"}
    arguments = [str(part) for pair in options.items() for part in pair]
    arguments += [part for key in keys for part in ("--set", key)]
    ways = ("dc-dit", "static-flops", "oracle")
    equal_compute.main(["train", *arguments, "--goals", "3e9", "6e9", "--only", *ways])
    lines = [json.loads(text) for text in (out / "lines.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines].count("digits-dc-dit-0") == 2 and len(lines) == 2 * len(ways)
    for line in lines:
        assert line["training_flops"] >= line["goal"]
        assert (line["samples"] is None) == ("oracle" in line["run"])
        assert ("routing" in line) == ("static" not in line["run"])
    assert all(set(line["loss"]) == {"0.0", "0.6"} for line in lines if "routing" in line)
    assert all(len(line["routing"]["kept_share_inside"]) == 2 for line in lines if "routing" in line)

    page = tmp_path / "page"
    equal_compute.main(["page", "--lines", str(out / "lines.jsonl"), "--out", str(page)])
    text = (page / "report.md").read_text()
    assert all(f"| {way} " in text for way in ways) and "| oracle, ink" in text
    assert "dc-dit against static-flops" in text
    for line in lines:
        by_level = next(iter(line["loss_by_level"].values()))
        assert [sum(bands) for bands in line["loss_by_band"].values()] == pytest.approx(by_level)
    for name in ("loss", "routing", "masks", "samples"):
        assert f"digits-{name}.png" in text and (page / f"digits-{name}.png").is_file()
    kept = json.loads((page / "study.json").read_text())["runs"]["digits-oracle-0"]
    assert [line["goal"] for line in kept] == [3e9, 6e9] and "samples" not in kept[0]
