"""One wrapper that makes a kernel launcher a differentiable op, in eager mode and under torch.compile.

In eager mode the launcher is called directly, through an ``autograd.Function`` only if a gradient is wanted: the
dispatcher boundary of a custom op costs tens of microseconds, which a small model at batch 1 would notice. Under
``torch.compile`` (and for fake tensors) the registered ``torch.library`` op runs, so that tracing never breaks.

A launcher may group its arguments and results in NamedTuples. The registered op takes and returns their leaves.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from dcdit.ops._triton.nested import builder, leaf_types, leaves, parts
from dcdit.ops.autograd import apply, first_derivative_only
from dcdit.ops.namespace import add_op_namespace_prefix
from dcdit.ops.sizes import known_true

_PLAIN = frozenset([Tensor, torch.nn.Parameter])
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class KernelOp:
    """A launcher registered as ``torch.ops.dcdit.<name>``.

    Args:
        name: op name inside the ``dcdit`` namespace.
        launcher: host function that returns a new tensor or a tuple of them. Its annotations make the schema of the op:
            Tensor, int, float, bool and torch.dtype, each also ``| None``, and NamedTuples of these. Tensors in a
            NamedTuple among the results are for the backward and carry no gradient. A result that is not wanted may be
            None; the registered op returns an empty tensor in its place.
        fake: same arguments, returns empty tensors of the right shape and dtype.
    """

    def __init__(self, name: str, launcher: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.launcher = launcher
        self._arguments = get_type_hints(launcher)
        self._result = self._arguments.pop("return")
        self._argument_builders = [builder(kind) for kind in self._arguments.values()]
        self.op = torch.library.custom_op(add_op_namespace_prefix(name), self._on_leaves(launcher), mutates_args=())
        self.op.register_fake(self._on_leaves(fake))
        self._function: type[torch.autograd.Function] | None = None

    def differentiate(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> "KernelOp":
        """Attach a backward: ``setup_context(ctx, inputs, output)``, ``backward(ctx, *grads)`` as in torch.library.

        ``inputs`` and ``output`` are what the launcher takes and returns. ``backward`` gets a gradient for each part of
        ``output`` and returns one for each of ``inputs``; for a NamedTuple both are None or hold nothing else.
        """
        self._register_autograd(setup_context, backward)
        body = {
            "forward": staticmethod(self.launcher),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(first_derivative_only(backward)),
        }
        self._function = type(self.launcher.__name__, (torch.autograd.Function,), body)
        return self

    def __call__(self, *args: Any) -> Any:
        """What the launcher returns; its leaves while a trace is made."""
        in_trace, transformed, requires_grad = torch.compiler.is_compiling(), False, False
        for a in args:  # one pass: this is much of what a small call costs the host
            if not isinstance(a, Tensor):
                continue
            if a.dtype is torch.float64:
                raise TypeError(
                    f"{self.op._name} has a float64 argument; the triton backend accepts float32, bfloat16, float16: "
                    "use dcdit.ops.use_backend('torch') or 'reference'"
                )
            if in_trace or type(a) not in _PLAIN:
                in_trace = True  # fake and functional tensors belong to one
            elif _is_wrapped(a):
                transformed = True
            elif a.requires_grad:
                requires_grad = True
        if in_trace:
            return self.op(*leaves(args))  # a trace must see the registered op
        if transformed:
            # A tensor of torch.func has no memory of its own. A backward may keep it until after the transform.
            if self._function is not None and torch._C._are_functorch_transforms_active():
                return self._function.apply(*args)
            return self.op(*leaves(args))
        if requires_grad and self._function is not None and torch.is_grad_enabled():
            return apply(self._function, *args)
        return self.launcher(*args)

    def _on_leaves(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The launcher or its fake with a signature that ``torch.library`` accepts."""
        flat = not any(parts(kind) for kind in self._arguments.values())
        if flat and all(kind is Tensor for _, kind in parts(self._result)):
            return function

        def call(*values: Any) -> Any:
            result = function(*self._nest_arguments(values))
            if not isinstance(result, tuple):
                return result
            like = next(value for value in values if isinstance(value, Tensor))
            return tuple(like.new_empty(0) if leaf is None else leaf for leaf in leaves(result))

        types = [leaf for name, kind in self._arguments.items() for leaf in leaf_types(kind, name)]
        anywhere = inspect.Parameter.POSITIONAL_OR_KEYWORD
        inputs = [inspect.Parameter(name, anywhere, annotation=kind) for name, kind in types]
        outputs: Any = (Tensor,) * len(leaf_types(self._result, ""))
        output = tuple[outputs] if parts(self._result) else Tensor
        call.__signature__ = inspect.Signature(inputs, return_annotation=output)  # type: ignore[attr-defined]
        return call

    def _register_autograd(self, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
        build_result = builder(self._result)
        many = bool(parts(self._result))
        counts = [len(leaf_types(kind, "")) for kind in self._arguments.values()]

        def setup_on_leaves(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if many:
                output = build_result(iter(output))
                for_backward = leaves(tuple(part for part in output if isinstance(part, tuple)))
                if for_backward:
                    without_gradient(ctx, *for_backward)
            setup_context(ctx, self._nest_arguments(inputs), output)

        def backward_on_leaves(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            results = backward(ctx, *(build_result(iter(grads)) if many else grads))
            return tuple(grad for grad, count in zip(results, counts, strict=True) for _ in range(count))

        self.op.register_autograd(backward_on_leaves, setup_context=setup_on_leaves)

    def _nest_arguments(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        rest = iter(values)
        return tuple([build(rest) for build in self._argument_builders])


def wants_gradient(*args: Tensor | None) -> bool:
    """Whether the result of a call with these arguments may be differentiated, also by ``torch.func``."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in args)


def without_gradient(ctx: Any, *outputs: Tensor) -> None:
    """Outputs that only the backward reads, such as statistics, have no gradient.

    Autograd must not allocate zeros for one either, nor for an output that nothing reads, such as the sum of the last
    block.
    """
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def unit_stride(rows: Tensor) -> Tensor:
    """Rows that a kernel can read: any stride between rows, elements side by side; other tensors are copied."""
    return rows if known_true(rows.stride(-1) == 1) else rows.contiguous()


def unit_strides(*tensors: Tensor) -> list[Tensor]:
    """The same of several tensors, at a lower cost."""
    if torch.compiler.is_compiling():
        return [unit_stride(rows) for rows in tensors]
    return [rows if rows.stride(-1) == 1 else rows.contiguous() for rows in tensors]
