"""When GELU is computed inside the product, and that everything else is two steps."""

import pytest
import torch
import torch.nn.functional as F
from support.inputs import randn
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dcdit.nn import linear_gelu as module
from dcdit.nn.linear_gelu import linear_gelu


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Pretend that CPU tensors are on a GPU, whose product with GELU is computed here. Holds its results."""
    results: list[Tensor] = []

    def product(bias: Tensor, x: Tensor, weight: Tensor, use_gelu: bool) -> Tensor:
        assert use_gelu and x.dim() == 2
        hidden = x.float() @ weight.float() + bias.float()
        results.append(F.gelu(hidden, approximate="tanh").to(x.dtype))
        return results[-1]

    monkeypatch.setattr(module, "_is_on_cuda", lambda x: True)
    monkeypatch.setattr(torch, "_addmm_activation", product)
    return results


def layer(dtype: torch.dtype = torch.bfloat16, **options) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, **options).to(dtype)


@pytest.mark.parametrize("shape", [(7, 24), (2, 7, 24), (0, 24), (2, 0, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_one_product_that_is_at_least_as_exact(shape: tuple[int, ...], dtype: torch.dtype, fused: list[Tensor]) -> None:
    linear, x = layer(dtype), randn(*shape).to(dtype)
    found = linear_gelu(linear, x)
    assert len(fused) == 1 and found.shape == (*shape[:-1], 40) and found.dtype == dtype
    exact = F.gelu(F.linear(x.double(), linear.weight.double(), linear.bias.double()), approximate="tanh")
    two_steps = F.gelu(linear(x), approximate="tanh")
    if x.numel():
        assert (found.double() - exact).abs().max() <= 2 * (two_steps.double() - exact).abs().max()


class Half(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def hooked() -> nn.Linear:
    linear = layer()
    linear.register_forward_hook(lambda module, args, out: out / 2)
    return linear


def replaced() -> nn.Linear:
    linear = layer()
    linear.forward = lambda x: F.linear(x, linear.weight, linear.bias) / 2
    return linear


class Quantised(Tensor):
    """Stands for a subclass whose memory is no matrix."""


def with_a_subclass() -> nn.Linear:
    linear = layer()
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    return linear


NOT_FUSED = {
    "a hook": hooked,
    "a subclass": lambda: Half(24, 40).to(torch.bfloat16),
    "a replaced forward": replaced,
    "a parametrisation": lambda: parametrizations.weight_norm(layer()),
    "an adapter": lambda: nn.Sequential(layer()),
    "a weight of a subclass": with_a_subclass,
    "no bias": lambda: layer(bias=False),
    "float32": lambda: layer(torch.float32),
    "float64": lambda: layer(torch.float64),
}


@pytest.mark.parametrize("name", NOT_FUSED)
@torch.no_grad()
def test_anything_else_is_called(name: str, fused: list[Tensor]) -> None:
    linear = NOT_FUSED[name]()
    x = randn(7, 24).to(next(linear.parameters()).dtype)
    found = linear_gelu(linear, x)
    assert not fused
    assert torch.equal(found, F.gelu(linear(x), approximate="tanh"))


def test_with_gradients_it_is_two_steps(fused: list[Tensor]) -> None:
    linear, x = layer(), randn(7, 24).to(torch.bfloat16)
    linear_gelu(linear, x).sum().backward()
    assert not fused and linear.weight.grad.any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        linear_gelu(linear, x)
    assert not fused
    with torch.no_grad():
        linear_gelu(linear, x)
    assert len(fused) == 1


@torch.no_grad()
def test_tensors_of_a_cpu_are_two_steps() -> None:
    """There PyTorch's product computes the GELU by erf, which is another function."""
    linear, x = layer(torch.float32), randn(7, 24)
    fused = torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)
    torch.testing.assert_close(fused, F.gelu(linear(x)))
    tanh = F.gelu(linear(x), approximate="tanh")
    assert torch.equal(linear_gelu(linear, x), tanh) and (tanh - fused).abs().max() > 1e-4


@torch.no_grad()
def test_the_compiler_keeps_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import EagerAndRecordGraphs
    from torch._inductor.decomposition import decompositions

    monkeypatch.setattr(module, "_is_on_cuda", lambda x: True)
    torch.compiler.reset()
    recorded = EagerAndRecordGraphs()
    linear, x = layer(), randn(7, 24).to(torch.bfloat16)
    torch.compile(lambda x: linear_gelu(linear, x), fullgraph=True, backend=recorded)(x)
    (graph,) = recorded.graphs
    assert any(node.target is torch._addmm_activation for node in graph.graph.nodes)
    assert torch.ops.aten._addmm_activation.default not in decompositions
