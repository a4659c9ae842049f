"""The regression guard: work that is counted, not timed. One pass over memory, launch or read more fails here."""

import json

import pytest
import torch
from support.counted import CASES, DEPTH, MODES, PATH

from benchmarks.harness.counting import count_work
from dcdit.profiling.workloads import WORKLOADS

KEPT = json.loads(PATH.read_text())


@pytest.mark.parametrize("name", CASES)
def test_work_does_not_grow(name: str) -> None:
    """Launches and reads exactly; operators, bytes and FLOPs at most (another PyTorch may fuse more)."""
    now, kept = CASES[name](), KEPT[name]
    hint = f"{name}: if this was meant, run PYTHONPATH=.:tests python -m support.counted"
    assert now["launches"] == kept["launches"], hint
    assert now["reads"] == kept["reads"], hint
    for counted in ("operators", "bytes", "flops"):
        assert now.get(counted, 0) <= kept.get(counted, 0), f"{counted} of {hint}"


def test_every_count_is_kept() -> None:
    assert KEPT.keys() == CASES.keys()


@pytest.mark.parametrize("mode", MODES)
def test_one_read_in_exact_mode_and_none_elsewhere(mode: str) -> None:
    assert KEPT[f"model, {mode}"]["reads"] == (1 if mode in ("exact", "drop") else 0)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith("select_")])
def test_no_operation_but_the_selection_reads(name: str) -> None:
    assert all(counts["reads"] == 0 for case, counts in KEPT.items() if case.startswith(f"{name}, "))


def test_a_block_costs_two_modulation_launches() -> None:
    """The last addition of a block joins the norm of the next: two launches for each block, and the last two."""
    assert KEPT["model, budget"]["launches"]["_modulation_fwd_kernel"] == 2 * DEPTH + 2


def test_an_added_pass_and_an_added_read_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard itself: a copy and a read added to the gather are seen."""
    from dcdit.ops._triton import packing

    before = CASES["gather_tokens, forward"]()
    launcher = packing.kernels.gather_fwd

    def wasteful(*args: torch.Tensor) -> torch.Tensor:
        out = launcher(*args).clone()
        _ = out.sum().item()
        return out

    monkeypatch.setattr(packing.kernels, "gather_fwd", wasteful)
    after = CASES["gather_tokens, forward"]()
    assert after["reads"] == before["reads"] + 1
    assert after["operators"] > before["operators"]
    assert after["bytes"] > before["bytes"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.arange(3).repeat_interleave(x.long().abs()),
        lambda x: x.cpu(),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_reads_are_seen(read) -> None:
    with count_work() as work:
        read(torch.tensor([1.0, -2.0, 3.0]))
    assert work.reads == 1


def test_views_and_allocations_are_free() -> None:
    x = torch.zeros(4, 6)
    with count_work() as work:
        torch.empty(100)
        _ = x.view(-1)[2:].unsqueeze(0).expand(3, -1)
    assert (work.bytes, work.operators.total(), work.reads) == (0, 0, 0)


def test_bytes_and_peak_of_a_sum() -> None:
    x = torch.zeros(1000)
    with count_work() as work:
        y = x + 1
        del y
        y = x + 1
    assert work.bytes == 2 * 8000
    assert work.peak_bytes == 4000
    assert y.numel() == 1000
