"""The configurations of the study, and its page from logs with known numbers."""

import dataclasses

from benchmarks.studies.upcycling import (
    DISTILLED,
    OFFICIAL,
    PLAIN,
    SCRATCH,
    SHORT,
    WEAK,
    configs,
    source_config,
    write_page,
)


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
    assert list(runs) == [SCRATCH, PLAIN, DISTILLED, WEAK, SHORT, OFFICIAL]
    assert len({run.run.out for run in runs.values()}) == 6
    plain = dataclasses.asdict(runs[SCRATCH])
    for kind, run in runs.items():
        other = dataclasses.asdict(run)
        assert other["model"]["overrides"].pop("adapt_conditioning", False) is (kind != SCRATCH)
        assert other["model"]["overrides"].pop("start", None) == ("official" if kind == OFFICIAL else None)
        for section in ("data", "diffusion", "optim", "router", "model"):
            assert other[section] == plain[section], section
    assert runs[DISTILLED].upcycle.source == source_config(tmp_path, tmp_path / "runs", 9).run.out
    warm_ups = [(run.upcycle.distill_steps, run.upcycle.distill_weight) for run in list(runs.values())[1:]]
    assert warm_ups == [(0, 1.0), (6, 1.0), (6, 0.1), (2, 1.0), (0, 1.0)]


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
