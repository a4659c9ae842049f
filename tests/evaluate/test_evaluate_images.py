"""Metrics and the column of real images beside them."""

import numpy as np
import pytest
from support.tiny import TinyExtractor, images

from dcdit.evaluate import ReferenceSet, evaluate_images, extract_features
from dcdit.evaluate.distances import frechet_distance, kernel_distance, precision_recall
from dcdit.evaluate.measure import DIGITS

REAL, FAKE = images(120), images(40, seed=1, power=1.5)


def evaluate(x, reference, extractor=None, **options):
    return evaluate_images(x, reference, extractor or TinyExtractor(), progress=False, **options)


def test_all_metrics_with_their_counts():
    found = evaluate(FAKE, REAL)
    assert list(found.metrics) == list(found.floor) == list(DIGITS)
    assert not found.left_out
    fake, real = (extract_features(x, TinyExtractor(), progress=False) for x in (FAKE, REAL))
    values = {name: metric.value for name, metric in found.metrics.items()}
    assert values["FID"] == frechet_distance(fake.statistics.pooled, real.statistics.pooled)
    assert values["sFID"] == frechet_distance(fake.statistics.spatial, real.statistics.spatial)
    assert (values["KID"], found.metrics["KID"].spread) == kernel_distance(fake.pooled, real.pooled)
    assert (values["precision"], values["recall"]) == precision_recall(fake.pooled, real.pooled)
    assert {(f.count, f.reference_count) for name, f in found.metrics.items() if name != "IS"} == {(40, 120)}
    assert (found.metrics["IS"].count, found.metrics["IS"].reference_count) == (40, None)
    assert evaluate(FAKE, REAL) == found


def test_the_floor_is_of_as_many_real_images_against_others():
    found = evaluate(FAKE, REAL, num_reference=60)
    assert {(f.count, f.reference_count) for name, f in found.floor.items() if name != "IS"} == {(40, 60)}
    assert found.metrics["FID"].reference_count == 60
    assert found.floor["FID"].value < found.metrics["FID"].value
    assert found.floor["FID"].value > 0  # disjoint
    assert found.floor["precision"].value > found.metrics["precision"].value


def test_the_floor_of_real_images_is_what_they_score():
    """Images of the real distribution differ from the floor by chance only; images of another one differ by more."""
    found = evaluate(images(40, seed=2), REAL, num_reference=60)
    assert found.metrics["FID"].value < 3 * found.floor["FID"].value
    assert evaluate(FAKE, REAL, num_reference=60).metrics["FID"].value > 3 * found.floor["FID"].value


def test_a_small_reference_gives_a_smaller_floor_and_says_so():
    found = evaluate(FAKE, images(50))
    assert (found.floor["FID"].count, found.floor["FID"].reference_count) == (25, 25)
    assert "too small for 40 real images of its own: that column is of 25" in found.table()
    found = evaluate(FAKE, images(15))
    assert not found.floor and found.left_out == {"floor": "half of 15 real images is too few"}


def test_a_set_against_itself():
    found = evaluate(REAL, REAL)
    assert found.metrics["FID"].value < 1e-9 and found.metrics["sFID"].value < 1e-9
    assert found.metrics["precision"].value == found.metrics["recall"].value == 1


@pytest.mark.parametrize(
    ("kinds", "left_out"),
    [
        (("pooled",), {"IS": "the extractor gives no logits", "sFID": "the extractor gives no spatial features"}),
        (("pooled", "logits"), {"sFID": "the extractor gives no spatial features"}),
        (("pooled", "spatial"), {"IS": "the extractor gives no logits"}),
    ],
)
def test_metrics_that_an_extractor_does_not_allow_are_left_out_by_name(kinds, left_out):
    found = evaluate(FAKE, REAL, TinyExtractor(kinds=kinds))
    assert found.left_out == left_out
    assert set(found.metrics) == set(found.floor) == set(DIGITS) - set(left_out)
    for metric, reason in left_out.items():
        assert f"Left out: {metric}, because {reason}." in found.table()


