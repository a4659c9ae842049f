"""1-D chunking: decoding one token at a time equals the forward pass, for any batch, packed or padded."""

import re
from pathlib import Path

import pytest
import torch
from support.inputs import randn, random_cu_seqlens
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn import hnet

DIM = 8
LENGTHS = {1: (11,), 2: (7, 12), 5: (9, 1, 14, 3, 6)}
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


class Recurrent(nn.Module):
    """An inner network with a state per sequence: a step of the wrong row changes its output."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(DIM, DIM)

    def allocate(self, batch: int, like: Tensor) -> Tensor:
        return like.new_zeros(batch, DIM)

    def forward(self, x: Tensor, cu_seqlens: Tensor, cache: Tensor | None = None) -> Tensor:
        out = []
        for row, sequence in enumerate(x.split(cu_seqlens.diff().tolist())):
            state = x.new_zeros(1, DIM)
            for token in sequence:
                state = self.cell(token[None], state)
                out.append(state)
            if cache is not None:
                cache[row] = state
        return torch.cat(out) if out else x

    def step(self, x: Tensor, cache: Tensor, rows: Tensor) -> Tensor:
        cache[rows] = self.cell(x, cache[rows])
        return cache[rows]


class Stage(nn.Module):
    """Router, chunks, an inner network (a stage or not), chunks back to tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.routing, self.chunk, self.dechunk = hnet.RoutingModule(DIM), hnet.ChunkLayer(), hnet.DeChunkLayer()
        self.residual = nn.Linear(DIM, DIM)
        self.inner = inner
        for projection in (self.routing.query, self.routing.key):
            nn.init.normal_(projection.weight)

    def allocate(self, batch: int, like: Tensor) -> list:
        return [
            self.routing.allocate_inference_cache(batch),
            self.dechunk.allocate_inference_cache(batch, like),
            self.inner.allocate(batch, like),
        ]

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, cache: list | None = None, mask: Tensor | None = None):
        routing, dechunk, inner = cache or [None] * 3
        p = self.routing(x, cu_seqlens, mask, routing)
        chunks, sel = self.chunk(x, p, cu_seqlens)
        return self.dechunk(self.inner(chunks, sel.cu_seqlens, inner), p, sel, self.residual(x), dechunk)

    def step(self, x: Tensor, cache: list, rows: Tensor | None = None) -> Tensor:
        routing, dechunk, inner = cache
        p = self.routing.step(x, routing, rows)
        chunks, chunk_rows = self.chunk.step(x, p, rows if rows is not None else torch.arange(len(x)))
        if len(chunks):
            chunks = self.inner.step(chunks, inner, chunk_rows)
        return self.dechunk.step(chunks, p, dechunk, self.residual(x), rows)


def network(dtype: torch.dtype = torch.float64) -> Stage:
    torch.manual_seed(0)
    return Stage(Stage(Recurrent())).to(dtype)


def sequences(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(n, DIM, dtype=dtype, seed=i) for i, n in enumerate(lengths)]


def padded(tokens: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """(B, L, D) with large numbers in the padding, which nothing may read, and its mask."""
    x = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=100.0, padding_side=side)
    real = nn.utils.rnn.pad_sequence([torch.ones(len(t)) for t in tokens], batch_first=True, padding_side=side)
    return x, real.bool()


def decode(net: Stage, tokens: list[Tensor], cache: list, begin: list[int] | None = None) -> list[Tensor]:
    """Outputs of stepping each sequence from its position ``begin``; sequences that have ended are left out."""
    out: list[list[Tensor]] = [[] for _ in tokens]
    position = list(begin or [0] * len(tokens))
    while rows := [i for i, sequence in enumerate(tokens) if position[i] < len(sequence)]:
        x = torch.stack([tokens[i][position[i]] for i in rows])
        # All rows in order is what None means.
        y = net.step(x, cache, None if len(rows) == len(tokens) else torch.tensor(rows))
        for i, row in zip(rows, y, strict=True):
            out[i].append(row)
            position[i] += 1
    return [torch.stack(rows) if rows else tokens[0][:0] for rows in out]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("batch", LENGTHS)
