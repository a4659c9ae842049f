"""Checkpoints: nothing is lost, nothing half-written is ever seen, and every damaged file says so in one line."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.killing import dies_before

from dcdit import checkpoint as ckpt
from dcdit.models import create_model, load_official, presets, to_dit, to_official
from dcdit.utils.files import recover

TINY = {"hidden_size": 128, "depth": 1, "num_heads": 2, "grid": (8, 8), "num_classes": 3}
GOLDEN = "tests/support/dc_dit_tiny.npz"


def tiny(name="DC-DiT-S", seed=0, **overrides):
    torch.manual_seed(seed)
    model = create_model(name, **{**TINY, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def optimizer_of(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype, name


@pytest.fixture
def saved(tmp_path):
    model = tiny()
    optimizer = optimizer_of(model)
    ema = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    folder = ckpt.save_checkpoint(tmp_path / "run/checkpoints/step_00000002", model, ema, optimizer, {"step": 2})
    return folder, model, ema, optimizer


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DC-DiT-S", "DiT-S/2"])
def test_model_round_trip(tmp_path, name):
    model = tiny(name).eval()
    ckpt.save_model(tmp_path / "a.safetensors", model)
    loaded = ckpt.load_model(tmp_path / "a.safetensors")
    assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
    assert_same(loaded.state_dict(), model.state_dict())
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_a_model_says_what_trained_it(tmp_path):
    """Through files and back, and of a file of the reference implementation, which predicts noise."""
    model = tiny()
    ckpt.save_model(tmp_path / "a.safetensors", model)
    assert ckpt.load_model(tmp_path / "a.safetensors").objective is None
    model.objective = "flow"
    for _ in range(2):
        ckpt.save_model(tmp_path / "a.safetensors", model)
        model = ckpt.load_model(tmp_path / "a.safetensors")
        assert model.objective == "flow" == ckpt.read_metadata(tmp_path / "a.safetensors")["objective"]
    assert load_official(to_official(tiny()), num_heads=2).objective == "dit"


def test_dtype_is_kept(tmp_path):
    ckpt.save_model(tmp_path / "a.safetensors", tiny().bfloat16())
    assert ckpt.load_model(tmp_path / "a.safetensors").x_embedder.weight.dtype == torch.bfloat16


def test_configuration_is_in_the_metadata(saved):
    folder, model, *_ = saved
    for file in (ckpt.MODEL_FILE, ckpt.EMA_FILE):
        with safe_open(folder / file, framework="pt") as opened:
            metadata = opened.metadata()
        assert metadata["architecture"] == "DCDiT"
        assert json.loads(metadata["config"]) == model.config.to_dict()


def test_checkpoint_round_trip(saved):
    folder, model, ema, optimizer = saved
    loaded = ckpt.load_checkpoint(folder)
    assert (loaded.path, loaded.architecture, loaded.trainer) == (folder, "DCDiT", {"step": 2})
    assert loaded.config == model.config.to_dict()
    assert_same(loaded.model, model.state_dict())
    assert_same(loaded.ema, ema)
    other = tiny(seed=1)
    restored = torch.optim.AdamW(other.parameters(), lr=1e-3)
    ckpt.load_optimizer(other, restored, loaded.optimizer, folder)
    before, after = optimizer.state_dict()["state"], restored.state_dict()["state"]
    assert before.keys() == after.keys() and len(before) == len(list(model.parameters()))
    for index in before:
        assert_same(before[index], after[index])


def test_optimizer_without_state(tmp_path):
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    loaded = ckpt.load_checkpoint(ckpt.save_checkpoint(tmp_path / "c", model, model.state_dict(), optimizer, {}))
    ckpt.load_optimizer(model, optimizer, loaded.optimizer, "c")
    assert optimizer.state_dict()["state"] == {}


def test_load_model_takes_run_folder_or_file(saved):
    folder, model, ema, _ = saved
    run = folder.parents[1]
    assert_same(ckpt.load_model(run).state_dict(), ema)
    assert_same(ckpt.load_model(folder).state_dict(), ema)
    assert_same(ckpt.load_model(folder, ema=False).state_dict(), model.state_dict())
    assert_same(ckpt.load_model(folder / ckpt.MODEL_FILE).state_dict(), model.state_dict())


def test_newest_is_found_and_old_ones_go(saved):
    folder, model, ema, optimizer = saved
    run = folder.parents[1]
    for step in (10, 9):
        ckpt.save_checkpoint(ckpt.checkpoint_path(run, step), model, ema, optimizer, {"step": step})
    assert ckpt.read_trainer(run) == {"step": 10}
    ckpt.keep_newest(ckpt.checkpoint_path(run, 10), None)
    assert len(ckpt.list_checkpoints(run)) == 3
    ckpt.keep_newest(ckpt.checkpoint_path(run, 10), 2)
    assert [path.name for path in ckpt.list_checkpoints(run)] == ["step_00000009", "step_00000010"]


def test_later_checkpoints_do_not_crowd_out_the_newest(saved):
    """A run that was resumed from step 2 and has just saved step 3; step 10 is of its abandoned future."""
    folder, model, ema, optimizer = saved
    run = folder.parents[1]
    for step in (10, 3):
        ckpt.save_checkpoint(ckpt.checkpoint_path(run, step), model, ema, optimizer, {"step": step})
    ckpt.keep_newest(ckpt.checkpoint_path(run, 3), 1)
    assert [path.name for path in ckpt.list_checkpoints(run)] == ["step_00000003", "step_00000010"]


# --- all or nothing -----------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    folder, model, ema, optimizer = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr("dcdit.checkpoint.run.optimizer_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_save_replaces(saved):
    folder, model, ema, optimizer = saved
    ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    assert ckpt.read_trainer(folder) == {"step": 3}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "next"])
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path, step):
    model = tiny("DiT-S/2", hidden_size=32, num_heads=1)
    optimizer = torch.optim.AdamW(model.parameters())
    before, after = ({name: tensor + n for name, tensor in model.state_dict().items()} for n in (1, 2))
    old, new = (ckpt.checkpoint_path("run", n) for n in (2, step))

    def replace():
        ckpt.save_checkpoint(tmp_path / new, model, after, optimizer, {"ema": "after"})
        ckpt.keep_newest(tmp_path / new, 1)

    found = []
    for number in itertools.count():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ckpt.save_checkpoint(tmp_path / old, model, before, optimizer, {"ema": "before"})
        if not dies_before(number, replace):
            break
        checkpoint = ckpt.load_checkpoint(tmp_path / "run")
        assert ckpt.load_checkpoint(checkpoint.path).trainer == checkpoint.trainer
        found.append(checkpoint.trainer["ema"])
        assert_same(checkpoint.ema, {"before": before, "after": after}[found[-1]])
        assert_same(ckpt.load_model(tmp_path / "run").state_dict(), checkpoint.ema)
        recover(old_parent := (tmp_path / old).parent)
        assert ckpt.read_trainer(tmp_path / "run") == checkpoint.trainer
        listed = ckpt.list_checkpoints(tmp_path / "run")
        assert sorted(path.name for path in old_parent.iterdir()) == [path.name for path in listed]
        for path in listed:
            ckpt.load_checkpoint(path)
    # Once the new one is there, it stays.
    assert found == sorted(found, key=("before", "after").index) and {*found} == {"before", "after"}


# --- what is not a checkpoint -----------------------------------------------------------------------------------------


def spoil(folder, how):
    """Make of a checkpoint a folder that must not be replaced or deleted."""
    if how == "notes":
        (folder / "notes.txt").write_text("mine")
    elif how == "folder":
        (folder / "samples").mkdir()
    elif how == "foreign weights":
        save_file({"a": torch.zeros(1)}, folder / ckpt.MODEL_FILE, {"format": "pt"})
    elif how == "text":
        (folder / ckpt.EMA_FILE).write_text("months of work")
    elif how == "link":
        (folder / ckpt.EMA_FILE).unlink()
        (folder / ckpt.EMA_FILE).symlink_to(folder / ckpt.MODEL_FILE)
    else:
        for file in (ckpt.MODEL_FILE, ckpt.EMA_FILE, ckpt.OPTIMIZER_FILE):
            (folder / file).unlink()


SPOILS = ["notes", "folder", "foreign weights", "text", "link", "no weights"]


@pytest.mark.parametrize("how", SPOILS)
def test_what_is_no_checkpoint_is_neither_replaced_nor_deleted(saved, how):
    folder, model, ema, optimizer = saved
    spoil(folder, how)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with one_line(ValueError, "step_00000002 is no checkpoint of dcdit; accepted: a checkpoint, or "):
        ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    newest = ckpt.save_checkpoint(folder.with_name("step_00000003"), model, ema, optimizer, {"step": 3})
    ckpt.keep_newest(newest, 1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in sorted(folder.parent.iterdir())] == [folder.name, newest.name]


@pytest.mark.parametrize("size", [0, 300, -1])
def test_a_damaged_checkpoint_is_still_a_checkpoint(saved, size):
    """With nothing in a file, or with its header whole."""
    folder, model, ema, optimizer = saved
    file = folder / ckpt.MODEL_FILE
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[: header if size == 300 else size])
    (folder / ckpt.OPTIMIZER_FILE).unlink()
    assert ckpt.is_checkpoint(folder)
    ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    assert ckpt.read_trainer(folder) == {"step": 3} and ckpt.load_checkpoint(folder)


def test_a_linked_checkpoint_is_saved_through_and_never_deleted(saved, tmp_path):
    folder, model, ema, optimizer = saved
    elsewhere = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(elsewhere)
    ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    assert folder.is_symlink() and ckpt.read_trainer(elsewhere) == {"step": 3}
    newest = ckpt.save_checkpoint(folder.with_name("step_00000003"), model, ema, optimizer, {"step": 3})
    ckpt.keep_newest(newest, 1)
    recover(folder.parent)
    assert folder.is_symlink() and ckpt.load_checkpoint(elsewhere)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run"]


def test_a_folder_is_never_replaced_by_a_model(saved):
    folder, model, *_ = saved
    for path in (folder, folder.parent, folder.parents[1]):
        with one_line(ValueError, "is a folder; accepted: the name of a file"):
            ckpt.save_model(path, model)
    assert ckpt.load_checkpoint(folder)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    ckpt.save_model(tmp_path / "a.safetensors", tiny())
    before = (tmp_path / "a.safetensors").read_bytes()
    monkeypatch.setattr("dcdit.utils.tensors.save_file", full)
    with one_line(OSError, "a.safetensors cannot be written: .*No space left"):
        ckpt.save_model(tmp_path / "a.safetensors", tiny(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_the_run_of_a_path(saved, tmp_path, monkeypatch):
    folder, *_ = saved
    run = folder.parents[1]
    shutil.copytree(folder, tmp_path / "alone")
    (tmp_path / "link").symlink_to(folder)
    assert ckpt.run_folder(run) == ckpt.run_folder(folder) == run
    assert ckpt.run_folder(tmp_path / "link") == run.resolve()
    monkeypatch.chdir(run / "checkpoints")
    assert ckpt.run_folder(folder.name) == run
    with one_line(ValueError, "alone is in no run"):
        ckpt.run_folder(tmp_path / "alone")
    with one_line(FileNotFoundError, "no checkpoint in"):
        ckpt.run_folder(tmp_path)


# --- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.nan, torch.inf, -torch.inf], ids=str)
def poison(request):
    """Makes one number of a set of tensors not finite, in a copy."""

    def poison(tensors):
        name = list(tensors)[len(tensors) // 2]
        changed = tensors[name].clone()
        changed.view(-1)[-1] = request.param
        return {**tensors, name: changed}

    return poison


def test_weights_that_are_not_finite_are_not_saved(saved, tmp_path, poison):
    """Not over others, and not as new files."""
    folder, model, ema, optimizer = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with one_line(
        FloatingPointError, r"weights for \S*model\.safetensors are not written, because '\S+' is not finite$"
    ):
        ckpt.save_model(folder / ckpt.MODEL_FILE, model, poison(model.state_dict()))
    for path in (folder, tmp_path / "new"):
        with one_line(FloatingPointError, rf"the averaged weights for {path} are not written"):
            ckpt.save_checkpoint(path, model, poison(ema), optimizer, {"step": 3})
    optimizer.state[model.x_embedder.weight]["exp_avg"][0] = torch.nan
    with one_line(FloatingPointError, rf"the moments for {folder} are not written, because 'x_embedder\.weight/"):
        ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    model.load_state_dict(poison(model.state_dict()))
    with one_line(FloatingPointError, rf"the weights for {folder} are not written"):
        ckpt.save_checkpoint(folder, model, ema, optimizer, {"step": 3})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("file", [ckpt.EMA_FILE, ckpt.MODEL_FILE])
def test_a_model_that_is_not_finite_is_not_loaded(saved, file, poison):
    rewrite(saved[0] / file, change=poison)
    with one_line(ValueError, rf"{file} holds numbers that are not finite, in '\S+' for one"):
        ckpt.load_model(saved[0], ema=file == ckpt.EMA_FILE)


def test_a_foreign_model_that_is_not_finite_is_not_loaded(tmp_path, official, poison):
    torch.save(poison(official), tmp_path / "a.pt")
    with one_line(ValueError, r"a\.pt holds numbers that are not finite"):
        ckpt.load_model(tmp_path / "a.pt")
    save_file(poison(to_dit(tiny("DiT-S/2"))), tmp_path / "dit.safetensors")
    with one_line(ValueError, r"dit\.safetensors holds numbers that are not finite"):
        ckpt.load_static_dit(tmp_path / "dit.safetensors", num_heads=2)


@pytest.mark.parametrize("file", [ckpt.MODEL_FILE, ckpt.EMA_FILE, ckpt.OPTIMIZER_FILE])
def test_a_run_resumes_from_the_last_finite_checkpoint(saved, file, poison):
    """Another release saved two that are not finite, and a third was damaged since."""
    folder, model, ema, optimizer = saved
    later = [ckpt.save_checkpoint(folder.with_name(f"step_0000000{n}"), model, ema, optimizer, {}) for n in (4, 6, 8)]
    for newer in later[::2]:
        rewrite(newer / file, change=poison)
    (later[1] / ckpt.TRAINER_FILE).write_text("{")
    with one_line(ValueError, rf"step_00000008/{file} holds numbers that are not finite.*: --resume {folder}$"):
        ckpt.load_checkpoint(folder.parents[1])


def test_finite_checkpoints_are_not_deleted_for_others(saved, poison):
    folder, model, ema, optimizer = saved
    run = folder.parents[1]
    later = [ckpt.save_checkpoint(ckpt.checkpoint_path(run, n), model, ema, optimizer, {}) for n in (4, 6, 8)]
    rewrite(later[1] / ckpt.MODEL_FILE, change=poison)
    (later[2] / ckpt.EMA_FILE).write_bytes(b"")
    for count, first in ((3, 2), (2, 2), (1, 4)):
        ckpt.keep_newest(later[2], count)
        assert [path.name[-1] for path in ckpt.list_checkpoints(run)] == [f"{n}" for n in range(first, 10, 2)]


# --- damaged or foreign files ---------------------------------------------------------------------------------------


def one_line(kind, match):
    return pytest.raises(kind, match=rf"^[^\n]*{match}[^\n]*$")


def test_nothing_there(tmp_path):
    with one_line(FileNotFoundError, "nothing at"):
        ckpt.load_model(tmp_path / "a.safetensors")
    with one_line(FileNotFoundError, "no file"):
        ckpt.load_model(tmp_path / "a.pt")
    with one_line(FileNotFoundError, "no checkpoint in"):
        ckpt.load_model(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated(saved, keep):
    file = saved[0] / ckpt.EMA_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with one_line(ValueError, r"ema\.safetensors is damaged or no safetensors file"):
        ckpt.load_model(saved[0])


def test_not_safetensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"hello, this is some text and no tensors at all" * 10)
    with one_line(ValueError, "is damaged or no safetensors file"):
        ckpt.load_model(tmp_path / "a.safetensors")


def test_missing_configuration(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with one_line(ValueError, "has no dcdit configuration in its metadata; accepted"):
        ckpt.load_model(tmp_path / "a.safetensors")


def rewrite(path, architecture=None, config=None, change=lambda state: state):
    """The file again, with something about it changed."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = {**json.loads(metadata.get("config", "{}")), **(config or {})}
    if "config" in metadata:
        metadata |= {"architecture": architecture or metadata["architecture"], "config": json.dumps(stored)}
    save_file(change(state), path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "UNet"}, "holds a 'UNet'; accepted: DCDiT, DiT"),
        ({"architecture": "DiT"}, "unknown key '(router|dechunk.*)' in DiTConfig"),
        ({"config": {"num_heads": 3}}, "configuration that is not accepted: num_heads is 3"),
        ({"config": {"depth": 2}}, r"lacks weight 'blocks\.1\."),
        ({"config": {"mlp_ratio": 2.0}}, r"blocks\.0\.fc1\.weight has shape \[512.*, the model's is \[256"),
        ({"change": lambda state: {**state, "extra": torch.zeros(1)}}, "has the unknown weight 'extra'"),
    ],
)
def test_another_architecture(saved, changes, message):
    rewrite(saved[0] / ckpt.EMA_FILE, **changes)
    with one_line(ValueError, rf"ema\.safetensors.*{message}"):
        ckpt.load_model(saved[0])


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_trainer(saved, text):
    (saved[0] / ckpt.TRAINER_FILE).write_text(text)
    with one_line(ValueError, r"trainer\.json is damaged"):
        ckpt.load_checkpoint(saved[0])


