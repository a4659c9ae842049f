"""Features: the contract of an extractor, the cache on disk, and statistics."""

import os
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.autoencoder import flip_last_bit
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
        (lambda x: torch.ones(3, 0), r"returned pooled of shape \(3, 0\) .* accepted: float \(3, D\)"),
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


def test_features_are_of_the_same_images():
    with pytest.raises(
        ValueError, match=r"features of \{'pooled': 3, 'logits': 2\} images; accepted: of the same images"
    ):
        Features(torch.ones(3, 4), torch.ones(2, 5))


def test_a_cache_needs_an_identity(tmp_path):
    with pytest.raises(ValueError, match="has no identity, so its features cannot be cached"):
        extract_features(images(3), TinyExtractor(identity=None), cache=tmp_path, progress=False)


def rewrite(file, change=lambda tensors: tensors, **metadata):
    """Another safetensors file in the place of one in the cache."""
    with safe_open(file, framework="pt") as stored:
        tensors, own = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    save_file(change(tensors), file, {**own, **metadata})


def edited(tensors, kind, edit):
    return {**tensors, kind: edit(tensors[kind].clone())}


DAMAGED = {
    "cut": lambda file, other: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file, other: file.write_bytes(b""),
    "a flipped bit": lambda file, other: flip_last_bit(file),
    "of another batch": lambda file, other: file.write_bytes(other.read_bytes()),
    "one row less": lambda file, other: rewrite(file, lambda x: {kind: rows[:-1].clone() for kind, rows in x.items()}),
    "without pooled": lambda file, other: rewrite(file, lambda x: {"x": torch.zeros(1)}),
    "without logits": lambda file, other: rewrite(file, lambda x: {"pooled": x["pooled"]}),
    "not finite": lambda file, other: rewrite(file, lambda x: edited(x, "logits", lambda rows: rows.fill_(torch.nan))),
    "other values": lambda file, other: rewrite(file, lambda x: edited(x, "pooled", lambda rows: rows + 1)),
    "in half precision": lambda file, other: rewrite(file, lambda x: {kind: rows.half() for kind, rows in x.items()}),
    "flat": lambda file, other: rewrite(file, lambda x: edited(x, "pooled", lambda rows: rows.flatten())),
    "a number": lambda file, other: rewrite(file, lambda x: edited(x, "pooled", lambda rows: rows[0, 0])),
    "without metadata": lambda file, other: save_file({"pooled": torch.zeros(4, 12)}, file),
    "of another extractor": lambda file, other: rewrite(file, batch="0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_file_of_the_cache_that_is_not_what_was_written_is_computed_again(damage, tmp_path):
    x, extractor = images(8), TinyExtractor()
    options = {"batch_size": 4, "cache": tmp_path, "progress": False}
    extract_features(x[4:], extractor, **options)
    (other,) = tmp_path.iterdir()
    expected = extract_features(x, extractor, **options)
    (file,) = set(tmp_path.iterdir()) - {other}
    damage(file, other)
    extractor.images_seen = 0
    with pytest.warns(
        UserWarning, match=rf"^features of 1 batches were computed again, because of .*{file.name}[: ]"
    ) as caught:
        again = extract_features(x, extractor, **options)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert equal(again, expected) and extractor.images_seen == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(extract_features(x, extractor, **options), expected) and extractor.images_seen == 4


def test_what_is_no_file_in_the_cache_is_neither_read_nor_replaced(tmp_path):
    x, extractor = images(4), TinyExtractor()
    expected = extract_features(x, extractor, cache=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    file.unlink()
    os.mkfifo(file)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{file.name} .*no regular file"):
            assert equal(extract_features(x, extractor, cache=tmp_path, progress=False), expected)
        assert file.is_fifo()


def test_one_line_for_all_damaged_files_of_the_cache(tmp_path):
    x, extractor = images(10), TinyExtractor()
    expected = extract_features(x, extractor, batch_size=2, cache=tmp_path, progress=False)
    for file in list(tmp_path.iterdir())[:3]:
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="^features of 3 batches were computed again") as caught:
        assert equal(extract_features(x, extractor, batch_size=2, cache=tmp_path, progress=False), expected)
    assert len(caught) == 1 and extractor.images_seen == 16


def test_an_extractor_whose_features_change_their_width():
    class Grows(TinyExtractor):
        def forward(self, x):
            return super().forward(x)["pooled"][:, : 4 + self.images_seen]

    with pytest.raises(
        ValueError, match=r"Grows returned features of widths \{'pooled': 6\} once and \{'pooled': 8\} later"
    ):
        extract_features(images(4), Grows(), batch_size=2, progress=False)


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


def covariance(width=4, **changes):
    """A covariance with other entries at some places, e.g. ``at_0_1``."""
    x = np.random.default_rng(0).normal(size=(20, width))
    sigma = np.cov(x, rowvar=False)
    for place, value in changes.items():
        _, row, column = place.split("_")
        sigma[int(row), int(column)] = value
    return sigma


GOOD = {"mu": np.zeros(4), "sigma": covariance()}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros(3)}, "holds no statistics; accepted: an .npz with mu and sigma"),
        ({"mu": np.zeros(4)}, "holds mu without sigma"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"mu has shape \(4,\) and sigma \(5, 5\)"),
        ({"mu": np.zeros((1, 4)), "sigma": np.eye(4)}, r"mu has shape \(1, 4\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(4), "sigma": np.ones(4)}, r"mu has shape \(4,\) and sigma \(4,\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has shape \(0,\) and sigma \(0, 0\)"),
        ({"mu": np.zeros(4, int), "sigma": np.eye(4)}, "mu is int64; accepted: float"),
        ({"mu": np.zeros(4), "sigma": np.eye(4, dtype=complex)}, "sigma is complex128; accepted: float"),
        ({**GOOD, "mu_s": np.zeros(2)}, "holds mu_s without sigma_s"),
        ({**GOOD, "sigma_s": np.eye(2)}, "holds sigma_s without mu_s"),
        ({**GOOD, "mu": np.array([0, np.nan, 0, np.inf])}, "mu: not finite in 2 of"),
        # torch.linalg.eigh reads one triangle only, so a NaN in the other one used to give a number.
        ({**GOOD, "sigma": covariance(at_0_3=np.nan)}, "sigma: not finite in 1 of"),
        ({**GOOD, "sigma": covariance(at_3_0=np.nan)}, "sigma: not finite in 1 of"),
        ({**GOOD, "sigma": covariance(at_2_2=np.inf)}, "sigma: not finite in 1 of"),
        ({**GOOD, "sigma": covariance() * 1e200}, "sigma: too large"),
        ({**GOOD, "sigma": covariance(at_0_3=0.5)}, "sigma is not symmetric: entries differ by"),
        ({**GOOD, "sigma": -np.eye(4)}, r"sigma has the eigenvalue -1; accepted: none below zero"),
        ({**GOOD, "sigma": covariance(at_1_1=-0.01)}, "sigma has the eigenvalue -.*; accepted: none below zero"),
        ({**GOOD, "sigma": covariance() - 1.1 * np.eye(4) * np.linalg.eigvalsh(covariance())[0]}, "eigenvalue -"),
        ({**GOOD, "mu_s": np.zeros(4), "sigma_s": covariance(at_0_1=np.nan)}, "sigma_s: not finite in 1 of"),
        ({**GOOD, "count": np.int64(-5)}, "count is int64 -5; accepted: an integer of at least 1"),
        ({**GOOD, "count": np.int64(0)}, "count is int64 0; accepted: an integer of at least 1"),
        ({**GOOD, "count": np.float64(50_000)}, "count is float64 50000.0; accepted: an integer"),
        ({**GOOD, "count": np.array([5])}, r"count is int64 \(1,\); accepted: an integer"),
        ({**GOOD, "count": np.bool_(True)}, "count is bool True; accepted: an integer"),
        ({**GOOD, "extractor": np.str_("a\x1b[31m")}, "extractor is <U6 .*; accepted: a printable text"),
        ({**GOOD, "extractor": np.int64(1)}, "extractor is int64"),
        ({**GOOD, "count": np.array([{}])}, "count: it holds Python objects"),
    ],
)
def test_files_without_statistics(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        Statistics.load(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [5, 200])
def test_statistics_that_were_rounded_to_float32_are_accepted(count, dtype, tmp_path):
    """Of few images too, where most eigenvalues are zero and rounding makes half of them negative."""
    x = np.random.default_rng(0).normal(size=(count, 64)) + 3
    sigma = np.cov(x, rowvar=False).astype(dtype)
    np.savez(tmp_path / "a.npz", mu=x.mean(0).astype(dtype), sigma=sigma, count=np.uint16(count))
    statistics = Statistics.load(tmp_path / "a.npz")
    np.testing.assert_allclose(statistics.pooled.covariance(), sigma, atol=1e-5)
    assert statistics.count == count
