"""Drawing with sampling options: batches, guidance, a trace of the first image, and plans."""

import pytest
import torch
from support import capturable_attention, fake_device
from support.fake_device import FakeDriver
from support.small import small_dc_dit, small_dit

from dcdit.checkpoint import save_model
from dcdit.diffusion import sample
from dcdit.sample import Guidance, ModelCalls, measure_costs, measure_kept_share
from dcdit.sample.drawing import class_labels, draw, load_for_sampling
from dcdit.sample.options import CostTarget, SamplingOptions
from dcdit.sample.plan import make_plans
from dcdit.utils.images import to_pixels

LABELS = torch.tensor([1, 2, 0, 3, 1])
OPTIONS = SamplingOptions(
    checkpoint="run", method="ddim", steps=3, cfg_scale=2.0, cfg_interval=(0.2, 0.9), null_drop_fraction=0.8, seed=4
)


def test_a_recorded_model_in_training_is_evaluated():
    """What records its calls, or measures them, is no module. In training, labels would be dropped."""
    model = small_dc_dit(class_dropout_prob=0.9, depth=1)
    options = {"num_steps": 2, "method": "euler", "progress": False}
    expected = sample(model, LABELS, **options)
    share = measure_kept_share(model, LABELS, 2, "euler", progress=False)
    costs, _ = measure_costs(model, LABELS, 2, "euler", Guidance(), progress=False)
    model.train()
    assert torch.equal(sample(ModelCalls(model, 5), LABELS, **options), expected)
    assert measure_kept_share(model, LABELS, 2, "euler", progress=False) == share
    assert measure_costs(model, LABELS, 2, "euler", Guidance(), progress=False)[0] == costs
    assert model.training and model.y_embedder.training


@pytest.mark.parametrize("batch_size", [5, 2])
def test_draw_is_sample_in_batches(batch_size):
    """In each batch, the images are those that ``sample`` gives with the same numbers and options."""
    model = small_dc_dit(grid=(8, 8))
    options = SamplingOptions(**{**vars(OPTIONS), "batch_size": batch_size})
    drawn = draw(model, options, LABELS, 0.3, first_index=7, progress=False)
    expected = [
        sample(
            model, labels, 3, "ddim", cfg_scale=2.0, cfg_interval=(0.2, 0.9), drop_fraction=(0.3, 0.8), seed=4,
            first_index=7 + i * batch_size, progress=False,
        )
        for i, labels in enumerate(LABELS.split(batch_size))
    ]  # fmt: skip
    assert torch.equal(drawn.x, torch.cat(expected))
    assert len(drawn.calls) == 3 and drawn.traced == []


def test_a_trace_follows_the_first_images():
    """Also where they lie in several batches."""
    model = small_dc_dit(grid=(8, 8))
    options = SamplingOptions(**{**vars(OPTIONS), "batch_size": 2})
    drawn = draw(model, options, LABELS, 0.3, trace=3, progress=False)
    assert len(drawn.traced) == 3
    for number, traced in enumerate(drawn.traced):
        assert [seen.t for seen in traced.maps] == list(traced.expected)
        label = LABELS[number : number + 1]
        (alone,) = draw(model, options, label, 0.3, first_index=number, trace=1, progress=False).traced
        for seen, other in zip(traced.maps, alone.maps, strict=True):
            torch.testing.assert_close(seen.prob, other.prob, rtol=1e-3, atol=1e-4)
        *_, last = traced.expected.values()
        torch.testing.assert_close(last, drawn.x[number])  # ddim ends on the clean data that it expects


@pytest.mark.parametrize("make", [small_dc_dit, small_dit])
def test_images_that_are_not_finite_are_not_handed_on(make):
    model = make(grid=(8, 8))
    torch.nn.init.constant_(model.final_layer.linear.bias, torch.inf)
    options = SamplingOptions("run", "ddim", steps=1)
    with pytest.raises(FloatingPointError, match=r"^run draws numbers that are not finite in fp32$"):
        draw(model, options, LABELS, None, progress=False)
    with pytest.raises(FloatingPointError, match="an image holds numbers that are not finite"):
        to_pixels(torch.full((1, 3, 2, 2), torch.nan))


