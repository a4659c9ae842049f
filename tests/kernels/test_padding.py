"""Padding rows that no attention kernel writes: the kernel that makes them zero, and models in which it must run."""

import pytest
import torch
from kernels.test_ahead_of_time import run
from support import unwritten
from support.inputs import random_cu_seqlens
from support.small import batch, small_dc_dit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dcdit import ops
from dcdit.kernels import padding as kernels
from dcdit.models import DCDiT
from dcdit.ops import unchecked
from dcdit.ops.padding import zero_padding_


def written(kernel_rows: Tensor, cu_seqlens: Tensor) -> None:
    """Zeros past the last sequence, and nothing else."""
    expected = kernel_rows.clone()
    expected[int(cu_seqlens[-1]) :] = 0
    kernels.zero_padding(kernel_rows, cu_seqlens)
    torch.testing.assert_close(kernel_rows, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (9, 3, 2, 8), (40, 1152), (7,)], ids=str)
def test_only_padding_rows_are_written(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    for lengths in ([4, 0, 3], [shape[0] - 7, 7], [0, 0], []):
        rows = torch.full(shape, float("nan"), dtype=dtype, device=device)
        written(rows, random_cu_seqlens(*lengths).to(device))


@pytest.mark.parametrize("programs", [1, 3])
def test_few_programs_share_many_rows(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    written(torch.ones(300, 129, device=device), random_cu_seqlens(3, 2).to(device))


@pytest.mark.parametrize("end", [-5, 12])
def test_wrong_bounds_stay_inside_the_buffer(end: int, device: torch.device) -> None:
    """On a GPU nothing checks them."""
    memory = torch.ones(30, 8, device=device)
    kernels.zero_padding(memory[10:20], torch.tensor([0, end], dtype=torch.int32, device=device))
    assert memory[:10].all() and memory[20:].all()


def test_the_kernel_compiles_for_every_gpu() -> None:
    code = """
import torch
from dcdit.kernels import launch, padding
from tools import aot
with launch.record_launches() as recorded:
    padding.zero_padding(torch.empty(64, 3, 16, 72, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.int32))
reports = [report for target in aot.TARGETS for report in aot.compile_launches(recorded, "bf16", 3456, target)]
print(*(report.spills for report in reports))
"""
    done = run("-c", code)
    assert done.stdout.split() == ["False"] * 4, done.stdout + done.stderr


# --- the function around it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("strided", [False, True])
def test_autograd_does_not_see_the_write(backend: str, strided: bool, device: torch.device) -> None:
    x, cu_seqlens = torch.randn(6, 4, device=device).requires_grad_(), random_cu_seqlens(2, 2).to(device)
    out = x.exp()  # its backward reads the result
    view = out.t().contiguous().t() if strided else out
    with ops.use_backend(backend):
        zero_padding_(view, cu_seqlens)
    assert not view[4:].any() and view[:4].equal(x.exp()[:4])
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad[:4], x.detach().exp()[:4])


# --- whole models ---------------------------------------------------------------------------------------------------


def inputs_of(model: DCDiT) -> list[Tensor]:
    """A batch on the device of the model."""
    return [value.to(model.pos_embed.device) for value in batch(model.config)]


def run_model(model: DCDiT, capacity: int | None) -> list[Tensor]:
    """Output, loss and gradients."""
    x, t, y = inputs_of(model)
    out, routing = model(x, t, y, drop_fraction=0.3, capacity=capacity, return_routing=True)
    assert capacity is None or (routing.selection.cu_seqlens[-1] < capacity and not routing.selection.overflow)
    loss = out.square().mean() + ops.ratio_loss(routing.prob, routing.natural_mask, 4.0)
    model.zero_grad()
    loss.backward()
    return [out.detach(), loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(("backend", "packed"), [("torch", False), ("torch", True), ("triton", True)])
def test_nothing_unwritten_reaches_a_loss_or_a_gradient(
    backend: str, packed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_dc_dit(grid=(4, 6), num_heads=2).to(device)
    expected = run_model(model, None)
    unwritten.install(monkeypatch, packed)
    with ops.use_backend(backend):
        found = run_model(model, capacity=3 * 24)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("torch", torch.no_grad), ("torch", torch.inference_mode), ("triton", torch.inference_mode)],
)
def test_inference_leaves_padding_unwritten_and_reads_none_of_it(
    backend: str, mode: type, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_dc_dit(grid=(4, 6), num_heads=2).to(device)
    inputs = inputs_of(model)
    with mode(), ops.use_backend(backend):
        expected = model(*inputs, drop_fraction=0.3)
        results = unwritten.install(monkeypatch)
        found = model(*inputs, drop_fraction=0.3, capacity=3 * 24)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert len(results) == 2 and all(out[-1].isnan().all() for out in results)


@pytest.mark.parametrize("change", ["hook", "class", "none, with a gradient"])
def test_a_changed_layer_behind_attention_gets_zeros(
    change: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may look at all rows at once, as a dynamic quantisation does."""
    model = small_dc_dit(grid=(4, 6), num_heads=2).to(device)
    seen = []

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            scale = x.abs().max()
            return super().forward(x / scale) * scale

    for block in model.blocks:
        if change == "hook":
            block.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        elif change == "class":
            block.proj.__class__ = Scaled
    inputs = inputs_of(model)
    results = unwritten.install(monkeypatch)
    with torch.set_grad_enabled(change.endswith("gradient")):
        out = model(*inputs, capacity=3 * 24)
    assert out.isfinite().all()
    assert len(seen) == (0 if change.startswith("none") else 2)
    assert all(not x[-1].any() for x in (*seen, *results))


def test_gradients_of_one_buffer_are_not_copied(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """A kernel that takes q, k and v in one buffer writes their gradients into one."""

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    def copies(packed: bool) -> int:
        unwritten.install(monkeypatch, packed)
        qkv = torch.randn(10, 3, 2, 8, device=device).requires_grad_()
        out = unchecked.self_attention(qkv, random_cu_seqlens(4, 3).to(device), 4, True, False)
        with Operators() as operators:
            out.sum().backward()
        assert not qkv.grad[7:].any() and qkv.grad[:7].all()
        return operators.names.count("aten::stack")

    assert copies(packed=False) - copies(packed=True) == 1
