"""No command replaces what it reads, what somebody else made, or a folder; each says so before it works."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from support.small import small_dc_dit
from support.tiny import images

from dcdit.checkpoint import save_model
from dcdit.cli.main import main
from dcdit.utils.files import claimed

PIXELS = {"in_channels": 3, "grid": (8, 8), "num_classes": 3, "hidden_size": 128, "num_heads": 2, "depth": 1}


class Net(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with a model, an extractor and images as a file and as a folder."""
    monkeypatch.chdir(tmp_path)
    save_model("model.safetensors", small_dc_dit(**PIXELS))
    torch.jit.script(Net()).save("net.pt")
    np.savez("real.npz", arr_0=images(12))
    np.savez("train.npz", images=images(12), labels=np.arange(12))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images(12)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("months of work")
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(place, capsys, words, match):
    """The command fails in one line, and every file is as before."""
    before = contents(place)
    capsys.readouterr()
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    *before_it, last = err.splitlines()
    assert out == "" and last.startswith("dcdit: error: ") and match in last, err
    assert all(line.startswith("dcdit: warning: ") for line in before_it), err
    assert contents(place) == before


MEASURE = "evaluate --trust-extractor --extractor net.pt --device cpu --cache cache --out out "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images real.npz --write-statistics results", "results is a folder; accepted: the name of a file"),
        ("--images real.npz --write-statistics real.npz", "real.npz is where --images is read from"),
        ("--images real.npz --write-statistics linked.npz", "linked.npz is where --images is read from"),
        ("--images images --reference real.npz --write-statistics real.npz", "real.npz is where --reference is read"),
        ("--images images --write-statistics images/0.png", "images/0.png is where --images is read from"),
        ("--images real.npz --write-statistics net.pt", "net.pt is where --extractor is read from"),
        ("--checkpoint model.safetensors --write-statistics model.safetensors", "is where --checkpoint is read from"),
        ("--images real.npz --write-statistics out/images.png", "out/images.png, which --out also writes"),
        ("--checkpoint model.safetensors --write-statistics out/samples.npz", "which --out also writes"),
        ("--images images --out images", "images is where --images is read from"),
        ("--images images --out images/deep/er", "images/deep/er is where --images is read from"),
        ("--images real.npz --reference images --out images/out", "is where --reference is read from"),
        ("--checkpoint model.safetensors --reference out/samples.npz", "out/samples.npz is where --reference is read"),
        ("--images real.npz --out net.pt", "net.pt is no folder and cannot become one"),
        ("--images real.npz --cache real.npz", "real.npz is no folder and cannot become one"),
        ("--images images --cache images/features", "images/features is where --images is read from"),
        ("--images real.npz --reference images --cache images", "images is where --reference is read from"),
        ("--images real.npz --out mine", "mine/report.md is already there and would be replaced"),
    ],
)
def test_evaluate(place, capsys, words, message):
    (place / "linked.npz").symlink_to("real.npz")
    for folder, file in [("mine", "report.md"), ("out", "samples.npz")]:
        (place / folder).mkdir()
        (place / folder / file).write_bytes((place / "real.npz").read_bytes())
    refused(place, capsys, MEASURE + words, message)


def test_evaluate_replaces_its_own_files_and_the_target_of_a_link(place):
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    (place / "stats.npz").symlink_to("results/stats.npz")
    for _ in range(2):
        assert main((MEASURE + "--images real.npz --write-statistics stats.npz").split()) == 0
    assert (place / "stats.npz").is_symlink() and (place / "results/thesis.txt").read_text() == "months of work"
    assert {"mu", "sigma"} < set(np.load(place / "results/stats.npz"))
    assert sorted(contents(place / "out")) == ["images.png", "metrics.json", "notes.txt", "report.md"]


SAMPLE = "sample --checkpoint model.safetensors --steps 1 --labels 0 --device cpu --out "


