"""The schedule and its subsets, against the formulae."""

import numpy as np
import pytest
import torch

from dcdit.diffusion import linear_schedule, space_timesteps

BETAS = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)


def test_training_schedule():
    schedule = linear_schedule()
    alpha_bar = np.cumprod(1 - BETAS)
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=1e-12)
    np.testing.assert_allclose(schedule.max_log_variance.exp(), BETAS, rtol=1e-10)
    assert schedule.timesteps.tolist() == list(range(1000))
    assert all(x.dtype == torch.float64 for x in schedule[1:])


@pytest.mark.parametrize("steps", [2, 10, 250, "ddim50"])
def test_a_shorter_chain_keeps_alpha_bar_and_has_its_own_betas(steps):
    kept = space_timesteps(steps)
    schedule = linear_schedule(kept)
    alpha_bar = np.cumprod(1 - BETAS)[kept]
    np.testing.assert_allclose(schedule.alpha_bar, alpha_bar, rtol=1e-12)
    beta = schedule.max_log_variance.exp().numpy()
    np.testing.assert_allclose(np.cumprod(1 - beta), alpha_bar, rtol=1e-12)
    # Bayes: the precision of the posterior is that of the forward step plus that of the marginal before it.
    before = alpha_bar[:-1]
    precision = (1 - beta[1:]) / beta[1:] + 1 / (1 - before)
    np.testing.assert_allclose(schedule.min_log_variance[1:].exp(), 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_xt[1:], np.sqrt(1 - beta[1:]) / beta[1:] / precision, rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_x0[1:], np.sqrt(before) / (1 - before) / precision, rtol=1e-9)
    # The first step goes to the data itself; its variance is borrowed from the second.
    assert schedule.posterior_x0[0] == pytest.approx(1) and schedule.posterior_xt[0] == 0
    assert schedule.min_log_variance[0] == schedule.min_log_variance[1]


def test_a_chain_of_one_step_is_finite():
    assert all(x.isfinite().all() for x in linear_schedule([999]))


def test_spacing_adds_up_the_stride_as_improved_diffusion_does():
    for count in range(2, 1001):
        position, expected = 0.0, []
        for _ in range(count):
            expected.append(round(position))
            position += 999 / (count - 1)
        assert space_timesteps(count) == space_timesteps(str(count)) == expected
    # 21 steps: the tenth sum of 49.95 stays below 499.5, which 10 * 49.95 does not.
    assert space_timesteps(21)[10] == 499 and round(10 * 49.95) == 500


def test_spacing_examples():
    assert space_timesteps(1000) == list(range(1000))
    assert space_timesteps(1) == [0]
    assert space_timesteps(4) == [0, 333, 666, 999]
    assert space_timesteps("ddim50") == list(range(0, 1000, 20))
    assert space_timesteps("ddim3") == [0, 334, 668]


@pytest.mark.parametrize("steps", [0, -5, 1001, "ddim0", "ddim1001", "many", 2.5, ""])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match="num_steps is"):
        space_timesteps(steps)


def test_no_integer_stride():
    with pytest.raises(ValueError, match="no integer stride takes 400"):
        space_timesteps("ddim400")


@pytest.mark.parametrize("steps", [[], [3, 2], [1, 1], [-1, 5], [5, 1000]])
def test_bad_subset(steps):
    with pytest.raises(ValueError, match="ascending steps"):
        linear_schedule(steps)
