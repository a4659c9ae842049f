"""Varlen attention against the float64 definition, and the choice of its kernel."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.inputs import randn, random_cu_seqlens

from dcdit.ops import attention_kernels as kernels
from dcdit.ops import reference, use_backend
from dcdit.ops.attention import varlen_attention
from dcdit.ops.attention_kernels import attention_backends, choose_attention_backend

LENGTHS = {
    "equal": [5, 5, 5],
    "ragged": [1, 40, 3, 17],
    "empty_inside": [0, 6, 0, 0, 9, 0],
    "all_empty": [0, 0],
    "one": [1],
    "ragged_square": [9, 2],
    "none": [],
}


def inputs(lengths, dtype=torch.float64, heads=3, head_dim=8, padding=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths) + padding, heads, head_dim)
    qkv = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]
    return qkv, random_cu_seqlens(*lengths), max(lengths, default=0)


def value_and_grads(function, qkv, grad):
    out = function(*qkv)
    return out, *torch.autograd.grad(out, qkv, grad.to(out.dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_matches_the_definition_in_float64(lengths, causal):
    qkv, cu, longest = inputs(lengths)
    grad = randn(*qkv[0].shape, dtype=torch.float64, seed=7)
    got = value_and_grads(lambda *x: varlen_attention(*x, cu, longest, causal), qkv, grad)
    want = (
        value_and_grads(lambda *x: reference.varlen_attention(*x, cu, longest, causal), qkv, grad) if lengths else got
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [LENGTHS["equal"], LENGTHS["ragged"]], ids=["equal", "ragged"])
def test_error_is_at_most_twice_that_of_the_plain_formula(lengths, dtype):
    qkv, cu, longest = inputs(lengths, dtype, head_dim=32)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    grad = randn(*qkv[0].shape, dtype=torch.float64, seed=7)

    def plain(q, k, v):
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat(
            [
                torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", a, b) * a.shape[-1] ** -0.5).softmax(-1), c)
                for a, b, c in parts
            ]
        )

    truth = value_and_grads(lambda *x: reference.varlen_attention(*x, cu, longest), exact, grad)
    got = value_and_grads(lambda *x: varlen_attention(*x, cu, longest), qkv, grad)
    peer = value_and_grads(plain, qkv, grad)
    for a, b, c in zip(got, peer, truth, strict=True):
        assert a.dtype == dtype
        # One ulp of the largest entry more, as in FlashAttention's own tests: the maximum of a few hundred roundings in
        # float32 is luck.
        floor = torch.finfo(dtype).eps * c.abs().max()
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + floor


CROSS = {
    "longer": ([5, 3], [9, 4]),
    "shorter": ([5, 3], [2, 3]),
    "equal": ([4, 4], [4, 4]),
    "equal, longer": ([2, 2], [5, 5]),
    "equal, shorter": ([5, 5], [2, 2]),
    "no key": ([3, 2], [0, 4]),
    "no query": ([0, 2, 0], [3, 4, 0]),
    "nothing": ([2, 3], [0, 0]),
    "none": ([], []),
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "lengths_k"), CROSS.values(), ids=CROSS)
def test_keys_of_other_lengths_and_fewer_heads(lengths, lengths_k, causal, padding, groups):
    (q, _, _), cu, longest = inputs(lengths, heads=2 * groups, padding=padding)
    (_, k, v), cu_k, longest_k = inputs(lengths_k, heads=2, padding=2 * padding, seed=1)
    with torch.no_grad():
        for x, rows in ((q, lengths), (k, lengths_k), (v, lengths_k)):
            x[sum(rows) :] = float("nan")
    grad = randn(*q.shape, dtype=torch.float64, seed=7)
    options = {"padding": padding > 0, "cu_seqlens_k": cu_k, "max_seqlen_k": longest_k}
    got = value_and_grads(lambda *x: varlen_attention(*x, cu, longest, causal, **options), (q, k, v), grad)
    want = value_and_grads(lambda *x: reference.varlen_attention(*x, cu, longest, causal, **options), (q, k, v), grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert not a.isnan().any()


def test_the_last_query_sees_every_key():
    """The alignment of flash-attention: with two more keys than queries, the first query sees three of them."""
    (q, _, _), cu, _ = inputs([2], heads=1)
    (_, k, v), cu_k, _ = inputs([4], heads=1, seed=1)
    out = varlen_attention(q, k, v, cu, 2, True, cu_seqlens_k=cu_k, max_seqlen_k=4)
    weight = ((q[:, 0] @ k[:, 0].mT) * 8**-0.5).masked_fill(torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]]).bool(), -1e9)
    torch.testing.assert_close(out[:, 0], weight.softmax(-1) @ v[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "lengths_k"), [([5, 3, 2], [9, 0, 1]), ([3, 3], [4, 4])], ids=["ragged", "equal"])
def test_cross_attention_compiles_to_one_graph(lengths, lengths_k, causal):
    torch._dynamo.reset()
    (q, _, _), cu, longest = inputs(lengths, heads=4)
    (_, k, v), cu_k, longest_k = inputs(lengths_k, heads=2, seed=1)

    def attend(q, k, v, cu, cu_k):
        return varlen_attention(q, k, v, cu, longest, causal, cu_seqlens_k=cu_k, max_seqlen_k=longest_k)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    grad = randn(*q.shape, dtype=torch.float64, seed=7)
    got = value_and_grads(lambda *x: compiled(*x, cu, cu_k), (q, k, v), grad)
    want = value_and_grads(lambda *x: attend(*x, cu, cu_k), (q, k, v), grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    qkv, cu, longest = inputs([2, 0, 3], heads=1, head_dim=4)
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, cu, longest, causal=True), qkv)


def test_equal_lengths_run_as_one_call_without_copies(monkeypatch):
    seen = []

    def spy(q, k, v, **options):
        seen.append((q.shape, q.data_ptr()))
        return sdpa(q, k, v, **options)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    qkv = torch.randn(12, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    varlen_attention(q, k, v, random_cu_seqlens(4, 4, 4), 4)
    assert seen == [((3, 2, 4, 8), q.data_ptr())]
    varlen_attention(q, k, v, random_cu_seqlens(4, 3, 5), 5)
    assert len(seen) == 4


def test_equal_lengths_are_dense_where_the_kernel_would_be_that_of_pytorch(monkeypatch):
    """In inference, unless the kernel is asked for by name. Where a gradient is wanted, the dense call would copy."""
    started = []

    def kernel(name, q, *_):
        started.append(name)
        return torch.zeros_like(q)

    monkeypatch.setattr(kernels, "run_kernel", kernel)
    chosen = "torch_varlen"
    monkeypatch.setattr(kernels, "choose_attention_backend", lambda *_: chosen)
    qkv, cu, longest = inputs([4, 4, 4], torch.float32)
    frozen = [x.detach() for x in qkv]
    expected = reference.varlen_attention(*frozen, cu, longest)
    torch.testing.assert_close(varlen_attention(*frozen, cu, longest), expected)
    assert started == []
    cases = [
        lambda: varlen_attention(*qkv, cu, longest),
        lambda: varlen_attention(*frozen, cu, longest, backend="torch_varlen"),
        lambda: varlen_attention(*frozen, cu, longest, padding=True),
        lambda: varlen_attention(*frozen, random_cu_seqlens(4, 3, 5), 5),
    ]
    for number, case in enumerate(cases, 1):
        case()
        assert started == ["torch_varlen"] * number
    chosen = "flash3"
    varlen_attention(*frozen, cu, longest)
    assert started[-1] == "flash3"


def test_a_sequence_does_not_depend_on_the_others():
    qkv, cu, longest = inputs([4, 9, 2], torch.float32)
    together = varlen_attention(*qkv, cu, longest)
    alone = varlen_attention(*(x[4:13] for x in qkv), random_cu_seqlens(9), 9)
    torch.testing.assert_close(together[4:13], alone, rtol=0, atol=0)


@pytest.mark.parametrize("forced", ["torch", "reference"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_padding_rows_are_zero_and_leak_nothing(lengths, forced):
    # The buffer of ragged_square has B * max_seqlen rows. Without padding that would mean equal lengths.
    qkv, cu, longest = inputs(lengths, padding=7)
    total = sum(lengths)
    poisoned = [x.detach().clone() for x in qkv]
    for x in poisoned:
        x[total:] = float("nan")
        x.requires_grad_()
    grad = randn(*qkv[0].shape, dtype=torch.float64, seed=7)
    grad[total:] = float("nan")
    clean = [x.detach()[:total].requires_grad_() for x in qkv]
    with use_backend(forced):
        got = value_and_grads(lambda *x: varlen_attention(*x, cu, longest, padding=True), poisoned, grad)
        want = value_and_grads(lambda *x: varlen_attention(*x, cu, longest), clean, grad[:total])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[:total], b, rtol=1e-12, atol=1e-12)
        assert (a[total:] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lengths", "padding"), [([6, 6], 0), ([6, 2, 9], 0), ([6, 6], 4), ([0, 5, 8], 3)], ids=str)
def test_compiles_to_one_graph_on_the_cpu(lengths, padding, causal):
    torch._dynamo.reset()
    qkv, cu, longest = inputs(lengths, padding=padding)

    def attend(q, k, v, cu_seqlens):
        return varlen_attention(q, k, v, cu_seqlens, longest, causal, padding=padding > 0)

    grad = randn(*qkv[0].shape, dtype=torch.float64, seed=7)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got = value_and_grads(lambda *x: compiled(*x, cu), qkv, grad)
    want = value_and_grads(lambda *x: attend(*x, cu), qkv, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_when_the_number_of_tokens_depends_on_data(dynamic):
    torch._dynamo.reset()
    q = torch.randn(9, 2, 8)
    torch._dynamo.decorators.mark_unbacked(q, 0)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(q, cu):
        return varlen_attention(q, q, q, cu, 5)

    cu = random_cu_seqlens(4, 5)
    torch.testing.assert_close(compiled(q, cu), varlen_attention(q, q, q, cu, 5))


def test_the_registered_op_passes_opcheck():
    qkv, cu, _ = inputs([3, 0, 5], padding=2)
    torch.library.opcheck(torch.ops.dcdit.varlen_sdpa.default, (*qkv, cu, cu, True))


# --- choosing a kernel: the machine is simulated, the kernels are replaced -----------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be on a GPU with these packages installed. The test says what a package returns."""

    def pretend(capability, packages, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(kernels, "_LOADED", {})
        monkeypatch.setattr(kernels, "_LOADED_PACKED", {})
        monkeypatch.setattr(kernels, "_is_registered", lambda op: op is not None)
        real = kernels.importlib.import_module

        def import_module(name):
            if name in packages:
                return SimpleNamespace(flash_attn_varlen_func=packages[name], varlen_attn=packages[name])
            if name.startswith("torch"):
                return real(name)
            raise ModuleNotFoundError(f"No module named {name!r}")

        monkeypatch.setattr(kernels, "importlib", SimpleNamespace(import_module=import_module))

    def forget():
        kernels._why_unavailable.cache_clear()
        kernels._first_supported.cache_clear()

    forget()
    yield pretend
    forget()


ALL = {name: lambda q, k, v, **_: q for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn")}
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "packages", "compiling", "expected"),
    [
        ((9, 0), ALL, False, "flash3"),
        ((9, 0), ALL, True, "flash3"),
        ((10, 0), ALL, False, "flash4"),
        ((10, 0), ALL, True, "flash2"),
        ((8, 0), ALL, False, "flash2"),
        ((9, 0), {}, False, "torch_varlen"),
        ((7, 5), ALL, False, "sdpa"),
    ],
)
def test_auto_takes_the_best_kernel(gpu, capability, packages, compiling, expected):
    gpu(capability, packages)
    assert choose_attention_backend("auto", CUDA, torch.bfloat16, 64, compiling) == expected


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 64), (torch.float64, 64), (torch.float16, 68)])
def test_auto_never_rounds_or_pads(gpu, dtype, head_dim):
    gpu((9, 0), ALL)
    assert choose_attention_backend("auto", CUDA, dtype, head_dim, False) == "sdpa"


