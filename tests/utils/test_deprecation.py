"""Names that changed still work for one version: the same thing under both, and a warning that says the new one."""

import pytest
import torch
from support.helpers import randn, random_cu_seqlens, random_selection

from dcdit import nn, ops


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
