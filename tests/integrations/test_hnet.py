"""Patched modules of an H-Net: what they return, their gradients, their caches, and decoding of any batch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from support import other_hnet
from torch import nn

import dcdit
from dcdit.nn.hnet import RoutingModule

DIM = 16
LENGTHS = (7, 1, 12)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Stage(nn.Module):
    """The three modules around an inner network that has no state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.routing_module = other_hnet.RoutingModule(DIM)
        self.chunk_layer, self.dechunk_layer = other_hnet.ChunkLayer(), other_hnet.DeChunkLayer(DIM)
        self.inner = inner

    def caches(self, batch, dtype):
        inner = self.inner.caches(batch, dtype) if isinstance(self.inner, Stage) else None
        make = [module.allocate_inference_cache for module in (self.routing_module, self.dechunk_layer)]
        return SimpleNamespace(routing=make[0](batch, 99, "cpu", dtype), dechunk=make[1](batch, 99, "cpu", dtype),
                               inner=inner)  # fmt: skip

    def forward(self, x, cu_seqlens=None, mask=None, caches=None):
        routing, dechunk = (caches.routing, caches.dechunk) if caches else (None, None)
        p = self.routing_module(x, cu_seqlens=cu_seqlens, mask=mask, inference_params=routing)
        h, starts, _, inner_mask = self.chunk_layer(x, p.boundary_mask, cu_seqlens, mask=mask)
        if isinstance(self.inner, Stage):
            h, predictions = self.inner(h, starts, inner_mask, caches.inner if caches else None)
        else:
            h, predictions = self.inner(h), []
        h = self.dechunk_layer(h, p.boundary_mask, p.boundary_prob, starts, mask=mask, inference_params=dechunk)
        c = p.selected_probs
        return h * (1 + c - c.detach()), [p, *predictions]

    def step(self, x, caches):
        p = self.routing_module.step(x, caches.routing)
        h = self.chunk_layer.step(x, p.boundary_mask)
        if len(h):
            h = self.inner(h)
        return self.dechunk_layer.step(h, p.boundary_mask, p.boundary_prob, caches.dechunk)


def network(stages=2):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())
    for _ in range(stages):
        net = Stage(net)
    return net.double()


def padded(dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.randn(len(LENGTHS), max(LENGTHS), DIM, dtype=dtype)
    return x, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def gradients(net, *args, valid=slice(None)):
    net.zero_grad()
    out, predictions = net(*args)
    loss = (out[valid] * torch.linspace(-1, 1, DIM)).sum()
    (loss + sum(p.boundary_prob[..., 1].square().mean() for p in predictions)).backward()
    return out, predictions, {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_packed(integers):
    net = network()
    fast = dcdit.patch(copy.deepcopy(net))
    x, valid = padded()
    starts = nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(integers)
    out, predictions, grads = gradients(net, x[valid], starts)
    fast_out, fast_predictions, fast_grads = gradients(fast, x[valid], starts)
    torch.testing.assert_close(fast_out, out, **EXACT)
    for theirs, ours in zip(predictions, fast_predictions, strict=True):
        assert type(ours) is type(theirs) and torch.equal(ours.boundary_mask, theirs.boundary_mask)
        torch.testing.assert_close(ours.boundary_prob, theirs.boundary_prob, **EXACT)
        torch.testing.assert_close(ours.selected_probs, theirs.selected_probs, **EXACT)
    assert 0 < predictions[1].boundary_mask.sum() < predictions[0].boundary_mask.sum() < len(x[valid])
    for name, grad in grads.items():
        torch.testing.assert_close(fast_grads[name], grad, **EXACT)
    opened = fast_predictions[0].boundary_mask
    _, next_starts, longest, mask = fast.chunk_layer(x[valid], opened, starts)
    assert next_starts.dtype == integers and longest == int(next_starts.diff().max()) and mask is None


def test_padded():
    net = network()
    fast = dcdit.patch(copy.deepcopy(net))
    x, valid = padded()
    out, predictions, grads = gradients(net, x, None, valid, valid=valid)
    fast_out, fast_predictions, fast_grads = gradients(fast, x, None, valid, valid=valid)
    torch.testing.assert_close(fast_out[valid], out[valid], **EXACT)
    for theirs, ours in zip(predictions, fast_predictions, strict=True):
        assert torch.equal(ours.boundary_mask, theirs.boundary_mask)
    for name, grad in grads.items():
        torch.testing.assert_close(fast_grads[name], grad, **EXACT)
    chunks, _, longest, mask = fast.chunk_layer(x, predictions[0].boundary_mask, mask=valid)
    theirs = net.chunk_layer(x, predictions[0].boundary_mask, mask=valid)
    assert longest is None and torch.equal(mask, theirs[3]) and torch.equal(chunks[mask], theirs[0][mask])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [0, 5])
def test_decoding_equals_the_whole_sequence(batch, prompt):
    """Also for more than one sequence, which open their chunks at different steps, and from a prompt of any length."""
    net = dcdit.patch(network(stages=1))
    torch.manual_seed(2)
    x = torch.randn(batch, 14, DIM, dtype=torch.float64)
    with torch.no_grad():
        whole, (prediction,) = net(x, None, torch.ones(batch, 14, dtype=torch.bool))
        caches = net.caches(batch, torch.float64)
        if prompt:
            mask = torch.ones(batch, prompt, dtype=torch.bool)
            torch.testing.assert_close(net(x[:, :prompt], None, mask, caches)[0], whole[:, :prompt], **EXACT)
        steps = [net.step(x[:, t : t + 1], caches) for t in range(prompt, 14)]
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, prompt:], **EXACT)
    assert batch == 1 or len({*map(tuple, prediction.boundary_mask.tolist())}) > 1


