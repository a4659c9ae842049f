"""The command line: a run from training to pictures, and one line for every error that a user can cause."""

import errno
import json
import re
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import dcdit
from dcdit import checkpoint as ckpt
from dcdit.cli import main
from dcdit.models import create_model
from dcdit.sample.model_calls import ModelCalls

TINY = ["in_channels=3", "grid=[8,8]", "hidden_size=128", "depth=1", "num_heads=2"]


@pytest.fixture
def fails(capsys, monkeypatch):
    """Run a command that must fail: exit code 2, nothing on stdout, one line on stderr that matches."""
    monkeypatch.delenv("DCDIT_TRACEBACK", raising=False)

    def fails(*argv, match):
        assert main(" ".join(map(str, argv)).split()) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("dcdit: error: ") and err.count("\n") == 1, err
        assert match in err

    return fails


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (path / label).mkdir()
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path / label / f"{i}.png")
    return path


def train_command(folder, out, *extra):
    sets = [f"model.overrides.{item}" for item in TINY] + [
        "model.num_classes=2",
        "data.size=8",
        "router.group_size=null",
    ]
    sets += ["run.log_every=1", "run.eval_every=2", "run.eval_images=1"]
    flags = ["--data-path", folder, "--steps", 3, "--batch-size", 2, "--lr", "1e-3", "--device", "cpu", "--out", out]
    return ["train", *map(str, flags), *(word for item in sets for word in ("--set", item)), *map(str, extra)]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A run folder whose name is a number, as a user might choose."""
    out = tmp_path_factory.mktemp("runs") / "2024"
    assert main(train_command(folder, out)) == 0
    return out


# --- train, sample ------------------------------------------------------------------------------------------------


def test_train_writes_a_run(trained):
    assert len((trained / "log.jsonl").read_text().splitlines()) == 4
    assert "lr: 0.001" in (trained / "config.yaml").read_text()
    assert ckpt.read_trainer(trained)["step"] == 3


def test_train_from_a_file_and_resume(folder, trained, tmp_path, capsys):
    again = tmp_path / "again"
    assert main(["train", "--config", str(trained / "config.yaml"), "--out", str(again), "--steps", "2"]) == 0
    assert main(["train", "--resume", str(again), "--steps", "3"]) == 0
    assert "3 steps done" in capsys.readouterr().out
    one, two = (ckpt.load_checkpoint(run) for run in (trained, again))
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)


def test_log_messages_show_on_request(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DCDIT_LOG", "info")
    assert main(train_command(folder, tmp_path / "run", "--steps", 1)) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dcdit: info: ")]
    assert re.fullmatch(r"dcdit: info: DC-DiT-S with [\d,]+ parameters, on cpu in 1 process\(es\), .*", lines[0])
    assert lines[-1] == f"dcdit: info: saved {tmp_path / 'run' / 'checkpoints' / 'step_00000001'}"
    monkeypatch.delenv("DCDIT_LOG")
    assert main(train_command(folder, tmp_path / "silent", "--steps", 1)) == 0
    assert "dcdit: info" not in capsys.readouterr().err


def test_unknown_log_level(fails, monkeypatch):
    monkeypatch.setenv("DCDIT_LOG", "loud")
    fails("info", match="DCDIT_LOG is 'loud'; accepted: debug, info, warning, error")


def test_sample_writes_pictures_and_kept_fractions(trained, tmp_path, capsys):
    out = tmp_path / "pictures"
    command = ["sample", "--checkpoint", trained, "--drop-fraction", 0, 0.5, "--labels", 1, 0, "--num-per-class", 3]
    command += ["--steps", 3, "--cfg-scale", 2, "--batch-size", 4, "--device", "cpu", "--out", out, "--individual"]
    assert main([str(word) for word in command]) == 0
    assert capsys.readouterr().out.count("6 images, kept") == 2
    for name in ("drop_0", "drop_0.5"):
        with Image.open(out / f"{name}.png") as grid:
            # 8 pixels are enlarged to 128; a gap of 4 lies between images, and a name of 16 below each.
            assert grid.size == (3 * 132 - 4, 2 * 148 - 4) and grid.mode == "RGB"
        assert sorted(file.name for file in (out / name).iterdir())[::3] == ["00000_class1.png", "00003_class0.png"]
        with Image.open(out / name / "00001_class1.png") as single:
            assert single.size == (8, 8)
    report = json.loads((out / "samples.json").read_text())
    assert report["labels"] == [1, 1, 1, 0, 0, 0] and report["method"] == "ddpm" and report["cfg_scale"] == 2
    full, half = report["runs"]
    assert (full["drop_fraction"], half["drop_fraction"]) == (0, 0.5)
    for run in (full, half):
        assert len(run["calls"]) == 3 and run["calls"][0]["t"] > run["calls"][-1]["t"]
        assert all(0 < call["kept"] <= 1 and 0 < call["kept_null"] <= 1 for call in run["calls"])
        assert run["kept"] == pytest.approx(np.mean([call["kept"] for call in run["calls"]]))
    assert full["kept"] == full["natural"]
    assert half["kept"] < half["natural"]


def test_sampling_repeats_and_batches_do_not_matter(trained, tmp_path):
    common = ["sample", "--checkpoint", str(trained), "--steps", "2", "--num", "3", "--device", "cpu"]
    for name, extra in (("a", []), ("b", []), ("c", ["--batch-size", "1"]), ("d", ["--seed", "1"])):
        assert main([*common, "--out", str(tmp_path / name), *extra]) == 0
    a, b, c, d = (np.asarray(Image.open(tmp_path / name / "drop_0.png")).astype(int) for name in "abcd")
    assert np.array_equal(a, b)
    assert abs(a - c).max() <= 1
    assert not np.array_equal(a, d)


def test_kept_fractions_are_those_of_the_model():
    torch.manual_seed(0)
    model = create_model("DC-DiT-S", num_classes=3, hidden_size=128, depth=1, num_heads=2, grid=(8, 8)).eval()
    torch.nn.init.normal_(model.router.out.weight, std=5.0)
    x, t, y = torch.randn(3, 4, 8, 8), torch.full((3,), 500), torch.tensor([0, 1, 3])
    watched = ModelCalls(model, images=2)
    with torch.no_grad():
        out, routing = model(x, t, y, drop_fraction=0.5, return_routing=True)
        assert torch.equal(watched(x, t, y, drop_fraction=0.5), out)
    (record,) = watched.records()
    kept = routing.mask.float().mean(1)
    assert record["t"] == 500
    assert record["kept"] == pytest.approx(float(kept[:2].mean()))
    assert record["kept_null"] == pytest.approx(float(kept[2]))
    assert record["natural"] == pytest.approx(float(routing.natural_mask[:2].float().mean()))


def test_budget_and_lite_cfg(trained, tmp_path):
    common = ["sample", "--checkpoint", str(trained), "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*common, "--budget", "7"]) == 0
    (run,) = json.loads((tmp_path / "samples.json").read_text())["runs"]
    assert [call["kept"] for call in run["calls"]] == pytest.approx([7 / 64] * 2)
    assert main([*common, "--drop-fraction", "0", "--null-drop-fraction", "0.9", "--cfg-scale", "2"]) == 0
    (run,) = json.loads((tmp_path / "samples.json").read_text())["runs"]
    assert all(call["kept_null"] < call["kept"] for call in run["calls"])


@pytest.fixture(scope="module")
def static_latents(tmp_path_factory):
    """A static model of four-channel latents."""
    path = tmp_path_factory.mktemp("static") / "dit.safetensors"
    ckpt.save_model(path, create_model("DiT-S/2", num_classes=3, hidden_size=64, depth=1, num_heads=2, grid=(8, 8)))
    return path


def test_latents_without_a_decoder(static_latents, tmp_path):
    assert (
        main(["sample", "--checkpoint", str(static_latents), "--steps", "2", "--device", "cpu", "--out", str(tmp_path)])
        == 0
    )
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["latents"].shape == (3, 4, 8, 8) and archive["labels"].tolist() == [0, 1, 2]


def test_latents_are_decoded(static_latents, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    command = ["sample", "--checkpoint", str(static_latents), "--steps", "2", "--device", "cpu", "--num", "4"]
    assert main([*command, "--vae", str(tmp_path / "vae"), "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (2 * 132 - 4, 2 * 148 - 4)  # 16 pixels are enlarged to 128, with a name below each


# --- info, version, help --------------------------------------------------------------------------------------------


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == torch.__version__
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["ops_backend"]) == ("cpu", "torch")
    assert cpu["auto"] == {"bfloat16": "sdpa", "float32": "sdpa"}
    assert {kernel["name"]: kernel["available"] for kernel in cpu["attention"]}["flash2"] is False
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"dcdit {dcdit.__version__}" in out
    assert "- flash2        needs a GPU, not cpu" in out
    assert "auto takes sdpa for float32: the first one available" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dcdit {dcdit.__version__}\n"


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "profile", "info"])
def test_help_documents_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "optim.ema_decay" in out or command != "train"
    from dcdit.cli.main import create_parser

    (subcommands,) = (action for action in create_parser([command])._actions if action.dest == "command")
    assert all(action.help for action in subcommands.choices[command]._actions)


def test_help_is_light():
    code = (
        "import sys; from dcdit.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert all(command in done.stdout for command in ("train", "sample", "profile", "info"))


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "dcdit", "train", "--steps", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "dcdit: error: optim.steps is 'x'; accepted: int\n"


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def test_no_command(fails):
    fails(match="COMMAND")


def test_unknown_command(fails):
    fails("tarin", match="invalid choice: 'tarin'")


def test_unknown_flag(fails):
    fails("train --stesp 3", match="unrecognized arguments: --stesp 3 (see dcdit train --help)")


def test_unknown_key(fails):
    fails("train --set optim.lrr=1", match="unknown configuration key 'optim.lrr'")


def test_unknown_preset(fails, folder, tmp_path):
    fails(*train_command(folder, tmp_path, "--model", "DC-DiT-M"), match="unknown preset 'DC-DiT-M'; accepted: DC-DiT-")
    fails(*train_command(folder, tmp_path, "--model", "dc-dit-xl"), match="did you mean 'DC-DiT-XL'?")


def test_missing_image_folder(fails, tmp_path):
    fails(*train_command(tmp_path / "nowhere", tmp_path), match="no image folder")


def test_empty_image_folder(fails, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    fails(*train_command(images, tmp_path / "run"), match="no images in")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image(fails, tmp_path, workers, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(8):
        (images / f"{i}.png").write_bytes(b"no image")
    command = train_command(images, tmp_path / "run", "--set", f"data.workers={workers}")
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dcdit: error: ") and "cannot read image" in last and ".png" in last


def test_missing_config(fails, tmp_path):
    fails(f"train --config {tmp_path / 'a.yaml'}", match="no configuration file")


def test_resume_with_another_config(fails, trained):
    fails(f"train --resume {trained} --config a.yaml", match="not --config")


def test_resume_of_nothing(fails, tmp_path):
    fails(f"train --resume {tmp_path}", match="no checkpoint in")


def test_a_folder_without_a_checkpoint_says_what_it_is(fails, trained, tmp_path):
    fails(f"sample --checkpoint {trained / 'checkpoints'}", match=f"; accepted: its run, {trained}")
    fails(f"sample --checkpoint {trained.parent}", match=f"; accepted: one of the runs in it, such as {trained}")
    shutil.copy(trained / "config.yaml", tmp_path)
    fails(f"train --resume {tmp_path}", match=f"dcdit train --config {tmp_path / 'config.yaml'} begins it again")


def test_resume_as_another_model(fails, trained):
    fails(
        f"train --resume {trained} --model DiT-S/2", match=f"model.name is 'DiT-S/2', but {trained} trains 'DC-DiT-S'"
    )


def test_resume_of_a_finished_run(trained, capsys):
    before = (trained / "log.jsonl").read_bytes()
    assert main(["train", "--resume", str(trained)]) == 0
    out, err = capsys.readouterr()
    assert out == "no step was left: 3 are done, and optim.steps is 3; --steps asks for more\n" and err == ""
    assert (trained / "log.jsonl").read_bytes() == before


def test_resume_of_a_truncated_checkpoint(fails, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    file = ckpt.find_checkpoint(tmp_path / "run") / ckpt.OPTIMIZER_FILE
    file.write_bytes(file.read_bytes()[:-10])
    fails(f"train --resume {tmp_path / 'run'} --steps 5", match="optimizer.safetensors is damaged")


def test_existing_run(fails, folder, trained):
    fails(*train_command(folder, trained), match="already holds a run")


def test_missing_checkpoint(fails, tmp_path):
    fails(f"sample --checkpoint {tmp_path / 'a.safetensors'}", match="a.safetensors'; accepted: a run or checkpoint")


def test_corrupt_checkpoint(fails, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"corrupt" * 100)
    fails(f"sample --checkpoint {tmp_path / 'a.safetensors'}", match="damaged or no safetensors file")


@pytest.mark.parametrize("rho", ["1", "1.5", "-0.1", "nan"])
def test_bad_drop_fraction(fails, trained, rho):
    fails(f"sample --checkpoint {trained} --drop-fraction {rho}", match="accepted: a number in [0, 1)")


def test_drop_fraction_that_is_no_number(fails, trained):
    fails(f"sample --checkpoint {trained} --drop-fraction half", match="invalid float value: 'half'")


def test_drop_fraction_of_a_static_model(fails, static_latents):
    fails(f"sample --checkpoint {static_latents} --drop-fraction 0.5", match="static DiT, which drops no tokens")


def test_budget_with_drop_fraction(fails, trained):
    fails(
        f"sample --checkpoint {trained} --budget 3 --drop-fraction 0.5",
        match="--drop-fraction and --budget each say how many",
    )


def test_budget_too_large(fails, trained):
    fails(f"sample --checkpoint {trained} --budget 65 --steps 1 --device cpu", match="budget is 65; accepted: 1 to 64")


@pytest.mark.parametrize("flag", ["--num-per-class", "--num", "--steps", "--batch-size"])
def test_counts_of_zero(fails, trained, flag):
    fails(f"sample --checkpoint {trained} {flag} 0", match=f"{flag} is 0; accepted: at least 1")


def test_bad_label(fails, trained):
    fails(f"sample --checkpoint {trained} --labels 2", match="label 2; accepted: a class name or a number from 0 to 1")
    fails(f"sample --checkpoint {trained} --labels -1", match="label -1; accepted: a class name")
    fails(f"sample --checkpoint {trained} --labels c", match="no class 'c' in")


def test_classes_by_name_are_those_by_number(trained, tmp_path):
    for labels in (["1", "0"], ["b", "a"]):
        out = tmp_path / labels[0]
        assert (
            main(["sample", "--checkpoint", str(trained), "--labels", *labels, "--steps", "2", "--out", str(out)]) == 0
        )
    one, two = (json.loads((tmp_path / name / "samples.json").read_text()) for name in ("1", "b"))
    assert one["labels"] == two["labels"] == [1, 0]


def test_missing_decoder(fails, static_latents, tmp_path):
    fails(f"sample --checkpoint {static_latents} --vae {tmp_path}", match="no diffusers autoencoder")


def test_missing_extra(fails, monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    fails(*train_command(folder, tmp_path), match="pip install 'dcdit[train]'")


def test_missing_yaml(fails, monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "yaml", None)
    fails(*train_command(folder, tmp_path), match="pip install 'dcdit[train]'")


@pytest.mark.parametrize("error", [TypeError("len() of 5"), AttributeError("no x"), KeyError("y"), RuntimeError("odd")])
def test_faults_of_the_program_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr("dcdit.cli.info.run", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        main(["info"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "out/a: No space left on device"),
        (ValueError("a\x1b[31m is\nred"), "a\\x1b[31m is red"),
        (MemoryError(), "there is not enough memory (MemoryError); accepted: a smaller batch, image or model"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nat"
            ),
            "there is not enough memory ([enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9 bytes.); accepted: a smaller batch, image or model",
        ),
        (
            ValueError(
                "Caught DamagedFile in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                '  File "a.py", line 1, in f\n    raise DamagedFile(x)\n           ^^^^^\n'
                "dcdit.data.samples.DamagedFile: cannot read a\nb\n"
            ),
            "dcdit.data.samples.DamagedFile: cannot read a\\nb",
        ),
    ],
)
def test_errors_of_users_are_one_line(monkeypatch, capsys, error, line):
    monkeypatch.setattr("dcdit.cli.info.run", mock.Mock(side_effect=error))
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"dcdit: error: {line}\n"


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("DCDIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown configuration key"):
        main(["train", "--set", "optim.lrr=1"])
