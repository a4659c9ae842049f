"""``dcdit evaluate`` from a checkpoint or from images to a table, and one line for every error of a user."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.small import save_diverged, small_dc_dit, small_dit
from support.tiny import images
from torch import nn

from dcdit.checkpoint import save_model
from dcdit.cli import main
from dcdit.utils.reading import sha256

PIXELS = {"in_channels": 3, "grid": (8, 8), "num_classes": 3, "hidden_size": 128, "num_heads": 2, "depth": 1}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 32, stride=89)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, a static one, an extractor, real images and wrong images."""
    path = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    save_model(path / "model.safetensors", small_dc_dit(**PIXELS))
    save_model(path / "static.safetensors", small_dit(**PIXELS, patch_size=2), notes={"objective": "flow"})
    save_diverged(path / "diverged.safetensors", small_dc_dit(**PIXELS))
    save_model(path / "latents.safetensors", small_dc_dit(**{**PIXELS, "in_channels": 4}))
    torch.jit.script(Net()).save(str(path / "net.pt"))
    np.savez(path / "real.npz", arr_0=images(40))
    np.savez(path / "few.npz", arr_0=images(5))
    (path / "mixed").mkdir()
    for i, image in enumerate([*images(3), *images(3, size=9)]):
        Image.fromarray(image).save(path / "mixed" / f"{i}.png")
    return path


@pytest.fixture
def evaluate(files, tmp_path, capsys):
    """Run the command, given as one string. Returns exit code, stdout, and lines of stderr without progress bars."""

    def evaluate(text):
        words = text.format(files=files, out=tmp_path).split()
        common = ["--trust-extractor", "--device", "cpu", "--cache", str(tmp_path / "cache")]
        code = main(["evaluate", *words, *common])
        out, err = capsys.readouterr()
        return code, out, err.rpartition("\r")[2].splitlines()

    return evaluate


SAMPLING = "--num 12 --steps 2 --batch-size 5 --out {out}/run"


def test_from_a_checkpoint_to_a_table(evaluate, tmp_path):
    code, out, _ = evaluate(
        "--checkpoint {files}/model.safetensors --drop-fraction 0.5 --extractor {files}/net.pt "
        "--reference {files}/real.npz " + SAMPLING
    )
    assert code == 0
    with np.load(tmp_path / "run" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 3) and archive["arr_0"].dtype == np.uint8
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(facts["figures"]) == {"FID", "KID", "precision", "recall"} == set(facts["floor"])
    assert set(facts["left_out"]) == {"IS", "sFID"}
    assert facts["figures"]["FID"]["count"] == 12 and facts["figures"]["FID"]["reference_count"] == 40
    assert facts["floor"]["FID"]["reference_count"] == 28
    assert facts["sampling"]["drop"] == "drop_0.5" and 0 < facts["sampling"]["kept"] < 1
    assert f"{facts['sampling']['tflops']:.4g} TFLOPs per image" in out
    for word in ("12 vs 40", "12 vs 28", "Left out: IS", "n = 12 is below 10,000"):
        assert word in out
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"{facts['figures']['FID']['value']:.2f}" in report and out.split("\n\n")[1] in report
    with Image.open(tmp_path / "run" / "images.png") as picture:
        assert picture.size == (16 * 84 - 4, 80)  # as large as fits in 2048 pixels


def test_without_an_extractor_it_writes_the_npz_and_the_flops(evaluate, tmp_path):
    code, out, _ = evaluate("--checkpoint {files}/static.safetensors " + SAMPLING)
    assert code == 0 and "TFLOPs per image" in out and "kept" not in out
    assert (tmp_path / "run" / "samples.npz").is_file()
    assert "figures" not in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_images_against_statistics_written_before(evaluate, tmp_path):
    command = "--images {files}/real.npz --extractor {files}/net.pt --out {out}/run "
    assert evaluate(command + "--write-statistics {out}/stats.npz")[0] == 0
    code, out, _ = evaluate(command + "--reference {out}/stats.npz")
    assert code == 0
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert facts["figures"]["FID"]["value"] < 1e-6 and list(facts["figures"]) == ["FID"]
    assert "Left out: KID, because stored statistics hold no images." in out


