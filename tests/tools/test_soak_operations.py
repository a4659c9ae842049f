"""The soak of the operations: it sees a wrong number, a wrong dtype and a wrong error, and repeats a case."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import _torch
from tools.soak import operations
from tools.soak.random_calls import EVERY_DTYPE, MAKERS, Maker
from tools.soak.verdict import error_over_allowed

FIRST = range(12)
"""Cases of each operation that a test tries."""


def errors(operation: str, backend: str = "torch") -> list[float]:
    work = operations.Work(backend, operation, 0, FIRST.start, FIRST.stop)
    return [error_over_allowed(operations._call(work, case), backend) for case in FIRST]


@pytest.mark.parametrize("operation", MAKERS)
def test_finds_nothing_now(operation: str) -> None:
    assert max(errors(operation)) <= 1


def test_every_operation_has_a_maker() -> None:
    assert {name for name in ops.__all__ if name.islower()} - {"use_backend"} == MAKERS.keys()


def relative(x: Tensor) -> Tensor:
    """Wrong by a hundredth at one place."""
    wrong = torch.zeros(x.numel(), dtype=x.dtype)
    wrong[: 1 if x.numel() else 0] = 1e-2
    return x * (1 + wrong.view(x.shape))


FAULTS: dict[str, Callable[[Any], Any]] = {
    "a value": relative,
    "a dtype": lambda x: x.double() if x.dtype != torch.float64 else x.float(),
    "NaN": lambda x: x + torch.full_like(x, float("nan")),
    "a gradient": lambda x: x.detach() + (x - x.detach()) * 1.01,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    "operation", sorted(MAKERS.keys() - {"select_tokens", "select_from_mask", "varlen_attention", "philox_normal"})
)
def test_sees_a_fault(operation: str, fault: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(_torch, operation)

    def wrong(*args: Any) -> Any:
        made = real(*args)
        return (*made[:-1], fault(made[-1])) if isinstance(made, tuple) else fault(made)

    monkeypatch.setattr(_torch, operation, wrong)
    assert max(errors(operation)) > 1


def test_sees_a_wrong_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _torch.select_tokens
    monkeypatch.setattr(_torch, "select_tokens", lambda *args: real(*args)._replace(overflow=torch.tensor(7)))
    assert max(errors("select_tokens")) == float("inf")


def test_sees_an_error_that_the_definition_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise ValueError("no")

    monkeypatch.setattr(_torch, "ratio_loss", refuse)
    assert max(errors("ratio_loss")) == float("inf")


def test_a_case_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--operation", "gather_tokens", "--case", "3", "--seed", "5"]
    shown = []
    for _ in range(2):
        assert operations.main(options) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "error over allowed: " in shown[0]


def test_the_makers_reach_what_breaks_things() -> None:
    calls = [MAKERS["dechunk_ema"](Maker(str(seed), EVERY_DTYPE["torch"])) for seed in range(200)]
    h, _, sel, gate, residual = zip(*(call.args for call in calls), strict=True)
    assert any(x.numel() == 0 for x in h) and any(x.isnan().any() for x in h)
    assert any(not x.is_contiguous() for x in h)
    assert {x.dtype for x in h} == {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    assert any(r is not None and r.dtype != x.dtype for x, r in zip(h, residual, strict=True))
    assert any(s.source_cu_seqlens is not None for s in sel) and any(s.source_cu_seqlens is None for s in sel)
    assert any(s.lengths.numel() and s.lengths.min() == 0 for s in sel)
    assert None in gate and any(x is not None for x in gate)


def test_the_table_and_the_lines_of_wrong_cases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def found(work: operations.Work) -> operations.Found:
        wrong = (104, 109) if (work.operation, work.first) == ("ratio_loss", 100) else ()
        return operations.Found(work, wrong, 3.5 if wrong else 0.1)

    tried: list[operations.Work] = []

    def in_processes(works: list[operations.Work], _: int) -> Iterator[operations.Found]:
        tried.extend(works)
        return map(found, works)

    monkeypatch.setattr(operations, "_in_processes", in_processes)
    state = tmp_path / "state"
    operations.run({"torch": 100}, 1, 3, state)
    with state.open("a") as file:
        file.write('[["torch", "ratio_loss"')  # a killed run
    assert len(tried) == len(MAKERS)
    part = operations.run({"torch": 200}, 1, 3, state)
    assert len(tried) == 2 * len(MAKERS) and len(set(tried)) == len(tried)
    assert part.faults == 2
    row = next(line for line in part.page.splitlines() if "ratio_loss" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["ratio_loss", "torch", "200", "2", "3.50"]
    assert "--operation ratio_loss --backend torch --seed 3 --case 109" in capsys.readouterr().out
    assert operations.run({"torch": 200}, 1, 3, state) == part
    assert len(set(tried)) == len(tried)
