"""The numbers, against independent formulas."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dcdit.evaluate.distances import (
    Gaussian,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features(count, width, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width))
    return torch.tensor(rng.normal(size=(count, width)) @ mixing + shift)


def by_scipy(x, y):
    """FID with the matrix square root, as its definition has it."""
    x, y = x.numpy(), y.numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * root).real


@pytest.mark.parametrize("counts", [(200, 300), (200, 12), (9, 12), (20, 20)], ids=str)
def test_frechet_distance_is_that_with_the_matrix_square_root(counts):
    """More images than dimensions, fewer, and both."""
    x, y = features(counts[0], 20), features(counts[1], 20, seed=1, shift=0.3)
    # A root of a singular product is only good to the square root of the precision.
    tolerance = {"rel": 1e-9} if min(counts) > 20 else {"rel": 1e-5}
    assert frechet_distance(Gaussian.fit(x), Gaussian.fit(y)) == pytest.approx(by_scipy(x, y), **tolerance)


def test_frechet_distance_is_torchmetrics():
    metric = FrechetInceptionDistance(feature=Numbered(20)).set_dtype(torch.float64)
    x, y = features(200, 20), features(150, 20, seed=1)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert frechet_distance(Gaussian.fit(x), Gaussian.fit(y)) == pytest.approx(float(metric.compute()), rel=1e-9)


class Numbered(nn.Identity):
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features


@pytest.mark.parametrize("counts", [(200, 300), (200, 12), (9, 12)], ids=str)
def test_distances_are_symmetric(counts):
    x, y = features(counts[0], 20), features(counts[1], 20, seed=1, shift=0.3)
    a, b = Gaussian.fit(x), Gaussian.fit(y)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    kid, deviation = kernel_distance(x, y)
    assert kernel_distance(y, x)[0] == pytest.approx(kid, abs=deviation)
    assert precision_recall(x, y) == precision_recall(y, x)[::-1]


@pytest.mark.parametrize("count", [10, 200])
def test_a_set_has_no_distance_to_itself(count):
    x = Gaussian.fit(features(count, 20))
    scale = float(x.factor.square().sum())
    assert frechet_distance(x, x) < 1e-12 * scale


@pytest.mark.parametrize("count", [10, 200])
def test_a_gaussian_keeps_its_covariance(count):
    x = features(count, 20)
    covariance = torch.tensor(np.cov(x.numpy(), rowvar=False))
    again = Gaussian.of(x.mean(0), covariance)
    for gaussian in (Gaussian.fit(x), again):
        torch.testing.assert_close(gaussian.covariance(), covariance, rtol=1e-10, atol=1e-10)
    assert again.factor.shape == (20, min(20, count - 1))


def test_gaussians_of_two_widths():
    with pytest.raises(ValueError, match="width 20 against statistics of width 19"):
        frechet_distance(Gaussian.fit(features(30, 20)), Gaussian.fit(features(30, 19)))


def mmd(x, y):
    """The unbiased estimate of squared MMD with the kernel (x.y / d + 1)^3, term by term."""
    d = x.shape[1]

    def mean(a, b, same):
        return np.mean([(a[i] @ b[j] / d + 1) ** 3 for i in range(len(a)) for j in range(len(b)) if not same or i != j])

    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


def test_kernel_distance_averages_the_estimate_of_subsets():
    x, y = features(60, 5), features(40, 5, seed=1, shift=0.5)
    mean, deviation = kernel_distance(x, y)
    # Each subset's estimate is unbiased, so their mean is near that of all images.
    assert mean == pytest.approx(mmd(x.numpy(), y.numpy()), abs=3 * deviation / 10)
    assert deviation > 0
    assert kernel_distance(x, y) == (mean, deviation)
    assert kernel_distance(x, y, seed=1) != (mean, deviation)


def test_kernel_distance_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    kernel_distance(features(20, 5), features(20, 5))
    inception_score(features(20, 5))
    assert torch.equal(torch.rand(1), expected)


def test_inception_score_of_known_predictions():
    sure = torch.eye(4).repeat(50, 1) * 1000  # 200 images, four classes, each certain
    score, _ = inception_score(sure)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    shares = [sure[part].argmax(1).bincount(minlength=4) / 20 for part in order.chunk(10)]
    entropies = [-(share * share.clamp(min=1e-9).log()).sum() for share in shares]
    assert score == pytest.approx(float(torch.stack(entropies).exp().mean()), rel=1e-5)
    assert inception_score(torch.zeros(200, 4)) == (pytest.approx(1), pytest.approx(0))


def covered(points, centres, k=3):
    """Share of points within some centre's distance to its k-th nearest other one, one by one."""
    inside = 0
    radii = [sorted(np.linalg.norm(centres - centre, axis=1))[k] for centre in centres]
    for point in points:
        inside += any(np.linalg.norm(point - c) <= radius for c, radius in zip(centres, radii, strict=True))
    return inside / len(points)