def test_stored_statistics_give_the_same_fid(tmp_path):
    real = extract_features(REAL, TinyExtractor(), progress=False)
    real.statistics.save(tmp_path / "real.npz")
    expected = evaluate(FAKE, REAL).metrics
    for source in (real.statistics, tmp_path / "real.npz", str(tmp_path / "real.npz")):
        found = evaluate(FAKE, source)
        assert set(found.metrics) == {"FID", "sFID", "IS"}
        for metric in ("FID", "sFID"):
            assert found.metrics[metric].value == pytest.approx(expected[metric].value, rel=1e-6)
            assert found.metrics[metric].reference_count == 120
        reason = "stored statistics hold no images"
        assert found.left_out == dict.fromkeys(("KID", "precision", "recall", "floor"), reason)


def test_a_reference_batch_of_adm_holds_statistics_and_images(tmp_path):
    """Statistics of many images for FID, some of the images for the other metrics, and no count of the many."""
    many = extract_features(images(300), TinyExtractor(), progress=False).statistics.pooled
    np.savez(tmp_path / "batch.npz", arr_0=REAL, mu=many.mean, sigma=many.covariance())
    found = evaluate(FAKE, tmp_path / "batch.npz")
    own = extract_features(FAKE, TinyExtractor(), progress=False).statistics.pooled
    assert found.metrics["FID"].value == pytest.approx(frechet_distance(own, many), rel=1e-6)
    assert "40 vs ?" in found.table()
    assert found.metrics["KID"] == evaluate(FAKE, REAL).metrics["KID"]
    assert found.left_out == {"sFID": "the stored statistics hold no mu_s and sigma_s"}
    assert set(found.floor) == set(found.metrics)


def test_without_a_reference_there_is_the_inception_score():
    found = evaluate(FAKE, None)
    assert list(found.metrics) == ["IS"]
    assert set(found.left_out) == set(DIGITS) - {"IS"} | {"floor"}


def test_features_are_used_again():
    extractor = TinyExtractor()
    real = extract_features(REAL, extractor, progress=False)
    for reference in (real, ReferenceSet(real)):
        found = evaluate_images(FAKE, reference, extractor, progress=False)
        assert found == evaluate(FAKE, REAL)
    assert extractor.images_seen == 120 + 2 * 40


def test_small_counts_give_a_warning():
    assert "n = 40 is below 10,000" in evaluate(FAKE, REAL).table()
    many = extract_features(images(10_000, size=3), TinyExtractor(kinds=("pooled",)), progress=False, batch_size=10_000)
    found = evaluate(many, many.statistics)
    assert not found.notes
    assert "Warning" not in found.table()


@pytest.mark.parametrize(
    ("x", "reference", "options", "message"),
    [
        (images(9), REAL, {}, "9 images are too few; accepted: at least 10"),
        (FAKE, images(9), {}, "9 reference images are too few"),
        (FAKE, images(40, size=9), {}, "the images are 8x8 pixels and the reference's 9x9"),
        (FAKE, REAL, {"num_reference": 121}, "num_reference is 121; accepted: 10 to 120"),
        (FAKE, REAL, {"num_reference": 9}, "num_reference is 9; accepted: 10 to 120"),
        (FAKE, None, {"num_reference": 20}, "there are no reference images to draw from"),
    ],
)
def test_sets_that_do_not_fit(x, reference, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(x, reference, **options)


def test_features_of_another_extractor():
    real = extract_features(REAL, TinyExtractor(), progress=False)
    other = TinyExtractor(identity="other")
    for reference in (real, real.statistics):
        with pytest.raises(ValueError, match="features of different extractors: other and tiny"):
            evaluate(FAKE, reference, other)


def test_statistics_of_another_width(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="features of width 12 against statistics of width 5"):
        evaluate(FAKE, tmp_path / "a.npz")
