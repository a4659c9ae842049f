import pytest
import torch

from dcdit.nn import TokenGate, WidthGates
from dcdit.nn.gates import TAU, gate_prob, logistic_noise, straight_through, token_mask

TIME = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def width_gates(bias: float = 0.0) -> WidthGates:
    torch.manual_seed(0)
    gates = WidthGates(32, depth=3, heads=4, groups=6)
    torch.nn.init.normal_(gates.linear.weight)
    torch.nn.init.constant_(gates.linear.bias, bias)
    return gates


def test_the_first_of_each_is_always_open():
    gates = width_gates(bias=-100.0).eval()(TIME)
    assert gates.heads.shape == (5, 3, 4) and gates.groups.shape == (5, 3, 6)
    for gate in (gates.heads, gates.groups):
        assert (gate[..., 0] == 1).all() and not gate[..., 1:].any()


def test_gates_open_by_the_sign_of_their_logit():
    module = width_gates().eval()
    gates = module(TIME)
    logits = module.linear(TIME).view(5, 3, 3 + 5)
    assert torch.equal(gates.heads[..., 1:], (logits[..., :3] > 0).float())
    assert torch.equal(gates.groups[..., 1:], (logits[..., 3:] > 0).float())


def test_a_new_model_is_complete():
    module = WidthGates(32, 3, 4, 6).train()
    assert all(bool((gate == 1).all()) for gate in module(TIME)[:2])
    assert (TokenGate(32).train()(torch.randn(2, 9, 32)) > 0.5).all()


def test_forward_is_hard_and_the_gradient_is_that_of_the_soft_gate():
    logits = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    noise = torch.tensor([4.0, -1.0, 0.0])
    p = gate_prob(logits, noise, training=True)
    gate = straight_through(p > 0.5, p)
    assert gate.tolist() == [1.0, 0.0, 1.0]
    gate.sum().backward()
    soft = ((logits.detach() + noise) / TAU).sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft) / TAU)


def test_noise_is_drawn_in_training_only_and_may_be_given():
    module = width_gates()
    torch.manual_seed(0)
    first, second = module(TIME), module(TIME)
    assert not torch.equal(first.heads, second.heads)
    noise = logistic_noise((5, 3, 8), TIME.device, torch.Generator().manual_seed(3))
    assert torch.equal(module(TIME, noise).heads, module(TIME, noise).heads)
    module.eval()
    assert torch.equal(module(TIME).groups, module(TIME).groups)


def test_noise_is_logistic():
    """The difference of two Gumbel numbers: mean 0, variance pi^2 / 3, and P(noise < 1) = sigmoid(1)."""
    noise = logistic_noise((200_000,), torch.device("cpu"), torch.Generator().manual_seed(0))
    assert noise.isfinite().all()
    assert abs(noise.mean()) < 0.02
    assert noise.var() == pytest.approx(torch.pi**2 / 3, rel=0.02)
    assert (noise < 1).float().mean() == pytest.approx(0.7311, abs=0.005)


def test_every_image_keeps_a_token():
    p = torch.tensor([[0.1, 0.4, 0.2], [0.6, 0.2, 0.9]], requires_grad=True)
    mask = token_mask(p)
    assert mask.tolist() == [[0, 1, 0], [1, 0, 1]]
    mask.sum().backward()
    assert torch.equal(p.grad, torch.ones(2, 3))


def test_counts_and_blocks():
    gates = width_gates().eval()(TIME)
    counts = gates.counts()
    assert torch.equal(counts.heads, gates.heads.sum(2).long()) and counts.tokens is None
    blocks = gates.of_blocks()
    assert len(blocks) == 3 and torch.equal(blocks[1].groups, gates.groups[:, 1])


def test_gates_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        gates = width_gates().eval()(TIME)
    assert torch.equal(gates.heads, width_gates().eval()(TIME).heads) and gates.heads.dtype == torch.float32