@torch.no_grad()
def test_steps_are_the_forward_pass(batch, dtype):
    """At every position of every sequence, through two nested stages with a recurrent network inside."""
    net, tokens = network(dtype), sequences(LENGTHS[batch], dtype)
    whole = net(torch.cat(tokens), random_cu_seqlens(*LENGTHS[batch]))
    stepped = decode(net, tokens, net.allocate(batch, whole))
    torch.testing.assert_close(torch.cat(stepped), whole, **TOLERANCE[dtype])


@pytest.mark.parametrize("prompt_format", ["packed", "right", "left"])
@pytest.mark.parametrize("batch", LENGTHS)
@torch.no_grad()
def test_steps_go_on_after_a_prefill(batch, prompt_format, dtype):
    net, tokens = network(dtype), sequences(LENGTHS[batch], dtype)
    whole = net(torch.cat(tokens), random_cu_seqlens(*LENGTHS[batch]))
    begin = [(len(t) + 1) // 2 for t in tokens]
    prompts = [t[:n] for t, n in zip(tokens, begin, strict=True)]
    cache = net.allocate(batch, whole)
    decode(net, prompts, cache)  # a prefill forgets it
    if prompt_format == "packed":
        head = net(torch.cat(prompts), random_cu_seqlens(*begin), cache).split(begin)
    else:
        x, mask = padded(prompts, prompt_format)
        head = net(x, None, cache, mask)[mask].split(begin)
    tail = decode(net, tokens, cache, begin)
    both = [piece for pair in zip(head, tail, strict=True) for piece in pair]
    torch.testing.assert_close(torch.cat(both), whole, **TOLERANCE[dtype])


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    net, tokens = network(), sequences(LENGTHS[5])
    x, mask = padded(tokens, side)
    packed = net(torch.cat(tokens), random_cu_seqlens(*LENGTHS[5]))
    torch.testing.assert_close(net(x, None, mask=mask)[mask], packed, **TOLERANCE[torch.float64])
    p = net.routing(x, mask=mask)
    assert not p[~mask].any()
    assert torch.equal(net.chunk(x, p)[0], x[p > 0.5])


@torch.no_grad()
def test_sequences_do_not_see_each_other():
    net, tokens = network(), sequences(LENGTHS[5])
    together = net(torch.cat(tokens), random_cu_seqlens(*LENGTHS[5])).split(list(LENGTHS[5]))
    for sequence, expected in zip(tokens, together, strict=True):
        alone = net(sequence[None], None)[0]
        torch.testing.assert_close(alone, expected, **TOLERANCE[torch.float64])


@torch.no_grad()
def test_nothing_looks_ahead():
    net = network()
    x, y = randn(1, 16, DIM, dtype=torch.float64), randn(1, 16, DIM, dtype=torch.float64, seed=1)
    expected = net(x, None)
    for t in range(1, 16):
        changed = torch.cat([x[:, :t], y[:, t:]], 1)
        torch.testing.assert_close(net(changed, None)[:, :t], expected[:, :t], **TOLERANCE[torch.float64])
        assert not torch.allclose(net(changed, None)[:, t], expected[:, t])


@torch.no_grad()
def test_empty_sequences():
    """They open no chunk, and their rows start with their first step."""
    net, tokens = network(), sequences((0, 5, 0, 4))
    later = randn(4, DIM, dtype=torch.float64, seed=9)
    cache = net.allocate(4, later)
    net(torch.cat(tokens), random_cu_seqlens(0, 5, 0, 4), cache)
    stepped = net.step(later, cache)
    full = [torch.cat([sequence, token[None]]) for sequence, token in zip(tokens, later, strict=True)]
    whole = net(torch.cat(full), random_cu_seqlens(1, 6, 1, 5))
    torch.testing.assert_close(stepped, whole[[0, 6, 7, 12]], **TOLERANCE[torch.float64])


@torch.no_grad()
def test_a_step_leaves_other_rows_alone():
    net = network()
    cache = net.allocate(3, randn(1, DIM, dtype=torch.float64))
    net.step(randn(3, DIM, dtype=torch.float64), cache)
    routing, dechunk, _ = cache
    before = routing.query.clone(), dechunk.held.clone()
    for seed in range(1, 5):  # one of these opens a chunk
        net.step(randn(1, DIM, dtype=torch.float64, seed=seed), cache, torch.tensor([1]))
    for old, new in zip(before, (routing.query, dechunk.held), strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]]) and not torch.equal(old[1], new[1])