@pytest.mark.parametrize("file", [ckpt.MODEL_FILE, ckpt.OPTIMIZER_FILE, ckpt.TRAINER_FILE])
def test_the_checkpoint_before_a_damaged_one_is_named(saved, file):
    folder, model, ema, optimizer = saved
    newest = ckpt.save_checkpoint(folder.with_name("step_00000010"), model, ema, optimizer, {"step": 10})
    (newest / file).write_bytes((newest / file).read_bytes()[:5])
    with one_line(ValueError, rf"step_00000010/{file} is damaged.*: --resume \S*/step_00000002$"):
        ckpt.load_checkpoint(folder.parents[1])
    ckpt.load_checkpoint(folder)


@pytest.mark.parametrize("file", [ckpt.EMA_FILE, ckpt.OPTIMIZER_FILE, ckpt.TRAINER_FILE])
def test_incomplete_checkpoint(saved, file):
    (saved[0] / file).unlink()
    with one_line(FileNotFoundError, f"no file .*{file}"):
        ckpt.load_checkpoint(saved[0])


def test_optimizer_of_another_model(saved):
    other = tiny("DiT-S/2")
    with one_line(ValueError, "optimiser state for the unknown parameter"):
        ckpt.load_optimizer(other, torch.optim.AdamW(other.parameters()), ckpt.load_checkpoint(saved[0]).optimizer, "x")


