"""A step with clipped gradients: fused kernels that clip on the way, against clipping first."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dcdit.train.optimizer import clipped_step, create_optimizer

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def adamw(net: nn.Module, fused: bool = True) -> torch.optim.AdamW:
    return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)


def clip_first(optimizer: torch.optim.AdamW, max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
    optimizer.step()
    return norm


def steps(net: nn.Module, optimizer: torch.optim.AdamW, step, max_norm: float, count: int = 20) -> list[Tensor]:
    """The norms, with inputs whose size goes up and down."""
    norms = []
    for number in range(count):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(number)) * (1 + number % 4)
        net(x).square().sum().backward()
        norms.append(step(optimizer, max_norm))
        optimizer.zero_grad(set_to_none=True)
    return norms


def test_gradients_below_the_bound_are_not_touched() -> None:
    found, expected = model(), model()
    norms = steps(found, adamw(found), clipped_step, 1e6)
    assert torch.equal(torch.stack(norms), torch.stack(steps(expected, adamw(expected), clip_first, 1e6)))
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


@pytest.mark.parametrize("max_norm", [0.37, 20.0, 60.0], ids=["all steps", "most", "some"])
def test_clipped_on_the_way_is_clipped_first(max_norm: float) -> None:
    found, expected = model(), model()
    norms = torch.stack(steps(found, adamw(found), clipped_step, max_norm))
    others = torch.stack(steps(expected, adamw(expected), clip_first, max_norm))
    assert (others > max_norm).any()
    torch.testing.assert_close(norms, others, rtol=1e-5, atol=0)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradients_themselves_are_clipped() -> None:
    net = model()
    optimizer = adamw(net)
    net(torch.randn(5, 8)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    norm = clipped_step(optimizer, 0.5)
    for parameter, grad in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, grad * (0.5 / norm), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_shows_in_the_weights(bad: float) -> None:
    """A run looks at them before it saves them."""
    net = model()
    net(torch.randn(5, 8)).sum().backward()
    net[0].weight.grad[0, 0] = bad
    assert not clipped_step(adamw(net), 1.0).isfinite()
    assert not net[0].weight.isfinite().all()


def test_on_a_cpu_nothing_changes_and_weights_without_gradient_are_left() -> None:
    found, expected = model(), model()
    for net in (found, expected):
        net[0].bias.requires_grad_(False)
    optimizer = create_optimizer(found, 1e-2, 0.1, CPU)
    assert not optimizer.defaults["fused"]
    norms = steps(found, optimizer, clipped_step, 1.0)
    assert torch.equal(torch.stack(norms), torch.stack(steps(expected, adamw(expected, False), clip_first, 1.0)))
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    frozen = copy.deepcopy(found[0].bias)
    steps(found, adamw(found), clipped_step, 1.0, 2)
    assert torch.equal(found[0].bias, frozen)


def test_divided_weights(tmp_path) -> None:
    """FSDP2 on one process: the norm is that of whole tensors, and the kernel takes DTensors with a plain factor."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole, divided = model(), model()
        fully_shard(divided, mesh=init_device_mesh("cpu", (1,)))
        norms = steps(divided, adamw(divided), clipped_step, 1.0)
        assert torch.equal(torch.stack(norms), torch.stack(steps(whole, adamw(whole), clipped_step, 1.0)))
        for a, b in zip(divided.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a.full_tensor(), b)
    finally:
        torch.distributed.destroy_process_group()
