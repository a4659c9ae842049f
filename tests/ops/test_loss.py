"""Ratio loss against the float64 definition."""

import pytest
import torch
from support.accuracy import check_against_reference
from support.inputs import random_probs

from dcdit import ops


@pytest.mark.parametrize("pattern", ["random", "ties", "all", "none"])
@pytest.mark.parametrize("group_size", [None, 1, 2, 8])
def test_against_reference(pattern: str, group_size: int | None) -> None:
    p = random_probs(8, 49, pattern=pattern)
    for target in (1.5, 4.0, 16.0):
        check_against_reference(ops.ratio_loss, p, p > 0.5, target, group_size)


def test_packed_and_half() -> None:
    p = random_probs(100)
    check_against_reference(ops.ratio_loss, p, p > 0.5, 4.0)
    loss = ops.ratio_loss(p.bfloat16(), p > 0.5, 4.0)
    assert loss.dtype == torch.float32
    check_against_reference(ops.ratio_loss, random_probs(4, 1000).bfloat16(), random_probs(4, 1000) > 0.5, 4.0)


def test_groups_are_averaged() -> None:
    p = random_probs(6, 20)
    parts = [ops.ratio_loss(part, part > 0.5, 4.0) for part in p.split(2)]
    torch.testing.assert_close(ops.ratio_loss(p, p > 0.5, 4.0, group_size=2), torch.stack(parts).mean())


def test_pushes_towards_the_target() -> None:
    for keep, sign in ((0.9, 1), (0.05, -1)):
        p = random_probs(2, 400, keep=keep).requires_grad_()
        (grad,) = torch.autograd.grad(ops.ratio_loss(p, p > 0.5, 4.0), p)
        assert (grad * sign > 0).all()