@torch.no_grad()
def test_the_average_is_kept_unrounded():
    """In half precision too, so that thousands of steps do not drift: the cache is float32."""
    layer = hnet.DeChunkLayer()
    tokens, zero = randn(400, 1, DIM).bfloat16(), torch.zeros(1, DIM, dtype=torch.bfloat16)
    p = torch.full((1, 400), 0.51)
    sel = ops.select_tokens(p)
    cache = layer.allocate_inference_cache(1, zero)
    whole = layer(tokens[:, 0], p, sel, torch.zeros(1, 400, DIM, dtype=torch.bfloat16))[0]
    stepped = torch.cat([layer.step(token, p[:, 0], cache, zero) for token in tokens])
    assert cache.held.dtype == torch.float32 and stepped.dtype == torch.bfloat16
    torch.testing.assert_close(stepped, whole, rtol=2**-7, atol=1e-6)


def test_gradients_reach_the_router_and_no_padding():
    net = network()
    x, mask = padded(sequences(LENGTHS[5]), "right")
    x.requires_grad_()
    (net(x, None, mask=mask)[mask] * randn(int(mask.sum()), DIM, dtype=torch.float64)).sum().backward()
    assert not x.grad[~mask].any()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_starts_as_the_distance_to_the_previous_token():
    x = randn(1, 6, DIM, dtype=torch.float64)
    p = hnet.RoutingModule(DIM).double()(x)
    torch.testing.assert_close(p[:, 1:], (1 - torch.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1)) / 2)
    assert p[0, 0] == 1


@pytest.mark.parametrize(
    ("mask", "cu_seqlens", "error", "message"),
    [
        ([[True, True, True]], [0, 3], ValueError, "both mask and cu_seqlens"),
        ([[1, 1, 1]], None, TypeError, "mask has dtype torch.int64; accepted: bool"),
        ([[True, True]], None, ValueError, r"mask has shape \(1, 2\)"),
        ([[True, False, True]], None, ValueError, "not one run of True"),
        ([[False, False, False]], None, ValueError, "not one run of True"),
    ],
)
def test_bad_masks(mask, cu_seqlens, error, message):
    starts = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(error, match=message):
        hnet.RoutingModule(DIM)(torch.randn(1, 3, DIM), starts, torch.tensor(mask))


def test_the_documentation_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "hnet.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), "docs/hnet.md", "exec"), {"__name__": "hnet_example"})
    assert "largest difference" in capsys.readouterr().out


class Wrapped(nn.Module):
    """An adapter without an attribute ``weight``, around a weight that is kept in integers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.numbers = nn.Parameter((base.weight * 127).to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1 / 127, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.numbers * self.scale).T


@torch.no_grad()
def test_a_replaced_projection_decodes():
    routing = hnet.RoutingModule(DIM).double()
    routing.query, routing.key = Wrapped(routing.query), Wrapped(routing.key)
    x, cache = randn(2, 5, DIM, dtype=torch.float64), routing.allocate_inference_cache(2)
    assert cache.query.dtype == torch.float64 and cache.query.shape == (2, DIM)
    stepped = torch.stack([routing.step(x[:, t], cache) for t in range(5)], 1)
    torch.testing.assert_close(stepped, routing(x), rtol=1e-12, atol=1e-12)
