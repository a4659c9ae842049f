"""Whole trajectories against the formulae, and the order of the ODE solvers."""

import itertools
import math

import numpy as np
import pytest
import torch

from dcdit.diffusion import Step, samplers, space_timesteps

BETAS = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
ALPHA_BAR = np.cumprod(1 - BETAS)
MEAN, STD = 0.3, 0.5


def run(chain, predict, x, noise=None):
    """Every step; ``predict`` takes x and the time."""
    for number, (times, row) in enumerate(zip(chain.times, chain.coefficients, strict=True)):
        numbers = torch.tensor(row, dtype=x.dtype).unbind()
        x, x0 = chain.update(lambda x, call, times=times: predict(x, times[call]), x, numbers, noise)
        yield Step(number, times[0], x, x0)


def last(*args):
    for step in run(*args):  # noqa: B007
        pass
    return step


def gaussian_model(x, t, learned=True):
    """The exact noise prediction for data N(MEAN, STD^2), and a variance that depends on x."""
    a = ALPHA_BAR[t]
    eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)
    return torch.cat([eps, torch.tanh(x)], 1) if learned else eps


def start(dtype, seed=0):
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def noise_source(dtype):
    generator = torch.Generator().manual_seed(1)
    return lambda: torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def ancestral(x, steps, draw, learned):
    """Float64, straight from the papers: q's parameters for the chain of kept steps, then one Gaussian per step."""
    alpha_bar = np.append(1.0, ALPHA_BAR[steps])
    for j in range(len(steps), 0, -1):
        beta = 1 - alpha_bar[j] / alpha_bar[j - 1]
        out = gaussian_model(x, steps[j - 1], learned)
        x0 = (x - math.sqrt(1 - alpha_bar[j]) * out[:, :2]) / math.sqrt(alpha_bar[j])
        x = (math.sqrt(alpha_bar[j - 1]) * beta * x0 + math.sqrt(1 - beta) * (1 - alpha_bar[j - 1]) * x) / (
            1 - alpha_bar[j]
        )
        if j > 1:
            smallest = beta * (1 - alpha_bar[j - 1]) / (1 - alpha_bar[j])
            weight = (out[:, 2:] + 1) / 2 if learned else 1.0
            x = x + beta ** (weight / 2) * smallest ** ((1 - weight) / 2) * draw()
    return x


CHAINS = [1000, 250, 21, "ddim50", 2, 1]