def test_rocm_reports_hopper_numbers_but_is_not_hopper(gpu):
    gpu((9, 4), ALL, hip="6.4")
    assert choose_attention_backend("auto", CUDA, torch.bfloat16, 64, False) == "flash2"


def test_report_says_why(gpu):
    gpu((8, 0), {"flash_attn": ALL["flash_attn"]})
    report = {name: (available, reason) for name, available, reason in attention_backends("cuda:0")}
    assert list(report) == ["flash3", "flash4", "flash2", "torch_varlen", "sdpa"]
    assert report["flash3"] == (False, "needs compute capability 9.x, not 8.0")
    assert report["flash2"][0] and report["torch_varlen"][0] and report["sdpa"][0]


def test_report_on_the_cpu_imports_nothing():
    assert [name for name, available, _ in attention_backends("cpu") if available] == ["sdpa"]


def test_a_broken_package_does_not_take_the_others_down(gpu):
    gpu((9, 0), {"flash_attn": ALL["flash_attn"]})
    report = {name: reason for name, _, reason in attention_backends(CUDA)}
    assert "No module named 'flash_attn_interface'" in report["flash3"]
    assert choose_attention_backend("auto", CUDA, torch.float16, 64, False) == "flash2"


@pytest.mark.parametrize("name", ["flash3", "flash2", "flash4", "torch_varlen"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("own", [None, [9, 3, 0]], ids=["self", "cross"])
def test_a_kernel_that_leaves_padding_rows_unwritten(monkeypatch, name, padding, own):
    """A replacement that returns NaN in rows of no sequence, forward and backward, as the kernels may."""
    lengths = [4, 0, 7]
    qkv, cu, longest = inputs(lengths, padding=padding)
    cross = {}
    if own is not None:
        (_, *kv), cu_k, _ = inputs(own, heads=1, padding=padding)
        qkv, cross = [qkv[0], *kv], {"cu_seqlens_k": cu_k, "max_seqlen_k": 9}
    totals = [sum(lengths), *[sum(lengths if own is None else own)] * 2]

    class Unwritten(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, total):
            ctx.total = total
            x = x.clone()
            x[total:] = float("nan")
            return x

        @staticmethod
        def backward(ctx, grad):
            return Unwritten.forward(ctx, grad, ctx.total), None

    def flash(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, deterministic=False):
        assert (max_seqlen_q, max_seqlen_k) == (longest, longest if own is None else 9)
        q, k, v = (Unwritten.apply(x, total) for x, total in zip((q, k, v), totals, strict=True))
        out = reference.varlen_attention(q, k, v, cu_seqlens_q, max_seqlen_q, causal, False, cu_seqlens_k)
        return Unwritten.apply(out, totals[0]), None

    def native(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert q.shape[1] == k.shape[1]  # an early version, which does not share heads
        return flash(q, k, v, cu_q, cu_k, max_q, max_k, causal=window_size == (-1, 0))[0]

    function = native if name == "torch_varlen" else flash
    accepted = frozenset(kernels.inspect.signature(function).parameters)
    monkeypatch.setattr(kernels, "_LOADED", {name: (function, accepted)})
    monkeypatch.setattr(kernels, "choose_attention_backend", lambda *_: name)
    with torch.no_grad():
        for x, total in zip(qkv, totals, strict=True):
            x[total:] = float("nan")
    grad = randn(*qkv[0].shape, dtype=torch.float64, seed=7)
    options = {"padding": padding > 0, **cross}
    got = value_and_grads(lambda *x: varlen_attention(*x, cu, longest, True, **options), qkv, grad)
    want = value_and_grads(lambda *x: reference.varlen_attention(*x, cu, longest, True, **options), qkv, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_installed_torch_takes_our_arguments(monkeypatch):
    """Call torch's own varlen op on fake tensors: that checks the signature without a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = pytest.importorskip("torch.nn.attention.varlen")
    accepted = frozenset(kernels.inspect.signature(module.varlen_attn).parameters)
    monkeypatch.setattr(kernels, "_LOADED", {"torch_varlen": (module.varlen_attn, accepted)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(10, 2, 64, dtype=torch.bfloat16, device="meta")
        cu = torch.empty(3, dtype=torch.int32, device="meta")
        out = kernels.run_kernel("torch_varlen", q, q, q, cu, 6, cu, 6, True)
        k = q[:5, :1]
        grouped = kernels.run_kernel("torch_varlen", q, k, k, cu, 6, cu, 4, True)
    assert out.shape == grouped.shape == q.shape and out.dtype == q.dtype


def test_kernels_of_others_take_int32(monkeypatch):
    monkeypatch.setattr(kernels, "choose_attention_backend", lambda *_: "flash2")
    qkv, cu, longest = inputs([2, 3])
    with pytest.raises(TypeError, match=r"int64; attention backend 'flash2' accepts int32: pass cu_seqlens.int\(\)"):
        varlen_attention(*qkv, cu.long(), longest)


# --- bad input ---------------------------------------------------------------------------------------------------


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        bad("k has shape", k=torch.zeros(6, 2, 4)),
        bad("v has shape", v=torch.zeros(6, 1, 8)),
        bad("k has shape", k=torch.zeros(7, 2, 8), v=torch.zeros(7, 2, 8)),
        bad("2 heads or a divisor", k=torch.zeros(6, 3, 8), v=torch.zeros(6, 3, 8)),
        bad("2 heads or a divisor", k=torch.zeros(6, 0, 8), v=torch.zeros(6, 0, 8)),
        bad("max_seqlen_k is missing", cu_seqlens_k=torch.tensor([0, 2, 6]).int()),
        bad("max_seqlen_k is 6 without", max_seqlen_k=6),
        bad("max_seqlen_k is 3 but", cu_seqlens_k=torch.tensor([0, 2, 6]).int(), max_seqlen_k=3),
        bad("cu_seqlens_k ends at 7", cu_seqlens_k=torch.tensor([0, 2, 7]).int(), max_seqlen_k=6),
        bad("cu_seqlens_k has shape", cu_seqlens_k=torch.tensor([0, 6]).int(), max_seqlen_k=6),
        bad("cu_seqlens_k has dtype", TypeError, cu_seqlens_k=torch.tensor([0, 2, 6]).short(), max_seqlen_k=6),
        bad("packed heads", q=torch.zeros(6, 16)),
        bad("q has dtype torch.int64", TypeError, q=torch.zeros(6, 2, 8, dtype=torch.int64)),
        bad("cu_seqlens has dtype torch.int16", TypeError, cu_seqlens=torch.tensor([0, 2, 6]).short()),
        bad("ends at 5", cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32)),
        bad("ends at 7", cu_seqlens=torch.tensor([0, 2, 7], dtype=torch.int32), padding=True),
        bad("descends", cu_seqlens=torch.tensor([0, 5, 4, 6], dtype=torch.int32)),
        bad("starts at 1", cu_seqlens=torch.tensor([1, 2, 6], dtype=torch.int32)),
        bad("longest sequence has 4 tokens", max_seqlen=3),
        bad("max_seqlen is a Tensor", TypeError, max_seqlen=torch.tensor(4)),
        bad("unknown attention backend 'flash5'", backend="flash5"),
        bad("'flash2' needs a GPU, not cpu; available: sdpa, auto", backend="flash2"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    x = torch.zeros(6, 2, 8)
    arguments = {
        "q": x, "k": x, "v": x, "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32), "max_seqlen": 4, **changes
    }  # fmt: skip
    with pytest.raises(error, match=message):
        varlen_attention(**arguments)
