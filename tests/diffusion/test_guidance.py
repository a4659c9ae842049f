"""The algebra of guidance, what it costs, and what reaches the model."""

import pytest
import torch
from torch import nn

from dcdit.diffusion import guided

NULL = 10


class Recorder:
    """A model whose output is a known function of the label, and that remembers its calls."""

    def __init__(self, width=4, out=8):
        self.calls = []
        self.out = out

    def __call__(self, x, t, y, drop_fraction=0.0, budget=None):
        self.calls.append({"x": x, "t": t, "y": y, "drop_fraction": drop_fraction, "budget": budget})
        channel = torch.arange(self.out, dtype=x.dtype).view(1, -1, 1, 1)
        return x.mean(1, keepdim=True) + channel + 100.0 * y.view(-1, 1, 1, 1)


@pytest.fixture
def x():
    return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def y():
    return torch.tensor([1, 2, 3])


@pytest.mark.parametrize(("channels", "count"), [(3, 3), (1, 1), ("all", 4), (4, 4), (9, 4)])
def test_which_channels_are_guided(x, y, channels, count):
    out = guided(Recorder(), y, 2.5, NULL, channels)(x, 500)
    conditional, null = Recorder()(x, None, y), Recorder()(x, None, torch.full_like(y, NULL))
    torch.testing.assert_close(out[:, :count], null[:, :count] + 2.5 * (conditional - null)[:, :count])
    assert torch.equal(out[:, count:], conditional[:, count:])


def test_both_branches_are_one_forward(x, y):
    model = Recorder()
    guided(model, y, 4.0, NULL)(x, 500)
    (call,) = model.calls
    assert torch.equal(call["x"], torch.cat([x, x]))
    assert call["y"].tolist() == [1, 2, 3, NULL, NULL, NULL]
    assert call["t"].tolist() == [500] * 6 and call["t"].dtype == torch.int64


def test_flow_times_stay_fractions(x, y):
    model = Recorder()
    guided(model, y)(x, 125.5)
    assert model.calls[0]["t"].tolist() == [125.5] * 3


@pytest.mark.parametrize("null_class", [None, NULL])
def test_scale_one_pays_for_one_branch(x, y, null_class):
    model = Recorder()
    out = guided(model, y, 1.0, null_class)(x, 500)
    assert model.calls[0]["x"] is x and model.calls[0]["y"].tolist() == [1, 2, 3]
    assert torch.equal(out, Recorder()(x, None, y))


def test_scale_zero_is_the_null_branch(x, y):
    out = guided(Recorder(), y, 0.0, NULL, "all")(x, 500)
    torch.testing.assert_close(out[:, :4], Recorder()(x, None, torch.full_like(y, NULL))[:, :4])


def test_interval(x, y):
    model = Recorder()
    predict = guided(model, y, 3.0, NULL, interval=(0.2, 0.6))
    for t in (999, 600, 400, 200, 199, 0):
        predict(x, t)
    assert [len(call["x"]) for call in model.calls] == [3, 6, 6, 6, 3, 3]


# --- budgets --------------------------------------------------------------------------------------------------------


def test_nothing_is_passed_that_was_not_asked_for(x, y):
    def static(x, t, y):
        return x

    assert guided(static, y, 1.0)(x, 5) is x


def test_one_number_stays_a_number(x, y):
    model = Recorder()
    guided(model, y, 2.0, NULL, drop_fraction=0.3)(x, 500)
    guided(model, y, drop_fraction=(0.3, 0.9))(x, 500)
    guided(model, y, budget=7)(x, 500)
    assert [call["drop_fraction"] for call in model.calls] == [0.3, 0.3, 0.0]
    assert [call["budget"] for call in model.calls] == [None, None, 7]


def test_lite_cfg_gives_each_branch_its_own(x, y):
    model = Recorder()
    guided(model, y, 2.0, NULL, drop_fraction=(0.25, 0.5))(x, 500)
    rho = model.calls[0]["drop_fraction"]
    assert rho.dtype == torch.float32 and rho.tolist() == [0.25] * 3 + [0.5] * 3


def test_rho_of_time(x, y):
    model = Recorder()
    predict = guided(model, y, 2.0, NULL, interval=(0, 0.7), drop_fraction=(lambda time: time / 2, 0.75))
    predict(x, 500)
    predict(x, 1000)
    assert model.calls[0]["drop_fraction"].tolist() == [0.25] * 3 + [0.75] * 3
    assert model.calls[1]["drop_fraction"].tolist() == [0.5] * 3


def test_rho_of_each_image(x, y):
    model = Recorder()
    each = torch.tensor([0.0, 0.5, 0.25], dtype=torch.float64)
    guided(model, y, 2.0, NULL, drop_fraction=each)(x, 500)
    guided(model, y, 2.0, NULL, drop_fraction=(each, 0.75))(x, 500)
    guided(model, y, drop_fraction=each)(x, 500)
    assert [call["drop_fraction"].tolist() for call in model.calls] == [
        [0, 0.5, 0.25, 0, 0.5, 0.25],
        [0, 0.5, 0.25, 0.75, 0.75, 0.75],
        [0, 0.5, 0.25],
    ]
    with pytest.raises(ValueError, match=r"drop_fraction has shape \(2,\); accepted: \(3,\), one per image"):
        guided(model, y, drop_fraction=each[:2])(x, 500)


class Static(nn.Module):
    def forward(self, x, t, y):
        return x


class Dynamic(nn.Module):
    def forward(self, x, t, y, drop_fraction=0.0, budget=None):
        return x


class Wrapper(nn.Module):
    """Keeps its model where DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("option", [{"drop_fraction": 0.2}, {"budget": 5}])
def test_a_static_model_takes_no_budget(y, option):
    compiled = torch.compile(Static(), backend="eager")
    for model in (Static(), compiled, Wrapper(compiled), lambda x, t, y: x):
        with pytest.raises(ValueError, match="takes none; accepted: a dynamic model"):
            guided(model, y, **option)
    guided(Dynamic(), y, **option)
    guided(torch.compile(Dynamic(), backend="eager"), y, **option)
    guided(Wrapper(torch.compile(Dynamic(), backend="eager")), y, **option)
    guided(lambda x, t, y, **options: x, y, **option)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 2.0}, "no null class"),
        ({"scale": -1.0, "null_class": NULL}, "cfg_scale is -1.0"),
        ({"scale": float("nan"), "null_class": NULL}, "cfg_scale is nan"),
        ({"channels": 0}, "cfg channels are 0"),
        ({"channels": "some"}, "cfg channels are 'some'"),
        ({"interval": (0.6, 0.2)}, "cfg interval is"),
        ({"interval": (0.0, 1.5)}, "cfg interval is"),
    ],
)
def test_bad_options(y, options, message):
    with pytest.raises(ValueError, match=message):
        guided(Recorder(), y, **options)


@pytest.mark.parametrize("rho", [1.0, -0.1, (0.2, 1.5), lambda time: 2.0])
def test_bad_fraction(x, y, rho):
    with pytest.raises(ValueError, match=r"drop_fraction is .* accepted: a number in"):
        guided(Recorder(), y, 2.0, NULL, drop_fraction=rho)(x, 500)
