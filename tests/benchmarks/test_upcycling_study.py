"""The configurations of the study, and its page from logs with known numbers."""

import dataclasses

import pytest
import torch

from benchmarks.studies import upcycling
from benchmarks.studies.upcycling import (
    DIRECTION,
    DISTILLED,
    LAST,
    OFFICIAL,
    PLAIN,
    SCRATCH,
    SHORT,
    WEAK,
    configs,
    source_config,
    write_page,
)
from dcdit.models import create_model
from dcdit.models.dc_dit import BlockStates
from dcdit.ops import select_from_mask
from dcdit.train.distill import Teacher, block_outputs


def log(*losses, distill=()):
    steps = range(10, 10 * len(losses) + 1, 10)
    records = []
    for nth, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        training = {"step": step, "loss": 1.0, "flops": 1000 * step}
        if nth < len(distill):
            training["distill_loss"] = distill[nth]
        records += [training, {"step": step, "val_loss": loss, "val_loss_ema": loss + 5}]
    return records


def test_runs_differ_in_nothing_but_their_weights(tmp_path):
    runs = configs(tmp_path, tmp_path / "runs", 20, 6, seed=3)
    assert list(runs) == [SCRATCH, PLAIN, DISTILLED, WEAK, SHORT, OFFICIAL, LAST, DIRECTION]
    assert len({run.run.out for run in runs.values()}) == 8
    plain = dataclasses.asdict(runs[SCRATCH])
    for kind, run in runs.items():
        other = dataclasses.asdict(run)
        assert other["model"]["overrides"].pop("adapt_conditioning", False) is (kind != SCRATCH)
        assert other["model"]["overrides"].pop("start", None) == ("official" if kind == OFFICIAL else None)
        for section in ("data", "diffusion", "optim", "router", "model"):
            assert other[section] == plain[section], section
    assert runs[DISTILLED].upcycle.source == source_config(tmp_path, tmp_path / "runs", 9).run.out
    warm_ups = [(run.upcycle.distill_steps, run.upcycle.distill_weight) for run in list(runs.values())[1:]]
    assert warm_ups == [(0, 1.0), (6, 1.0), (6, 0.1), (2, 1.0), (0, 1.0), (6, 1.0), (6, 1.0)]


def test_other_targets_ask_for_less():
    dit = create_model("DiT-S/2", in_channels=3, grid=(8, 8), hidden_size=16, depth=2, num_heads=2, num_classes=4)
    for weights in dit.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    teacher, x, cond = Teacher(dit), torch.randn(2, 3, 8, 8), torch.randn(2, 16)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, ::2, ::2] = True  # a token for each patch, so the two sets correspond
    sel = select_from_mask(mask.flatten(1))
    equal = [tokens.flatten(0, 1) for tokens in block_outputs(dit, x, cond)]
    losses = {None: teacher.loss, LAST: upcycling.last_block, DIRECTION: upcycling.directions}

    def loss(target, outputs):
        arguments = (x, BlockStates(cond, outputs), sel)
        return float(teacher.loss(*arguments) if target is None else losses[target](teacher, *arguments))

    assert [loss(target, equal) for target in losses] == pytest.approx([0, 0, 0], abs=1e-6)
    first_wrong = [torch.zeros_like(equal[0]), equal[1]]
    assert [loss(target, first_wrong) for target in losses] == pytest.approx([0.5, 0, 0.5], abs=1e-5)
    longer = [2 * tokens for tokens in equal]
    assert [loss(target, longer) for target in losses] == pytest.approx([1, 1, 0], abs=1e-5)


def test_page(tmp_path):
    curves = {
        SCRATCH: {0: log(0.5, 0.4, 0.3), 1: log(0.5, 0.4, 0.2)},
        PLAIN: {0: log(0.4, 0.3, 0.2), 1: log(0.4, 0.35, 0.3)},
        DISTILLED: {0: log(0.3, 0.2, 0.1, distill=[0.9]), 1: log(0.2, 0.15, 0.1, distill=[0.8])},
    }
    conditions = {"source_steps": 3, "distill_steps": 10, "images": 4}
    text = write_page(log(0.6, 0.25), curves, conditions, tmp_path).read_text()
    assert "| 20   | 0.4000 (0.4000, 0.4000) | 0.3250 (0.3000, 0.3500) | 0.1750 (0.2000, 0.1500) |" in text
    assert f"{PLAIN}: reaches the last loss of the run from scratch with its seed by step 20, not at all." in text
    assert f"{DISTILLED}: reaches the last loss of the run from scratch with its seed by step 10, by step 10." in text
    assert "| 10   | 5.5000 (5.5000, 5.5000) |" in text and "validation loss 0.2500" in text
    assert (tmp_path / "losses.png").stat().st_size > 10_000 and (tmp_path / "study.json").is_file()