@pytest.mark.parametrize("entry", ["step", "exp_avg", "exp_avg_sq"])
def test_optimizer_with_an_incomplete_parameter(saved, entry):
    model, tensors = saved[1], ckpt.load_checkpoint(saved[0]).optimizer
    name = next(iter(dict(model.named_parameters())))
    del tensors[f"{name}/{entry}"]
    new = torch.optim.AdamW(model.parameters())
    with one_line(ValueError, rf"x lacks {name}/{entry}; accepted: all of exp_avg, exp_avg_sq, step, or none"):
        ckpt.load_optimizer(model, new, tensors, "x")
    assert not new.state
    ckpt.load_optimizer(model, new, {k: v for k, v in tensors.items() if not k.startswith(f"{name}/")}, "x")
    assert model.get_parameter(name) not in new.state


# --- the reference implementation's state dicts ---------------------------------------------------------------------


@pytest.fixture
def official(monkeypatch):
    """The golden model's state dict; its width is made known as if it were a preset."""
    monkeypatch.setitem(presets.SCALES, "tiny", {"depth": 2, "hidden_size": 128, "num_heads": 2})
    with np.load(GOLDEN) as golden:
        return {
            name.removeprefix("state/"): torch.from_numpy(golden[name]) for name in golden if name.startswith("state/")
        }