def test_two_processes_draw_the_images_of_one(files, evaluate, tmp_path):
    command = ["--checkpoint", files / "model.safetensors", "--num", 6, "--steps", 2, "--batch-size", 2]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "dcdit", "evaluate", *command]
    subprocess.run([*map(str, launch), "--device", "cpu", "--out", str(tmp_path / "two")], check=True, timeout=240)
    assert main(["evaluate", *map(str, command), "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])


# --- the weights that drew ------------------------------------------------------------------------------------------


def write_checkpoint(run, step, seed):
    """A checkpoint with weights of its own; returns the hash of its averaged weights."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    model = small_dc_dit(**PIXELS)
    for name, factor in (("model", 0.5), ("ema", 1.0)):
        state = {key: value + 0.01 * factor * seed for key, value in model.state_dict().items()}
        save_model(folder / f"{name}.safetensors", model, state, {"objective": "flow"})
    return sha256(folder / "ema.safetensors")


def drawn(folder):
    settings = json.loads((folder / "sampling.json").read_text())["settings"]
    with np.load(folder / "samples.npz") as archive:
        return settings["weights"], settings["checkpoint"], archive["arr_0"]


@pytest.mark.parametrize("moment", ["find_weights", "sampling_options", "load_for_sampling", "make_plans"])
def test_a_run_that_saves_meanwhile_changes_nothing(evaluate, tmp_path, monkeypatch, moment):
    """The recorded hash is of the weights that drew, whenever the next checkpoint appears."""
    first = write_checkpoint(tmp_path / "a", 1, seed=1)
    module = sys.modules["dcdit.cli.evaluate"]
    original = getattr(module, moment)

    def saves_then(*args, **options):
        found = original(*args, **options)
        write_checkpoint(tmp_path / "a", 2, seed=2)
        return found

    monkeypatch.setattr(module, moment, saves_then)
    assert evaluate("--checkpoint {out}/a --num 2 --steps 1 --out {out}/one")[0] == 0
    weights, checkpoint, pixels = drawn(tmp_path / "one")
    assert weights == first and checkpoint == str(tmp_path / "a")
    monkeypatch.undo()
    assert evaluate("--checkpoint {out}/a/checkpoints/step_00000001 --num 2 --steps 1 --out {out}/two")[0] == 0
    assert np.array_equal(drawn(tmp_path / "two")[2], pixels)
    assert evaluate("--checkpoint {out}/a --num 2 --steps 1 --out {out}/three")[0] == 0
    assert not np.array_equal(drawn(tmp_path / "three")[2], pixels)


def test_weights_that_are_replaced_while_they_are_read(evaluate, tmp_path, monkeypatch):
    """A resumed run writes the same checkpoint again."""
    write_checkpoint(tmp_path / "a", 1, seed=1)
    module = sys.modules["dcdit.cli.evaluate"]
    original = module.load_for_sampling

    def replaces_then(*args, **options):
        write_checkpoint(tmp_path / "a", 1, seed=2)
        return original(*args, **options)

    monkeypatch.setattr(module, "load_for_sampling", replaces_then)
    code, _, err = evaluate("--checkpoint {out}/a --num 2 --steps 1 --out {out}/one")
    assert code == 2 and err[-1].endswith("ema.safetensors has changed while it was read; run the same command again")
    assert not (tmp_path / "one" / "samples.npz").exists()


def test_samples_that_are_fewer_than_were_drawn(evaluate, tmp_path):
    command = "--checkpoint {files}/model.safetensors " + SAMPLING
    assert evaluate(command)[0] == 0
    np.savez(tmp_path / "run" / "samples.npz", arr_0=images(11))
    code, _, err = evaluate(command)
    assert code == 2 and err[-1].endswith("samples.npz holds 11 images; accepted: 12, as sampling.json says")


def test_no_ema_takes_the_last_weights(evaluate, tmp_path):
    write_checkpoint(tmp_path / "a", 1, seed=1)
    assert evaluate("--checkpoint {out}/a --no-ema --num 2 --steps 1 --out {out}/one")[0] == 0
    assert drawn(tmp_path / "one")[0] == sha256(tmp_path / "a" / "checkpoints" / "step_00000001" / "model.safetensors")


# --- what is said, what is refused ----------------------------------------------------------------------------------


def test_what_a_folder_leaves_out_is_one_line(files, tmp_path, capsys):
    folder = tmp_path / "real"
    for name in ("a", ".ipynb_checkpoints"):
        (folder / name).mkdir(parents=True)
    for i, image in enumerate(images(12)):
        Image.fromarray(image).save(folder / "a" / f"{i}.png")
    Image.fromarray(image).save(folder / ".ipynb_checkpoints" / "0.png")
    command = [
        "evaluate",
        "--images",
        folder,
        "--reference",
        folder,
        "--trust-extractor",
        "--extractor",
        files / "net.pt",
        "--device",
        "cpu",
    ]
    assert main([*map(str, command), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "ipynb" in line]
    assert lines == [f"dcdit: warning: {folder}: left out, hidden or of the system: 1 ('.ipynb_checkpoints')"]


def test_statistics_are_checked_before_anything_is_drawn(files, tmp_path, evaluate):
    sigma = np.eye(9)
    sigma[0, 5] = np.nan
    np.savez(tmp_path / "nan.npz", mu=np.zeros(9), sigma=sigma)
    np.savez(tmp_path / "both.npz", mu=np.zeros(9), sigma=np.eye(9), count=-5, arr_0=images(12))
    command = "--checkpoint {files}/model.safetensors --extractor {files}/net.pt --out {out}/run "
    for name, message in (("nan", "sigma: not finite in 1 of"), ("both", "count is int64 -5; accepted")):
        code, _, err = evaluate(command + f"--reference {{out}}/{name}.npz")
        assert code == 2 and err == [f"dcdit: error: {tmp_path / name}.npz: {message}" + err[0].partition(message)[2]]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--images {files}/real.npz", "give an --extractor"),
        ("--reference {files}/real.npz", "one of the arguments --checkpoint --images is required"),
        ("--images {files}/real.npz --checkpoint a", "not allowed with argument"),
        ("--images {files}/real.npz --extractor {files}/a.pt", "no feature extractor"),
        ("--images {files}/real.npz --extractor {files}/real.npz", "is no TorchScript file"),
        ("--images {files}/a.npz --extractor {files}/net.pt", "no file"),
        (
            "--images {files}/few.npz --extractor {files}/net.pt",
            "5 images are too few; accepted: at least 10",
        ),
        (
            "--images {files}/mixed --extractor {files}/net.pt",
            "accepted: images of one size, or --size",
        ),
        (
            "--images {files}/real.npz --extractor {files}/net.pt --reference {files}/b",
            "no images at",
        ),
        ("--checkpoint {files}/model.safetensors --num 0", "--num is 0; accepted: at least 1"),
        ("--checkpoint {files}/a.safetensors", "nothing at"),
        ("--checkpoint {files}/diverged.safetensors", "diverged.safetensors holds numbers that are not finite"),
        ("--checkpoint {files}/latents.safetensors", "makes latents of 4 channels; --vae decodes them"),
        ("--checkpoint {files}/static.safetensors --drop-fraction 0.5", "drops no tokens"),
        ("--checkpoint {files}/static.safetensors --method ddpm", "trained with the objective 'flow', which"),
        ("--checkpoint {files}/model.safetensors --drop-fraction 1", "accepted: a number in [0, 1)"),
        (
            "--checkpoint {files}/model.safetensors --reference {files}/b --extractor {files}/net.pt",
            "no images at",
        ),
    ],
)
def test_what_a_user_can_get_wrong(evaluate, tmp_path, command, message):
    code, out, err = evaluate(command + " --out {out}/run")
    assert code == 2 and out == ""
    assert len([line for line in err if line.startswith("dcdit: error: ") and message in line]) == 1, err
    assert not (tmp_path / "run").exists()


def test_torchmetrics_is_named_where_it_is_missing(evaluate, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    _, _, err = evaluate(
        "--images {files}/real.npz --extractor {files}/net.pt --reference {files}/real.npz --out {out}/run"
    )
    assert err[-1].endswith("pip install 'dcdit[eval]'")
