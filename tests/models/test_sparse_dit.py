"""SparseDiT: what it computes against a plain float64 formulation, what it costs, and what it refuses."""

import json

import pytest
import torch
import torch.nn.functional as F
from support.small import SIZES, batch, small_dit, small_sparse_dit
from support.stages import counted_stages
from torch import Tensor, nn

from dcdit.checkpoint import load_model, save_model
from dcdit.models import SparseDiT, SparseDiTConfig, count_flops, create_config, create_model
from dcdit.models.flops import SOFTMAX_FLOPS
from dcdit.models.upcycle import upcycle

BY_TIME = {"noisy_grid": (2, 3), "sparse_grid": (4, 5)}
ROUTERS = ("predictability", "dithered", "cosine2d", "cosine1d", "uniform")
MODELS = {
    "pooled": {},
    "pooled by time": BY_TIME,
    **{name: {"router": name} for name in ROUTERS},
    "routed by time": {**BY_TIME, "router": "predictability", "dechunk_sigma": 2.0},
}


# --- the plain formulation: one image at a time, all tokens everywhere ----------------------------------------------


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, allowed: Tensor | None = None) -> Tensor:
    """q (L, D), k and v (M, D), and which of the M may be seen."""
    parts = []
    for q_h, k_h, v_h in zip(*(x.chunk(heads, 1) for x in (q, k, v)), strict=True):
        scores = q_h @ k_h.T / q_h.shape[1] ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        parts.append(scores.softmax(1) @ v_h)
    return torch.cat(parts, 1)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def plain_block(block, kind, x: Tensor, mod, source: Tensor | None = None, allowed: Tensor | None = None) -> Tensor:
    """One block on x (L, D). ``source`` is what it attends to, of which only the ``allowed`` tokens are there."""
    h, heads = norm(x, mod[0], mod[1]), block.num_heads
    if kind == "pooled":  # every token weighs the same, as the softmax of equal scores
        uniform = torch.full((len(x), len(x)), 1 / len(x), dtype=x.dtype)
        seen = uniform @ linear(block.value, h)
    elif source is None:
        seen = attend(*linear(block.qkv, h).chunk(3, 1), heads, allowed)
    else:
        k, v = linear(block.key_value, norm(source, mod[0], mod[1])).chunk(2, 1)
        seen = attend(linear(block.query, h), k, v, heads, allowed)
    x = x + mod[2] * linear(block.proj, seen)
    h = linear(block.fc2, F.gelu(linear(block.fc1, norm(x, mod[3], mod[4])), approximate="tanh"))
    return x + mod[5] * h


