"""From labels to samples, with functions and with the real models."""

import builtins
import math

import pytest
import torch
from support.small import small_dc_dit

from dcdit.diffusion import METHODS, parse_drop_schedule, sample
from dcdit.diffusion.sampling import FITTING_METHODS
from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig, KeptShare
from dcdit.sample import ModelCalls

SHAPE = (2, 4, 4)


def toy(x, t, y):
    """An arbitrary smooth function of all three, independent across images."""
    shift = (t.to(x.dtype) / 1000 + 0.1 * y.to(x.dtype)).view(-1, 1, 1, 1)
    return torch.cat([torch.tanh(x) + shift, torch.sin(x)], 1)


def draw(model=toy, labels=(0, 1, 2, 3, 4), steps=5, method="ddpm", **options):
    options = {"shape": SHAPE, "progress": False, **options}
    return sample(model, torch.tensor(labels), steps, method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_samples_depend_on_seed_and_index_only(method):
    options = {"method": method, "cfg_scale": 2.0, "null_class": 9}
    if method == "ddim":
        options["eta"] = 0.5
    together = draw(**options)
    assert together.shape == (5, *SHAPE) and together.dtype == torch.float32 and together.isfinite().all()
    parts = [draw(labels=(0, 1), **options), draw(labels=(2, 3, 4), first_index=2, **options)]
    torch.testing.assert_close(torch.cat(parts), together, rtol=1e-5, atol=1e-6)
    assert torch.equal(together, draw(**options))
    assert not torch.allclose(together, draw(seed=1, **options))
    same_label = draw(labels=(0, 0), **options)
    assert not torch.allclose(same_label[0], same_label[1])


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draw()
    assert torch.equal(before, torch.random.get_rng_state())


def test_initial_noise_is_standard_normal():
    seen = []

    def model(x, t, y):
        seen.append(x)
        return torch.zeros(len(x), 4, 4, 4)

    draw(model, labels=[0] * 2000, steps=1, method="euler")
    x = seen[0]
    assert abs(x.mean().item()) < 5 / math.sqrt(x.numel())
    assert abs(x.var().item() - 1) < 5 * math.sqrt(2 / x.numel())
    # No correlation between neighbouring images, although their seeds are consecutive.
    correlation = (x[:-1] * x[1:]).mean().item()
    assert abs(correlation) < 5 / math.sqrt(x[1:].numel())


def test_euler_approaches_heun():
    """Euler approaches the flow that Heun has already reached."""

    def velocity(x, t, y):
        return torch.sin(x)

    fine = draw(velocity, method="heun", steps=200)
    assert (draw(velocity, method="euler", steps=400) - fine).abs().max() < 5e-3
    assert (draw(velocity, method="euler", steps=5) - fine).abs().max() > 1e-2


def test_callback_and_number_of_steps():
    steps = []
    final = draw(method="ddim", steps="ddim20", callback=steps.append)
    assert [step.number for step in steps] == list(range(20))
    assert [step.t for step in steps] == list(range(0, 1000, 50))[::-1]
    assert torch.equal(steps[-1].x, final) and steps[0].x0.shape == final.shape


def test_progress_bar(capsys):
    draw(progress=True)
    assert "sampling: 100%" in capsys.readouterr().err
    draw(progress=False)
    assert capsys.readouterr().err == ""


def test_no_tqdm_no_bar(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert draw(progress=True).shape == (5, *SHAPE)
    assert capsys.readouterr().err == ""


def test_nothing_to_draw():
    assert sample(toy, torch.zeros(0, dtype=torch.int64), 2, shape=SHAPE, progress=False).shape == (0, *SHAPE)


# --- the real models ------------------------------------------------------------------------------------------------


def dynamic(**overrides):
    torch.manual_seed(0)
    model = DCDiT(
        DCDiTConfig(
            grid=(8, 8), hidden_size=128, depth=2, num_heads=2, num_classes=5, class_dropout_prob=0.1, **overrides
        )
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def static(**overrides):
    torch.manual_seed(0)
    return DiT(DiTConfig(grid=(8, 8), patch_size=2, hidden_size=64, depth=1, num_heads=2, num_classes=5, **overrides))


def test_a_dynamic_model_samples_with_lite_cfg_and_budgets():
    model = dynamic().train()
    kept = []
    modes = set()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: kept.append(len(inputs[0])))
    model.y_embedder.register_forward_hook(lambda module, inputs, output: modes.add(module.training))
    labels = torch.tensor([0, 4])
    out = sample(model, labels, 2, cfg_scale=1.5, drop_fraction=(0.0, 0.9), progress=False)
    assert out.shape == (2, 4, 8, 8) and out.isfinite().all()
    assert modes == {False} and model.training, "evaluated, and the mode put back"
    plain = sample(model, labels, 2, cfg_scale=1.5, progress=False)
    assert not torch.equal(out, plain)
    assert sum(kept[:2]) < sum(kept[2:])
    kept.clear()
    sample(model, labels, 2, budget=6, progress=False)
    assert kept == [12, 12]


def test_each_image_can_have_its_own_budget():
    """One batch of requests: each image is what it would be in a batch of its own."""
    model = dynamic().eval()
    each, labels = torch.tensor([0.0, 0.5, 0.8]), torch.tensor([0, 1, 2])
    options = {"num_steps": 3, "cfg_scale": 1.5, "progress": False}
    together = sample(model, labels, drop_fraction=(each, 0.9), **options)
    for i, rho in enumerate(each.tolist()):
        alone = sample(model, labels[i : i + 1], drop_fraction=(rho, 0.9), first_index=i, **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_batches_of_a_dynamic_model_agree():
    model = dynamic().eval()
    options = {"num_steps": 3, "cfg_scale": 1.5, "drop_fraction": lambda time: 0.5 * time, "progress": False}
    labels = torch.tensor([0, 1, 2])
    together = sample(model, labels, **options)
    apart = [sample(model, labels[i : i + 1], first_index=i, **options) for i in range(3)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-3, atol=1e-3)


def test_a_static_model_samples_but_takes_no_drop():
    model = static()
    assert sample(model, torch.tensor([0, 4]), 2, "euler", cfg_scale=2.0, progress=False).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"drop_fraction is 0\.5 but DiT takes none"):
        sample(model, torch.tensor([0]), 2, drop_fraction=0.5)


def test_a_model_without_null_class_cannot_be_guided():
    with pytest.raises(ValueError, match="no null class"):
        sample(static(class_dropout_prob=0.0), torch.tensor([0]), 2, cfg_scale=2.0)


@pytest.mark.parametrize(("objective", "fitting"), FITTING_METHODS.items())
def test_a_method_fits_the_objective_that_trained_the_model(objective, fitting):
    """Whatever wraps the model. A model that does not say what trained it takes every method."""
    model = static()
    for method in METHODS:
        model.objective = objective
        wrapped = model, torch.compile(model, backend="eager"), torch.nn.DataParallel(model), ModelCalls(model, 1)
        for each in wrapped if method not in fitting else ():
            message = f"trained with the objective '{objective}', which the method '{method}' does not fit; accepted: "
            with pytest.raises(ValueError, match=message + ", ".join(fitting)):
                sample(each, torch.tensor([0]), 2, method)
        model.objective = objective if method in fitting else None
        sample(model, torch.tensor([0]), 1, method, progress=False)


def test_dtypes():
    labels = torch.tensor([0])
    half = sample(static().bfloat16(), labels, 2, progress=False)
    assert half.dtype == torch.float32
    assert sample(static().double(), labels, 2, progress=False).dtype == torch.float64


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dpm"}, "unknown method 'dpm'; accepted: ddpm, ddim, euler, heun"),
        ({"steps": 1001}, "num_steps is 1001"),
        ({"method": "euler", "steps": 0}, "num_steps is 0; accepted for euler"),
        ({"method": "heun", "steps": "ddim50"}, "num_steps is 'ddim50'; accepted for heun"),
        ({"eta": 0.5}, "eta is 0.5, but ddpm has none"),
        ({"method": "ddim", "eta": 1.5}, "eta is 1.5"),
        ({"method": "euler", "clip": True}, "clip is for ddpm and ddim"),
        ({"labels": [[0, 1]]}, "labels have shape"),
        ({"labels": [0.5]}, "labels have shape"),
        ({"shape": None}, "toy has no config"),
        ({"cfg_scale": 3.0}, "no null class"),
        ({"drop_fraction": 0.5}, "drop_fraction is 0.5 but toy takes none"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        draw(**options)


# --- capacities -----------------------------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """A dynamic model that notes what its calls are given and lose."""

    def __init__(self):
        super().__init__()
        self.inner, self.config, self.calls = small_dc_dit(), small_dc_dit().config, []
        self.inner.kept_share = KeptShare(0.5, 0.05, 0.6, 100)

    def forward(self, x, t, y, drop_fraction=0.0, capacity=None, max_seqlen=None, return_routing=False):
        out, routing = self.inner(x, t, y, drop_fraction, capacity=capacity, max_seqlen=max_seqlen, return_routing=True)
        self.calls.append((len(x), capacity, max_seqlen, int(routing.selection.overflow)))
        return (out, routing) if return_routing else out

    def plan_capacity(self, batch, drop_fraction):
        return self.inner.plan_capacity(batch, drop_fraction)


def test_tokens_lost_to_a_capacity_are_told_once():
    model = Counting()
    with pytest.warns(UserWarning, match="was too small") as warned:
        draw(model, shape=None, capacity=50, method="heun", cfg_scale=2.0)
    (warning,) = warned
    lost = sum(call[-1] for call in model.calls)
    assert len(model.calls) == 10 and lost > 0
    told = f"capacity=50 was too small: {lost} tokens, those of the lowest p, were dropped in 5 steps"
    assert str(warning.message) == told and warning.filename == __file__


def test_a_planned_capacity_fits_the_branches_and_the_times():
    """Each image at the fraction that it drops least, of the calls with as many branches."""
    model, drop = Counting(), parse_drop_schedule("linear:0.8:0.2")
    options = {"cfg_scale": 2.0, "cfg_interval": (0.3, 1.0), "drop_fraction": (drop, 0.9), "capacity": "auto"}
    draw(model, labels=(0, 1), shape=None, steps=10, method="euler", **options)
    one, both = (model.inner.plan_capacity(len(rhos), rhos) for rhos in ([0.2 + 0.6 * 0.1] * 2, [0.38] * 2 + [0.9] * 2))
    assert {call[:3] for call in model.calls} == {(2, *one[:2]), (4, *both[:2])}
    assert one.capacity != both.capacity and both.capacity < 2 * 96


def test_a_planned_capacity_needs_a_model_that_plans():
    def model(x, t, y, capacity=None):
        return toy(x, t, y)

    with pytest.raises(ValueError, match="capacity is 'auto' but model plans none; accepted: a number, or a DCDiT"):
        draw(model, capacity="auto")
    with pytest.raises(ValueError, match=r"capacity is 'auto' but model\.kept_share is None"):
        draw(small_dc_dit(), shape=None, capacity="auto")
    draw(model, capacity=9)  # nobody can say what this one loses
