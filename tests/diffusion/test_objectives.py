"""The objectives against closed forms and a direct float64 computation."""

import math

import numpy as np
import pytest
import torch

from dcdit.diffusion import DiTObjective, FlowMatchingObjective, create_objective
from dcdit.diffusion.likelihood import discretized_gaussian_log_likelihood, gaussian_kl

BETAS = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
ALPHA_BAR = np.cumprod(1 - BETAS)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def never(x, t, y):
    raise AssertionError("the model must not be called")


# --- DiT -----------------------------------------------------------------------------------------------------------


def test_the_model_sees_the_forward_process():
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t, y=y)
        return torch.zeros(len(x), 2, 2, 2)

    x0 = torch.full((20000, 1, 2, 2), 0.7)
    y = torch.arange(20000)
    out = DiTObjective()(model, x0, y, torch.Generator().manual_seed(0))
    assert seen["y"] is y and seen["t"] is out["t"] and seen["x"].dtype == torch.float32
    t = seen["t"]
    assert t.dtype == torch.int64 and t.min() == 0 and t.max() == 999
    assert abs(t.double().mean().item() - 499.5) < 5 * 288.7 / math.sqrt(len(t))
    standard = (seen["x"].double() - 0.7 * torch.tensor(ALPHA_BAR)[t].sqrt().view(-1, 1, 1, 1)) / (
        1 - torch.tensor(ALPHA_BAR)[t]
    ).sqrt().view(-1, 1, 1, 1)
    n = standard.numel()
    assert abs(standard.mean().item()) < 5 / math.sqrt(n)
    assert abs(standard.var().item() - 1) < 5 * math.sqrt(2 / n)
    # A model that answers 0 is off by the noise itself.
    assert abs(out["mse"].mean().item() - 1) < 5 * math.sqrt(2 / n)


