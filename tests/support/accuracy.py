"""How accurate a backend must be: beside the definition in float64, at most twice as wrong as the definition itself.

The reference runs twice on the same inputs and the same output gradients, in float64 and in the dtype of the inputs.
The difference of the two is the error that plain PyTorch makes at this dtype. Outputs and gradients of a backend may
have at most twice this error.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from support.inputs import randn
from torch import Tensor

from dcdit.ops import TokenSelection, reference, use_backend
from dcdit.profiling.workloads import Workload

ULPS_FLOOR = 2
"""Errors below this many ulps of the largest value always pass: plain PyTorch may have no error at all, by luck."""


def is_float(value: Any) -> bool:
    """Whether it is a float tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def to_float64(value: Any) -> Any:
    """A detached float64 copy of a float tensor; everything else as it is."""
    return value.detach().double() if is_float(value) else value


def cotangent(output: Tensor, args: tuple[Any, ...], number: int = 0) -> Tensor:
    """Random numbers for the gradient of output ``number``, the same in float64 and in the dtypes of ``args``.

    Every float dtype among ``args`` holds them: they are rounded to one after the other, the coarsest first.
    """
    values = randn(*output.shape, seed=7 + number)
    for dtype in sorted({a.dtype for a in args if is_float(a)}, key=lambda dtype: -torch.finfo(dtype).eps):
        values = values.to(dtype)
    return values.to(output)


