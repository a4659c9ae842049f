"""The soak itself: it finds nothing in a run that was killed, and finds what is wrong with one."""

import json
import shutil
from collections import Counter

import torch
from safetensors.torch import load_file, save_file

from dcdit import checkpoint as ckpt
from dcdit.config import override
from dcdit.train import train
from tools.soak import kills

SMALL = {"optim.steps": 3, "run.checkpoint_every": 1, "model.name": "DiT-S/2"}


def test_two_kills_find_nothing():
    settings = [("training", 1.0, kills.IN_TRAINING, SMALL), ("writing", 0.02, kills.IN_WRITING, SMALL, True)]
    found = kills.run(2, tuple(kills.Setting(*setting) for setting in settings))
    assert found.faults == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.page.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["training", "writing"] and rows[0][1] == rows[1][2] == "2"
    assert all(int(row[4]) >= 1 and row[5:] == ["0"] * 4 for row in rows)


def test_what_is_wrong_is_counted(tmp_path):
    config = {**kills.BASE, **SMALL, "data.kind": "photographs", "data.size": 8, "model.num_classes": 8}
    whole = tmp_path / "whole"
    train(override({}, {**config, "run.out": str(whole)}))

    def count(change):
        run, found = shutil.copytree(whole, tmp_path / "run"), Counter()
        change(run, ckpt.find_checkpoint(run))
        kills._compare(whole, run, found)
        shutil.rmtree(run)
        return {name: found[name] for name in kills.FAULTS if found[name]}

    def another_weight(run, saved):
        tensors = load_file(saved / ckpt.OPTIMIZER_FILE)
        name = min(name for name in tensors if tensors[name].numel() > 1)
        save_file({**tensors, name: tensors[name] + torch.eye(1)[0]}, saved / ckpt.OPTIMIZER_FILE, {"format": "dcdit"})

    def repeated_line(run, saved):
        lines = (run / "log.jsonl").read_text().splitlines()
        (run / "log.jsonl").write_text("\n".join([*lines, lines[-1]]))

    def another_loss(run, saved):
        lines = (run / "log.jsonl").read_text().splitlines()
        lines[0] = json.dumps({**json.loads(lines[0]), "loss": 0.5})
        (run / "log.jsonl").write_text("\n".join(lines))

    assert count(lambda run, saved: None) == {}
    assert count(another_weight) == {"tensors that differ": 1}
    assert count(repeated_line) == {"log lines that differ": 1} == count(another_loss)
    assert count(lambda run, saved: (saved.parent / ".tmpAbCd12").touch()) == {"files left over": 1}