# --- what is printed ----------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """Give standard output and standard error other files, as a shell does."""

    def streams(stdout, stderr, encoding="utf-8"):
        for name, path in (("stdout", stdout), ("stderr", stderr)):
            monkeypatch.setattr(f"sys.{name}", open(path, "w", encoding=encoding))  # noqa: SIM115

    return streams


def test_results_and_bars_that_the_terminal_cannot_show_are_no_error(place, streams):
    streams("shown", "bars", encoding="ascii")
    assert main((MEASURE + "--images real.npz --reference images").split()) == 0
    assert rb"\xb1" in (place / "shown").read_bytes() and b"features: 100%" in (place / "bars").read_bytes()


def test_nobody_has_to_read_to_the_end(place, streams):
    """``dcdit sample | head -0``: the pipe is closed from the first line on, and the work is done all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    streams(writer, os.dup(writer))
    assert main(["info"]) == 0
    assert main(f"{SAMPLE} results --drop-fraction 0 0.5".split()) == 0
    assert (place / "results" / "drop_0.5.png").is_file()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])


def test_output_that_gets_lost_is_an_error(streams, tmp_path):
    streams("/dev/full", tmp_path / "errors")
    assert main(["info"]) == 2
    assert (tmp_path / "errors").read_text() == "dcdit: error: /dev/full: No space left on device\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_may_be_closed(stream, place, monkeypatch):
    monkeypatch.setattr(f"sys.{stream}", None)
    assert main(f"{SAMPLE} results".split()) == 0


# --- what is written ----------------------------------------------------------------------------------------------


TRAIN = "train --data-path train.npz --set data.kind=npz --device cpu --steps 1"
SIZES = ("in_channels=3", "grid=[8,8]", "hidden_size=128", "depth=1", "num_heads=2")
TINY = "--batch-size 2 --set router.group_size=null " + " ".join(f"--set model.overrides.{size}" for size in SIZES)
SAMPLED = "--checkpoint model.safetensors --steps 1 --device cpu"


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (f"{SAMPLE} /proc/a --report", "/proc/a"),
        (f"{TRAIN} --out /proc/a", "/proc/a"),
        ("demo --out /proc/a", "/proc/a"),
        ("profile --checkpoint model.safetensors --device cpu --out /proc/a/b", "/proc/a/b"),
        ("profile --checkpoint model.safetensors --device cpu --out out --trace /proc/a.json", "/proc/a.json"),
        ("evaluate --checkpoint model.safetensors --device cpu --out /proc/a", "/proc/a"),
        (f"{MEASURE} --images images --cache /proc/a", "/proc/a"),
        (f"{MEASURE} --images images --write-statistics /proc/a.npz", "/proc/a.npz"),
        ("extract --images images --vae vae --device cpu --workers 0 --out /proc/a", "/proc/a"),
        ("tune --out /proc/a.json", "/proc/a.json"),
    ],
)
def test_what_cannot_be_written_is_found_before_the_work(place, capsys, monkeypatch, words, path):
    """Not even root writes to /proc, though permissions say that root may."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: words.startswith("tune"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def work(*args, **options):
        pytest.fail("worked")

    for moment in ("nn.Module.forward", "optim.AdamW", "jit.load"):
        monkeypatch.setattr(f"torch.{moment}", work)
    for moment in ("profiling.tune.tune", "sample.drawing.sample", "models.DCDiT.forward", "cli.tune.tune"):
        monkeypatch.setattr(f"dcdit.{moment}", work)
    refused(place, capsys, words, path)