def test_caches_from_before_the_patch_go_on():
    """A prompt that the original modules have read is continued by the patched ones."""
    net, (x, _) = network(stages=1), padded()
    everything = torch.ones(3, 6, dtype=torch.bool)
    with torch.no_grad():
        caches = net.caches(3, torch.float64)
        net(x[:, :6], None, everything, caches)
        twin = copy.deepcopy(caches)
        expected = [net.step(x[:, t : t + 1], caches) for t in range(6, 12)]
        fast = dcdit.patch(copy.deepcopy(net))
        for t, theirs in enumerate(expected, 6):
            torch.testing.assert_close(fast.step(x[:, t : t + 1], twin), theirs, **EXACT)
    assert torch.equal(twin.routing.last_hidden_state, caches.routing.last_hidden_state)
    torch.testing.assert_close(twin.dechunk.last_value, caches.dechunk.last_value, **EXACT)


def test_a_long_decode_in_bfloat16_does_not_drift():
    """The cache is float32: the error after many steps is that of rounding the result once."""
    net = dcdit.patch(network(stages=1)).bfloat16()
    torch.manual_seed(3)
    x = torch.randn(1, 200, DIM, dtype=torch.bfloat16)
    exact = other_hnet.DeChunkLayer(DIM)
    with torch.no_grad():
        cache = net.dechunk_layer.allocate_inference_cache(1, 200, "cpu", torch.bfloat16)
        assert cache.last_value.dtype == torch.float32
        opened, p = torch.tensor([True]), torch.tensor([[0.4, 0.6]])
        found = [net.dechunk_layer.step(x[:, t : t + 1], opened, p, cache) for t in range(200)]
        q = torch.full((200, 1), 0.6, dtype=torch.float64).expand(200, 2)
        expected = exact(x[0].double()[None], torch.ones(1, 200, dtype=torch.bool), q[None])
    torch.testing.assert_close(torch.cat(found, 1).double(), expected, rtol=2**-8, atol=1e-7)


def test_weights_under_the_original_names():
    """Inside a larger module too; what is missing or unknown is still an error."""
    theirs = other_hnet.RoutingModule(DIM)
    ours = nn.ModuleDict({"routing": RoutingModule(DIM)})
    state = {f"routing.{name}": weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict(state)
    assert torch.equal(ours["routing"].query.weight, theirs.q_proj_layer.weight)
    assert torch.equal(ours["routing"].key.weight, theirs.k_proj_layer.weight)
    assert set(ours.state_dict()) == {"routing.query.weight", "routing.key.weight"}
    ours.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*routing\.key\.weight"):
        ours.load_state_dict({"routing.q_proj_layer.weight": theirs.q_proj_layer.weight})


def test_what_is_refused():
    net = dcdit.patch(network(stages=1))
    x, valid = padded()
    with pytest.raises(ValueError, match="neither mask nor cu_seqlens is given"):
        net.routing_module(x)
    caches = net.caches(3, torch.float64)
    with pytest.raises(ValueError, match="a prefill needs the mask"):
        net.routing_module(x, cu_seqlens=torch.tensor([0, 3]), inference_params=caches.routing)
    net(x, None, valid, caches)
    with pytest.raises(ValueError, match="the cache has seen tokens"):
        net.routing_module(x, mask=valid, inference_params=caches.routing)
