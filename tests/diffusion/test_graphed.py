"""The whole sampler step as a graph, on a stand-in for the device: the bits of the eager run, and one launch a step."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from support import capturable_attention, fake_device
from support.fake_device import FakeDriver
from support.small import GRID, small_dc_dit, small_dit

from dcdit.diffusion import SamplerGraphs, parse_drop_schedule, sample
from dcdit.diffusion.graphed import WORTHWHILE
from dcdit.graphs import CaptureError
from dcdit.models import KeptShare
from dcdit.sample import ModelCalls

POSITIONS = GRID[0] * GRID[1]
LABELS = torch.tensor([3, 1, 4])
CASES: dict[str, dict[str, Any]] = {
    "ddpm": {"budget": 12},
    "ddim with noise": {"method": "ddim", "eta": 0.7, "budget": 12},
    "ddim": {"method": "ddim", "budget": 12, "clip": True},
    "euler": {"method": "euler", "budget": 12},
    "heun": {"method": "heun", "budget": 12, "cfg_scale": 1.5, "cfg_interval": (0.3, 0.8)},
    "capacity": {"capacity": 120, "drop_fraction": 0.2},
    "capacity that overflows": {"capacity": 60},
    "guidance": {"capacity": 400, "cfg_scale": 2.0},
    "Lite-CFG at some times": {
        "capacity": 400, "cfg_scale": 2.0, "cfg_interval": (0.2, 0.7), "drop_fraction": (0.1, 0.8)
    },
    "a schedule": {"capacity": 400, "drop_fraction": parse_drop_schedule("linear:0.6:0.1"), "cfg_scale": 3.0},
    "a planned capacity": {
        "capacity": "auto", "cfg_scale": 2.0, "cfg_interval": (0.2, 0.7), "drop_fraction": (0.4, 0.8)
    },
    "each image its own": {"capacity": 400, "drop_fraction": (torch.tensor([0.0, 0.5, 0.2]), 0.9), "cfg_scale": 2.0},
}  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    capturable_attention.install(monkeypatch, POSITIONS)
    return fake_device.install(monkeypatch)


def draw(model: Any, labels: torch.Tensor = LABELS, num_steps: int = 5, **options: Any) -> torch.Tensor:
    return sample(model, labels, num_steps, **{"method": "ddpm", "progress": False, **options})


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_graphs_give_the_bits_of_the_eager_run(fake: FakeDriver, options: dict[str, Any]) -> None:
    """And tell that they lost the same tokens to a capacity that is too small, none to the others."""
    model = small_dc_dit()
    model.kept_share = KeptShare(0.6, 0.05, 0.8, 100)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        expected = draw(model, seed=5, first_index=7, graph=False, **options)
        assert fake.calls == []
        assert torch.equal(draw(model, seed=5, first_index=7, graph=True, **options), expected)
    assert sum(graph.replays for graph in fake.graphs) == 5
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == (2 if options.get("capacity") == 60 else 0) and len(set(messages)) <= 1


def test_a_static_model(fake: FakeDriver) -> None:
    model = small_dit()
    options = {"cfg_scale": 1.5, "cfg_interval": (0.0, 0.5)}
    assert torch.equal(draw(model, graph=True, **options), draw(model, graph=False, **options))
    assert [graph.replays for graph in fake.graphs] == [2, 3]


def test_graphs_are_used_again_for_other_labels_seeds_and_schedules(fake: FakeDriver) -> None:
    model, graphs = small_dc_dit(), SamplerGraphs()
    calls: list[dict[str, Any]] = [
        {"seed": 1, "drop_fraction": parse_drop_schedule("linear:0.6:0.1")},
        {"seed": 2**63 + 5, "drop_fraction": parse_drop_schedule("steps:0.6,0.5=0.3")},
        {"first_index": 2**40, "labels": LABELS.flip(0), "drop_fraction": torch.tensor([0.1, 0.2, 0.3])},
    ]
    for options in calls:
        options = {"capacity": 400, "cfg_scale": 2.0, "cfg_interval": (0.3, 1.0), **options}
        assert torch.equal(draw(model, graph=graphs, **options), draw(model, graph=False, **options))
    assert len(fake.graphs) == 2, "one with both branches of guidance, one without"
    assert fake.calls.count("new_pool") == 1
    draw(model, LABELS[:2], graph=graphs, capacity=400)
    assert fake.calls.count("new_pool") == 1 and len(fake.graphs) == 3


def test_a_step_is_one_launch(fake: FakeDriver) -> None:
    """Everything else happens before the first step or after the last."""
    model, graphs = small_dc_dit(), SamplerGraphs()
    draw(model, graph=graphs, budget=9, cfg_scale=2.0)
    fake.calls.clear()
    with fake.operators():
        draw(model, graph=graphs, budget=9, cfg_scale=2.0)
    first = fake.calls.index("replay 0")
    steps = fake.calls[first : len(fake.calls) - fake.calls[::-1].index("replay 0")]
    assert steps == ["replay 0"] * 5


def test_what_the_calls_kept_is_recorded(fake: FakeDriver) -> None:
    model = small_dc_dit()
    options = {"capacity": 400, "cfg_scale": 2.0, "cfg_interval": (0.2, 0.7), "drop_fraction": (0.1, 0.8)}
    eager, graphed = (ModelCalls(model, len(LABELS), maps=2) for _ in range(2))
    draw(eager, graph=False, **options)
    draw(graphed, graph=True, **options)
    assert graphed.records() == eager.records()
    assert len({record["kept"] for record in eager.records()}) > 1, "the calls differ"
    for mine, theirs in zip(graphed.maps(1), eager.maps(1), strict=True):
        assert mine.t == theirs.t and torch.equal(mine.prob, theirs.prob) and torch.equal(mine.mask, theirs.mask)


def test_steps_outlive_the_next_one(fake: FakeDriver) -> None:
    model = small_dc_dit()
    eager, graphed = [], []
    draw(model, budget=9, graph=False, callback=eager.append)
    out = draw(model, budget=9, graph=True, callback=graphed.append)
    for mine, theirs in zip(graphed, eager, strict=True):
        assert (mine.number, mine.t) == (theirs.number, theirs.t)
        assert torch.equal(mine.x, theirs.x) and torch.equal(mine.x0, theirs.x0)
    assert torch.equal(out, eager[-1].x)


def test_images_do_not_depend_on_the_batch(fake: FakeDriver) -> None:
    """Nor on the order in which batches are drawn, or on graphs."""
    model, graphs = small_dc_dit(), SamplerGraphs()
    labels = torch.tensor([0, 1, 2, 3, 4])
    together = draw(model, labels, budget=12, seed=3, graph=False)
    for start in (3, 0, 1, 4, 2):
        alone = draw(model, labels[start : start + 1], budget=12, seed=3, first_index=start, graph=graphs)
        torch.testing.assert_close(alone, together[start : start + 1], rtol=1e-4, atol=1e-4)


def test_labels_of_the_caller_stay(fake: FakeDriver) -> None:
    """Also without a null class, where nothing else is made of them."""
    model, graphs = small_dc_dit(class_dropout_prob=0.0, depth=1), SamplerGraphs()
    labels = torch.arange(6)
    for batch in labels.split(2):
        draw(model, batch, 2, budget=9, graph=graphs)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_graphs_are_used_again_under_the_same_autocast_only(fake: FakeDriver) -> None:
    model, graphs = small_dc_dit(depth=1), SamplerGraphs()
    plain = draw(model, num_steps=2, budget=9, graph=False)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            half = draw(model, num_steps=2, budget=9, graph=False)
            assert not torch.equal(half, plain)
            assert torch.equal(draw(model, num_steps=2, budget=9, graph=graphs), half)
        assert torch.equal(draw(model, num_steps=2, budget=9, graph=graphs), plain)
    assert len(fake.graphs) == 2
    drawn = []
    for mode in (True, False, True):  # in inference mode the tensors of a graph are of another kind
        with torch.inference_mode(mode):
            drawn.append(draw(model, LABELS.clone(), 2, budget=9, graph=graphs))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], plain)


def test_who_observes_is_a_part_of_the_work(fake: FakeDriver) -> None:
    """The graph of a bare model has nothing to tell to an observer of it."""

    class Observer:
        def __init__(self, model: Any) -> None:
            self.model, self.config, self.seen = model, model.config, []

        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, budget: int) -> torch.Tensor:
            return self.model(x, t, y, budget=budget)

        def observe(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, budget: int) -> Any:
            return self(x, t, y, budget), {"t": t}

        def record(self, seen: Any) -> None:
            self.seen.append(float(seen["t"][0]))

    model, graphs = small_dc_dit(depth=1), SamplerGraphs()
    observer = Observer(model)
    for caller in (model, observer):
        draw(caller, num_steps=2, budget=9, graph=graphs)
    assert observer.seen == [999, 0]


# --- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "options", "used"),
    [
        (WORTHWHILE, {"budget": 9}, True),
        (WORTHWHILE - 1, {"budget": 9}, False),
        (WORTHWHILE, {"capacity": 200}, True),
        (WORTHWHILE, {}, False),
        (WORTHWHILE, {"drop_fraction": 0.5}, False),
    ],
)
def test_by_default_where_it_is_safe_and_pays(
    fake: FakeDriver, steps: int, options: dict[str, Any], used: bool
) -> None:
    model = small_dc_dit(depth=1)
    out = draw(model, LABELS[:1], steps, method="euler", **options)
    assert bool(fake.graphs) == used
    assert torch.equal(out, draw(model, LABELS[:1], steps, method="euler", graph=False, **options))


def test_a_function_is_no_module(fake: FakeDriver) -> None:
    def model(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    draw(model, num_steps=WORTHWHILE, shape=(1, 2, 2))
    assert fake.graphs == []
    with pytest.raises(ValueError, match="function is no module, so nobody knows what it does"):
        draw(model, shape=(1, 2, 2), graph=True)


def test_a_training_model_is_evaluated_and_put_back(fake: FakeDriver) -> None:
    model = small_dc_dit().train()
    assert torch.equal(draw(model, budget=9, graph=True), draw(model.eval(), budget=9, graph=False))


def test_a_cpu_has_no_graphs() -> None:
    model = small_dc_dit(depth=1)
    with pytest.raises(ValueError, match=r"^the model is on cpu; CUDA graphs need a CUDA device$"):
        draw(model, budget=9, graph=True)
    assert draw(model, LABELS[:1], WORTHWHILE, method="euler", budget=9).isfinite().all()


def test_exact_mode_names_what_is_accepted(fake: FakeDriver) -> None:
    with pytest.raises(ValueError, match="accepted: a budget or a capacity, or an ExactGraphedDenoiser"):
        draw(small_dc_dit(), drop_fraction=0.3, graph=True)


# --- what is kept and what is refused ---------------------------------------------------------------------------------


def test_changed_weights_are_an_error(fake: FakeDriver) -> None:
    model, graphs = small_dc_dit(), SamplerGraphs()
    draw(model, budget=9, graph=graphs)
    with torch.no_grad():
        model.blocks[0].proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"blocks.0.proj.weight was replaced or changed"):
        draw(model, budget=9, graph=graphs)


def test_models_live_as_long_as_their_graphs(fake: FakeDriver) -> None:
    model, graphs = small_dc_dit(), SamplerGraphs(limit=2)
    alive = weakref.ref(model)
    draw(model, budget=9, graph=graphs)
    del model
    gc.collect()
    assert alive() is not None
    other = small_dc_dit()
    for budget in (9, 10):  # the limit drops the first
        draw(other, budget=budget, graph=graphs)
    fake.graphs.clear()
    gc.collect()
    assert alive() is None
    with pytest.raises(ValueError, match="limit is 0; accepted: at least 1"):
        SamplerGraphs(limit=0)


@pytest.mark.parametrize("point", ["capture_begin", "capture_end", "aten"])
def test_a_failed_capture(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """By default the run goes on without graphs and draws the same images; else the failure is named."""
    model = small_dc_dit(depth=1)
    if point == "aten":
        forward = model.decoder.forward
        monkeypatch.setattr(
            model.decoder, "forward", lambda x, *rest: forward(x * x.detach().isfinite().any().item(), *rest)
        )
    fake.fail_at.add(point)
    options: dict[str, Any] = {"budget": 9, "method": "euler"}
    expected = draw(model, num_steps=WORTHWHILE, graph=False, **options)
    with pytest.warns(UserWarning, match="sampling goes on without CUDA graphs: a step of euler cannot be captured"):
        out = draw(model, num_steps=WORTHWHILE, **options)
    assert torch.equal(out, expected)
    with pytest.raises(CaptureError, match="a step of euler cannot be captured") as caught:
        draw(model, graph=True, **options)
    assert caught.value.__cause__ is not None
    assert fake.open_pools == [] and len(fake.streams) == 1
