"""A pass over the tokens that creeps into a forward or a training step of XL fails here."""

import json

import pytest
import torch

from benchmarks import xl_work
from dcdit.diffusion import objectives
from dcdit.nn.dit_block import PackedDiTBlock

KEPT = json.loads(xl_work.PATH.read_text())


@pytest.mark.parametrize("name", xl_work.CASES)
def test_work_is_what_it_was(name: str) -> None:
    """Every launch, and the bytes to the nearest 10 kB: fake tensors are the same on every machine."""
    now = xl_work.CASES[name](xl_work.COUNTED_DEPTH)
    changed = "\n".join(xl_work.differences(now, KEPT[name]))
    assert not changed, f"{name}: if this was meant, run python -m benchmarks.xl_work --write\n{changed}"


def test_nothing_without_memory_is_left_behind() -> None:
    """The noise schedule is made once in a process."""
    objectives._schedule_on.cache_clear()
    xl_work.count_training_step("budget", 1)
    objective, x = objectives.create_objective("dit", learn_sigma=False), torch.ones(1, 1, 2, 2)
    assert objective.noise(x, torch.tensor([0]), x).x.sum().item() > 4


def test_an_added_pass_over_the_tokens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard itself: a copy of what the attention of a block returns."""
    attention = PackedDiTBlock.attention
    monkeypatch.setattr(PackedDiTBlock, "attention", lambda *args: attention(*args).sin())
    now = xl_work.count_forward("budget", xl_work.COUNTED_DEPTH)
    transformer, whole = xl_work.differences(now, KEPT["forward, budget"])
    assert transformer.startswith("transformer: launches ")
    assert transformer.endswith(f"(+{xl_work.COUNTED_DEPTH} sin)") and whole.endswith("sin)")
    megabytes = now["transformer"]["megabytes"] - KEPT["forward, budget"]["transformer"]["megabytes"]
    assert megabytes == pytest.approx(xl_work.COUNTED_DEPTH * 2 * 2 * xl_work.KEPT * 1152 / 1e6, abs=0.02)


def test_one_read_in_exact_mode_and_none_elsewhere() -> None:
    reads = {name: parts["whole"]["what"].get("read on the host", 0) for name, parts in KEPT.items()}
    assert {name for name, number in reads.items() if number} == {"forward, exact", "training step, exact"}
    assert max(reads.values()) == 1


def test_the_table_adds_up() -> None:
    counts = {name: KEPT[name] for name in ("forward, exact", "forward, static")}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in xl_work.table(counts).splitlines()[2:]]
    assert rows[-1][0] == "whole"
    for column in (1, 3):
        assert sum(int(row[column] or 0) for row in rows[:-1]) == int(rows[-1][column])
    assert torch.get_default_dtype() == torch.float32
