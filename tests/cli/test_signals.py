"""A signal ends every command with one line and 128 plus its number, and the command goes on where it stopped."""

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
from support.autoencoder import SIZE, save_autoencoder, write_images
from support.small import small_dc_dit

from dcdit.checkpoint import save_model
from dcdit.cli.main import COMMANDS, main
from dcdit.sample import drawing
from dcdit.train.loop import TrainResult

PIXELS = {"in_channels": 3, "grid": (8, 8), "num_classes": 3, "hidden_size": 128, "num_heads": 2, "depth": 1}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
pytestmark = pytest.mark.usefixtures("hang_up_ends_programs")


@pytest.fixture
def interrupted(monkeypatch, capsys):
    """Run a command that gets a signal, again and again, from the second call of a function on."""

    def interrupted(owner, function, number, words):
        original, calls = getattr(owner, function), []

        def signalled(*args, **options):
            calls.append(function)
            if len(calls) == 2:
                signal.raise_signal(number)
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, function, signalled)
            assert main([str(word) for word in words]) == 128 + number
        assert len(calls) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1] == f"dcdit: interrupted by {number.name}"
        assert "Traceback" not in lines

    return interrupted


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("number", SIGNALS)
def test_every_command(command, number, monkeypatch, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]

    def run(args):
        signal.raise_signal(number)

    monkeypatch.setattr(f"{COMMANDS[command][0]}.run", run)
    needed = ["--checkpoint", "a"] if command in ("sample", "evaluate") else []
    assert main([command, *needed]) == 128 + number
    assert capsys.readouterr() == ("", f"dcdit: interrupted by {number.name}\n")
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("error", [ImportError("cannot load module more than once per process"), None])
def test_a_signal_waits_for_the_imports_of_a_command(error, monkeypatch, capsys):
    """Compiled modules may turn it into another error, lose it, or abort."""
    whole = []

    def add_arguments(parser):
        signal.raise_signal(signal.SIGINT)
        whole.append(parser)
        if error is not None:
            raise error

    monkeypatch.setattr("dcdit.cli.info.add_arguments", add_arguments)
    assert main(["info"]) == 130
    assert whole and capsys.readouterr() == ("", "dcdit: interrupted by SIGINT\n")


def test_evaluate_goes_on(tmp_path, interrupted):
    save_model(tmp_path / "model.safetensors", small_dc_dit(**PIXELS))
    command = ["evaluate", "--checkpoint", tmp_path / "model.safetensors", "--num", 4, "--batch-size", 2, "--steps", 1]
    command += ["--device", "cpu", "--out"]
    assert main([str(word) for word in [*command, tmp_path / "whole"]]) == 0
    interrupted(drawing, "sample", signal.SIGTERM, [*command, tmp_path / "out"])
    assert [path.name for path in (tmp_path / "out" / "batches").iterdir()] == ["000000.npz"]
    assert main([str(word) for word in [*command, tmp_path / "out"]]) == 0
    whole, again = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("whole", "out"))
    assert np.array_equal(whole, again)


def test_extract_goes_on(tmp_path, interrupted):
    from dcdit.data.latents import encode

    (tmp_path / "images").mkdir()
    command = ["extract", "--images", write_images(tmp_path / "images"), "--vae", save_autoencoder(tmp_path / "vae")]
    command += ["--size", SIZE, "--shard-size", 2, "--workers", 1, "--device", "cpu", "--out", tmp_path / "out"]
    interrupted(encode, "_encode", signal.SIGHUP, command)
    shards = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert shards == ["latents_shard00000.safetensors"]
    assert main([str(word) for word in command]) == 0
    assert main(["extract", "--verify", str(tmp_path / "out")]) == 0


def test_a_demo_whose_training_was_interrupted_goes_no_further(tmp_path, monkeypatch, capsys):
    ended = TrainResult(1, "interrupt", Path("checkpoint"), Path("log"), True, signal.SIGTERM)
    monkeypatch.setattr("dcdit.train.train", lambda config: ended)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 143
    assert capsys.readouterr().out.startswith("1/4 training") and not (tmp_path / "demo").exists()
    monkeypatch.setattr("dcdit.train.train", lambda config: dataclasses.replace(ended, signal=0))
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2, "a run that ended by itself is looked at"
