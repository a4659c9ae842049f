"""The two terms of the variational bound: Gaussian KL and the discretised decoder, in nats per element."""

import math

import torch
from torch import Tensor


def gaussian_kl(mean_difference: Tensor, log_variance_p: Tensor, log_variance_q: Tensor) -> Tensor:
    """Elementwise KL(p || q) of two Gaussians, which depends on their means only through the difference."""
    log_ratio = log_variance_p - log_variance_q
    # expm1, because the two variances are close at most steps.
    return 0.5 * (log_ratio.expm1() - log_ratio + mean_difference**2 * (-log_variance_q).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Elementwise log probability of the bin of width 2/255 around x in [-1, 1]; the end bins reach to infinity.

    The formula of improved diffusion (arXiv 2102.09672). Its tanh approximation of the normal CDF and its smallest
    probability of 1e-12 are kept, so that losses can be compared.
    """
    inverse_std = (-0.5 * log_variance).exp()
    below_upper_edge = _normal_cdf((x - mean + 1 / 255) * inverse_std)
    below_lower_edge = _normal_cdf((x - mean - 1 / 255) * inverse_std)
    probability = torch.where(
        x < -0.999,
        below_upper_edge,
        torch.where(x > 0.999, 1 - below_lower_edge, below_upper_edge - below_lower_edge),
    )
    return probability.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
