from contextlib import contextmanager

import torch

from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig
from dcdit.nn import STAGES, collect_stages, stage

SMALL = {"grid": (4, 4), "hidden_size": 128, "depth": 1, "num_heads": 2, "num_classes": 3}
INPUTS = torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)


class Collector:
    def __init__(self) -> None:
        self.entered: list[str] = []
        self.open = 0

    @contextmanager
    def __call__(self, name: str):
        assert self.open == 0, f"{name} is nested in another stage"
        self.entered.append(name)
        self.open += 1
        yield
        self.open -= 1


def test_dynamic_model_passes_every_stage_in_order() -> None:
    """What transformer and de-chunk need beside the kept tokens is started while their number is read."""
    collector = Collector()
    with collect_stages(collector):
        DCDiT(DCDiTConfig(**SMALL))(*INPUTS)
    select = STAGES.index("select") + 1
    assert tuple(collector.entered) == (*STAGES[:select], "transformer", "dechunk", *STAGES[select:])


def test_static_model() -> None:
    collector = Collector()
    with collect_stages(collector):
        DiT(DiTConfig(**SMALL))(*INPUTS)
    assert collector.entered == ["embed", "transformer", "final"]


def test_nothing_is_collected_outside() -> None:
    outer, inner = Collector(), Collector()
    with collect_stages(outer):
        with collect_stages(inner), stage("embed"):
            pass
        with stage("final"):
            pass
    with stage("router"):
        pass
    assert (outer.entered, inner.entered) == (["final"], ["embed"])


def test_compiled_code_ignores_the_collector() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        with stage("embed"):
            return x * 2

    collector = Collector()
    with collect_stages(collector):
        compiled = torch.compile(doubled, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert collector.entered == []
