"""Features: the contract of an extractor, the cache on disk, and statistics."""

import numpy as np
import pytest
import torch
from support.tiny import TinyExtractor, images
from torch import nn

from dcdit.evaluate import Features, Statistics, extract_features


def equal(a: Features, b: Features) -> bool:
    kinds = ("pooled", "logits", "spatial")
    return all(torch.equal(getattr(a, kind), getattr(b, kind)) for kind in kinds)


def test_features_are_those_of_the_extractor():
    x, extractor = images(10), TinyExtractor()
    found = extract_features(x, extractor, batch_size=4, progress=False)
    expected = extractor(torch.tensor(x).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.pooled, expected["pooled"])
    torch.testing.assert_close(found.logits, expected["logits"])
    # Seven channels of the twelve, positions first: the order of ADM's stored statistics.
    spatial = expected["spatial"][:, :7].permute(0, 2, 3, 1).reshape(10, 2 * 3 * 7)
    torch.testing.assert_close(found.spatial, spatial)
    assert found.extractor == "tiny" and found.size == (8, 8) and len(found) == 10
    assert not found.pooled.requires_grad


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.flatten(1).float(),
        lambda x: (x.flatten(1).float(),),
        lambda x: (x.flatten(1).double(), None),
        lambda x: (x.flatten(1).float(), None, None),
        lambda x: {"pooled": x.flatten(1).half(), "more": None},
    ],
    ids=["tensor", "tuple", "logits None", "both None", "mapping"],
)
def test_pooled_features_alone(make):
    x = images(3)
    found = extract_features(x, Returns(make), progress=False)
    assert torch.equal(found.pooled, torch.tensor(x).permute(0, 3, 1, 2).flatten(1).float())
    assert found.logits is None and found.spatial is None


def test_a_tuple_is_pooled_logits_spatial():
    found = extract_features(
        images(3), Returns(lambda x: (torch.ones(3, 4), torch.zeros(3, 5), torch.ones(3, 9, 2, 2))), progress=False
    )
    assert (found.pooled.shape, found.logits.shape, found.spatial.shape) == ((3, 4), (3, 5), (3, 28))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.float(), r"returned pooled of shape \(3, 3, 8, 8\)"),
        (lambda x: torch.ones(2, 5), r"returned pooled of shape \(2, 5\) .* accepted: float \(3, D\)"),
        (lambda x: torch.ones(3, 5, dtype=torch.int64), "and torch.int64; accepted: float"),
        (lambda x: torch.full((3, 5), torch.nan), "returned pooled that are not finite"),
        (lambda x: (torch.ones(3, 5), torch.ones(3)), "returned logits of shape"),
        (lambda x: {"pooled": torch.ones(3, 5), "spatial": torch.ones(3, 6, 2, 2)}, "at least 7, h, w"),
        (lambda x: {"logits": torch.ones(3, 5)}, r"returned \['logits'\]; accepted: tensors by the names pooled"),
        (lambda x: {"pooled": [1, 2, 3]}, "accepted: tensors by the names"),
        (lambda x: 5, "returned int; accepted: a tensor"),
        (lambda x: (torch.ones(3, 5),) * 4, "returned tuple"),
    ],
)
def test_extractors_that_break_the_contract(make, message):
    with pytest.raises(ValueError, match=message):
        extract_features(images(3), Returns(make), progress=False)


def test_cached_features_are_not_computed_again(tmp_path):
    x, extractor = images(10), TinyExtractor()
    options = {"batch_size": 4, "cache": tmp_path / "cache", "progress": False}
    first = extract_features(x, extractor, **options)
    assert extractor.images_seen == 10
    assert equal(extract_features(x, extractor, **options), first) and extractor.images_seen == 10
    np.savez(tmp_path / "x.npz", arr_0=x)
    assert equal(extract_features(tmp_path / "x.npz", extractor, **options), first) and extractor.images_seen == 10
    x[9] ^= 1
    changed = extract_features(x, extractor, **options)
    assert extractor.images_seen == 12 and not equal(changed, first)
    another = TinyExtractor(identity="another")
    extract_features(x, another, **options)
    assert another.images_seen == 10


def test_an_interrupted_extraction_goes_on(tmp_path):
    class Stops(TinyExtractor):
        def forward(self, x):
            if self.images_seen == 8 and not self.kinds:
                raise KeyboardInterrupt
            return super().forward(x)

    x, extractor = images(10), Stops(kinds=("pooled",))
    options = {"batch_size": 4, "cache": tmp_path, "progress": False}
    expected = extract_features(x, TinyExtractor(kinds=("pooled",)), batch_size=4, progress=False)
    extract_features(x[:8], extractor, **options)
    extractor.kinds = ()
    with pytest.raises(KeyboardInterrupt):
        extract_features(x, extractor, **options)
    extractor.kinds, extractor.images_seen = ("pooled",), 0
    assert torch.equal(extract_features(x, extractor, **options).pooled, expected.pooled)
    assert extractor.images_seen == 2


def test_a_cache_needs_an_identity(tmp_path):
    with pytest.raises(ValueError, match="has no identity, so its features cannot be cached"):
        extract_features(images(3), TinyExtractor(identity=None), cache=tmp_path, progress=False)


def test_a_damaged_cache_is_named(tmp_path):
    extract_features(images(3), TinyExtractor(), cache=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: .* delete it"):
        extract_features(images(3), TinyExtractor(), cache=tmp_path, progress=False)


def test_an_extractor_is_put_into_evaluation_mode_meanwhile():
    extractor = Returns(lambda x: x.flatten(1).float() * (2.0 if extractor.training else 1.0)).train()
    assert extract_features(images(3), extractor, progress=False).pooled.max() <= 255
    assert extractor.training


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [8, 100])
def test_statistics_are_those_of_numpy_and_survive_a_file(count, tmp_path):
    features = extract_features(images(count), TinyExtractor(), progress=False)
    features.statistics.save(tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz") as archive:
        for mean, covariance, x in (("mu", "sigma", features.pooled), ("mu_s", "sigma_s", features.spatial)):
            x = x.double().numpy()
            np.testing.assert_allclose(archive[mean], x.mean(0), rtol=1e-12)
            np.testing.assert_allclose(archive[covariance], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)
    again = Statistics.load(tmp_path / "stats.npz")
    assert (again.count, again.extractor) == (count, "tiny")
    for name in ("pooled", "spatial"):
        ours, theirs = getattr(features.statistics, name), getattr(again, name)
        torch.testing.assert_close(theirs.covariance(), ours.covariance(), rtol=1e-9, atol=1e-12)


def test_statistics_of_others_need_no_more_than_mu_and_sigma(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4, dtype=np.float32))
    statistics = Statistics.load(tmp_path / "a.npz")
    assert (statistics.spatial, statistics.count, statistics.extractor) == (None, None, None)
    assert torch.equal(statistics.pooled.covariance(), torch.eye(4).double())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros(3)}, "holds no statistics; accepted: an .npz with mu and sigma"),
        ({"mu": np.zeros(4)}, "holds mu without sigma"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"mu has shape \(4,\) and sigma \(5, 5\)"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(2)}, "holds mu_s without sigma_s"),
    ],
)
def test_files_without_statistics(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        Statistics.load(tmp_path / "a.npz")