def test_official_state_dict(tmp_path, official):
    for wrapped in (official, {"ema": official, "model": {"pos_embed": official["pos_embed"]}}):
        torch.save(wrapped, tmp_path / "a.pt")
        assert_same(to_official(ckpt.load_model(tmp_path / "a.pt")), official)


def test_official_of_unknown_width(tmp_path, official):
    torch.save({**official, "pos_embed": torch.zeros(1, 256, 64)}, tmp_path / "a.pt")
    with one_line(ValueError, "has width 64; accepted: 384, 768, 1024, 1152"):
        ckpt.load_model(tmp_path / "a.pt")


class Settings:
    """Stands for the configuration object that the reference implementation pickles into its checkpoints."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": {}, "config": Settings()}, "would call .*Settings; accepted: tensors and plain values"),
        ({"a": torch.zeros(1)}, "has no 'pos_embed'"),
        ({}, "holds no state dict"),
        ([1], "holds no state dict"),
    ],
)
def test_foreign_pickle(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with one_line(ValueError, message):
        ckpt.load_model(tmp_path / "a.pt")


def test_damaged_pickle(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"nothing to see here")
    with one_line(ValueError, "a.pt cannot be read as a file of torch.save: it is damaged"):
        ckpt.load_model(tmp_path / "a.pt")