@pytest.mark.parametrize(
    ("words", "limit", "name"),
    [
        (f"{SAMPLE} out", 100, "out/samples.json"),
        (f"{SAMPLE} out --num 16", 2000, "out/drop_0.png"),
        (f"{TRAIN} {TINY} --out out", 5000, "out/checkpoints/step_00000001"),
        (f"evaluate {SAMPLED} --out out --num 40", 5000, "out/batches/000000.npz"),
        (f"evaluate {SAMPLED} --out out --num 40 --batch-size 4", 5000, "out/samples.npz"),
        (f"{MEASURE} --images images", 200, "cache/"),
        (f"{MEASURE} --images images --write-statistics s.npz", 1000, "s.npz"),
    ],
)
def test_a_disk_that_fills_up(place, capsys, words, limit, name):
    """The error names the file, whatever library writes it. Here a limit on the size of files stands for the disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        assert main(words.split()) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dcdit: error: ") and name in last and "cannot be written: " in last, last
    assert not list(place.rglob("*.dcdit")), "nothing unfinished is left"


@pytest.mark.parametrize("file", ["drop_0.png", "samples.json", "report.md", "drop_0/00000_class0.png"])
def test_sample(place, capsys, file):
    (place / "results" / file).parent.mkdir(exist_ok=True)
    (place / "results" / file).write_text("mine")
    refused(place, capsys, f"{SAMPLE} results --individual --report", "is already there and would be replaced")
    refused(place, capsys, f"{SAMPLE} results/thesis.txt", "is no folder and cannot become one")


def test_sample_replaces_its_own_files(place):
    for flags in ("--individual", "--individual --seed 1"):
        assert main(f"{SAMPLE} results {flags}".split()) == 0
    files = ["drop_0.png", "drop_0/00000_class0.png", "samples.json", "thesis.txt"]
    assert sorted(contents(place / "results")) == files
    assert json.loads((place / "results/samples.json").read_text())["seed"] == 1


def test_profile(place, capsys):
    (place / "results" / "profile.json").write_text('{"model": "mine"}')
    command = "profile --checkpoint model.safetensors --device cpu --seconds 0.01 "
    refused(place, capsys, command + "--out results", "results/profile.json is already there and would be replaced")
    refused(place, capsys, command + "--trace results", "results is a folder; accepted: the name of a file")
    refused(
        place, capsys, command + "--trace model.safetensors", "model.safetensors is where --checkpoint is read from"
    )


def test_demo(place, capsys):
    (place / "results" / "training.png").write_text("mine")
    refused(place, capsys, "demo --out results", "results/training.png is already there and would be replaced")


def entry(rows, **shape):
    return {"shape": shape, "config": {"ROWS": rows}}


def test_tune(place, capsys, monkeypatch):
    """It adds to its own tables, and looks at them before it tunes for hours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("DCDIT_CONFIG_FOLDER", str(place / "configs"))
    new = {**entry(1), "measured": {"ms": 1.0, "spread": 0.02, "ms_before": 1.5, "ms_before_again": 1.5}}
    monkeypatch.setattr("dcdit.cli.tune.tune", lambda *_: {"gather": [new]})
    refused(place, capsys, "tune --out results", "results is a folder; accepted: the name of a file")
    for text in ("months of work", "[1]"):
        (place / "table.json").write_text(text)
        refused(place, capsys, "tune --out table.json", "table.json holds no launch configurations; accepted: ")
    (place / "table.json").write_text(json.dumps({"scatter": [entry(2)], "gather": [entry(3), entry(4, D=64)]}))
    assert main(["tune", "--out", "table.json"]) == 0
    assert {"1.5000", "1.0000", "±2%", "1.50"} < set(capsys.readouterr().out.split())
    found = {"scatter": [entry(2)], "gather": [entry(4, D=64), new]}
    assert json.loads((place / "table.json").read_text()) == found
    assert main(["tune"]) == 0
    assert [path.name for path in (place / "configs").iterdir()] == ["Some_GPU.sm_90.json"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("images/latents", "images/latents is where --images is read from"),
        ("images", "images is where --images is read from"),
        ("results", "results/latents_stats.pt is not of dcdit extract"),
        ("real.npz", "real.npz is no folder and cannot become one"),
        ("busy", "busy is in use by process "),
    ],
)
def test_extract(place, capsys, out, message):
    from support.autoencoder import SIZE, save_autoencoder

    save_autoencoder(place / "vae")
    (place / "results" / "latents_stats.pt").write_bytes(b"mine")
    with claimed(place / "busy"):
        refused(place, capsys, f"extract --images images --vae vae --size {SIZE} --workers 0 --out {out}", message)
    assert not (place / "busy").exists()
