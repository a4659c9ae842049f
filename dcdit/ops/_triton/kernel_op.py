"""One wrapper that makes a kernel launcher a differentiable op, in eager mode and under torch.compile.

Under ``torch.compile`` (and for fake tensors) the registered ``torch.library`` op runs, so that tracing never breaks.
In eager mode the launcher is called directly, through an ``autograd.Function`` only if a gradient is wanted: the
dispatcher boundary of a custom op costs tens of microseconds, which a small model at batch 1 would notice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcdit.ops.autograd import first_derivative_only

_PLAIN = (Tensor, torch.nn.Parameter)


class KernelOp:
    """A launcher registered as ``torch.ops.dcdit.<name>``.

    Args:
        name: op name inside the ``dcdit`` namespace.
        launcher: host function with annotated arguments (Tensor, Tensor | None, int, float, bool) that returns a new
            tensor or a tuple of them; absent results are empty tensors, never None.
        fake: same signature, returns empty tensors of the right shape and dtype.
    """

    def __init__(self, name: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.launcher = launcher
        self.op = torch.library.custom_op(f"dcdit::{name}", launcher, mutates_args=())
        self.op.register_fake(fake)
        self._function: type[torch.autograd.Function] | None = None

    def differentiate(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> "KernelOp":
        """Attach a backward: ``setup_context(ctx, inputs, output)``, ``backward(ctx, *grads)`` as in torch.library."""
        self.op.register_autograd(backward, setup_context=setup_context)
        body = {
            "forward": staticmethod(self.launcher),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(first_derivative_only(backward)),
        }
        self._function = type(self.launcher.__name__, (torch.autograd.Function,), body)
        return self

    def __call__(self, *args: Any) -> Any:
        if _holds_float64(args):
            raise TypeError(
                f"{self.op._name} has a float64 argument; the triton backend accepts float32, bfloat16, float16: "
                "use dcdit.ops.use_backend('torch') or 'reference'"
            )
        if torch.compiler.is_compiling() or _traced(args):
            return self.op(*args)
        if self._function is not None and torch.is_grad_enabled() and _wants_grad(args):
            return self._function.apply(*args)
        return self.launcher(*args)


def _holds_float64(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)


def _traced(args: tuple[Any, ...]) -> bool:
    """Fake and functional tensors belong to a trace, which must see the registered op."""
    return any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in args)


def _wants_grad(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def unit_stride(rows: Tensor) -> Tensor:
    """Rows a kernel can walk: any row stride, elements side by side; anything else is copied."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
