"""Ratio loss: against the definition, groups, many partial sums, and tracing."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.accuracy import check_against_reference, differentiate
from support.inputs import random_probs

from dcdit import ops
from dcdit.kernels import launch
from dcdit.ops._triton import loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = ops.ratio_loss


@given(
    groups=st.integers(1, 20),
    group_size=st.integers(1, 3),
    length=st.integers(1, 50),
    pattern=st.sampled_from(["random", "ties", "none", "all", "extreme"]),
    target=st.sampled_from([1.001, 2.0, 4.0, 64.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@example(groups=40, group_size=1, length=1, pattern="random", target=4.0, dtype=torch.float32, seed=0)
def test_groups(
    groups: int, group_size: int, length: int, pattern: str, target: float, dtype: torch.dtype, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    p = random_probs(groups * group_size, length, pattern=pattern, seed=seed).to(device, dtype)
    check_against_reference(OP, p, p > 0.5, target, group_size, backend="triton")


@pytest.mark.parametrize("shape", [(6, 9), (48,)])
def test_whole_batch_and_packed(shape: tuple[int, ...], device: torch.device) -> None:
    p = random_probs(*shape).to(device)
    check_against_reference(OP, p, p > 0.5, 4.0, backend="triton")


@pytest.mark.parametrize("group_size", [None, 10])
def test_many_partial_sums(group_size: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "config_for", lambda *_: {"BLOCK": 4, "num_warps": 1})
    p = random_probs(20, 33).to(device)
    check_against_reference(OP, p, p > 0.5, 4.0, group_size, backend="triton")


def test_one_where_both_means_are_the_target(device: torch.device) -> None:
    mask = torch.tensor([[True, False, False, False]] * 6, device=device)
    p = torch.full((6, 4), 0.25, device=device)
    with ops.use_backend("triton"):
        torch.testing.assert_close(OP(p, mask, 4.0, 2).item(), 1.0)


def test_transposed_input(device: torch.device) -> None:
    p = random_probs(9, 6).to(device).t()
    check_against_reference(OP, p, p > 0.5, 4.0, 3, backend="triton")


def test_nan_is_not_hidden(device: torch.device) -> None:
    p = random_probs(4, 9).to(device)
    p[2, 3] = float("nan")
    with ops.use_backend("triton"):
        assert OP(p, p > 0.5, 4.0, 2).isnan()


def test_float64_is_refused(device: torch.device) -> None:
    p = random_probs(4, 9).to(device).double()
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        OP(p, p > 0.5, 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype: torch.dtype, device: torch.device) -> None:
    p = random_probs(4, 9).to(device, dtype)
    torch.library.opcheck(loss._loss.op._opoverload, (p.requires_grad_(), p.detach() > 0.5, 4.0, 2))


@pytest.mark.parametrize("group_size", [None, 2])
def test_compiles_without_a_graph_break(group_size: int | None, device: torch.device) -> None:
    p = random_probs(4, 9).to(device)
    args = (p, p > 0.5, 4.0, group_size)
    with ops.use_backend("triton"):
        eager = differentiate(OP, args)
        traced = differentiate(torch.compile(OP, fullgraph=True, backend="aot_eager"), args)
    for actual, wanted in zip(itertools.chain(*traced), itertools.chain(*eager), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