def test_precision_and_recall(monkeypatch):
    monkeypatch.setattr("dcdit.evaluate.distances.ROWS", 16)  # several blocks, the last one not full
    x, y = features(40, 3), features(50, 3, seed=1, shift=1.5)
    precision, recall = precision_recall(x, y)
    assert (precision, recall) == (covered(x.numpy(), y.numpy()), covered(y.numpy(), x.numpy()))
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall


def test_precision_falls_with_wild_samples_and_recall_with_narrow_ones():
    x = features(200, 3)
    assert precision_recall(x, x) == (1, 1)
    precision, recall = precision_recall(x * 5, x)
    assert precision < 0.5
    precision, recall = precision_recall(x * 0.05, x)
    assert precision == 1 and recall < 0.5


@pytest.mark.parametrize("width", [64, 512])
def test_images_that_are_there_several_times_cover_themselves(width):
    """Their radius is 0, and a distance of 0 comes out of a matrix product with rounding."""
    rng = torch.Generator().manual_seed(0)
    single = torch.randn(250, width, generator=rng).abs()
    several = single.repeat(5, 1)[torch.randperm(1250, generator=rng)]
    for count in (5, 26, 100, 250):
        assert precision_recall(several[:count], several)[0] == 1
        assert precision_recall(single[:count], several)[0] == 1
    assert precision_recall(single + 0.01, several)[0] == 0


# --- what is no set of features -------------------------------------------------------------------------------------


CALLS = {
    "fit": lambda x, y: Gaussian.fit(x),
    "kid": kernel_distance,
    "kid, the other": lambda x, y: kernel_distance(y, x),
    "is": lambda x, y: inception_score(x),
    "precision": precision_recall,
    "recall": lambda x, y: precision_recall(y, x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "features: not finite in 1 of"),
        (float("inf"), "features: not finite in 1 of"),
        (-float("inf"), "features: not finite in 1 of"),
        (1e300, "features: too large"),
    ],
)
def test_features_that_are_not_finite(call, value, message):
    x, y = features(20, 5), features(20, 5, seed=1)
    x[7, 3] = value
    with pytest.raises(ValueError, match=message):
        call(x, y)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("shape", [(1, 5), (20,), (20, 0), (20, 5, 1)], ids=str)
def test_features_of_another_shape(call, shape):
    with pytest.raises(ValueError, match=r"features of shape \(.*; accepted: \(N, D\) with N at least"):
        call(torch.zeros(shape), features(20, 5))


def test_a_distance_is_a_number_or_an_error():
    good = Gaussian.fit(features(20, 5))
    with pytest.raises(ValueError, match="mean: not finite in 1 of"):
        Gaussian(torch.tensor([0, torch.nan, 0, 0, 0]), good.factor)
    with pytest.raises(ValueError, match="covariance: not finite in 25 of"):
        Gaussian(good.mean, torch.full((5, 5), torch.nan))
    with pytest.raises(
        ValueError, match="the Fréchet distance is inf: the features or statistics are not finite, or too"
    ):
        frechet_distance(Gaussian(good.mean + 5.9e153, good.factor), Gaussian(good.mean - 5.9e153, good.factor))
    with pytest.raises(ValueError, match="the KID is"):
        kernel_distance(features(20, 5) * 1e120, features(20, 5))
