"""A forward pass as a graph, on a stand-in for the device: equal results, and what the graph forbids."""

import gc
import weakref

import pytest
import torch
from support import capturable_attention, fake_device
from support.fake_device import FakeDriver
from support.small import GRID, batch, small_dc_dit, small_dit, small_sparse_dit

from dcdit.graphs import CaptureError, ExactGraphedDenoiser, GraphedDenoiser, graph_obstacle
from dcdit.models import DCDiT

POSITIONS = GRID[0] * GRID[1]
IMAGES = 3


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    capturable_attention.install(monkeypatch, POSITIONS)
    return fake_device.install(monkeypatch)


def inputs(model: DCDiT, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, t, y = batch(model.config, IMAGES)
    return x + 0.3 * seed, (t + 100 * seed) % 1000, (y + seed) % 10


@pytest.mark.parametrize("options", [{"budget": 20}, {"capacity": 110}, {"capacity": 200}], ids=str)
@torch.no_grad()
def test_the_graph_gives_the_bits_of_the_model(fake: FakeDriver, options: dict[str, int]) -> None:
    model = small_dc_dit()
    graphed = GraphedDenoiser(model, IMAGES, **options)
    assert int(graphed.overflow) == 0
    kept, dropped = set(), 0
    for seed in range(4):
        rho = {} if "budget" in options else {"drop_fraction": torch.tensor([0.1, 0.0, 0.3]) * seed}
        args = inputs(model, seed)
        expected, routing = model(*args, **options, **rho, return_routing=True)
        kept.add(tuple(routing.mask.flatten().tolist()))
        dropped += int(routing.selection.overflow)
        out = graphed(*args, **rho)
        assert torch.equal(out, expected)
        assert int(graphed.overflow) == dropped
    assert len(kept) == 4 and len(fake.graphs) == 1 and fake.graphs[0].replays == 4


@pytest.mark.parametrize(
    "make",
    [small_dit, small_sparse_dit, lambda: small_sparse_dit(router="predictability")],
    ids=["DiT", "SparseDiT", "routed"],
)
@torch.no_grad()
def test_a_static_model(fake: FakeDriver, make) -> None:
    model = make()
    graphed = GraphedDenoiser(model, IMAGES)
    for seed in range(2):
        args = inputs(model, seed)
        assert torch.equal(graphed(*args), model(*args))
    with pytest.raises(ValueError, match="takes no drop_fraction: it was captured of a static model"):
        graphed(*args, 0.5)


@torch.no_grad()
def test_the_graph_keeps_its_model_alive(fake: FakeDriver) -> None:
    model = small_dc_dit()
    args = inputs(model, 1)
    expected, alive = model(*args, budget=9), weakref.ref(model)
    graphed = GraphedDenoiser(model, IMAGES, budget=9)
    del model
    gc.collect()
    assert alive() is not None
    assert torch.equal(graphed(*args), expected)


def replaced_weight(model: DCDiT) -> None:
    model.blocks[1].fc1.weight = torch.nn.Parameter(model.blocks[1].fc1.weight.clone())


def moved_weight(model: DCDiT) -> None:
    model.blocks[1].fc1.weight.data = model.blocks[1].fc1.weight.data.clone()


def changed_weight(model: DCDiT) -> None:
    with torch.no_grad():
        model.blocks[1].fc1.weight.mul_(2)


def replaced_module(model: DCDiT) -> None:
    model.blocks[1].fc1 = torch.nn.Linear(128, 512)


def replaced_buffer(model: DCDiT) -> None:
    model.pos_embed = model.pos_embed.clone()


CHANGES = {
    replaced_weight: "blocks.1.fc1.weight",
    moved_weight: "blocks.1.fc1.weight",
    changed_weight: "blocks.1.fc1.weight",
    replaced_module: "blocks.1.fc1",
    replaced_buffer: "pos_embed",
    DCDiT.train: "the model is in training mode",
}


@pytest.mark.parametrize("make", [lambda m: GraphedDenoiser(m, IMAGES, budget=9), ExactGraphedDenoiser])
@pytest.mark.parametrize(("change", "message"), CHANGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_changed_model_is_named(fake: FakeDriver, make, change, message: str) -> None:
    model = small_dc_dit()
    graphed = make(model)
    graphed(*inputs(model, 0))
    change(model)
    with pytest.raises(ValueError, match=message):
        graphed(*inputs(model, 1))


def test_a_failed_capture_is_named_and_the_model_still_runs(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dc_dit()
    forward = model.decoder.forward

    def waits(*args: torch.Tensor) -> torch.Tensor:
        return forward(*args) * (1 if float(args[0].detach().sum()) < 1e30 else 0)

    model.decoder.forward = waits
    with pytest.raises(CaptureError, match="a forward pass of 3 images cannot be captured: RuntimeError"):
        GraphedDenoiser(model, IMAGES, budget=9)
    assert fake.open_pools == [] and fake.streams[-1].name == "default"
    assert model(*inputs(model, 0), budget=9).isfinite().all()


def test_graphs_share_a_pool(fake: FakeDriver) -> None:
    model = small_dc_dit()
    first = GraphedDenoiser(model, IMAGES, budget=9)
    second = GraphedDenoiser(model, IMAGES, budget=30, pool=first.pool)
    assert first.pool == second.pool
    args = inputs(model, 0)
    expected = [model(*args, budget=k) for k in (9, 30, 9)]
    assert all(torch.equal(graph(*args), out) for graph, out in zip((first, second, first), expected, strict=True))


@pytest.mark.parametrize("make", [lambda m: GraphedDenoiser(m, IMAGES, capacity=150), ExactGraphedDenoiser])
def test_inputs_that_the_model_refuses_are_not_spread(fake: FakeDriver, make) -> None:
    """A copy into the memory of a graph would repeat or round them."""
    model = small_dc_dit()
    x, t, y = inputs(model, 0)
    graphed = make(model)
    calls = {
        r"x has shape \(3, 1, 8, 12\)": (x[:, :1], t, y),
        r"x has shape \(3, 4, 1, 1\)": (x[:, :, :1, :1], t, y),
        r"t has shape \(1\)": (x, t[:1], y),
        r"y has shape \(1\)": (x, t, y[:1]),
        "y has dtype torch.float32": (x, t, y + 0.5),
        "drop_fraction is 1.5": (x, t, y, 1.5),
        "drop_fraction is -0.5": (x, t, y, -0.5),
        r"drop_fraction has shape \(1\)": (x, t, y, torch.tensor([0.5])),
    }
    for message, args in calls.items():
        with pytest.raises(ValueError, match=message):
            graphed(*args)
        with pytest.raises(ValueError, match=message):
            model(*args)


@torch.no_grad()
def test_autocast_is_that_of_the_capture(fake: FakeDriver) -> None:
    model = small_dc_dit()
    args = inputs(model, 0)
    fixed, exact, plain = GraphedDenoiser(model, IMAGES, budget=9), ExactGraphedDenoiser(model), model(*args)
    exact(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(*args), model(*args))
        with pytest.raises(ValueError, match=r"autocast is to torch\.bfloat16, and was to None when"):
            fixed(*args)
        under = GraphedDenoiser(model, IMAGES, budget=9)
        assert torch.equal(under(*args), model(*args, budget=9))
    assert torch.equal(exact(*args), plain)
    with pytest.raises(ValueError, match=r"autocast is to None, and was to torch\.bfloat16"):
        under(*args)


@pytest.mark.parametrize("make", [lambda m: GraphedDenoiser(m, IMAGES, budget=POSITIONS), ExactGraphedDenoiser])
def test_graphs_of_inference_mode_serve_outside_of_it(fake: FakeDriver, make) -> None:
    model = small_dc_dit()
    model.router.out.bias.data.fill_(9.0)
    args = inputs(model, 0)
    with torch.inference_mode():
        graphed = make(model)
        first = graphed(*args)
    assert torch.equal(graphed(*args), first)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_bad_calls_are_named(fake: FakeDriver) -> None:
    model = small_dc_dit()
    x, t, y = inputs(model, 0)
    graphed = GraphedDenoiser(model, IMAGES, budget=9)
    with pytest.raises(ValueError, match="x holds 2 images; this graph was captured for 3"):
        graphed(x[:2], t[:2], y[:2])
    with pytest.raises(ValueError, match="this graph takes no drop_fraction: it was captured with budget=9"):
        graphed(x, t, y, 0.5)
    with pytest.raises(ValueError, match="budget is 9 and capacity is 50; accepted: one of them"):
        GraphedDenoiser(model, IMAGES, 9, 50)
    with pytest.raises(ValueError, match="max_graphs is 0; accepted: at least 1"):
        ExactGraphedDenoiser(model, 0)
    with pytest.raises(ValueError, match="x holds 0 images; accepted: at least 1"):
        ExactGraphedDenoiser(model)(x[:0], t[:0], y[:0])
    with pytest.raises(ValueError, match="batch is 0; accepted: at least 1"):
        GraphedDenoiser(model, 0, 9)
    with pytest.raises(ValueError, match="capacity=50 is for a DC-DiT; accepted for a DiT: none"):
        GraphedDenoiser(small_dit(), IMAGES, capacity=50)


def with_hook() -> DCDiT:
    model = small_dc_dit()
    model.blocks[0].register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: small_dc_dit().train(), {"budget": 9}, "the model is in training mode"),
        (with_hook, {"budget": 9}, "a module has hooks"),
        (small_dc_dit, {}, "the number of kept tokens changes; accepted: a budget or a capacity"),
        (lambda: torch.compile(small_dc_dit(), backend="eager"), {"budget": 9}, "the model is compiled as a whole"),
        (lambda: small_dc_dit, {"budget": 9}, "function is no module"),
        (lambda: small_sparse_dit(noisy_grid=(2, 2)), {}, "the number of its sparse tokens follows the timestep"),
        (small_dit, {}, None),
        (small_dc_dit, {"budget": 9}, None),
        (small_dc_dit, {"capacity": 99}, None),
    ],
)
def test_obstacles(fake: FakeDriver, make, options: dict[str, int], message: str | None) -> None:
    obstacle = graph_obstacle(make(), **options)
    assert obstacle is None if message is None else obstacle is not None and message in obstacle


def test_checks_of_values_are_an_obstacle(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCDIT_CHECK", "1")
    assert "DCDIT_CHECK=1" in str(graph_obstacle(small_dc_dit(), budget=9))


def test_a_cpu_is_an_obstacle() -> None:
    """The rule itself, without the stand-in."""
    assert graph_obstacle(small_dit()) == "the model is on cpu; CUDA graphs need a CUDA device"
    for make in (lambda m: GraphedDenoiser(m, 1, budget=4), ExactGraphedDenoiser):
        with pytest.raises(ValueError, match="the model is on cpu; CUDA graphs need a CUDA device"):
            make(small_dc_dit())


def test_a_bound_on_the_length_of_an_image_reaches_the_model(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    given, forward = [], DCDiT.forward

    def recorded(self: DCDiT, *args: torch.Tensor, **options: object) -> object:
        given.append((options["capacity"], options["max_seqlen"]))
        return forward(self, *args, **options)

    monkeypatch.setattr(DCDiT, "forward", recorded)
    GraphedDenoiser(small_dc_dit(), 3, capacity=110, max_seqlen=40)
    assert set(given) == {(110, 40)}
