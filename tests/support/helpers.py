"""What the operator tests share: inputs, the float64 reference, and the tolerance rule."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dcdit.ops import TokenSelection, boundary_prob_predictability, reference, select_tokens, use_backend

ULPS_FLOOR = 2
"""A bound of twice zero would ask for luck: errors below this many ulps of the largest value always pass."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_probs(*shape: int, pattern: str = "random", keep: float = 0.25, seed: int = 0) -> Tensor:
    """float32 probabilities of one pattern.

    ``random``: about ``keep`` of them above 0.5. ``ties``: multiples of 1/8, exact 0.5 among them. ``one``: one per row
    above 0.5. ``none``: all below. ``all``: all above. ``extreme``: exactly 0 or 1. ``long``: the first row keeps all,
    the others one.
    """
    rng = generator(seed)
    low, high = (torch.rand(shape, generator=rng) * 0.49 + offset for offset in (0.005, 0.505))
    if pattern == "random":
        return torch.where(torch.rand(shape, generator=rng) < keep, high, low)
    if pattern == "ties":
        return torch.randint(0, 9, shape, generator=rng) / 8.0
    if pattern == "extreme":
        return torch.randint(0, 2, shape, generator=rng).float()
    if pattern == "none":
        return low
    if pattern == "all":
        return high
    if pattern == "one":
        index = torch.randint(0, shape[-1], (*shape[:-1], 1), generator=rng)
        return low.scatter(-1, index, 0.75)
    if pattern == "long":
        low[..., 0, :] = high[..., 0, :]
        return low
    raise ValueError(f"unknown pattern {pattern!r}")


def random_cu_seqlens(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_selection(
    *shape: int, pattern: str = "random", seed: int = 0, **kwargs: Any
) -> tuple[Tensor, TokenSelection]:
    """Probabilities and the reference's selection of them."""
    p = random_probs(*shape, pattern=pattern, seed=seed)
    with use_backend("reference"):
        return p, select_tokens(p, **kwargs)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def to_float64(value: Any) -> Any:
    """A detached float64 copy of a float tensor; everything else as it is."""
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def differentiate(
    fn: Callable[..., Any], args: tuple[Any, ...], seed: int = 7
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``fn(*args)`` and the gradients of all float tensor arguments under fixed random cotangents."""
    args = tuple(
        # A view of a fresh leaf would lose its strides; requires_grad_ on a detached alias keeps them.
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
    """The narrowest dtype of the arguments, so that every run can hold the same cotangents exactly."""
    return min((leaf.dtype for leaf in leaves), key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)


def reference64(fn: Callable[..., Any], *args: Any, seed: int = 7) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs and gradients of the reference in float64, on inputs and cotangents that every dtype can hold."""
    return differentiate(fn, tuple(to_float64(a) for a in args), seed)


def assert_close_to_reference(
    actual: Tensor, exact: Tensor, same_dtype: Tensor, name: str = "result", terms: float = 0.0
) -> None:
    """The error against float64 is at most twice the error of PyTorch at the same dtype.

    Where a result is a small difference of large numbers, the largest error of few values is luck. ``terms``, the
    largest sum of the magnitudes of those numbers, then takes the place of the largest value in the floor.
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
    """Of two compiled kernels: with other outputs wanted, the compiler fuses other products."""
    ulps = 8 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, other, rtol=ulps, atol=ulps * float(other.abs().max()))


def check_against_reference(
    op: Callable[..., Any],
    *args: Any,
    backend: str = "torch",
    seed: int = 7,
    terms: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Forward and all gradients of one public operation on a backend against its twin in ``reference``.

    ``terms`` maps the number of a float argument to the magnitudes behind its gradient (see
    :func:`assert_close_to_reference`).
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
    """:func:`check_against_reference` of the predictability boundary: its last bias has one sum for a gradient."""
    p = reference.boundary_prob_predictability(*(to_float64(a) for a in args))
    terms = {4: float((randn(*p.shape, seed=7).to(p).abs() * p * (1 - p)).sum())}
    check_against_reference(boundary_prob_predictability, *args, backend=backend, terms=terms)


def check_rms_against_reference(
    op: Callable[..., Any], make_args: Callable[[int], tuple[Any, ...]], seeds: int = 20, backend: str = "torch"
) -> None:
    """The same bound on the root mean square error over many inputs: where a result is one number, the error of one
    run is luck."""
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