def test_a_file_of_several_dtypes_is_drawn_from_in_one(tmp_path):
    model = small_dc_dit(grid=(8, 8))
    model.x_embedder.half()
    model.router.double()
    save_model(tmp_path / "a.safetensors", model)
    options = SamplingOptions(str(tmp_path / "a.safetensors"), "ddim", steps=2)
    loaded = load_for_sampling(options.checkpoint, torch.device("cpu")).model
    expected = draw(model.float(), options, LABELS, 0.3, progress=False)
    torch.testing.assert_close(draw(loaded, options, LABELS, 0.3, progress=False).x, expected.x)


def test_labels():
    assert class_labels(20, None, 1, None).tolist() == list(range(16))
    assert class_labels(3, None, 2, None).tolist() == [0, 0, 1, 1, 2, 2]
    assert class_labels(3, [2, 0], 1, 5).tolist() == [2, 0, 2, 0, 2]
    with pytest.raises(ValueError, match="label 3; accepted: 0 to 2"):
        class_labels(3, [1, 3], 1, None)


def test_plans():
    dynamic, static = small_dc_dit(grid=(8, 8)), small_dit(grid=(8, 8))

    def plans(model, **changes):
        return [(plan.name, plan.summary) for plan in make_plans(SamplingOptions("run", "ddim", **changes), model)]

    assert plans(dynamic) == [("drop_0", {"drop_fraction": 0.0})]
    assert plans(dynamic, drop_fractions=(0.0, 0.25)) == [
        ("drop_0", {"drop_fraction": 0.0}),
        ("drop_0.25", {"drop_fraction": 0.25}),
    ]
    assert plans(dynamic, budget=9) == plans(static) == [("samples", {"drop_fraction": None})]
    assert plans(dynamic, drop_schedules=("linear:0.6:0.1",)) == [
        ("schedule_linear_0.6_0.1", {"drop_schedule": "linear:0.6:0.1"})
    ]
    with pytest.raises(ValueError, match="a target needs labels"):
        plans(dynamic, target=CostTarget(1.0, "TFLOPs"))


# --- CUDA graphs, on a stand-in for the device ------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    capturable_attention.install(monkeypatch, 64)
    return fake_device.install(monkeypatch)


@pytest.mark.parametrize(
    ("make", "changes", "captured"),
    [
        (small_dc_dit, {"budget": 9, "null_drop_fraction": None}, 4),  # two batch sizes, with and without guidance
        (small_dit, {"null_drop_fraction": None}, 4),
        (small_dc_dit, {}, None),  # exact mode: one graph for each number of rows
    ],
)
def test_graphs_draw_the_same_images_and_records(fake: FakeDriver, make, changes, captured: int | None) -> None:
    model = make(grid=(8, 8))
    drop = 0.3 if captured is None else None
    options = {**vars(OPTIONS), "batch_size": 2, **changes}
    plain, graphed = (
        draw(model, SamplingOptions(**{**options, "graph": graph}), LABELS, drop, progress=False)
        for graph in (False, True)
    )
    assert torch.equal(graphed.x, plain.x) and graphed.calls == plain.calls
    assert fake.graphs and (captured is None or len(fake.graphs) == captured)


def test_without_a_gpu_graphs_are_refused_in_one_line() -> None:
    for make, budget in ((small_dc_dit, None), (small_dc_dit, 9), (small_dit, None)):
        options = SamplingOptions("run", "ddim", steps=1, budget=budget, graph=True)
        with pytest.raises(ValueError, match=r"^the model is on cpu; CUDA graphs need a CUDA device$"):
            draw(make(grid=(8, 8)), options, LABELS, None, progress=False)
