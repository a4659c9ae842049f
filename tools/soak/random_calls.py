"""Random calls of the operations: small sizes down to 0, any strides, dtypes and modes; the same for the same seed."""

import inspect
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection

SIZES = (0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 13, 16, 17, 24, 33, 40, 70)
SIDES = (0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 17)
"""Of grids. The longest are longer than the window of the smoothing."""
WIDTHS = (1, 2, 3, 4, 7, 8, 8, 16, 20, 33, 66)
SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3)
_KERNEL_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
EVERY_DTYPE = {"torch": (*_KERNEL_DTYPES, torch.float64), "triton": _KERNEL_DTYPES}
"""The dtypes that a backend has; a likely one stands there twice."""
LAYOUTS = 6
LARGE_SCALES = (1e-14, 1e20, 1e30)
"""Of rows whose cosine is taken."""


class Call(NamedTuple):
    """An operation, its arguments, and how it is called and differentiated."""

    op: Callable[..., Any]
    args: tuple[Any, ...]
    without_gradient: tuple[int, ...] = ()
    """Numbers of the arguments whose gradient nobody wants."""
    cotangents: int = 0
    """The memory layout of what flows back, as in :func:`strided`."""
    autocast: bool = False
    """Whether all runs under autocast, which changes nothing."""


