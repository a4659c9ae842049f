"""The operations trace into one graph, the graph computes the same, and its tensors have the strides it was told."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from support import interpreter_scan
from support.accuracy import differentiate
from support.every_operation import every_operation
from support.inputs import randn, random_probs, ste_coefficient
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from dcdit import ops
from dcdit.profiling.workloads import Shape

B, H, W, D = 2, 6, 7, 16
L = H * W
MODES = {
    "budget": {"budget": 9},
    "capacity": {"capacity": 40, "drop_fraction": 0.2},
    "exact": {"drop_fraction": 0.3},
}
BACKENDS = ["torch", "triton"]


class _CheckStrides(torch.fx.Interpreter):
    """Runs a graph node by node, and compares each tensor with the fake tensor that the trace had in its place."""

    def run_node(self, n: torch.fx.Node) -> Any:
        made, told = super().run_node(n), n.meta.get("val")
        for real, fake in zip(*(x if isinstance(x, list | tuple) else (x,) for x in (made, told)), strict=False):
            if isinstance(real, Tensor) and isinstance(fake, Tensor) and real.numel():
                where = f"{n.target} gives {tuple(real.shape)}, strides {real.stride()}; told were {fake.stride()}"
                assert real.dtype == fake.dtype, where
                for size, stride, wanted in zip(real.shape, real.stride(), fake.stride(), strict=True):
                    assert size == 1 or not isinstance(wanted, int) or stride == wanted, where
        return made


def _compile(graph: torch.fx.GraphModule, _: Any) -> Any:
    return make_boxed_func(lambda *args: _CheckStrides(graph).run(*args))


checked = aot_autograd(fw_compiler=_compile, bw_compiler=_compile)
"""A compiler backend: aot_eager, plus the check."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_scan.install(monkeypatch)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def transposed(x: Tensor) -> Tensor:
    """The same numbers, with strides that no operation expects."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def route(x: Tensor, q: Tensor, k: Tensor, weight: Tensor, mode: dict[str, Any]) -> tuple[Tensor, ...]:
    p = (ops.boundary_prob_cosine2d(q, k, weight, (H, W)) + ops.boundary_prob_cosine(q, k)) / 2
    sel = ops.select_tokens(p, **mode)
    tokens = ops.gather_tokens(x, sel, x[0])
    gate, h = ste_coefficient(p), transposed(tokens)
    spatial = ops.dechunk_spatial(h, p, sel, (H, W), 1.0, gate, x)
    ema = ops.dechunk_ema(h, p, sel, gate, x)
    return spatial, ema, ops.scatter_tokens(h, sel, 1.0), ops.ratio_loss(p, sel.natural_mask, 4.0)


def block(t: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    added, normed = ops.gated_add_modulated_layer_norm(t, y, gate, shift, scale, cu_seqlens)
    return added, ops.gated_add(normed, y, gate, cu_seqlens), ops.modulated_layer_norm(t, shift, scale, cu_seqlens)


def assert_same(compiled: Any, fn: Any, *args: Any) -> None:
    eager, traced = differentiate(fn, args), differentiate(compiled, args)
    for expected, actual in zip(eager[0] + eager[1], traced[0] + traced[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_routing_is_one_graph(mode: dict[str, Any], backend: str) -> None:
    args = [randn(B, L, D, seed=seed) for seed in range(3)] + [randn(D, 3, 3) / 9]
    if mode != MODES["capacity"]:
        args = [transposed(x) for x in args]
    with ops.use_backend(backend):
        assert_same(torch.compile(route, fullgraph=True, backend=checked), route, *args, mode)


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_is_one_graph(backend: str, strides: str) -> None:
    sel = ops.select_tokens(random_probs(B, L), capacity=40)
    args = [randn(40, D, seed=seed) for seed in range(2)] + [randn(B, D, seed=2 + seed) for seed in range(3)]
    if strides == "transposed":
        args = [transposed(x) for x in args]
    with ops.use_backend(backend):
        assert_same(torch.compile(block, fullgraph=True, backend=checked), block, *args, sel.cu_seqlens)


def spread_out(x: Tensor) -> Tensor:
    """The same numbers in every second place of memory."""
    return torch.stack([x, x], -1)[..., 0]


def same_for_all_images(x: Tensor) -> Tensor:
    """Of a batch, the first image for all, as an expanded tensor has it."""
    return x[:1].expand(x.shape)


LAYOUTS = (transposed, spread_out, same_for_all_images)


@pytest.mark.parametrize(("backend", "first"), [("torch", 0), ("torch", 1), ("torch", 2), ("triton", 0)])
def test_strides_of_every_operation(backend: str, first: int) -> None:
    """Each argument has another layout than the one before it. On PyTorch, each has every layout in turn."""
    call, inputs = every_operation(Shape(2, (3, 4), 32, 0.4, torch.float32, torch.device("cpu")))
    for number, x in enumerate(inputs):
        if x.requires_grad and x.dim():
            inputs[number] = (LAYOUTS[(first + number) % 3] if x.dim() > 1 else spread_out)(x.detach())
    with ops.use_backend(backend):
        assert_same(torch.compile(call, fullgraph=True, backend=checked), call, *inputs)


def test_the_check_of_strides_sees_a_wrong_fake() -> None:
    @torch.library.custom_op("dcdit_test::transposes", mutates_args=())
    def transposes(x: Tensor) -> Tensor:
        return x.t().contiguous()

    transposes.register_fake(lambda x: torch.empty_like(x).t())
    with pytest.raises(AssertionError, match="told were"):
        torch.compile(lambda x: transposes(x) + 1, fullgraph=True, backend=checked)(randn(3, 4))


def test_changed_masks_do_not_recompile() -> None:
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    weight = randn(D, 3, 3) / 9
    with torch.no_grad():
        for seed in range(4):
            inputs = [randn(B, L, D, seed=seed + i) for i in range(3)]
            with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
                for actual, expected in zip(
                    compiled(*inputs, weight, MODES["capacity"]), route(*inputs, weight, MODES["capacity"]), strict=True
                ):
                    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_custom_operators_are_well_formed() -> None:
    from dcdit.ops._torch import dechunk_ema, nearest, smoothing, upsample  # noqa: F401

    p = random_probs(B, L)
    sel = ops.select_tokens(p)
    h, q = randn(sel.indices.numel(), D), p.flatten()[sel.indices]
    packed_rows, row_of = sel.packed_rows.view(B, H, W), sel.packed_rows.flatten().long()
    registered = torch.ops.dcdit
    calls = {
        registered.torch_nearest_kept: (packed_rows >= 0,),
        registered.torch_upsample: (h, row_of, randn(B * L, D), torch.float32),
        registered.torch_row_dots: (randn(B * L, D), h, row_of),
        registered.torch_smooth_forward: (h, q, packed_rows, sel.indices, 6, 1.0),
        registered.torch_smooth_backward: (h, h, q, h, q[:, None], packed_rows, sel.indices, 6, 1.0),
        registered.torch_scan: (h, q, 1 - q),
    }
    for op, args in calls.items():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