# Two steps in float32 are left out: the first divides by sqrt(alpha_bar) = 1/158 and so magnifies rounding.
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "count"),
    [(torch.float64, count) for count in CHAINS] + [(torch.float32, count) for count in CHAINS if count != 2],
)
def test_ddpm_trajectory(count, learned, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    steps = space_timesteps(count)
    got = last(samplers.ddpm(steps), lambda x, t: gaussian_model(x, t, learned), start(dtype), noise_source(dtype))
    want = ancestral(start(dtype).double(), steps, noise_source(torch.float64), learned)
    assert got.x.dtype == dtype
    torch.testing.assert_close(got.x.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("count", [50, "ddim50"])
def test_ddim_trajectory(count, eta):
    steps = space_timesteps(count)
    got = last(samplers.ddim(steps, eta), gaussian_model, start(torch.float64), noise_source(torch.float64))
    x, draw = start(torch.float64), noise_source(torch.float64)
    alpha_bar = np.append(1.0, ALPHA_BAR[steps])
    for j in range(len(steps), 0, -1):
        now, before = alpha_bar[j], alpha_bar[j - 1]
        eps = gaussian_model(x, steps[j - 1])[:, :2]
        sigma = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
        x = math.sqrt(before / now) * (x - math.sqrt(1 - now) * eps) + math.sqrt(1 - before - sigma**2) * eps
        if sigma > 0:
            x = x + sigma * draw()
    torch.testing.assert_close(got.x, x, rtol=1e-10, atol=1e-10)


def test_ddpm_reaches_the_data_distribution():
    x = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def exact_posterior(x, t):
        return torch.cat([gaussian_model(x, t, learned=False), -torch.ones_like(x)], 1)

    chain = samplers.ddpm(space_timesteps(250))
    end = last(chain, exact_posterior, x, lambda: torch.randn(x.shape, generator=generator)).x
    n = end.numel()
    assert abs(end.mean().item() - MEAN) < 5 * STD / math.sqrt(n)
    assert abs(end.std().item() - STD) < 0.02


def test_deterministic_ddim_draws_no_noise_and_finds_the_data():
    data = start(torch.float64, seed=5)

    def knows_the_data(x, t):
        return (x - math.sqrt(ALPHA_BAR[t]) * data) / math.sqrt(1 - ALPHA_BAR[t])

    def forbidden():
        raise AssertionError("no noise")

    steps = list(run(samplers.ddim(space_timesteps(20)), knows_the_data, start(torch.float64), forbidden))
    torch.testing.assert_close(steps[-1].x, data, rtol=1e-9, atol=1e-9)
    assert [step.number for step in steps] == list(range(20))
    assert [step.t for step in steps] == space_timesteps(20)[::-1]
    for step in steps:
        torch.testing.assert_close(step.x0, data, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [samplers.ddpm, samplers.ddim])
def test_clipping_bounds_the_expected_data(sampler):
    def wild(x, t):
        return torch.cat([-5 * torch.ones_like(x), x.clamp(-1, 1)], 1)

    chains = [sampler(space_timesteps(10), clip=clip) for clip in (True, False)]
    steps, free = (list(run(chain, wild, start(torch.float32), noise_source(torch.float32))) for chain in chains)
    assert all(step.x0.abs().max() <= 1 for step in steps)
    torch.testing.assert_close(steps[-1].x, steps[-1].x0)
    assert free[0].x0.abs().max() > 1


def test_diffusers_agrees():
    """The same chains through diffusers, whose coefficients are float32."""
    diffusers = pytest.importorskip("diffusers")
    options = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
    steps = space_timesteps(250)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", **options)
    scheduler.set_timesteps(timesteps=steps[::-1])
    x = start(torch.float32)
    generator = torch.Generator().manual_seed(1)
    for t in steps[::-1]:
        x = scheduler.step(gaussian_model(x, t), t, x, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(1)
    chain = samplers.ddpm(steps)
    ours = last(chain, gaussian_model, start(torch.float32), lambda: torch.randn(x.shape, generator=generator))
    torch.testing.assert_close(ours.x, x, rtol=1e-4, atol=1e-4)

    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, **options)
    scheduler.set_timesteps(50)
    x = start(torch.float32)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(gaussian_model(x, t, learned=False), t, x).prev_sample
    ours = last(samplers.ddim(space_timesteps("ddim50")), gaussian_model, start(torch.float32))
    torch.testing.assert_close(ours.x, x, rtol=1e-4, atol=1e-4)


# --- flow matching --------------------------------------------------------------------------------------------------


def velocity(x, t):
    """E[noise - x0 | x_t] for data N(MEAN, STD^2) on straight paths; the model sees 1000 t."""
    t = t / 1000
    offset = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return t * offset - (MEAN + (1 - t) * STD**2 * offset)


def ode_error(sampler, count):
    x = start(torch.float64)
    # The flow of a Gaussian is affine: it keeps the number of standard deviations.
    return (last(sampler(count), velocity, x).x - (MEAN + STD * x)).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [(samplers.euler, 1), (samplers.heun, 2)])
def test_order_of_convergence(sampler, order):
    errors = [ode_error(sampler, count) for count in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
    assert errors[-1] < 5e-2


@pytest.mark.parametrize("sampler", [samplers.euler, samplers.heun])
def test_straight_paths_are_exact_in_one_step(sampler):
    data, noise = start(torch.float64, seed=5), start(torch.float64)
    (step,) = run(sampler(1), lambda x, t: torch.cat([noise - data, x], 1), noise)
    torch.testing.assert_close(step.x, data)
    torch.testing.assert_close(step.x0, data)


def test_flow_times():
    times = {}
    for sampler in (samplers.euler, samplers.heun):
        seen = times[sampler] = []

        def record(x, t, seen=seen):
            seen.append(t)
            return x

        last(sampler(4), record, start(torch.float64))
    assert times[samplers.euler] == [1000, 750, 500, 250]
    assert times[samplers.heun] == [1000, 750, 750, 500, 500, 250, 250, 0]
