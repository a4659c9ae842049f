import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small import batch, small_dc_dit
from torch import Tensor

from dcdit import ops
from dcdit.nn import DenseDiTBlock, Modulation, PackedDiTBlock, StackedModulation, VarlenMeta
from dcdit.ops import checks

DIM, HEADS = 32, 4


def twins() -> tuple[PackedDiTBlock, DenseDiTBlock]:
    torch.manual_seed(0)
    packed, dense = PackedDiTBlock(DIM, HEADS, 4.0).double(), DenseDiTBlock(DIM, HEADS, 4.0).double()
    dense.load_state_dict(packed.state_dict())
    return packed, dense


def modulations(batch: int, depth: int) -> list[Modulation]:
    stacked = StackedModulation(DIM, depth).double()
    return stacked(torch.randn(batch, DIM, generator=torch.Generator().manual_seed(2)).double())


@pytest.mark.parametrize("lengths", [(3, 1, 6), (4, 4)])
def test_packed_chain_is_the_dense_block_on_each_image(lengths: tuple[int, ...]) -> None:
    """Two blocks with the pending branch between them, against each image on its own."""
    packed, dense = twins()
    first, second = modulations(len(lengths), depth=2)
    tokens = torch.randn(sum(lengths), DIM).double()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    varlen = VarlenMeta(cu_seqlens, max(lengths), padding=False)

    x, pending = packed(tokens, None, first, varlen)
    x, pending = packed(x, pending, second, varlen)
    found = ops.gated_add(x, *pending, cu_seqlens)

    for i, image in enumerate(tokens.split(lengths)):
        expected = image[None]
        for mod in (first, second):
            expected = dense(expected, Modulation(*(row[i : i + 1] for row in mod)))
        torch.testing.assert_close(found[cu_seqlens[i] : cu_seqlens[i + 1]], expected[0])


def test_dense_block_is_adaln_zero() -> None:
    _, dense = twins()
    (mod,) = modulations(2, depth=1)
    x = torch.randn(2, 5, DIM).double()

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def attention(x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in dense.qkv(x).chunk(3, dim=-1))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / (DIM // HEADS) ** 0.5).softmax(-1)
        return dense.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (row[:, None] for row in mod)
    y = x + gate * attention(norm(x) * (1 + scale) + shift)
    y = y + mlp_gate * dense.mlp(norm(y) * (1 + mlp_scale) + mlp_shift)
    torch.testing.assert_close(dense(x, mod), y)


def test_stacked_modulation_is_one_linear_per_block() -> None:
    torch.manual_seed(0)
    stacked = StackedModulation(DIM, depth=3)
    cond = torch.randn(2, DIM)
    for block, mod in enumerate(stacked(cond)):
        rows = slice(block * 6 * DIM, (block + 1) * 6 * DIM)
        expected = torch.nn.functional.linear(cond, stacked.linear.weight[rows], stacked.linear.bias[rows])
        torch.testing.assert_close(torch.cat(mod, dim=1), expected)
        # Views of one product, never copied.
        assert all(row.data_ptr() == mod[0].data_ptr() + i * DIM * 4 for i, row in enumerate(mod))


@pytest.mark.parametrize("options", [{}, {"capacity": 3 * 24}], ids=str)
def test_arguments_are_checked_once_and_not_in_every_block(
    options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks cost the host more than the launches. All of them are functions of one module, and none calls another."""
    calls: Counter[str] = Counter()

    def counted(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return check(*args, **kwargs)

        return call

    for name, check in inspect.getmembers(checks, inspect.isfunction):
        if name != "value_checks_enabled":
            monkeypatch.setattr(checks, name, counted(name, check))
    found = {}
    for depth in (1, 4):
        model = small_dc_dit(grid=(4, 6), depth=depth)
        calls.clear()
        with torch.no_grad():
            model(*batch(model.config), **options)
        found[depth] = Counter(calls)
    assert found[1] == found[4] and found[1].total() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 3, 9])}, "cu_seqlens has dtype torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}, "ends at 8; it must end at 9"),
        ({"max_seqlen": 5}, "max_seqlen is 5 but the longest sequence has 6"),
        ({"max_seqlen": torch.tensor(6)}, "max_seqlen is a Tensor"),
    ],
)
def test_the_first_block_of_a_chain_names_bad_arguments(change: dict[str, Any], message: str) -> None:
    packed, _ = twins()
    (mod,) = modulations(2, depth=1)
    tokens = torch.randn(9, DIM).double()
    varlen = VarlenMeta(torch.tensor([0, 3, 9], dtype=torch.int32), 6, padding=False)
    packed(tokens, None, mod, varlen)
    with pytest.raises((ValueError, TypeError), match=message):
        packed(tokens, None, mod, varlen._replace(**change))
    with pytest.raises(ValueError, match="shift has shape"):
        packed(tokens, None, mod._replace(attn_shift=mod.attn_shift[:1]), varlen)
