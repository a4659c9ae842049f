"""The error of the fast backends where a gradient of a gradient is asked for."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the backward of an ``autograd.Function`` so that it cannot be differentiated again.

    torch's own ``once_differentiable`` raises only where a second gradient reaches it. ``torch.autograd.grad`` with
    given inputs does not reach it, and would silently return an incomplete result.

    Raises:
        RuntimeError: the backward runs with ``create_graph=True``.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # in a backward this means create_graph=True
            raise RuntimeError(
                "this dcdit operation has no second derivative (create_graph=True) on the triton and torch backends; "
                "dcdit.ops.use_backend('reference') has one"
            )
        return backward(ctx, *grads)

    return checked