def test_a_generator_fixes_the_draw():
    x0, y = torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)

    def model(x, t, y):
        return torch.cat([x, x], 1)

    first, again, other = (DiTObjective()(model, x0, y, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["loss"], other["loss"])


def vlb_by_hand(x0, x_t, t, eps, variance):
    """Bits per element, one image, in numpy with explicit loops over nothing but the formulae."""
    previous = ALPHA_BAR[t - 1] if t else 1.0
    posterior = BETAS * np.append(0, 1 - ALPHA_BAR[:-1]) / (1 - ALPHA_BAR)
    low, high = math.log(posterior[max(t, 1)]), math.log(BETAS[t])
    log_variance = (variance + 1) / 2 * high + (1 - variance) / 2 * low
    to_x0 = math.sqrt(previous) * BETAS[t] / (1 - ALPHA_BAR[t])
    to_xt = math.sqrt(1 - BETAS[t]) * (1 - previous) / (1 - ALPHA_BAR[t])
    expected = (x_t - math.sqrt(1 - ALPHA_BAR[t]) * eps) / math.sqrt(ALPHA_BAR[t])
    mean, true_mean = to_x0 * expected + to_xt * x_t, to_x0 * x0 + to_xt * x_t
    if t == 0:
        cdf = lambda z: 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))  # noqa: E731
        std = np.exp(0.5 * log_variance)
        upper, lower = cdf((x0 + 1 / 255 - mean) / std), cdf((x0 - 1 / 255 - mean) / std)
        probability = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
        nats = -np.log(np.maximum(probability, 1e-12))
    else:
        nats = 0.5 * (log_variance - low + (np.exp(low) + (true_mean - mean) ** 2) / np.exp(log_variance) - 1)
    return nats.mean() / math.log(2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_vlb_is_the_formula(dtype, tolerance):
    t = torch.tensor([0, 0, 1, 2, 30, 500, 999])
    x0 = randn(7, 3, 4, 4, seed=1).clamp(-1, 1).to(dtype)
    noise, output = randn(7, 3, 4, 4, seed=2).to(dtype), randn(7, 6, 4, 4, seed=3).to(dtype)
    output[:, :3] = noise + 0.05 * output[:, :3]
    out = DiTObjective().losses(lambda *_: output, x0, None, t, noise)
    for i, step in enumerate(t.tolist()):
        x, e = x0[i].double().numpy(), noise[i].double().numpy()
        x_t = math.sqrt(ALPHA_BAR[step]) * x + math.sqrt(1 - ALPHA_BAR[step]) * e
        eps, variance = output[i].double().numpy().reshape(2, 3, 4, 4)
        assert out["vlb"][i].item() == pytest.approx(vlb_by_hand(x, x_t, step, eps, variance), rel=tolerance, abs=1e-9)
    torch.testing.assert_close(out["mse"], ((output[:, :3] - noise) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(out["loss"], out["mse"] + out["vlb"])
    assert all(value.dtype == dtype for name, value in out.items() if name != "t")


def test_a_perfect_predictor_has_no_loss():
    t = torch.tensor([1, 10, 400, 999])
    x0, noise = randn(4, 2, 3, 3, seed=4), randn(4, 2, 3, 3, seed=5)
    perfect = torch.cat([noise, -torch.ones_like(noise)], 1)  # -1: the posterior's own variance
    out = DiTObjective().losses(lambda *_: perfect, x0, None, t, noise)
    assert out["mse"].abs().max() == 0
    assert out["vlb"].abs().max() < 1e-12


def test_the_vlb_trains_the_variance_only():
    t = torch.tensor([0, 7, 800])
    x0, noise = randn(3, 2, 3, 3, seed=6), randn(3, 2, 3, 3, seed=7)
    output = randn(3, 4, 3, 3, seed=8).requires_grad_()
    out = DiTObjective().losses(lambda *_: output, x0, None, t, noise)
    (of_vlb,) = torch.autograd.grad(out["vlb"].sum(), output, retain_graph=True)
    assert (of_vlb[:, :2] == 0).all() and (of_vlb[:, 2:] != 0).any(dim=(1, 2, 3)).all()
    (of_mse,) = torch.autograd.grad(out["mse"].sum(), output, retain_graph=True)
    torch.testing.assert_close(of_mse[:, :2], 2 * (output.detach()[:, :2] - noise) / 18)
    assert (of_mse[:, 2:] == 0).all()


def test_gradient_of_the_vlb():
    t = torch.tensor([0, 1, 300])
    x0 = randn(3, 1, 2, 2, seed=9).clamp(-1, 1)
    noise, eps = randn(3, 1, 2, 2, seed=10), randn(3, 1, 2, 2, seed=11)
    eps = noise + 0.02 * eps

    def vlb(variance):
        return DiTObjective().losses(lambda *_: torch.cat([eps, variance], 1), x0, None, t, noise)["vlb"]

    assert torch.autograd.gradcheck(vlb, randn(3, 1, 2, 2, seed=12).requires_grad_())


def test_without_a_learned_variance():
    x0, noise = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    out = DiTObjective(learn_sigma=False).losses(lambda x, t, y: x, x0, None, torch.tensor([3, 4]), noise)
    assert set(out) == {"loss", "mse", "t"} and torch.equal(out["loss"], out["mse"])


def test_half_precision_data_is_not_scored_in_half_precision():
    x0 = torch.randn(2, 1, 4, 4).bfloat16()

    def model(x, t, y):
        assert x.dtype == torch.bfloat16
        return torch.cat([x, x], 1)

    out = DiTObjective()(model, x0, None)
    assert out["loss"].dtype == torch.float32


# --- likelihood -----------------------------------------------------------------------------------------------------


def test_gaussian_kl_is_that_of_torch():
    difference, p, q = (randn(50, seed=seed) for seed in range(3))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(difference, (p / 2).exp()), normal(torch.zeros(50).double(), (q / 2).exp())
    )
    torch.testing.assert_close(gaussian_kl(difference, p, q), expected)


def test_the_discretised_gaussian_is_a_distribution_over_256_levels():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_variance in ((0.1, -4.0), (-0.98, -3.0), (0.999, 0.0), (0.0, 2.0)):
        log_p = discretized_gaussian_log_likelihood(
            levels, torch.tensor(mean), torch.tensor(log_variance, dtype=torch.float64)
        )
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
        # The tanh approximation of the normal CDF is good to a few 1e-4.
        inner = torch.distributions.Normal(mean, math.exp(log_variance / 2))
        exact = inner.cdf(levels[1:-1] + 1 / 255) - inner.cdf(levels[1:-1] - 1 / 255)
        assert (log_p[1:-1].exp() - exact).abs().max() < 5e-4


# --- flow matching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_flow_matching_paths_and_times(time):
    seen = {}

    def model(x, t, y):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    n = 20000
    out = FlowMatchingObjective(time)(model, torch.full((n, 1, 2, 2), 0.7), None, torch.Generator().manual_seed(0))
    t = seen["t"] / 1000
    assert seen["t"] is not None and torch.equal(out["t"], seen["t"]) and seen["x"].dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1 and abs(t.mean().item() - 0.5) < 5 * 0.29 / math.sqrt(n)
    if time == "uniform":
        assert abs(t.var().item() - 1 / 12) < 0.005
    else:
        z = torch.logit(t.double())
        assert abs(z.mean().item()) < 5 / math.sqrt(n) and abs(z.var().item() - 1) < 5 * math.sqrt(2 / n)
    late = t > 0.1
    noise = ((seen["x"] - (1 - t.view(-1, 1, 1, 1)) * 0.7) / t.view(-1, 1, 1, 1))[late]
    assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2 / noise.numel())
    # A model that answers 0 is off by noise - x0: variance 1 plus 0.7 squared.
    assert out["mse"].mean().item() == pytest.approx(1.49, abs=0.05)


@pytest.mark.parametrize("channels", [2, 4])
def test_flow_matching_loss(channels):
    x0, noise, t = randn(3, 2, 3, 3), randn(3, 2, 3, 3, seed=1), torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)

    def model(x, time, y):
        torch.testing.assert_close(time, torch.tensor([0.0, 250.0, 1000.0], dtype=torch.float64))
        torch.testing.assert_close(x[0], x0[0])
        torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * noise[1])
        torch.testing.assert_close(x[2], noise[2])
        return torch.cat([noise - x0 + 0.5, torch.full_like(x0, 9.0)], 1)[:, :channels]

    out = FlowMatchingObjective().losses(model, x0, None, t, noise)
    torch.testing.assert_close(out["loss"], torch.full((3,), 0.25, dtype=torch.float64))
    assert torch.equal(out["loss"], out["mse"])


