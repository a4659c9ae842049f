"""The folder of a run: where a resumed run goes on, what a new one leaves alone, and what a file cannot decide."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit import checkpoint as ckpt
from dcdit.cli.main import main
from dcdit.config import dump_yaml, override
from dcdit.train import train
from dcdit.train.records import cut_log
from dcdit.utils.signals import Signals

MODEL = {"in_channels": 3, "grid": [8, 8], "hidden_size": 32, "depth": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), labels=np.arange(8) % 3)
    return path


@pytest.fixture
def config(archive, tmp_path, monkeypatch):
    """A configuration with the folder ``a``. The folder of the test is the working directory."""
    monkeypatch.chdir(tmp_path)

    def config(*overrides, out="a"):
        data = {
            "model": {"name": "DiT-S/2", "num_classes": 3, "overrides": MODEL},
            "data": {"kind": "npz", "path": str(archive), "held_out": 0.25},
            "optim": {"steps": 2, "batch_size": 4, "device": "cpu"},
            "run": {"out": str(out), "log_every": 1, "eval_every": 0, "checkpoint_every": 1},
        }
        return override(data, overrides)

    return config


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(run):
    return [path.name[-1] for path in sorted((run / "checkpoints").iterdir())], [
        json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()
    ]


def fails(capsys, *words, match):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("dcdit: error: ")]) == 1 and match in lines[-1], lines


# --- a resumed run goes on in its folder -----------------------------------------------------------------------------


def test_a_copy_goes_on_in_the_copy(config, tmp_path):
    train(config())
    shutil.copytree("a", "b")
    before = contents(tmp_path / "a")
    assert main(["train", "--resume", "b/checkpoints/step_00000001", "--set", "optim.lr=0.5", "--steps", "3"]) == 0
    assert contents(tmp_path / "a") == before
    assert steps(tmp_path / "b") == (["1", "2", "3"], [1, 2, 3])
    assert "out: b\n" in (tmp_path / "b/config.yaml").read_text()
    assert ckpt.read_trainer("b")["config"]["run"]["out"] == "b"
    assert (tmp_path / "b/checkpoints/step_00000002/model.safetensors").read_bytes() not in before.values()


def test_a_renamed_run_goes_on(config, tmp_path):
    train(config())
    (tmp_path / "a").rename(tmp_path / "renamed")
    assert main(["train", "--resume", "renamed", "--steps", "3"]) == 0
    result = train(config("optim.steps=4"), resume="renamed")  # whatever run.out says
    assert steps(tmp_path / "renamed") == (["1", "2", "3", "4"], [1, 2, 3, 4])
    assert [path.name for path in tmp_path.iterdir()] == ["renamed"]
    assert (str(result.checkpoint), str(result.log)) == ("renamed/checkpoints/step_00000004", "renamed/log.jsonl")


def test_a_checkpoint_is_named_from_anywhere(config, tmp_path, monkeypatch):
    train(config("optim.steps=1"))
    (tmp_path / "link").symlink_to("a/checkpoints/step_00000001")
    places = [("a/checkpoints", "step_00000001"), ("a/checkpoints/step_00000001", "."), (".", "link"), ("a", ".")]
    for last, (folder, name) in enumerate(places, 2):
        monkeypatch.chdir(tmp_path / folder)
        assert main(["train", "--resume", name, "--steps", str(last)]) == 0
        assert steps(tmp_path / "a")[0][-1] == str(last)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


def test_resume_with_another_out_is_refused(config, tmp_path, capsys):
    train(config("optim.steps=1"))
    fails(capsys, "train", "--resume", "a", "--out", "b", match="--out is b, but --resume goes on in a; leave --out")
    fails(capsys, "train", "--resume", "a", "--set", "run.out=b", match="--out is b, but --resume goes on in a")
    assert main(["train", "--resume", "a", "--out", str(tmp_path / "a"), "--steps", "2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_checkpoint_in_no_run_is_refused(config, tmp_path, capsys):
    saved = train(config("optim.steps=1")).checkpoint
    shutil.copytree(saved, "downloaded")
    before = contents(tmp_path)
    fails(capsys, "train", "--resume", "downloaded", match="downloaded is in no run, so there is no folder to go on in")
    with pytest.raises(ValueError, match="downloaded is in no run"):
        train(config(), resume="downloaded")
    assert contents(tmp_path) == before


def test_a_finished_run_is_not_written_again(config, tmp_path):
    train(config())
    before = contents(tmp_path)
    result = train(config(), resume="a")
    assert (result.step, result.checkpoint.name) == (2, "step_00000002")
    assert contents(tmp_path) == before


def test_a_finished_run_deletes_the_checkpoints_that_a_kill_left(config, tmp_path, monkeypatch):
    """Killed between its last checkpoint and the deletion of those before it."""
    train(config())
    monkeypatch.chdir(tmp_path / "a/checkpoints/step_00000002")
    result = train(config("run.keep_checkpoints=1"), resume=".")
    assert result.checkpoint.is_dir() and steps(tmp_path / "a") == (["2"], [1, 2])


# --- a file decides neither where a run writes nor what it reads -----------------------------------------------------


@pytest.fixture
def strangers(config, tmp_path, archive):
    """A run whose checkpoints say to write to ``home``, to read another file, and to send records somewhere."""
    train(config("optim.steps=1"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "log.jsonl").write_text('{"step": 9}\n')
    private = tmp_path / "home" / "private.npz"
    shutil.copy(archive, private)
    file = tmp_path / "a/checkpoints/step_00000001/trainer.json"
    trainer = json.loads(file.read_text())
    trainer["config"]["run"] |= {"out": str(tmp_path / "home"), "trackers": ["tensorboard"]}
    trainer["config"]["data"] |= {"path": str(private), "held_out_path": "https://example.org/a.tar"}
    trainer["config"]["upcycle"]["source"] = str(tmp_path / "home" / "dit.pt")
    file.write_text(json.dumps(trainer))
    return tmp_path / "home"


def test_a_checkpoint_does_not_say_where_to_write_and_what_to_read(strangers, archive, tmp_path):
    before = contents(strangers)
    assert main(["train", "--resume", "a", "--steps", "2"]) == 0
    assert contents(strangers) == before
    written = ckpt.read_trainer("a")["config"]
    assert (written["run"]["out"], written["run"]["trackers"]) == ("a", None)
    assert (written["data"]["path"], written["data"]["held_out_path"]) == (str(archive), None)
    assert written["upcycle"]["source"] is None
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["checkpoints", "config.yaml", "log.jsonl"]


def test_without_a_config_the_user_names_what_is_read(strangers, archive, tmp_path, capsys):
    (tmp_path / "a/config.yaml").unlink()
    before = contents(tmp_path)
    command = ["train", "--resume", "a", "--steps", "2"]
    flags = {
        "data.path": [],
        "data.held_out_path": ["--data-path", archive],
        "upcycle.source": ["--set", "data.held_out_path="],
        "run.trackers": ["--set", "upcycle.source="],
    }
    for key, more in flags.items():
        command += more
        fails(capsys, *command, match=f"a has no config.yaml, and {key} is not taken from a checkpoint (")
        assert contents(tmp_path) == before
    assert main([str(word) for word in [*command, "--set", "run.trackers="]]) == 0
    assert ckpt.read_trainer("a")["config"]["data"]["path"] == str(archive)


# --- a new run leaves alone what is there ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "log.jsonl", "samples.npz", "sampling.json", "checkpoints/epoch_3.ckpt", "checkpoints/step_1/x"],
)
def test_a_folder_with_files_of_such_a_name_is_refused(config, tmp_path, name, capsys):
    for file in (name, "notes.txt", "batches/1.npz", ".venv.3.12.new/x", ".bashrc.1.old"):
        (tmp_path / "a" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / file).write_text("mine")
    (tmp_path / "c.yaml").write_text(dump_yaml(config()))
    before = contents(tmp_path)
    shown = "checkpoints/" if "checkpoints" in name else name
    fails(capsys, "train", "--config", "c.yaml", match=f"a already holds {shown}; choose another --out, or move them")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("out", ["photos", "photos/run", "photos/cat/run", "linked/run"])
def test_a_run_within_its_data_is_refused(config, tmp_path, out, capsys):
    """It would be one more class, and the run could not be resumed."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    (tmp_path / "linked").symlink_to("photos")
    (tmp_path / "c.yaml").write_text(
        dump_yaml(config("data.kind=folder", "data.path=photos", "data.size=8", f"run.out={out}"))
    )
    before = contents(tmp_path)
    fails(
        capsys, "train", "--config", "c.yaml", match=f"{out} is where data.path is read from; accepted: another place"
    )
    assert contents(tmp_path) == before


