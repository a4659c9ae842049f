"""Names that changed still work for one version: the same thing under both, and a warning that says the new one."""

import pytest
import torch
from support.inputs import randn, random_cu_seqlens, random_selection

from dcdit import evaluate, nn, ops


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("DiTBlock", "PackedDiTBlock"),
        ("FinalLayer", "PackedFinalLayer"),
        ("Pending", "PendingResidual"),
        ("Sequences", "VarlenMeta"),
    ],
)
def test_renamed_modules(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"dcdit.nn.{old} is now dcdit.nn.{new}"):
        assert getattr(nn, old) is getattr(nn, new)


@pytest.mark.parametrize(
    ("old", "new"), [("Figure", "Metric"), ("Reference", "ReferenceSet"), ("extract", "extract_features")]
)
def test_renamed_in_evaluate(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"dcdit.evaluate.{old} is now dcdit.evaluate.{new}"):
        assert getattr(evaluate, old) is getattr(evaluate, new)


def test_renamed_field_of_an_evaluation() -> None:
    found = evaluate.Evaluation({"FID": evaluate.Metric(1.0, 10)}, {}, {}, (), None)
    with pytest.warns(DeprecationWarning, match=r"Evaluation.figures is now Evaluation.metrics"):
        assert found.figures is found.metrics
    assert list(found.to_dict()) == ["figures", "floor", "left_out", "notes", "extractor"], "the names in metrics.json"


def test_a_name_that_never_was_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match=r"'dcdit\.nn' has no attribute 'TreeBlock'"):
        _ = nn.TreeBlock


def test_renamed_field_of_a_selection() -> None:
    _, sel = random_selection(2, 9)
    with pytest.warns(DeprecationWarning, match="packed_rows"):
        assert sel.slots is sel.packed_rows


def test_renamed_argument_of_the_attention() -> None:
    q, k, v = (randn(6, 2, 8, seed=seed) for seed in range(3))
    with pytest.warns(DeprecationWarning, match="padding"):
        out = ops.varlen_attention(q, k, v, random_cu_seqlens(2, 3), 3, slack=True)
    assert torch.equal(out, ops.varlen_attention(q, k, v, random_cu_seqlens(2, 3), 3, padding=True))