# --- noise, then loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [DiTObjective(), FlowMatchingObjective("logit_normal")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_noise_and_loss_are_the_parts_of_losses(objective, dtype):
    """Bit for bit, with the model's input in the dtype of the data and the rest in float32 at least."""
    x0 = randn(4, 2, 3, 3).to(dtype)
    t, noise = objective.draw(x0.shape, x0.device, torch.Generator().manual_seed(1), dtype)
    weight = randn(4, 2, seed=2).to(dtype)

    def model(x, time, y):
        return torch.einsum("oc,bchw->bohw", weight, x) + (time.to(dtype) / 1000).view(-1, 1, 1, 1)

    noisy = objective.noise(x0, t, noise)
    upcast = torch.promote_types(dtype, torch.float32)
    assert noisy.x.dtype == dtype and torch.equal(noisy.x, noisy.x_t.to(dtype))
    assert {noisy.target.dtype, noisy.x0.dtype, noisy.x_t.dtype} == {upcast}
    parts = objective.loss(model(noisy.x, noisy.time, None), noisy)
    whole = objective.losses(model, x0, None, t, noise)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    drawn = objective(model, x0, None, torch.Generator().manual_seed(1))
    assert all(torch.equal(parts[name], drawn[name]) for name in whole)


@pytest.mark.parametrize("name", ["flow", "dit"])
def test_noise_levels_run_from_data_to_noise(name):
    objective = create_objective(name)
    x0, ones = randn(6, 3, 16, 16, dtype=torch.float32).clamp(-1, 1), torch.ones(6, 3, 16, 16)
    start, end = (objective.noise(x0, objective.t_at(level, x0), ones) for level in (0.0, 1.0))
    torch.testing.assert_close(start.x, x0, atol=0.02, rtol=0)
    torch.testing.assert_close(end.x, ones, atol=0.02, rtol=0)
    assert start.time.shape == end.time.shape == (6,)
    assert float(start.time[0]) < float(end.time[0])
    middle = objective.noise(x0, objective.t_at(0.5, x0), ones)
    assert middle.time.tolist() == [500] * 6


def test_objectives_by_name():
    assert isinstance(create_objective("flow"), FlowMatchingObjective)
    assert [create_objective("dit", learn_sigma).learn_sigma for learn_sigma in (True, False)] == [True, False]
    with pytest.raises(ValueError, match="unknown objective 'ddim'; accepted: dit, flow"):
        create_objective("ddim")


# --- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_time_distribution():
    with pytest.raises(ValueError, match="time is 'cosine'; accepted: uniform, logit_normal"):
        FlowMatchingObjective("cosine")


@pytest.mark.parametrize("objective", [DiTObjective(), FlowMatchingObjective()])
@pytest.mark.parametrize("x0", [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
def test_data_must_be_float_images(objective, x0):
    with pytest.raises(ValueError, match="x0 has shape"):
        objective(never, x0, None)


@pytest.mark.parametrize(
    ("objective", "channels", "wanted"),
    [
        (DiTObjective(), 3, r"needs \(2, 6, 4, 4\)"),
        (DiTObjective(learn_sigma=False), 6, r"needs \(2, 3, 4, 4\)"),
        (FlowMatchingObjective(), 4, r"needs \(2, 3, 4, 4\) or \(2, 6, 4, 4\)"),
    ],
)
def test_the_model_must_return_the_right_channels(objective, channels, wanted):
    with pytest.raises(ValueError, match=wanted):
        objective(lambda x, t, y: torch.zeros(2, channels, 4, 4), torch.zeros(2, 3, 4, 4), None)