def differentiate(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    wanted: Sequence[int] | None = None,
    rounded_for: tuple[Any, ...] | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``fn(*args)``, and the gradients of its float tensors for the :func:`cotangent` of each output.

    Args:
        fn: the function.
        args: its arguments.
        wanted: numbers of the arguments whose gradients are wanted; None wants those of all float tensors.
        rounded_for: the arguments whose dtypes hold the cotangents; None: ``args``.
    """
    if wanted is None:
        wanted = [i for i, a in enumerate(args) if is_float(a)]
    # A detached alias keeps the strides of the argument.
    own = tuple(a.detach().requires_grad_(i in wanted) if is_float(a) else a for i, a in enumerate(args))
    result = fn(*own)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if not wanted:
        return outputs, []
    used = [i for i, output in enumerate(outputs) if output.requires_grad]
    grads = torch.autograd.grad(
        [outputs[i] for i in used],
        [own[i] for i in wanted],
        [cotangent(outputs[i], args if rounded_for is None else rounded_for, i) for i in used],
        allow_unused=True,
    )
    return [out.detach() for out in outputs], list(grads)


def reference64(
    fn: Callable[..., Any], args: tuple[Any, ...], wanted: Sequence[int] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients in float64, for the inputs and the cotangents of a run in the dtypes of ``args``."""
    return differentiate(fn, tuple(to_float64(a) for a in args), wanted, rounded_for=args)


def assert_close_to_reference(
    actual: Tensor, exact: Tensor, same_dtype: Tensor, name: str = "result", terms: float = 0.0
) -> None:
    """The error against float64 is at most twice the error of PyTorch at the same dtype.

    Where a result is a small difference of large numbers, the largest error among few values is luck. ``terms`` is then
    the largest sum of the magnitudes of these numbers. It takes the place of the largest value in the floor.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    if actual.numel() == 0:
        return
    exact = exact.to(actual.device)
    error, allowed = (float((x.double() - exact).abs().max()) for x in (actual, same_dtype.to(actual.device)))
    floor = ULPS_FLOOR * torch.finfo(actual.dtype).eps * max(terms, float(exact.abs().max()))
    assert error <= 2 * allowed + floor, f"{name}: error {error:.3e}, same-dtype PyTorch has {allowed:.3e}"


def assert_equal_but_rounding(actual: Tensor, other: Tensor) -> None:
    """Two kernels compiled for different outputs may differ by rounding: the compiler fuses other products."""
    ulps = 8 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, other, rtol=ulps, atol=ulps * float(other.abs().max()))


def check_against_reference(
    op: Callable[..., Any],
    *args: Any,
    backend: str = "torch",
    terms: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Outputs and all gradients of a public operation on a backend, against its twin in ``reference``.

    ``terms`` maps the name of an argument to the ``terms`` of its gradient in :func:`assert_close_to_reference`.
    """
    arguments = dict(zip(inspect.signature(op).parameters, args, strict=False))
    _check(op, getattr(reference, op.__name__), arguments, None, backend, terms)


def check_workload(workload: Workload, backend: str) -> None:
    """The same of a workload of the registry: the outputs that it uses and the gradients that it wants.

    A selection has no gradients, and all of it must be equal. Noise has none either.
    """
    op, arguments = workload.operation.op, workload.arguments
    twin = getattr(reference, op.__name__)
    if not workload.operation.differentiable:
        with use_backend(backend):
            actual = op(**arguments)
        expected = twin(**arguments)
        if isinstance(expected, Tensor):
            assert_close_to_reference(actual, expected.double(), expected)
        else:
            assert_same_selection(actual, expected)
        return

    def positional(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: workload.used(fn(**dict(zip(arguments, args, strict=True))))

    wanted = [name for name, a in arguments.items() if is_float(a) and a.requires_grad]
    _check(positional(op), positional(twin), arguments, wanted, backend)


def _check(
    op: Callable[..., Any],
    twin: Callable[..., Any],
    arguments: Mapping[str, Any],
    wanted: Sequence[str] | None,
    backend: str,
    terms: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """``op`` and ``twin`` take the values of ``arguments`` by position. ``wanted`` None: all gradients that exist."""
    names = [name for name, a in arguments.items() if is_float(a)] if wanted is None else wanted
    args, numbers = tuple(arguments.values()), [list(arguments).index(name) for name in names]
    outputs64, grads64 = reference64(twin, args, numbers)
    same_outputs, same_grads = differentiate(twin, args, numbers)
    with use_backend(backend):
        outputs, grads = differentiate(op, args, numbers)
    for i, triple in enumerate(zip(outputs, outputs64, same_outputs, strict=True)):
        assert_close_to_reference(*triple, name=f"output {i}")
    if "out_bias" in names:
        # The gradient of this bias is one number, a small difference of large sums.
        p = outputs64[0]
        terms = {**terms, "out_bias": float((cotangent(p, args).abs() * p * (1 - p)).sum())}
    for name, actual, exact, same in zip(names, grads, grads64, same_grads, strict=True):
        if exact is None and wanted is None:
            # Without images there are only padding rows, and nothing depends on the tokens.
            assert actual is None or not actual.any(), f"gradient of {name} should not exist"
            continue
        assert actual is not None and exact is not None and same is not None, f"gradient of {name} is missing"
        assert_close_to_reference(actual, exact, same, f"gradient of {name}", terms.get(name, 0.0))


def check_rms_against_reference(
    op: Callable[..., Any], make_args: Callable[[int], tuple[Any, ...]], seeds: int = 20, backend: str = "torch"
) -> None:
    """The same bound on the root mean square error over many inputs, without a floor.

    For results that are one number: there the error of one run is luck.
    """
    twin = getattr(reference, op.__name__)
    squares = []
    for seed in range(seeds):
        args = make_args(seed)
        outputs64, grads64 = reference64(twin, args)
        same_outputs, same_grads = differentiate(twin, args)
        with use_backend(backend):
            outputs, grads = differentiate(op, args)
        triples = zip(outputs + grads, same_outputs + same_grads, outputs64 + grads64, strict=True)
        squares.append([[float((x.double() - exact).square().mean()) for x in pair] for *pair, exact in triples])
    error, allowed = torch.tensor(squares).mean(0).sqrt().unbind(1)
    assert (error <= 2 * allowed).all(), f"errors {error.tolist()}, same-dtype PyTorch has {allowed.tolist()}"


def assert_same_selection(actual: TokenSelection, expected: TokenSelection) -> None:
    """Every field is equal, in dtype and shape too."""
    for name, got, wanted in zip(TokenSelection._fields, actual, expected, strict=True):
        if isinstance(wanted, TokenSelection):
            assert_same_selection(got, wanted)
        elif isinstance(wanted, Tensor):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
            assert torch.equal(got.cpu(), wanted.cpu()), f"{name}: {got.tolist()}, expected {wanted.tolist()}"
        else:
            assert got == wanted, f"{name}: {got}, expected {wanted}"
