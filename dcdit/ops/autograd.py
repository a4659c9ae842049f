"""What both fast backends say where their gradients end."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an ``autograd.Function`` that refuses to be differentiated again.

    torch's own ``once_differentiable`` fails only where a second gradient reaches it, and ``torch.autograd.grad`` with
    given inputs walks around it: what is missing would be left out of the result without a word.

    Raises:
        RuntimeError: gradients of gradients were asked for (``create_graph=True``).
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # in a backward: with create_graph=True alone
            raise RuntimeError(
                "this dcdit operation has no second derivative (create_graph=True) on the triton and torch backends; "
                "dcdit.ops.use_backend('reference') has one"
            )
        return backward(ctx, *grads)

    return checked
