"""Autograd functions of the backends: how they are called, and what their gradients promise."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dcdit.ops.autocast import without_autocast

Results = tuple[Tensor | None, ...]


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` at the cost of a function without ``setup_context``.

    ``torch.func`` needs a separate ``setup_context``. For such a function, ``Function.apply`` binds the arguments to
    the signature of the forward in every call, which takes longer than the rest of a small operation. Only a transform
    of ``torch.func`` and the compiler need more than the call below.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the backward of an autograd function that autograd cannot differentiate again. It runs without autocast.

    Its gradients are right, whether or not they are part of a graph (``create_graph=True``, ``torch.func.grad``). Only
    a derivative of them is an error. torch's ``once_differentiable`` does not connect that error with the inputs, so
    ``torch.autograd.grad`` with given inputs would not reach it and would silently return an incomplete result.

    Raises:
        RuntimeError: in the backward of the gradients.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        with without_autocast(next(grad for grad in grads if grad is not None)):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
        causes = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        if not causes:
            return results
        return _without_derivative(results if isinstance(results, tuple) else (results,), causes)

    return checked


def _without_derivative(results: Results, causes: list[Tensor]) -> Results:
    """The results, as a function of ``causes`` that has no derivative."""
    found = [x for x in results if x is not None]
    if not found:
        return results
    wrapped = iter(_NoDerivative.apply(len(found), *found, *causes))
    return tuple(None if x is None else next(wrapped) for x in results)


class _NoDerivative(Function):
    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "this dcdit operation has no second derivative on the triton and torch backends; "
            "dcdit.ops.use_backend('reference') has one"
        )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, (N, M, K) and (N, K, P) -> (N, M, P). Its derivatives of every order are computed without autocast."""
    return apply(_MatMul, a, b)


class _MatMul(Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return matmul(grad, b.mT) if need_a else None, matmul(a.mT, grad) if need_b else None
