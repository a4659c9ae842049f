"""NamedTuples taken apart for torch.library and autograd, and put together again."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.ops._triton.nested import builder, leaf_types, leaves, save, saved


class Inner(NamedTuple):
    x: Tensor
    count: int


class Outer(NamedTuple):
    first: Tensor | None
    inner: Inner
    grid: tuple[int, int]


def test_leaves_make_the_value_again() -> None:
    value = Outer(None, Inner(torch.ones(2), 3), (4, 5))
    assert [name for name, _ in leaf_types(Outer, "")] == ["first", "x", "count", "grid_0", "grid_1"]
    flat = leaves(value)
    assert flat[:1] + flat[2:] == [None, 3, 4, 5]
    again = builder(Outer)(iter(flat))
    assert isinstance(again, Outer) and isinstance(again.inner, Inner)
    assert again == value


def test_saved_values_come_back_and_autograd_alone_holds_their_tensors() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, inner: Inner) -> Tensor:
            save(ctx, x, inner, None)
            return x * inner.x * inner.count

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            _, inner, nothing = saved(ctx)
            assert nothing is None and isinstance(inner, Inner)
            kept.append(ctx)
            return grad * inner.x * inner.count, None

    kept: list[Any] = []
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(Scale.apply(x, Inner(torch.full((2,), 2.0), 3)).sum(), x)
    assert grad.tolist() == [6.0, 6.0]
    assert not any(isinstance(leaf, Tensor) for leaf in leaves(kept[0].without_tensors))