def cells(side: int, count: int) -> list[range]:
    """The rows of a grid that each of ``count`` adaptive pools averages."""
    return [range(i * side // count, -(-(i + 1) * side // count)) for i in range(count)]


def pool(x: Tensor, grid: tuple[int, int], few: tuple[int, int]) -> Tensor:
    x = x.unflatten(0, grid)
    rows = [torch.stack([x[i, j] for i in down for j in across]).mean(0) for down in cells(grid[0], few[0])
            for across in cells(grid[1], few[1])]  # fmt: skip
    return torch.stack(rows)


def upsample(x: Tensor, few: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    x = x.unflatten(0, few)
    return torch.stack([
        x[i * few[0] // grid[0], j * few[1] // grid[1]] for i in range(grid[0]) for j in range(grid[1])
    ])  # fmt: skip


def nearest_chosen(x: Tensor, p: Tensor, chosen: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """De-chunking of all rows x (L, D), of which the chosen ones count: weights of the others are zero."""
    position = torch.stack([torch.arange(len(x)) // grid[1], torch.arange(len(x)) % grid[1]], 1)
    distance = (position[:, None] - position).square().sum(2)
    q = p.clamp(1e-4, 1 - 1e-4)
    weight = (-distance / (2 * sigma**2)).exp() * (q * chosen)
    smooth = weight / (weight.sum(1, keepdim=True) + 1e-8) @ x
    rows = q[:, None] * x + (1 - q[:, None]) * smooth
    nearest = (distance * len(x) + torch.arange(len(x))).masked_fill(~chosen, len(x) ** 3).argmin(1)
    gate = torch.where(p > 0.5, p, 1 - p)
    return rows[nearest] + rows[nearest].detach() * (gate - gate.detach())[:, None]


def plain_image(model: SparseDiT, tokens: Tensor, modulation, t: float) -> tuple[Tensor, list[Tensor]]:
    """The blocks on one image (L, D), and the probabilities of the routers.

    With a router the sparse blocks run on all tokens, and no token may see one that was not chosen.
    """
    config, grid = model.config, model.patch_grid
    modules, probs = iter(model.sparse_tokens), []
    allowed = None
    for kind, block, mod in zip(config.kinds, model.blocks, modulation, strict=True):
        if kind == "merge":
            module, full = next(modules), tokens
            few = config.sparse_grid_at(t)
            if config.router is None:
                tokens = pool(full, grid, few)
            else:
                p = module.router(full[None])[0]
                probs.append(p)
                allowed = torch.zeros(len(p), dtype=torch.bool)
                # Of equal probabilities the higher raster index stays.
                allowed[sorted(range(len(p)), key=lambda i: (p[i].item(), i))[-few[0] * few[1] :]] = True
            tokens = plain_block(block, kind, tokens, mod, full)
        elif kind == "recover":
            rows, sparse = linear(module.from_sparse, tokens), tokens
            back = upsample(rows, few, grid) if allowed is None else nearest_chosen(
                rows, p, allowed, grid, config.dechunk_sigma)  # fmt: skip
            tokens = plain_block(block, kind, back + linear(module.from_full, full), mod, sparse, allowed)
            allowed = None
        else:
            tokens = plain_block(block, kind, tokens, mod, allowed=allowed)
    return tokens, probs


def plain(model: SparseDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    tokens, cond = model.embed(x, t, y)
    modulation = model.modulation(cond)
    images = [
        plain_image(model, tokens[i], [[row[i] for row in mod] for mod in modulation], float(t[i]))[0]
        for i in range(len(x))
    ]
    return model.project(torch.stack(images), cond)


# --- the tests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_gradients_against_the_plain_formulation(kind: str) -> None:
    model = small_sparse_dit(**MODELS[kind])
    model.double()
    x, t, y = batch(model.config)
    t = torch.tensor([950, 400, 30])
    found = []
    for run in (model, lambda *inputs: plain(model, *inputs)):
        model.zero_grad()
        out = run(x.double(), t, y)
        (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).square().mean().backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (ours, our_grads), (theirs, their_grads) = found
    torch.testing.assert_close(ours, theirs)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, their_grads[name], rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not kind.startswith("cosine")])
@torch.no_grad()
def test_flops_match_pytorchs_counter(kind: str) -> None:
    model = small_sparse_dit(**MODELS[kind])
    x, _, y = batch(model.config)
    t = torch.tensor([950, 400, 30])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = counted_stages(lambda: model(x, t, y))
    lengths = [model.config.sparse_tokens_at(float(time)) for time in t]
    ours = count_flops(model.config, lengths)
    # The papers add 3 FLOPs per attention score for the softmax; PyTorch counts the two products only.
    full, scores = model.config.tokens, 0
    for few in lengths:
        pairs = {"pooled": 0, "merge": few * full, "recover": few * full, "sparse": few * few, "dense": full * full}
        scores += sum(pairs[block] for block in model.config.kinds)
    ours["transformer"] -= model.config.num_heads * scores * SOFTMAX_FLOPS
    assert counted == {name: ours[name] for name in counted}
    assert {name for name, flops in ours.items() if flops} - {"total"} <= counted.keys()
    assert {"gather", *(["select"] if model.config.router else [])} <= counted.keys()


def test_flops_of_the_published_model() -> None:
    """Their log says 67.632 G multiply-adds for XL at 256 pixels. It leaves out the scores of attention, but has those
    of the pooled block, which they compute, with a row of values for every token; and they upsample before the layer
    for the sparse tokens."""
    config = create_config("SparseDiT-XL/2")
    full, few, dim = 256, 64, 1152
    scores = 4 * (2 * few * full + 3 * few**2 + full**2) + 3 * full**2
    ours = count_flops(config)["total"] - 16 * scores * (4 * dim // 16 + SOFTMAX_FLOPS)
    ours += 2 * (2 * (full - 1) * dim**2 + full**2 * dim + 4 * (full - few) * dim**2)
    assert ours / 2e9 == pytest.approx(67.632, rel=1e-3)


@torch.no_grad()
def test_images_at_several_times_run_each_with_its_own_tokens() -> None:
    for kind in ("pooled by time", "routed by time"):
        model = small_sparse_dit(**MODELS[kind]).double()
        x, _, y = batch(model.config, 5)
        t = torch.tensor([10, 990, 400, 12, 800])
        together = model(x.double(), t, y)
        for i in range(5):
            torch.testing.assert_close(model(x[i : i + 1].double(), t[i : i + 1], y[i : i + 1])[0], together[i])
        assert model(x[:0].double(), t[:0], y[:0]).shape == (0, *together.shape[1:])


def test_sparse_tokens_by_timestep() -> None:
    """Sides of 6 to 10: the fewest in the first quarter of the noise, then linear."""
    config = create_config("SparseDiT-S/2", sparse_grid=[10, 10], noisy_grid=[6, 6])
    times = (1000, 999.5, 750, 749, 600, 500, 375, 187.5, 30, 0)
    assert [config.sparse_grid_at(t)[0] for t in times] == [6, 6, 6, 6, 7, 7, 8, 9, 10, 10]
    assert config.sparse_tokens_at(600) == 49 and config.most_sparse_tokens == 100
    fixed = create_config("SparseDiT-S/2")
    assert {fixed.sparse_grid_at(t) for t in times} == {(8, 8)}


def test_every_weight_gets_a_gradient() -> None:
    for change in (BY_TIME, {"router": "predictability"}):
        model = small_sparse_dit(**change).train()
        model(*batch(model.config)).square().mean().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert missing == [], change


def test_gradient_checkpointing_changes_nothing() -> None:
    for kind in ("pooled by time", "predictability"):
        gradients = []
        for recompute in (False, True):
            model = small_sparse_dit(**MODELS[kind]).train()
            model.y_embedder.dropout_prob = 0.0
            model.gradient_checkpointing = recompute
            model(*batch(model.config)).square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for plain_grad, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(recomputed, plain_grad)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_half_precision(kind: str) -> None:
    """Under autocast the residual stream stays float32, as in a static DiT."""
    model = small_sparse_dit(**MODELS[kind])
    inputs = batch(model.config)
    exact = model(*inputs)
    seen = set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs)
    assert seen == {torch.float32}
    # A router may choose other tokens where two probabilities are close.
    for out in (mixed, model.bfloat16()(*inputs)):
        assert out.dtype == torch.bfloat16
        error = (out.float() - exact).abs().mean() / exact.abs().mean()
        assert error < (0.03 if model.config.router is None else 0.2)


def test_one_graph_under_torch_compile() -> None:
    model = small_sparse_dit(router="predictability", depth=5, modules=1)
    inputs = batch(model.config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@torch.no_grad()
def test_a_new_model_made_from_a_static_dit() -> None:
    """With all tokens in the middle it is the source, but for the pooled blocks and the way around the middle."""
    sizes = {"depth": 5, "hidden_size": 64}
    source = small_dit(**sizes)
    model = SparseDiT(
        SparseDiTConfig(grid=(8, 12), **{**SIZES, **sizes}, modules=1, sparse_depth=1, sparse_grid=(4, 6))
    ).eval()
    upcycle(model, source)
    inputs = batch(model.config)
    block = source.blocks[0]  # the pooled one: without queries, its scores are all equal
    block.qkv.weight[:128], block.qkv.bias[:128] = 0, 0
    tokens, cond = source.embed(*inputs)
    modulation = source.modulation(cond)
    full = block(tokens, modulation[0])
    merged = source.blocks[1](full, modulation[1])
    sparse = source.blocks[2](merged, modulation[2])
    mod = modulation[3]
    h = torch.cat([full, sparse], 1)  # queries of all tokens, keys and values of the sparse ones
    q, k, v = source.blocks[3].qkv(norm(h, mod[0][:, None], mod[1][:, None])).chunk(3, 2)
    length = full.shape[1]
    seen = torch.stack([attend(a[:length], b[length:], c[length:], 4) for a, b, c in zip(q, k, v, strict=True)])
    out = full + mod[2][:, None] * source.blocks[3].proj(seen)
    out = out + source.blocks[3].mlp_branch(out, mod)
    out = source.blocks[4](out, modulation[4])
    torch.testing.assert_close(model(*inputs), source.project(out, cond))
    with pytest.raises(ValueError, match="has patch_size 4, the SparseDiT 2"):
        upcycle(model, small_dit(patch_size=4, **sizes))


def test_checkpoints(tmp_path) -> None:
    for number, change in enumerate(MODELS.values()):
        model = small_sparse_dit(**change)
        file = tmp_path / f"{number}.safetensors"
        save_model(file, model)
        loaded = load_model(file)
        assert isinstance(loaded, SparseDiT) and loaded.config == model.config
        assert SparseDiTConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        inputs = batch(model.config)
        with torch.no_grad():
            torch.testing.assert_close(loaded(*inputs), model(*inputs))


def test_presets() -> None:
    """The published sizes of XL: 1 + 4 (1 + 3 + 1 + 1) + 3 blocks at 256 pixels, 2 + 24 + 2 at 512."""
    config = create_config("SparseDiT-XL/2")
    assert (config.pooled, config.modules, config.sparse_depth, config.tail) == (1, 4, 3, 3)
    assert config.sparse_grid == (8, 8) and config.noisy_grid is None and config.router is None
    larger = create_config("SparseDiT-XL/2", image_size=512)
    assert (larger.pooled, larger.tail, larger.sparse_grid) == (2, 2, (8, 8))
    assert create_config("SparseDiT-B/8").sparse_grid == (2, 2)
    assert create_config("SparseDiT-S/2").kinds == [
        "pooled",
        *["merge", "sparse", "sparse", "recover", "dense"] * 2,
        "dense",
    ]
    with torch.device("meta"):
        model = create_model("SparseDiT-XL/2")
    # Their log says 0.683 G parameters, in which the position table counts.
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == pytest.approx(0.683e9, abs=5e5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": 0}, "modules is 0; accepted: at least 1"),
        ({"pooled": -1}, "pooled is -1; accepted: at least 0"),
        ({"depth": 8}, "depth is 8; accepted: at least 9, the blocks of pooled = 1 and of modules = 2 with sparse_dep"),
        ({"sparse_grid": (5, 4)}, r"sparse_grid is \(5, 4\); accepted: at most \(4, 6\)"),
        ({"sparse_grid": [3]}, r"sparse_grid is \(3,\); accepted: \(H, W\), two positive integers"),
        ({"sparse_grid": None}, r"sparse_grid is None; accepted: \(H, W\)"),
        ({"noisy_grid": (4, 4)}, r"noisy_grid is \(4, 4\); accepted: at most \(3, 4\)"),
        (
            {"router": "random"},
            "router is 'random'; accepted: predictability, dithered, cosine2d, cosine1d, uniform, or null",
        ),
        (
            {"router": "predictability", "hidden_size": 48},
            "hidden_size is 48; accepted with that router: a multiple of",
        ),
        ({"dechunk_sigma": 0.0}, r"dechunk_sigma is 0.0; accepted: a number in \(0, 16\]"),
        ({"modules": "2"}, "modules is '2'; accepted: int"),
    ],
)
def test_bad_values(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        small_sparse_dit(**change)
    assert "\n" not in str(error.value)


def test_bad_use() -> None:
    model = small_sparse_dit()
    x, t, y = batch(model.config)
    with pytest.raises(ValueError, match=r"return_probs is True, but .* this model pools its tokens"):
        model(x, t, y, return_probs=True)
    with pytest.raises(ValueError, match="lengths holds 25; accepted: 1 to 24"):
        count_flops(model.config, 25)
    assert model(x[:0], t[:0], y[:0]).shape == (0, 8, 8, 12)
    assert small_sparse_dit(**BY_TIME)(x[:0], t[:0], y[:0]).shape == (0, 8, 8, 12)
