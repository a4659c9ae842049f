"""A bad call raises at once, with a message that names the value and what is accepted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import unchecked

B, H, W, D = 2, 3, 4, 8
L = H * W
P = torch.full((B, L), 0.75)
SEL = ops.select_tokens(P)
EXTRA_SEL = ops.select_tokens(P[:, 1:], extra_tokens=1)
T = B * L
X, TOKENS, TABLE = torch.zeros(B, L, D), torch.zeros(T, D), torch.zeros(B, D)
CU = SEL.cu_seqlens
PACKED_CU = torch.tensor([0, 5, L], dtype=torch.int32)
PACKED_SEL = ops.select_tokens(P[0], PACKED_CU)
WEIGHT = torch.zeros(D, 3, 3)
FEATURES, CHANNELS = torch.zeros(B, D, H, W), torch.zeros(D)
META = torch.device("meta")


def cu(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


class Bad(NamedTuple):
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]
    """Parts of the message: the bad value, and what is accepted."""


def nan_at(x: Tensor, index: int) -> Tensor:
    return x.clone().index_put_((torch.tensor(0), torch.tensor(index)), torch.tensor(float("nan")))


SELECT = [
    Bad("p of one dimension", lambda: ops.select_tokens(P[0]), ValueError, ("p ", "(12)", "(B, L)")),
    Bad("p of three dimensions", lambda: ops.select_tokens(X), ValueError, ("p ", "(2, 12, 8)", "(B, L)")),
    Bad("p of integers", lambda: ops.select_tokens(P.long()), TypeError, ("p ", "torch.int64", "float32")),
    Bad("grid with cu_seqlens", lambda: ops.select_tokens(P, CU), ValueError, ("p ", "(2, 12)", "(S,)")),
    Bad("NaN", lambda: ops.select_tokens(nan_at(P, 3)), ValueError, ("p holds 1 NaN", "[0, 1]")),
    Bad("drop of 1", lambda: ops.select_tokens(P, drop_fraction=1.0), ValueError, ("drop_fraction", "1.0", "[0, 1)")),
    Bad("drop below 0", lambda: ops.select_tokens(P, drop_fraction=-0.1), ValueError, ("-0.1", "[0, 1)")),
    Bad("NaN drop", lambda: ops.select_tokens(P, drop_fraction=float("nan")), ValueError, ("nan", "[0, 1)")),
    Bad(
        "one drop of 1",
        lambda: ops.select_tokens(P, drop_fraction=torch.tensor([0.5, 1.0])),
        ValueError,
        ("drop_fraction", "[0.5, 1.0]", "[0, 1)"),
    ),
    Bad(
        "three drops for two images",
        lambda: ops.select_tokens(P, drop_fraction=torch.zeros(3)),
        ValueError,
        ("drop_fraction", "(3)", "(2,)"),
    ),
    Bad(
        "drop on another device",
        lambda: ops.select_tokens(P, drop_fraction=torch.zeros(B, device=META)),
        ValueError,
        ("drop_fraction", "meta", "cpu"),
    ),
    Bad("threshold", lambda: ops.select_tokens(P, threshold=1.5), ValueError, ("threshold", "1.5", "[0, 1]")),
    Bad("budget above L", lambda: ops.select_tokens(P, budget=13), ValueError, ("budget", "13", "1 to 12")),
    Bad("budget 0", lambda: ops.select_tokens(P, budget=0), ValueError, ("budget", "0", "1 to 12")),
    Bad("budget 2.5", lambda: ops.select_tokens(P, budget=2.5), TypeError, ("budget", "2.5", "int")),
    Bad(
        "budget above the shortest sequence",
        lambda: ops.select_tokens(P[0], PACKED_CU, budget=6),
        ValueError,
        ("budget", "6", "1 to 5"),
    ),
    Bad(
        "budget and drop",
        lambda: ops.select_tokens(P, drop_fraction=0.1, budget=3),
        ValueError,
        ("budget=3", "drop_fraction"),
    ),
    Bad(
        "budget and capacity", lambda: ops.select_tokens(P, budget=3, capacity=9), ValueError, ("budget=3", "capacity")
    ),
    Bad("capacity below B", lambda: ops.select_tokens(P, capacity=1), ValueError, ("capacity is 1", "at least 2")),
    Bad("max_seqlen 0", lambda: ops.select_tokens(P, max_seqlen=0), ValueError, ("max_seqlen is 0", "at least 1")),
    Bad("max_seqlen 2.0", lambda: ops.select_tokens(P, max_seqlen=2.0), TypeError, ("max_seqlen", "2.0", "int")),
    Bad(
        "budget and max_seqlen", lambda: ops.select_tokens(P, budget=3, max_seqlen=9), ValueError, ("budget=3", "max_")
    ),
    Bad("always of floats", lambda: ops.select_tokens(P, always=P), TypeError, ("always", "torch.float32", "bool")),
    Bad(
        "always of another shape",
        lambda: ops.select_tokens(P, always=P[0] > 0),
        ValueError,
        ("always", "(12)", "(2, 12)"),
    ),
    Bad("always elsewhere", lambda: ops.select_tokens(P, always=(P > 0).to(META)), ValueError, ("always", "meta")),
    Bad(
        "always above the budget",
        lambda: ops.select_tokens(P, budget=3, always=P > 0),
        ValueError,
        ("always keeps 12", "budget", "3"),
    ),
    Bad(
        "always of a sequence above the budget",
        lambda: ops.select_tokens(P[0], PACKED_CU, budget=5, extra_tokens=0, always=P[0] > 0),
        ValueError,
        ("always keeps 7", "budget", "5"),
    ),
    Bad("extra tokens below 0", lambda: ops.select_tokens(P, extra_tokens=-1), ValueError, ("extra_tokens is -1", "0")),
    Bad(
        "extra tokens of 1.0", lambda: ops.select_tokens(P, extra_tokens=1.0), TypeError, ("extra_tokens", "1.0", "int")
    ),
    Bad(
        "extra tokens of sequences",
        lambda: ops.select_tokens(P[0], PACKED_CU, extra_tokens=1),
        ValueError,
        ("extra_tokens is 1", "grid batch"),
    ),
    Bad(
        "no budget beside extra tokens",
        lambda: ops.select_tokens(P, budget=2, extra_tokens=2),
        ValueError,
        ("budget is 2", "3 to 14", "2 extra tokens"),
    ),
    Bad(
        "no capacity beside extra tokens",
        lambda: ops.select_tokens(P, capacity=5, extra_tokens=2),
        ValueError,
        ("capacity is 5", "at least 6", "2 extra tokens"),
    ),
    Bad(
        "no max_seqlen beside extra tokens",
        lambda: ops.select_from_mask(P > 0, max_seqlen=2, extra_tokens=2),
        ValueError,
        ("max_seqlen is 2", "at least 3", "2 extra tokens"),
    ),
    Bad("a mask of floats", lambda: ops.select_from_mask(P), TypeError, ("mask", "torch.float32", "bool")),
    Bad(
        "a mask over a grid",
        lambda: ops.select_from_mask(torch.ones(B, H, W, dtype=torch.bool)),
        ValueError,
        ("mask ", "(2, 3, 4)", "(B, L)"),
    ),
    Bad("capacity True", lambda: ops.select_tokens(P, capacity=True), TypeError, ("capacity", "True", "int")),
]

CU_SEQLENS = [
    Bad("int16", lambda: ops.select_tokens(P[0], cu(0, 5, L, dtype=torch.int16)), TypeError, ("torch.int16", "int32")),
    Bad("of two dimensions", lambda: ops.select_tokens(P[0], cu(0, L)[None]), ValueError, ("(1, 2)", "(B + 1,)")),
    Bad("empty", lambda: ops.select_tokens(P[0], cu()), ValueError, ("(0)", "(B + 1,)")),
    Bad("not from 0", lambda: ops.select_tokens(P[0], cu(1, L)), ValueError, ("starts at 1", "0")),
    Bad("descending", lambda: ops.select_tokens(P[0], cu(0, 7, 5, L)), ValueError, ("descends", "[0, 7, 5, 12]")),
    Bad("too short", lambda: ops.select_tokens(P[0], cu(0, 5)), ValueError, ("ends at 5", "12")),
    Bad("too long", lambda: ops.select_tokens(P[0], cu(0, 13)), ValueError, ("ends at 13", "12")),
    Bad(
        "too long for the tokens",
        lambda: ops.modulated_layer_norm(TOKENS, TABLE, TABLE, cu(0, 5, 25)),
        ValueError,
        ("ends at 25", "24"),
    ),
    Bad(
        "of floats for the tokens",
        lambda: ops.gated_add(TOKENS, TOKENS, TABLE, CU.float()),
        TypeError,
        ("torch.float32", "int32 or int64"),
    ),
    Bad(
        "int64 for kernels of others",
        lambda: unchecked.check_packed(TOKENS, CU.long(), L, False),
        TypeError,
        ("torch.int64", "cu_seqlens.int()"),
    ),
    Bad(
        "elsewhere",
        lambda: ops.gated_add(TOKENS, TOKENS, TABLE, CU.to(META)),
        ValueError,
        ("cu_seqlens", "meta", "cpu"),
    ),
    Bad("of cosine", lambda: ops.boundary_prob_cosine(X[0], X[0], cu(0, 5)), ValueError, ("ends at 5", "12")),
]

BOUNDARY = [
    Bad(
        "packed without cu_seqlens",
        lambda: ops.boundary_prob_cosine(X[0], X[0]),
        ValueError,
        ("q ", "(12, 8)", "(B, L, D)"),
    ),
    Bad(
        "k of another shape",
        lambda: ops.boundary_prob_cosine(X, X[:, 1:]),
        ValueError,
        ("k ", "(2, 11, 8)", "(2, 12, 8)"),
    ),
    Bad("k elsewhere", lambda: ops.boundary_prob_cosine(X, X.to(META)), ValueError, ("k ", "meta", "cpu")),
    Bad("integers", lambda: ops.boundary_prob_cosine(X.long(), X.long()), TypeError, ("q ", "torch.int64", "float32")),
    Bad("grid", lambda: ops.boundary_prob_cosine2d(X, X, WEIGHT, (3, 5)), ValueError, ("(3, 5)", "12")),
    Bad("negative grid", lambda: ops.boundary_prob_cosine2d(X, X, WEIGHT, (-3, -4)), ValueError, ("(-3, -4)", "12")),
    Bad(
        "grid of three",
        lambda: ops.boundary_prob_cosine2d(X, X, WEIGHT, (3, 2, 2)),
        ValueError,
        ("(3, 2, 2)", "(H, W)"),
    ),
    Bad(
        "weight",
        lambda: ops.boundary_prob_cosine2d(X, X, WEIGHT[:, None], (H, W)),
        ValueError,
        ("(8, 1, 3, 3)", "(D, 3, 3)"),
    ),
    Bad(
        "packed cosine2d",
        lambda: ops.boundary_prob_cosine2d(X[0], X[0], WEIGHT, (H, W)),
        ValueError,
        ("(12, 8)", "(B, L, D)"),
    ),
    Bad(
        "features of three dimensions",
        lambda: ops.boundary_prob_predictability(X, CHANNELS, CHANNELS, CHANNELS, torch.zeros(1)),
        ValueError,
        ("(2, 12, 8)", "(B, C, H, W)"),
    ),
    Bad(
        "groups",
        lambda: ops.boundary_prob_predictability(FEATURES, CHANNELS, CHANNELS, CHANNELS, torch.zeros(1), 3),
        ValueError,
        ("num_groups is 3", "divisor of C = 8"),
    ),
    Bad(
        "norm weight",
        lambda: ops.boundary_prob_predictability(FEATURES, CHANNELS[1:], CHANNELS, CHANNELS, torch.zeros(1)),
        ValueError,
        ("norm_weight", "(7)", "(8,)"),
    ),
    Bad(
        "out weight",
        lambda: ops.boundary_prob_predictability(FEATURES, CHANNELS, CHANNELS, CHANNELS[1:], torch.zeros(1)),
        ValueError,
        ("out_weight", "(7)", "(C,)"),
    ),
    Bad(
        "out bias",
        lambda: ops.boundary_prob_predictability(FEATURES, CHANNELS, CHANNELS, CHANNELS, CHANNELS),
        ValueError,
        ("out_bias", "(8)", "(1,)"),
    ),
]

PACKING = [
    Bad(
        "x of another batch", lambda: ops.gather_tokens(X[[0, 1, 0]], SEL), ValueError, ("x ", "(3, 12, 8)", "(2, 12)")
    ),
    Bad("x without positions", lambda: ops.gather_tokens(P[0], SEL), ValueError, ("x ", "(12)", "(1, 12)")),
    Bad("x of no channel", lambda: ops.gather_tokens(X[..., :0], SEL), ValueError, ("x ", "(2, 12, 0)", "one channel")),
    Bad(
        "a table for packed sequences",
        lambda: ops.gather_tokens(X[:1, :5], PACKED_SEL),
        ValueError,
        ("x ", "(1, 5, 8)", "(12)"),
    ),
    Bad("x elsewhere", lambda: ops.gather_tokens(X.to(META), SEL), ValueError, ("meta", "cpu")),
    Bad(
        "x of complex numbers",
        lambda: ops.gather_tokens(X + 1j, SEL),
        TypeError,
        ("x ", "complex64", "view_as_real"),
    ),
    Bad(
        "bias for integers",
        lambda: ops.gather_tokens(X.long(), SEL, X[0]),
        TypeError,
        ("x ", "torch.int64", "float32"),
    ),
    Bad("bias wider", lambda: ops.gather_tokens(X[..., 1:], SEL, X[0]), ValueError, ("bias", "(12, 8)", "(12, 7)")),
    Bad("fill of half", lambda: ops.scatter_tokens(TOKENS.int(), SEL, 0.5), ValueError, ("fill is 0.5", "torch.int32")),
    Bad("fill of 256", lambda: ops.scatter_tokens(TOKENS.byte(), SEL, 256), ValueError, ("fill is 256", "0 to 255")),
    Bad("fill of text", lambda: ops.scatter_tokens(TOKENS, SEL, "0"), TypeError, ("fill is '0'", "a number")),
    Bad(
        "bias of another length",
        lambda: ops.gather_tokens(X, SEL, X[0, 1:]),
        ValueError,
        ("bias", "(11, 8)", "(12, 8)"),
    ),
    Bad(
        "bias of a packed source", lambda: ops.gather_tokens(X[0], PACKED_SEL, X[0]), ValueError, ("bias", "(B, L, D)")
    ),
    Bad("too few tokens", lambda: ops.scatter_tokens(TOKENS[1:], SEL), ValueError, ("t ", "(23, 8)", "24")),
    Bad("unpacked tokens", lambda: ops.scatter_tokens(X, SEL), ValueError, ("t ", "(2, 12, 8)", "(T, D)")),
    Bad("tokens elsewhere", lambda: ops.scatter_tokens(TOKENS.to(META), SEL), ValueError, ("meta", "cpu")),
]

AFFINE = [
    Bad(
        "weight",
        lambda: ops.modulated_layer_norm(TOKENS, TABLE, TABLE, CU, weight=CHANNELS[1:]),
        ValueError,
        ("weight ", "(7)", "(8,)"),
    ),
    Bad(
        "bias of integers",
        lambda: ops.modulated_layer_norm(TOKENS, TABLE, TABLE, CU, bias=CHANNELS.long()),
        TypeError,
        ("bias ", "torch.int64", "float32"),
    ),
    Bad(
        "weight elsewhere",
        lambda: ops.modulated_rms_norm(TOKENS, None, TABLE, CU, weight=CHANNELS.to(META)),
        ValueError,
        ("weight", "meta", "cpu"),
    ),
    Bad(
        "shift of another dtype",
        lambda: ops.modulated_rms_norm(TOKENS, TABLE.double(), TABLE, CU),
        TypeError,
        ("scale ", "torch.float32", "torch.float64"),
    ),
    Bad(
        "scale of one image",
        lambda: ops.modulated_rms_norm(TOKENS, None, TABLE[:1], CU),
        ValueError,
        ("scale ", "(1, 8)", "(2, 8)"),
    ),
]

DECHUNK = [
    Bad("too few tokens", lambda: ops.dechunk_spatial(TOKENS[1:], P, SEL, (H, W)), ValueError, ("h ", "(23, 8)", "24")),
    Bad(
        "p of another shape",
        lambda: ops.dechunk_spatial(TOKENS, P[:1], SEL, (H, W)),
        ValueError,
        ("p ", "(1, 12)", "(2, 12)"),
    ),
    Bad(
        "p over the extra tokens",
        lambda: ops.dechunk_ema(TOKENS, P, EXTRA_SEL),
        ValueError,
        ("p ", "(2, 12)", "(2, 11)"),
    ),
    Bad(
        "residual of the grid alone",
        lambda: ops.dechunk_ema(TOKENS, P[:, 1:], EXTRA_SEL, residual=X[:, 1:]),
        ValueError,
        ("residual ", "(2, 11, 8)", "(2, 12, 8)"),
    ),
    Bad("grid", lambda: ops.dechunk_spatial(TOKENS, P, SEL, (W, W)), ValueError, ("(4, 4)", "12", "(H, W)")),
    Bad("sigma 0", lambda: ops.dechunk_spatial(TOKENS, P, SEL, (H, W), 0.0), ValueError, ("sigma is 0.0", "(0, 16]")),
    Bad("sigma below 0", lambda: ops.dechunk_spatial(TOKENS, P, SEL, (H, W), -1.0), ValueError, ("-1.0", "(0, 16]")),
    Bad("NaN sigma", lambda: ops.dechunk_spatial(TOKENS, P, SEL, (H, W), float("nan")), ValueError, ("nan", "(0, 16]")),
    Bad("sigma 17", lambda: ops.dechunk_spatial(TOKENS, P, SEL, (H, W), 17.0), ValueError, ("17.0", "(0, 16]")),
    Bad(
        "packed source",
        lambda: ops.dechunk_spatial(TOKENS[:L], P[0], PACKED_SEL, (H, W)),
        ValueError,
        ("packed", "(B, L)"),
    ),
    Bad(
        "gate", lambda: ops.dechunk_spatial(TOKENS, P, SEL, (H, W), gate=P[0]), ValueError, ("gate", "(12)", "(2, 12)")
    ),
    Bad(
        "integer gate",
        lambda: ops.dechunk_ema(TOKENS, P, SEL, gate=P.long()),
        TypeError,
        ("gate", "torch.int64", "float32"),
    ),
    Bad(
        "residual",
        lambda: ops.dechunk_ema(TOKENS, P, SEL, residual=TOKENS),
        ValueError,
        ("residual", "(24, 8)", "(2, 12, 8)"),
    ),
    Bad(
        "residual elsewhere",
        lambda: ops.dechunk_ema(TOKENS, P, SEL, residual=X.to(META)),
        ValueError,
        ("residual", "meta", "cpu"),
    ),
    Bad("p elsewhere", lambda: ops.dechunk_ema(TOKENS, P.to(META), SEL), ValueError, ("p ", "meta", "cpu")),
]

LOSS = [
    Bad("target 1", lambda: ops.ratio_loss(P, P > 0.5, 1.0), ValueError, ("target is 1.0", "above 1")),
    Bad("NaN target", lambda: ops.ratio_loss(P, P > 0.5, float("nan")), ValueError, ("target is nan", "above 1")),
    Bad(
        "group size",
        lambda: ops.ratio_loss(P, P > 0.5, 4.0, 3),
        ValueError,
        ("group_size is 3", "divisor of the batch 2"),
    ),
    Bad("group size 0", lambda: ops.ratio_loss(P, P > 0.5, 4.0, 0), ValueError, ("group_size is 0", "divisor")),
    Bad(
        "groups of a packed source",
        lambda: ops.ratio_loss(P[0], P[0] > 0.5, 4.0, 2),
        ValueError,
        ("group_size is 2", "(B, L)"),
    ),
    Bad(
        "mask of another shape",
        lambda: ops.ratio_loss(P, P[0] > 0.5, 4.0),
        ValueError,
        ("natural_mask", "(12)", "(2, 12)"),
    ),
    Bad("mask of floats", lambda: ops.ratio_loss(P, P, 4.0), TypeError, ("natural_mask", "torch.float32", "bool")),
    Bad("nothing", lambda: ops.ratio_loss(P[:0], P[:0] > 0.5, 4.0), ValueError, ("(0, 12)", "at least one")),
]

MODULATION = [
    Bad(
        "unpacked tokens",
        lambda: ops.modulated_layer_norm(X, TABLE, TABLE, CU),
        ValueError,
        ("t ", "(2, 12, 8)", "(T, D)"),
    ),
    Bad(
        "integer tokens",
        lambda: ops.modulated_layer_norm(TOKENS.long(), TABLE, TABLE, CU),
        TypeError,
        ("torch.int64", "float32"),
    ),
    Bad(
        "shift of one image",
        lambda: ops.modulated_layer_norm(TOKENS, TABLE[:1], TABLE, CU),
        ValueError,
        ("shift", "(1, 8)", "(2, 8)"),
    ),
    Bad(
        "scale dtype",
        lambda: ops.modulated_layer_norm(TOKENS, TABLE, TABLE.half(), CU),
        TypeError,
        ("scale", "float16", "float32"),
    ),
    Bad("expanded gate", lambda: ops.gated_add(TOKENS, TOKENS, TOKENS, CU), ValueError, ("gate", "(24, 8)", "(2, 8)")),
    Bad(
        "y of another shape",
        lambda: ops.gated_add(TOKENS, TOKENS[1:], TABLE, CU),
        ValueError,
        ("y ", "(23, 8)", "(24, 8)"),
    ),
    Bad(
        "gate elsewhere", lambda: ops.gated_add(TOKENS, TOKENS, TABLE.to(META), CU), ValueError, ("gate", "meta", "cpu")
    ),
    Bad(
        "shift of the fused pair",
        lambda: ops.gated_add_modulated_layer_norm(TOKENS, TOKENS, TABLE, TABLE[:, 1:], TABLE, CU),
        ValueError,
        ("shift", "(2, 7)", "(2, 8)"),
    ),
]

GROUP_NORM = [
    Bad(
        "x of two dimensions",
        lambda: ops.group_norm_silu(TOKENS, 4, CHANNELS, CHANNELS),
        ValueError,
        ("x ", "(24, 8)", "(B, L, C)", "(B, C, H, W)"),
    ),
    Bad("integer x", lambda: ops.group_norm_silu(X.long(), 4, CHANNELS, CHANNELS), TypeError, ("x ", "torch.int64")),
    Bad(
        "no channel",
        lambda: ops.group_norm_silu(X[..., :0], 1, CHANNELS[:0], CHANNELS[:0]),
        ValueError,
        ("x ", "(2, 12, 0)", "at least one channel"),
    ),
    Bad(
        "groups",
        lambda: ops.group_norm_silu(FEATURES, 3, CHANNELS, CHANNELS),
        ValueError,
        ("num_groups is 3", "divisor of C = 8"),
    ),
    Bad("no group", lambda: ops.group_norm_silu(X, 0, CHANNELS, CHANNELS), ValueError, ("num_groups is 0", "C = 8")),
    Bad("weight", lambda: ops.group_norm_silu(X, 4, CHANNELS[1:], CHANNELS), ValueError, ("weight", "(7)", "(8,)")),
    Bad("bias", lambda: ops.group_norm_silu(X, 4, CHANNELS, TABLE), ValueError, ("bias", "(2, 8)", "(8,)")),
    Bad(
        "expanded shift",
        lambda: ops.group_norm_silu(X, 4, CHANNELS, CHANNELS, X),
        ValueError,
        ("shift", "(2, 12, 8)", "(2, 8) = (B, C)"),
    ),
    Bad(
        "shift elsewhere",
        lambda: ops.group_norm_silu(X, 4, CHANNELS, CHANNELS, TABLE.to(META)),
        ValueError,
        ("shift", "meta", "cpu"),
    ),
]

BACKEND = [Bad("unknown", lambda: ops.use_backend("cuda"), ValueError, ("'cuda'", "triton", "torch", "reference"))]

TABLE_OF_BAD_CALLS = {
    f"{family}: {bad.name}": bad
    for family, calls in {
        "select": SELECT,
        "cu_seqlens": CU_SEQLENS,
        "boundary": BOUNDARY,
        "packing": PACKING,
        "affine": AFFINE,
        "dechunk": DECHUNK,
        "loss": LOSS,
        "modulation": MODULATION,
        "group norm": GROUP_NORM,
        "backend": BACKEND,
    }.items()
    for bad in calls
}


@pytest.mark.parametrize("bad", TABLE_OF_BAD_CALLS.values(), ids=TABLE_OF_BAD_CALLS.keys())
def test_bad_call(bad: Bad) -> None:
    with pytest.raises(bad.error) as raised:
        bad.call()
    message = str(raised.value)
    assert type(raised.value) is bad.error
    assert "\n" not in message
    for part in bad.says:
        assert part in message, f"{message!r} does not say {part!r}"


def test_the_good_calls_beside_the_bad_ones_work() -> None:
    """So a bad call fails for the reason in the table, not for another one."""
    ops.select_tokens(P[0], PACKED_CU, budget=5)
    ops.dechunk_spatial(TOKENS, P, SEL, (H, W), 16.0, P, X)
    ops.dechunk_ema(TOKENS[:L], P[0], PACKED_SEL, P[0], X[0])
    ops.boundary_prob_predictability(FEATURES, CHANNELS, CHANNELS, CHANNELS, torch.zeros(1))
    ops.boundary_prob_cosine2d(X, X, WEIGHT, (H, W))
    ops.gated_add_modulated_layer_norm(TOKENS, TOKENS, TABLE, TABLE, TABLE, CU)
    ops.ratio_loss(P, P > 0.5, 4.0, 1)
    ops.group_norm_silu(X, 4, CHANNELS, CHANNELS, TABLE)
    ops.group_norm_silu(FEATURES, 8, CHANNELS, CHANNELS)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_selection_whose_images_keep_nothing_is_accepted(backend: str) -> None:
    sel = ops.select_from_mask(torch.zeros(B, L, dtype=torch.bool))
    with ops.use_backend(backend):
        assert ops.gather_tokens(X, sel).shape == (0, D)
        assert not ops.dechunk_spatial(TOKENS[:0], P, sel, (H, W)).any()
        assert not ops.dechunk_ema(TOKENS[:0], P, sel).any()
        assert (ops.scatter_tokens(TOKENS[:0], sel, 2.0) == 2.0).all()
        assert ops.gated_add(TOKENS[:0], TOKENS[:0], TABLE, sel.cu_seqlens).shape == (0, D)
        assert ops.modulated_layer_norm(TOKENS[:0], TABLE, TABLE, sel.cu_seqlens).shape == (0, D)


def test_what_is_no_tensor() -> None:
    p = torch.rand(2, 6)
    sel = ops.select_tokens(p, budget=3)
    with pytest.raises(TypeError, match="p is a list; accepted: a tensor"):
        ops.select_tokens([[0.1, 0.9]], budget=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cu_seqlens is a list; accepted: a tensor"):
        ops.select_tokens(p[0], cu_seqlens=[0, 2, 6])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x is a ndarray; accepted: a tensor"):
        ops.gather_tokens(p.numpy(), sel)
    with pytest.raises(TypeError, match=r"grid is 6; accepted: \(H, W\)"):
        ops.dechunk_spatial(torch.randn(6, 4), p, sel, grid=6)  # type: ignore[arg-type]