class Maker:
    """What random arguments are made of.

    Args:
        seed: of everything.
        dtypes: to choose from.
    """

    def __init__(self, seed: str, dtypes: tuple[torch.dtype, ...]) -> None:
        self.random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self._dtypes = dtypes

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def dtype(self) -> torch.dtype:
        return self.random.choice(self._dtypes)

    def dtypes(self, count: int) -> list[torch.dtype]:
        """Mostly one dtype for all, sometimes several."""
        if self.random.random() < 0.7:
            return [self.dtype()] * count
        return [self.dtype() for _ in range(count)]

    def size(self) -> int:
        return self.random.choice(SIZES)

    def lengths(self) -> list[int]:
        """Of a few sequences, which may be empty."""
        return [self.random.choice(SIZES) for _ in range(self.random.randrange(5))]

    def grid(self) -> tuple[int, int]:
        return self.random.choice(SIDES), self.random.choice(SIDES)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float | None = None) -> Tensor:
        """Normal numbers in random strides."""
        x = torch.randn(shape, generator=self._generator) * (self.random.choice(SCALES) if scale is None else scale)
        return self._strided(x.to(dtype or self.dtype()))

    def rows(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Rows whose cosine is taken: some of them zeros, tiny or huge."""
        x = torch.randn(shape, generator=self._generator)
        if dtype != torch.float16 and self.random.random() < 0.3:
            exponent = torch.rand((*shape[:-1], 1), generator=self._generator)
            x = torch.where(exponent < 0.3, x * self.random.choice(LARGE_SCALES), x)
        if self.random.random() < 0.2:
            x = torch.where(torch.rand((*shape[:-1], 1), generator=self._generator) < 0.3, 0.0, x)
        return self._strided(x.to(dtype))

    def _strided(self, x: Tensor) -> Tensor:
        return strided(x, self.random.randrange(LAYOUTS))

    def cu_seqlens(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def probabilities(self, *shape: int, dtype: torch.dtype) -> Tensor:
        kind, count = self.random.randrange(6), math.prod(shape)
        uniform = torch.rand(count, generator=self._generator)
        values = [
            uniform,
            (uniform * 9).floor() / 8,
            uniform.round(),
            torch.full((count,), 0.75),
            0.49 * uniform,
            0.5 + (uniform * 3 - 1).floor() * 2.0**-8,
        ][kind]
        return values.clamp(0, 1).view(shape).to(dtype)

    def mode(self, p: Tensor, lengths: list[int] | None = None) -> dict[str, Any]:
        """Keyword arguments of ``select_tokens``, for a grid batch or for sequences of these lengths."""
        found: dict[str, Any] = {}
        images, shortest = p.shape if lengths is None else (len(lengths), min(lengths, default=0))
        if self.random.random() < 0.25:
            found["always"] = self.mask(*p.shape)
        if lengths is None and self.random.random() < 0.25:
            found["extra_tokens"] = self.random.randint(1, 3)
        extra, kind = found.get("extra_tokens", 0), self.random.randrange(4)
        if kind == 0 and images and shortest:
            return {**found, "budget": extra + self.random.randint(1, shortest)}
        found["threshold"] = self.one_of(0.5, 0.5, 0.25, 0.0, 1.0)
        if kind == 1:
            found["drop_fraction"] = self.random.random() * 0.999
        if kind == 2:
            found["drop_fraction"] = torch.rand(images, generator=self._generator) * 0.999
        if self.random.random() < 0.4:
            found["capacity"] = images * (1 + extra) + self.random.randrange(60)
        if self.random.random() < 0.3:
            found["max_seqlen"] = 1 + extra + self.random.randrange(20)
        return found

    def mask(self, *shape: int) -> Tensor:
        """Of any share of the positions, none and all among them."""
        return torch.rand(shape, generator=self._generator) < self.one_of(-1.0, self.random.random(), 2.0)

    def grid_selection(self, grid: tuple[int, int]) -> tuple[Tensor, TokenSelection]:
        """Probabilities of a grid batch, and a selection of it; sometimes one in which images keep nothing."""
        images, length = self.random.randrange(4), grid[0] * grid[1]
        p = self.probabilities(images, length, dtype=self.dtype())
        if self.random.random() < 0.2:
            return p, ops.select_from_mask(self.mask(images, length), extra_tokens=self.one_of(0, 0, 2))
        mode = self.mode(p)
        if "budget" in mode:
            mode.pop("always", None)  # which may be more than that
        return p, ops.select_tokens(p, **mode)

    def any_selection(self) -> tuple[Tensor, TokenSelection]:
        """Of a grid batch, or of packed sequences."""
        if self.random.random() < 0.5:
            return self.grid_selection(self.grid())
        lengths = self.lengths()
        p = self.probabilities(sum(lengths), dtype=self.dtype())
        mode = self.mode(p, lengths)
        if "budget" in mode:
            mode.pop("always", None)
        return p, ops.select_tokens(p, self.cu_seqlens(lengths), **mode)

    def token(self) -> tuple[int, ...]:
        """Mostly a row, sometimes a number or several heads."""
        return self.one_of((), (2, 3), *((width,) for width in WIDTHS))

    def integers(self, *shape: int) -> Tensor:
        """Of any dtype and size."""
        dtype = self.one_of(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
        numbers = torch.randint(-(2**62), 2**62, shape, generator=self._generator)
        return self._strided(numbers > 0 if dtype == torch.bool else numbers.to(dtype))

    def packed(self, sel: TokenSelection, width: int, dtype: torch.dtype) -> Tensor:
        """(T, D) with NaN in padding rows."""
        rows = self.normal(sel.indices.shape[0], width, dtype=dtype)
        return torch.where((sel.indices >= 0)[:, None], rows, float("nan"))


def strided(x: Tensor, layout: int) -> Tensor:
    """The same numbers in another memory layout; of the last one, one slice in place of all."""
    if x.dim() < 2 or layout == 0:
        return torch.stack([x, x], -1)[..., 0] if x.dim() == 1 and layout else x
    if layout == 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == 2:
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == 3:
        return torch.cat([x, x], -1)[..., x.shape[-1] :]
    if layout == 4:
        return torch.stack([x, x], -1)[..., 0]
    return x[:1].expand(x.shape) if x.shape[0] else x


def random_call(operation: str, seed: str, dtypes: tuple[torch.dtype, ...]) -> Call:
    """A call of an operation, the same for the same seed."""
    make = Maker(seed, dtypes)
    call = MAKERS[operation](make)
    floats = [i for i, a in enumerate(call.args) if isinstance(a, Tensor) and a.is_floating_point()]
    unwanted = tuple(i for i in floats if make.random.random() < 0.5) if make.random.random() < 0.3 else ()
    return call._replace(
        without_gradient=unwanted,
        cotangents=make.random.randrange(LAYOUTS),
        autocast=make.random.random() < 0.2,
    )


def boundary_prob_cosine(make: Maker) -> Call:
    a, b = make.dtypes(2)
    width = make.one_of(*WIDTHS)
    if make.one_of(False, True):
        lengths = make.lengths()
        q, k = (make.rows(sum(lengths), width, dtype=dtype) for dtype in (a, b))
        return Call(ops.boundary_prob_cosine, (q, k, make.cu_seqlens(lengths)))
    shape = make.random.randrange(4), make.size(), width
    return Call(ops.boundary_prob_cosine, (make.rows(*shape, dtype=a), make.rows(*shape, dtype=b), None))


def boundary_prob_cosine2d(make: Maker) -> Call:
    a, b, of_weight = make.dtypes(3)
    grid, width = make.grid(), make.one_of(*WIDTHS)
    shape = make.random.randrange(4), grid[0] * grid[1], width
    weight = make.normal(width, 3, 3, dtype=of_weight, scale=make.one_of(0.1, 0.1, 1.0))
    return Call(
        ops.boundary_prob_cosine2d, (make.rows(*shape, dtype=a), make.rows(*shape, dtype=b), weight, grid)
    )  # fmt: skip


def boundary_prob_predictability(make: Maker) -> Call:
    groups, width = make.random.randint(1, 4), make.one_of(1, 2, 3, 8)
    channels, dtypes = groups * width, make.dtypes(2)
    features = make.normal(make.random.randrange(4), channels, *make.grid(), dtype=dtypes[0])
    parameters = [make.normal(channels, dtype=dtypes[1], scale=1.0) for _ in range(3)]
    bias = make.normal(dtype=dtypes[1], scale=1.0)
    return Call(ops.boundary_prob_predictability, (features, *parameters, bias, groups))


def group_norm_silu(make: Maker) -> Call:
    groups, width = make.random.randint(1, 4), make.one_of(1, 2, 3, 8)
    images, channels, (a, b) = make.random.randrange(4), groups * width, make.dtypes(2)
    height, length = make.grid()
    x = make.normal(images, channels, height, length, dtype=a) if make.one_of(False, True) else None
    x = make.normal(images, height * length, channels, dtype=a) if x is None else x
    weight, bias = (make.normal(channels, dtype=b, scale=1.0) for _ in range(2))
    shift = make.normal(images, channels, dtype=b, scale=1.0) if make.one_of(False, True) else None
    return Call(ops.group_norm_silu, (x, groups, weight, bias, shift))


def select_tokens(make: Maker) -> Call:
    shape, lengths = _source(make)
    p = make.probabilities(*shape, dtype=make.dtype())
    return _selecting(ops.select_tokens, p, lengths, make, make.mode(p, lengths))


def select_from_mask(make: Maker) -> Call:
    shape, lengths = _source(make)
    mask = make.mask(*shape)
    return _selecting(ops.select_from_mask, mask, lengths, make, make.mode(mask, lengths))


def _source(make: Maker) -> tuple[tuple[int, ...], list[int] | None]:
    """The shape of a grid batch, or of sequences and their lengths."""
    if make.one_of(False, True):
        return (make.random.randrange(5), make.size()), None
    lengths = make.lengths()
    return (sum(lengths),), lengths


def _selecting(op: Callable[..., Any], p: Tensor, lengths: list[int] | None, make: Maker, mode: dict[str, Any]) -> Call:
    """A call with those arguments of a mode that the operation has."""
    _, _, *others = inspect.signature(op).parameters.values()
    cu_seqlens = None if lengths is None else make.cu_seqlens(lengths)
    return Call(op, (p, cu_seqlens, *(mode.get(other.name, other.default) for other in others)))


def gather_tokens(make: Maker) -> Call:
    _, sel = make.any_selection()
    (a, b), token, source, bias = make.dtypes(2), make.token(), sel.mask.shape, None
    if sel.source_cu_seqlens is None and make.random.random() < 0.2:
        source = 1, sel.mask.shape[1]
    if make.random.random() < 0.2:
        return Call(ops.gather_tokens, (make.integers(*source, *token), sel, None))
    if sel.source_cu_seqlens is None and make.one_of(False, True):
        narrow = (*token[:-1], make.random.randint(1, token[-1])) if token else ()
        bias = make.normal(sel.mask.shape[1], *make.one_of(token, narrow), dtype=b)
    return Call(ops.gather_tokens, (make.normal(*source, *token, dtype=a), sel, bias))


def scatter_tokens(make: Maker) -> Call:
    _, sel = make.any_selection()
    if make.random.random() < 0.2:
        return Call(ops.scatter_tokens, (make.integers(sel.indices.shape[0], *make.token()), sel, make.one_of(0, 1)))
    token, rows = make.token(), make.packed(sel, 1, make.dtype())
    t = rows.view(-1, *[1] * len(token)) * make.normal(*token, dtype=rows.dtype)
    return Call(ops.scatter_tokens, (t, sel, make.one_of(0.0, 0.0, 1.0, -3.5)))


def _gate_and_residual(
    make: Maker, p: Tensor, sel: TokenSelection, width: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    gate = torch.where(p > 0.5, p, 1 - p).to(make.dtype()) if make.one_of(False, True) else None
    residual = make.normal(*sel.mask.shape, width, dtype=dtype) if make.one_of(False, True) else None
    return gate, residual


def dechunk_spatial(make: Maker) -> Call:
    grid, (a, b), width = make.grid(), make.dtypes(2), make.one_of(*WIDTHS)
    p, sel = make.grid_selection(grid)
    args = make.packed(sel, width, a), p, sel, grid, make.one_of(0.3, 1.0, 1.0, 2.0, 5.0)
    return Call(ops.dechunk_spatial, (*args, *_gate_and_residual(make, p, sel, width, b)))


def dechunk_ema(make: Maker) -> Call:
    (p, sel), (a, b), width = make.any_selection(), make.dtypes(2), make.one_of(*WIDTHS)
    return Call(ops.dechunk_ema, (make.packed(sel, width, a), p, sel, *_gate_and_residual(make, p, sel, width, b)))


def ratio_loss(make: Maker) -> Call:
    group_size, groups = make.random.randint(1, 3), make.random.randint(1, 3)
    p = make.probabilities(groups * group_size, make.random.randint(1, 40), dtype=make.dtype())
    args = p, p > 0.5, 1 + 10 * make.random.random()
    return Call(ops.ratio_loss, (*args, make.one_of(None, group_size)))


def _modulated(make: Maker, tokens: int, tables: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    lengths, width, dtypes = make.lengths(), make.one_of(*WIDTHS), make.dtypes(tokens + 1)
    rows = sum(lengths) + make.one_of(0, 0, 3)
    found = [make.normal(rows, width, dtype=dtype) for dtype in dtypes[:tokens]]
    return (
        found,
        [make.normal(len(lengths), width, dtype=dtypes[-1], scale=1.0) for _ in range(tables)],
        make.cu_seqlens(lengths),
    )


def modulated_layer_norm(make: Maker) -> Call:
    tokens, tables, cu_seqlens = _modulated(make, 1, 2)
    affine = _some_of(make, 2, tables)
    return Call(ops.modulated_layer_norm, (*tokens, *tables, cu_seqlens, make.one_of(1e-6, 1e-6, 1e-2), *affine))


def modulated_rms_norm(make: Maker) -> Call:
    (t,), (shift, scale), cu_seqlens = _modulated(make, 1, 2)
    args = t, make.one_of(shift, None), scale, cu_seqlens, make.one_of(1e-6, 1e-6, 1e-2)
    return Call(ops.modulated_rms_norm, (*args, *_some_of(make, 1, [scale])))


def _some_of(make: Maker, count: int, tables: list[Tensor]) -> list[Tensor | None]:
    """Weights of a norm, or None."""
    width, dtype = tables[0].shape[1], make.one_of(tables[0].dtype, make.dtype())
    return [make.normal(width, dtype=dtype, scale=1.0) if make.one_of(False, True) else None for _ in range(count)]


def gated_add(make: Maker) -> Call:
    tokens, tables, cu_seqlens = _modulated(make, 2, 1)
    return Call(ops.gated_add, (*tokens, *tables, cu_seqlens))


def gated_add_modulated_layer_norm(make: Maker) -> Call:
    tokens, tables, cu_seqlens = _modulated(make, 2, 3)
    return Call(ops.gated_add_modulated_layer_norm, (*tokens, *tables, cu_seqlens, make.one_of(1e-6, 1e-2)))


def varlen_attention(make: Maker) -> Call:
    lengths = make.lengths() if make.one_of(False, True) else [make.size()] * make.random.randrange(4)
    of_k = lengths
    if crossed := make.one_of(False, True):
        of_k = [make.size() for _ in lengths] if make.one_of(False, True) else [make.size()] * len(lengths)
    padding, heads, groups, width = (
        make.one_of(0, 0, 3),
        make.random.randint(1, 3),
        make.one_of(1, 1, 2),
        make.one_of(1, 2, 8, 16),
    )
    dtypes, rows_k = make.dtypes(3), sum(of_k) + padding
    q = make.normal(sum(lengths) + padding, heads * groups, width, dtype=dtypes[0], scale=1.0)
    k, v = (make.normal(rows_k, heads, width, dtype=dtype, scale=1.0) for dtype in dtypes[1:])

    def sequences(lengths: list[int]) -> tuple[Tensor, int]:
        return make.cu_seqlens(lengths), max(lengths, default=0) + make.one_of(0, 0, 2)

    args = q, k, v, *sequences(lengths), make.one_of(False, True), "auto", padding > 0, None
    return Call(ops.varlen_attention, (*args, *(sequences(of_k) if crossed else (None, None))))


def philox_normal(make: Maker) -> Call:
    def whole(bits: int, *shape: int) -> Tensor:
        numbers = [make.random.getrandbits(make.one_of(3, bits)) for _ in range(math.prod(shape))]
        return torch.tensor(numbers, dtype=torch.int64).reshape(shape)

    return Call(ops.philox_normal, (whole(63), whole(63, make.random.randrange(4)), whole(63), make.size()))


MAKERS: dict[str, Callable[[Maker], Call]] = {
    name: value for name, value in list(globals().items()) if name in ops.__all__ and name.islower()
}
"""By the name of the operation."""
