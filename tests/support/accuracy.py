"""How accurate a backend must be: beside the definition in float64, at most twice as wrong as the definition itself.

The reference runs twice on the same inputs, in float64 and in the dtype of the inputs. The difference of the two is the
error that plain PyTorch makes at this dtype. Outputs and gradients of a backend may have at most twice this error.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from support.inputs import randn
from torch import Tensor

from dcdit.ops import TokenSelection, boundary_prob_predictability, reference, use_backend

ULPS_FLOOR = 2
"""Errors below this many ulps of the largest value always pass: plain PyTorch may have no error at all, by luck."""


def to_float64(value: Any) -> Any:
    """A detached float64 copy of a float tensor; everything else as it is."""
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def differentiate(
    fn: Callable[..., Any], args: tuple[Any, ...], seed: int = 7
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``fn(*args)``, and the gradients of all float tensors among ``args`` for fixed random cotangents."""
    args = tuple(
        # A detached alias keeps the strides of the argument.
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    result = fn(*args)
    outputs = list(result) if isinstance(result, tuple) else [result]
    cotangents = [
        randn(*out.shape, seed=seed + i).to(args_dtype(leaves)).to(device=out.device, dtype=out.dtype)
        for i, out in enumerate(outputs)
    ]
    differentiable = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in differentiable], leaves, [c for _, c in differentiable], allow_unused=True
    )
    return [out.detach() for out in outputs], list(grads)


def args_dtype(leaves: list[Tensor]) -> torch.dtype:
    """The narrowest dtype of the arguments: cotangents of this dtype are exact in every run."""
    return min((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)


def reference64(fn: Callable[..., Any], *args: Any, seed: int = 7) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients of the reference in float64, on inputs and cotangents that every dtype can hold."""
    return differentiate(fn, tuple(to_float64(a) for a in args), seed)


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
    seed: int = 7,
    terms: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Outputs and all gradients of a public operation on a backend, against its twin in ``reference``.

    ``terms`` maps the index of a float argument to the ``terms`` of its gradient in :func:`assert_close_to_reference`.
    """
    twin = getattr(reference, op.__name__)
    outputs64, grads64 = reference64(twin, *args, seed=seed)
    outputs32, grads32 = differentiate(twin, args, seed)
    with use_backend(backend):
        outputs, grads = differentiate(op, args, seed)
    assert len(outputs) == len(outputs64)
    for i, triple in enumerate(zip(outputs, outputs64, outputs32, strict=True)):
        assert_close_to_reference(*triple, name=f"output {i}")
    for i, (actual, exact, same) in enumerate(zip(grads, grads64, grads32, strict=True)):
        if exact is None or same is None:
            assert actual is None or not actual.any(), f"gradient {i} should not exist"
            continue
        assert actual is not None, f"gradient {i} is missing"
        assert_close_to_reference(actual, exact, same, name=f"gradient {i}", terms=terms.get(i, 0.0))


def check_predictability(*args: Any, backend: str = "torch") -> None:
    """:func:`check_against_reference` of the predictability boundary, where the gradient of out_bias is one sum."""
    p = reference.boundary_prob_predictability(*(to_float64(a) for a in args))
    terms = {4: float((randn(*p.shape, seed=7).to(p).abs() * p * (1 - p)).sum())}
    check_against_reference(boundary_prob_predictability, *args, backend=backend, terms=terms)


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
        outputs64, grads64 = reference64(twin, *args)
        outputs32, grads32 = differentiate(twin, args)
        with use_backend(backend):
            outputs, grads = differentiate(op, args)
        triples = zip(outputs + grads, outputs32 + grads32, outputs64 + grads64, strict=True)
        squares.append([[float((x.double() - exact).square().mean()) for x in pair] for *pair, exact in triples])
    error, allowed = torch.tensor(squares).mean(0).sqrt().unbind(1)
    assert (error <= 2 * allowed).all(), f"errors {error.tolist()}, same-dtype PyTorch has {allowed.tolist()}"


def assert_same_selection(actual: TokenSelection, expected: TokenSelection) -> None:
    """Every field is equal, in dtype and shape too."""
    for name, got, wanted in zip(TokenSelection._fields, actual, expected, strict=True):
        if isinstance(wanted, Tensor):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), name
            assert torch.equal(got.cpu(), wanted.cpu()), f"{name}: {got.tolist()}, expected {wanted.tolist()}"
        else:
            assert got == wanted, f"{name}: {got}, expected {wanted}"
