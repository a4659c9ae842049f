"""Functions that the compiler must not look into."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from dcdit.ops.autocast import without_autocast
from dcdit.ops.namespace import add_op_namespace_prefix


def as_custom_op(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function one operator under ``torch.compile``; in eager mode it stays a plain call.

    For functions that loop over slices or leave a loop early: tracing would unroll the loop or break the graph.

    Args:
        fake: same signature; returns empty tensors of the right shape, strides and dtype.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def operator(*args: Any) -> Any:
            with without_autocast(args[0]):  # a compiled backward may run under autocast
                return fn(*args)

        name = add_op_namespace_prefix(f"torch_{fn.__name__.lstrip('_')}")
        op = torch.library.custom_op(name, operator, mutates_args=())
        op.register_fake(fake)

        def call(*args: Any) -> Any:
            return op(*args) if torch.compiler.is_compiling() else fn(*args)

        return call

    return decorate
