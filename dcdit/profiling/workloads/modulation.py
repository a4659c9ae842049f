"""adaLN on packed tokens with one row of modulation for each token, as DiT code (arXiv 2212.09748) would expand it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation


def _norm(inputs: Inputs, table_dtype: torch.dtype | None = None, padded: bool = False) -> Arguments:
    sel = inputs.padded_selection() if padded else inputs.selection()
    t, (shift, scale, *_) = inputs.packed(sel), inputs.table(table_dtype)
    return {"t": t, "shift": shift, "scale": scale, "cu_seqlens": sel.cu_seqlens}


def _affine_norm(inputs: Inputs) -> Arguments:
    width = inputs.shape.width
    return {**_norm(inputs), "weight": inputs.normal(width), "bias": inputs.normal(width)}


def _rms_norm(
    inputs: Inputs, table_dtype: torch.dtype | None = None, padded: bool = False, plain: bool = False
) -> Arguments:
    """With a shift and a weight, or plain."""
    made = _norm(inputs, table_dtype, padded)
    return {**made, "shift": None} if plain else {**made, "weight": inputs.normal(inputs.shape.width)}


def _add(inputs: Inputs, table_dtype: torch.dtype | None = None, padded: bool = False) -> Arguments:
    sel = inputs.padded_selection() if padded else inputs.selection()
    x, y, (_, _, gate, *_) = inputs.packed(sel), inputs.packed(sel), inputs.table(table_dtype)
    return {"x": x, "y": y, "gate": gate, "cu_seqlens": sel.cu_seqlens}


def _add_norm(inputs: Inputs, table_dtype: torch.dtype | None = None, padded: bool = False) -> Arguments:
    sel = inputs.padded_selection() if padded else inputs.selection()
    x, y, (shift, scale, gate, *_) = inputs.packed(sel), inputs.packed(sel), inputs.table(table_dtype)
    return {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "cu_seqlens": sel.cu_seqlens}


def _cases(arguments: Callable[..., Arguments], tokens: tuple[str, ...]) -> dict[str, Case]:
    """Modulation in the tokens' dtype and in float32, trained and frozen; and packed rows that are padding."""
    float32 = partial(arguments, table_dtype=torch.float32)
    return {
        "default": Case(arguments),
        "frozen": Case(arguments, gradients=tokens),
        "float32": Case(float32),
        "float32_frozen": Case(float32, gradients=tokens),
        "padded": Case(partial(arguments, padded=True)),
    }


def _norm_alone(cases: dict[str, Case]) -> dict[str, Case]:
    """The same, where nothing reads the sum, as behind the last block."""
    renamed = {"norm_alone" if name == "default" else f"{name}_norm_alone": case for name, case in cases.items()}
    return {name: case._replace(outputs=(1,)) for name, case in renamed.items() if not name.startswith("padded")}


def _plain_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor) -> Call:
    def call() -> Tensor:
        return _modulate(t, *_per_token(cu_seqlens, len(t), shift, scale))

    return call


def _plain_rms_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, weight: Tensor) -> Call:
    def call() -> Tensor:
        shift_rows, scale_rows = _per_token(cu_seqlens, len(t), shift, scale)
        return F.rms_norm(t, t.shape[-1:], weight, 1e-6) * (1 + scale_rows) + shift_rows

    return call


def _plain_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Call:
    def call() -> Tensor:
        (rows,) = _per_token(cu_seqlens, len(x), gate)
        return x + rows * y

    return call


def _plain_add_norm(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        gate_rows, shift_rows, scale_rows = _per_token(cu_seqlens, len(x), gate, shift, scale)
        added = x + gate_rows * y
        return added, _modulate(added, shift_rows, scale_rows)

    return call


def _per_token(cu_seqlens: Tensor, tokens: int, *tables: Tensor) -> list[Tensor]:
    """A row for each token. Without the size of the result, a GPU would have to tell the host how long it is."""
    lengths = cu_seqlens.diff()
    return [table.repeat_interleave(lengths, dim=0, output_size=tokens) for table in tables]


def _modulate(t: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(t, t.shape[-1:], eps=1e-6) * (1 + scale) + shift


_PAIR = _cases(_add_norm, tokens=("x", "y"))

OPERATIONS = (
    Operation(
        ops.modulated_layer_norm,
        plain=_plain_norm,
        cases={**_cases(_norm, tokens=("t",)), "affine": Case(_affine_norm)},
        forward_reads=("t", "shift", "scale"),
        backward_reads=("t", "scale"),
        backward_writes=("t", "shift", "scale"),
    ),
    Operation(
        ops.modulated_rms_norm,
        plain=_plain_rms_norm,
        cases={
            "default": Case(_rms_norm),
            "frozen": Case(_rms_norm, gradients=("t",)),
            "float32": Case(partial(_rms_norm, table_dtype=torch.float32)),
            "padded": Case(partial(_rms_norm, padded=True)),
            "without_shift": Case(partial(_rms_norm, plain=True)),
        },
        forward_reads=("t", "shift", "scale", "weight"),
        backward_reads=("t", "scale", "weight"),
        backward_writes=("t", "shift", "scale", "weight"),
    ),
    Operation(
        ops.gated_add,
        plain=_plain_add,
        cases=_cases(_add, tokens=("x", "y")),
        forward_reads=("x", "y", "gate"),
        backward_reads=("y", "gate"),
        backward_writes=("y", "gate"),
    ),
    Operation(
        ops.gated_add_modulated_layer_norm,
        plain=_plain_add_norm,
        cases={**_PAIR, **_norm_alone(_PAIR)},
        forward_reads=("x", "y", "gate", "shift", "scale"),
        backward_reads=("x", "y", "gate", "scale"),
        backward_writes=("x", "y", "gate", "shift", "scale"),
    ),
)