def test_other_files_are_left_alone(config, tmp_path):
    for file in ("notes.txt", "batches/1.npz", ".venv.3.12.new/x", ".bashrc.1.old", "checkpoints2/x", ".x.2.gone/y"):
        (tmp_path / "a" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / file).write_text("mine")
    (tmp_path / "a" / "checkpoints").mkdir()
    before = contents(tmp_path)
    train(config())
    train(config("optim.steps=3"), resume="a")
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before
    assert steps(tmp_path / "a") == (["1", "2", "3"], [1, 2, 3])


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(config, tmp_path):
    """The same command works again; with another configuration the folder is refused."""

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config("run.checkpoint_every=2"), callbacks=[stop])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["config.yaml", "log.jsonl"]
    with pytest.raises(ValueError, match=r"a already holds config\.yaml, log\.jsonl; choose another --out"):
        train(config("optim.lr=0.5"))
    train(config("run.checkpoint_every=2"))
    assert steps(tmp_path / "a") == (["2"], [1, 2])


def test_a_signal_before_the_first_step(config, tmp_path, monkeypatch):
    """A new run saves what it began with, and a resumed one has its checkpoint; both go on as ever."""

    class AtOnce(Signals):
        caught = signal.SIGTERM

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    train(config(out="whole"))
    with monkeypatch.context() as patch:
        patch.setattr("dcdit.train.loop.Signals", AtOnce)
        for resume in (None, "a"):
            result = train(config(), resume=resume)
            assert (result.step, result.reason, result.checkpoint.name) == (0, "interrupt", "step_00000000")
    train(config(), resume="a")
    ours, theirs = (ckpt.load_checkpoint(run).optimizer for run in ("a", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert steps(tmp_path / "a") == (["0", "1", "2"], [1, 2])


def test_an_error_before_training_leaves_no_folder(config, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(config(f"data.path={tmp_path}/nowhere.npz"))
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder(config, tmp_path, capsys):
    """While one trains, neither a new run nor a resumed one gets in; the same goes for an evaluation."""
    (tmp_path / "c.yaml").write_text(dump_yaml(config()))
    seen = []

    def second(record):
        if record["step"] == 2:
            (tmp_path / "linked").symlink_to("a")
            for words in (
                ["train", "--config", "c.yaml"],
                ["train", "--resume", "a"],
                ["train", "--resume", "linked/checkpoints/step_00000001"],
                ["evaluate", "--checkpoint", "a", "--num", 1, "--steps", 1, "--device", "cpu", "--out", "linked"],
            ):
                fails(capsys, *words, match=" is in use by process ")
                seen.append(words)

    train(config(), callbacks=[second])
    assert len(seen) == 4
    assert steps(tmp_path / "a") == (["1", "2"], [1, 2])


# --- links -----------------------------------------------------------------------------------------------------------


def test_linked_folders_and_files_are_followed(config, tmp_path):
    big = tmp_path / "big"
    for name in ("run", "checkpoints"):
        (big / name).mkdir(parents=True)
    (tmp_path / "a").symlink_to(big / "run")
    (big / "run" / "checkpoints").symlink_to(big / "checkpoints")
    (big / "run" / "log.jsonl").symlink_to(big / "log.jsonl")
    train(config("run.keep_checkpoints=1"))
    train(config("optim.steps=3", "run.keep_checkpoints=1"), resume="a/checkpoints/step_00000002")
    assert [path.name for path in (big / "checkpoints").iterdir()] == ["step_00000003"]
    assert all(path.is_symlink() for path in (tmp_path / "a", big / "run/checkpoints", big / "run/log.jsonl"))
    assert steps(big / "run") == (["3"], [1, 2, 3])
    assert sorted(path.name for path in big.iterdir()) == ["checkpoints", "log.jsonl", "run"]


def test_a_linked_checkpoint_can_be_resumed_and_its_target_stays(config, tmp_path):
    train(config("optim.steps=1"))
    shutil.copytree("a", "b")
    linked = tmp_path / "b/checkpoints/step_00000001"
    shutil.rmtree(linked)
    linked.symlink_to(tmp_path / "a/checkpoints/step_00000001")
    before = contents(tmp_path / "a")
    for last in (2, 3):  # every later resume works too
        settings = config(f"optim.steps={last}", "run.keep_checkpoints=1")
        train(settings, resume="b/checkpoints/step_00000001" if last == 2 else "b")
        assert contents(tmp_path / "a") == before and linked.is_symlink()
        assert steps(tmp_path / "b") == (["1", str(last)], list(range(1, last + 1)))


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "notes in a checkpoint"])
def test_what_the_run_could_not_replace_later_is_refused_at_once(config, tmp_path, kind):
    train(config())
    later = tmp_path / "a/checkpoints/step_00000002"
    if kind == "notes in a checkpoint":
        (later / "notes.txt").write_text("mine")
    else:
        later.rename(tmp_path / "moved")
        (tmp_path / "moved" / "notes.txt").write_text("mine")
        if kind == "folder":
            (tmp_path / "moved").rename(later)
        else:
            later.symlink_to(tmp_path / ("moved" if kind == "link" else "nowhere"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"step_00000002 (is a link|holds more than a checkpoint), and the run would "):
        train(config("optim.lr=0.5"), resume="a/checkpoints/step_00000001")
    assert contents(tmp_path) == before


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', [1, 2]),
        ('{"step": 1}\n{"step": 2}', [1, 2]),  # an editor left the line end out
        ('{"step": 1}\n{"step": 3}', [1]),
        ('{"step": 1}\n{"st', [1]),  # a kill cut it off
        ("", []),
    ],
)
def test_the_log_is_cut_at_the_step(tmp_path, text, kept):
    (tmp_path / "log.jsonl").write_text(text)
    cut_log(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in kept)


@pytest.mark.parametrize("line", ["notes", "[1]", "{}", '{"step": null}', "3"])
def test_a_log_of_something_else_is_left_alone(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: .* is no record of a run; accepted: "):
        cut_log(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == text
