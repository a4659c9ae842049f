"""Runs that are killed or asked to end, at any moment, and go on bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.programs import environment
from support.runs import assert_same_weights, read_log, records, stop_at, without_speed
from support.shards import image_shards

from dcdit import checkpoint as ckpt
from dcdit.config import dump_yaml, override
from dcdit.train import train


@pytest.mark.parametrize(
    "overrides",
    [["optim.precision=bf16", "optim.accumulate=2"], ["model.name=DiT-S/2", "run.eval_every=2"]],
    ids=["dynamic-bf16-accumulate", "static"],
)
def test_a_run_killed_at_any_moment_goes_on_bitwise(config, tmp_path, overrides):
    """SIGKILL before one of many file operations: between steps, in log lines, inside and around checkpoints."""
    saving = ["run.checkpoint_every=1", "run.keep_checkpoints=1"]
    whole = train(config(*overrides, *saving, out="whole"))
    (tmp_path / "config.yaml").write_text(dump_yaml(config(*overrides, *saving)))
    command = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, str(tmp_path / "runs"), "31"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = []
    for out in sorted((tmp_path / "runs").iterdir(), key=lambda out: int(out.name)):
        begun = bool(ckpt.list_checkpoints(out))
        steps.append(ckpt.read_trainer(out)["step"] if begun else 0)
        again = train(config(*overrides, *saving, out=out), resume=out if begun else None)
        assert_same_weights(whole.checkpoint, again.checkpoint)
        assert without_speed(records(whole)) == without_speed(records(again))
        assert [path.name for path in (out / "checkpoints").iterdir()] == [whole.checkpoint.name]
        assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.yaml", "log.jsonl"]
    assert len(steps) >= 4 and min(steps) == 0 and max(steps) >= 2


def test_a_run_killed_at_some_time_goes_on_bitwise(config, tmp_path):
    """The command itself, and a SIGKILL that nothing in it waits for."""
    saving = ["optim.steps=30", "run.checkpoint_every=3"]
    whole = train(config(*saving, out="whole"))
    settings = config(*saving, out="killed")
    (tmp_path / "killed.yaml").write_text(dump_yaml(settings))
    log = tmp_path / "killed" / "log.jsonl"
    command = [sys.executable, "-m", "dcdit", "train", "--config", str(tmp_path / "killed.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert ckpt.read_trainer(settings.run.out)["step"] < 30
    assert_same_weights(whole.checkpoint, train(settings, resume=settings.run.out).checkpoint)


def test_a_killed_run_on_a_stream_goes_on_bitwise(config, tmp_path):
    """With loading processes and with two ranks, over the end of an epoch."""
    settings = config("optim.steps=7", "run.checkpoint_every=3", "run.eval_every=4", "data.kind=stream", "data.size=8")
    settings.data.path = str(image_shards(tmp_path / "shards", (5, 6, 3, 6, 5, 4)))
    settings.data.shuffle_buffer = 6
    (tmp_path / "config.yaml").write_text(dump_yaml(settings))
    command = [sys.executable, str(Path(__file__).with_name("stream_runs.py")), str(tmp_path / "config.yaml")]
    done = subprocess.run([*command, str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for runs in ("1-2", "2-0"):
        whole, killed = (tmp_path / runs / name for name in ("whole", "killed"))
        assert_same_weights(ckpt.find_checkpoint(whole), ckpt.find_checkpoint(killed))
        first, second = (without_speed(read_log(out / "log.jsonl")) for out in (whole, killed))
        assert first == second and [r["step"] for r in first if "val_loss" in r] == [4]
        places = ckpt.read_trainer(killed)["stream"]["places"]
        assert places == ckpt.read_trainer(whole)["stream"]["places"] and max(epoch for epoch, *_ in places) >= 1


def test_a_run_asked_to_end_at_any_moment_saves_and_goes_on_bitwise(config, tmp_path):
    """Signals to a whole job with loading processes, as schedulers send them; of two ranks also to one alone."""
    settings = config("optim.steps=5", "run.eval_every=2", "run.log_every=50", "run.checkpoint_every=3")
    settings.data.workers = 1
    whole = train(settings)
    (tmp_path / "config.yaml").write_text(dump_yaml(settings))
    command = [sys.executable, str(Path(__file__).with_name("signalled_runs.py")), str(tmp_path / "config.yaml")]
    (tmp_path / "runs").mkdir()
    done = subprocess.run([*command, str(tmp_path / "runs")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = {
        "loading": (1, [143]),
        "stepping": (2, [130]),
        "validating": (2, [143]),
        "saving": (4, [129]),
        "ranks": (2, [143, 143]),
        "rank": (2, [143, 143]),
    }
    for name, (step, codes) in ended.items():
        out = tmp_path / "runs" / name
        assert json.loads((tmp_path / "runs" / f"{name}.json").read_text()) == codes, done.stderr
        assert f"interrupt: {step} steps done; checkpoint {ckpt.checkpoint_path(out, step)}" in done.stdout
        if len(codes) == 1:
            again = train(override(settings, {"run.out": str(out), "data.workers": 0}), resume=out)
            assert_same_weights(whole.checkpoint, again.checkpoint)
            validations = [record for record in records(whole) if "val_loss" in record]
            assert [record for record in records(again) if "val_loss" in record] == validations
            assert [record["step"] for record in records(again)] == [2, 4, 5]


@pytest.mark.parametrize("launcher", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", None])
def test_a_run_ends_with_its_launcher(config, monkeypatch, launcher):
    """That of one process dies of SIGTERM and passes nothing on. Without a launcher, the parent may end (nohup)."""
    if launcher is not None:
        monkeypatch.setenv(launcher, "no")

    def launcher_ends(record):
        if record["step"] == 2:
            monkeypatch.setattr(os, "getppid", lambda: 1)

    result = train(config(), callbacks=[launcher_ends])
    ended = (4, "steps", 0) if launcher is None else (2, "interrupt", signal.SIGTERM)
    assert (result.step, result.reason, result.signal) == ended
    assert ckpt.read_trainer(result.checkpoint)["step"] == result.step


def test_signal_handlers_come_back(config):
    before = signal.getsignal(signal.SIGINT)
    train(config("optim.steps=1"), callbacks=[stop_at(1)])
    assert signal.getsignal(signal.SIGINT) is before
