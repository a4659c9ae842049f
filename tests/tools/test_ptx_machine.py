"""The PTX machine: small programs written by hand, against what the PTX manual says of each instruction."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tools.ptx.instructions import translate
from tools.ptx.machine import run
from tools.ptx.memory import GlobalMemory, MachineError
from tools.ptx.number import bfloat16
from tools.ptx.program import parse

HEAD = """
.entry test(.param .u64 test_param_0, .param .u64 test_param_1)
{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [test_param_0];
    ld.param.b64 %rd1, [test_param_1];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd2, %r0, 4, %rd0;
    mad.wide.u32 %rd3, %r0, 4, %rd1;
"""


def execute(body: str, x: Tensor, out: Tensor | None = None, threads: int = 32, blocks: int = 1) -> Tensor:
    """For thread i, %rd2 is the address of the i-th 4 bytes of x and %rd3 that of out. Shared memory is 1 KiB."""
    out = torch.zeros(threads, dtype=torch.int32) if out is None else out
    program = parse(HEAD + body + "ret;\n}")
    parameters = dict(zip(program.parameters, (x.data_ptr(), out.data_ptr()), strict=True))
    steps = [translate(instruction) for instruction in program.instructions]
    run(program, steps, (blocks,), threads, 1024, parameters, GlobalMemory([x, out]))
    return out


def unary(operation: str, x: Tensor) -> Tensor:
    """``%r2 = operation(%r1)`` of every element."""
    body = f"ld.global.b32 %r1, [%rd2]; {operation} st.global.b32 [%rd3], %r2;"
    return execute(body, x, threads=len(x)).view(x.dtype)


def numbers(count: int = 32) -> Tensor:
    return torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0)).to(torch.int32)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_diverge_and_reconverge() -> None:
    """Thread i runs its loop i times, then all threads exchange their results."""
    body = """
    mov.b32 %r1, 0; mov.b32 %r2, 0;
$LOOP:
    setp.ge.s32 %p1, %r1, %r0;
    @%p1 bra $END;
    add.s32 %r1, %r1, 1; add.s32 %r2, %r2, 10;
    bra.uni $LOOP;
$END:
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
    st.global.b32 [%rd3], %r3;
    """
    assert execute(body, numbers()).tolist() == [10 * (i ^ 1) for i in range(32)]


def test_blocks_have_their_own_shared_memory() -> None:
    body = """
    mov.u32 %r1, %ctaid.x; shl.b32 %r2, %r0, 2;
    st.shared.b32 [%r2], %r1; bar.sync 0; ld.shared.b32 %r3, [global_smem+0];
    mul.lo.s32 %r4, %r1, 64; add.s32 %r4, %r4, %r0;
    mad.wide.u32 %rd4, %r4, 4, %rd1;
    st.global.b32 [%rd4], %r3;
    """
    out = execute(body, numbers(), torch.zeros(192, dtype=torch.int32), threads=64, blocks=3)
    assert out.view(3, 64).equal(torch.arange(3, dtype=torch.int32)[:, None].expand(3, 64))


STORE = "shl.b32 %r2, %r0, 2; st.shared.b32 [%r2], %r0; xor.b32 %r3, %r2, 128;"


def test_a_missing_barrier_is_a_race() -> None:
    read = "ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd3], %r4;"
    out = execute(STORE + "bar.sync 0;" + read, numbers(64), threads=64)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(MachineError, match="race: shared memory is read"):
        execute(STORE + read, numbers(64), threads=64)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("st.shared.b32 [global_smem], %r0;", "two warps write different values"),
        (STORE + "bar.sync 0; ld.shared.b32 %r4, [%r3]; st.shared.b32 [%r2], %r4;", "before a barrier follows another"),
        ("st.shared.b32 [global_smem+1024], %r0;", "leaves the 1024 bytes"),
        ("st.shared.b32 [global_smem+2], %r0;", "not aligned"),
        ("st.global.b32 [%rd2+256], %r0;", "outside of every argument"),
        ("st.global.b32 [%rd2+2], %r0;", "not aligned"),
        ("setp.lt.s32 %p1, %r0, 9; @%p1 bra $X; bar.sync 0;\n$X: add.s32 %r1, %r0, 1;", "not reached by all threads"),
        ("setp.lt.s32 %p1, %r0, 9; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "a warp whose threads have diverged"),
        ("add.s32 %r1, %r9, 1;", "%r9 is read before it is written"),
        ("lop3.b32 %r1, %r0, %r0, %r0, 128;", "unknown instruction"),
        ("add.sat.s32 %r1, %r0, %r0;", "unknown qualifiers"),
    ],
)
def test_undefined_and_unknown_is_an_error(body: str, says: str) -> None:
    with pytest.raises(MachineError, match=says):
        execute(body, numbers(64), threads=64)


def test_lanes_of_a_warp_may_store_copies_that_differ() -> None:
    """One lane wins. Only different warps must store the same."""
    body = """
    and.b32 %r1, %r0, 31; st.shared.b32 [global_smem], %r1; bar.sync 0;
    ld.shared.b32 %r2, [global_smem]; st.global.b32 [%rd3], %r2;
    """
    assert len(execute(body, numbers(64), threads=64).unique()) == 1


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_arrives_with_its_wait(waits: bool) -> None:
    wait = "cp.async.wait_group 0;" if waits else ""
    body = f"""
    shl.b32 %r2, %r0, 2;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 4; cp.async.commit_group; {wait}
    ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd3], %r3;
    """
    assert execute(body, numbers()).equal(numbers()) == waits


def test_the_last_groups_may_still_be_running() -> None:
    body = """
    shl.b32 %r2, %r0, 2;
    cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x4, 4; cp.async.commit_group;
    cp.async.ca.shared.global [ %r2 + 128 ], [ %rd2 + 0 ], 0x4, 0; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.b32 %r3, [%r2]; ld.shared.b32 %r4, [%r2+128];
    cp.async.wait_group 0; ld.shared.b32 %r5, [%r2+128];
    add.s32 %r3, %r3, %r5; setp.eq.s32 %p1, %r4, -1; selp.b32 %r3, %r3, 0, %p1; st.global.b32 [%rd3], %r3;
    """
    assert execute(body, numbers()).equal(numbers())


@pytest.mark.parametrize(
    ("how", "origin"),
    [
        ("up.b32 %r2, %r1, 3, 0", lambda i: i - 3 if i >= 3 else i),
        ("down.b32 %r2, %r1, 3, 31", lambda i: i + 3 if i + 3 < 32 else i),
        ("bfly.b32 %r2, %r1, 12, 31", lambda i: i ^ 12),
        ("idx.b32 %r2, %r1, 5, 31", lambda i: 5),
        # In segments of eight lanes: the clamp holds them in its upper bits.
        ("idx.b32 %r2, %r1, 5, 6175", lambda i: i // 8 * 8 + 5),
        ("up.b32 %r2, %r1, 3, 6144", lambda i: i - 3 if i % 8 >= 3 else i),
    ],
)
def test_shuffles(how: str, origin: Any) -> None:
    x = numbers()
    assert unary(f"shfl.sync.{how}, -1;", x).equal(x[[origin(i) for i in range(32)]])


@pytest.mark.parametrize(("how", "wanted"), [("add", torch.sum), ("min", torch.amin), ("max", torch.amax)])
def test_reductions(how: str, wanted: Any) -> None:
    x = numbers() // 64
    found = unary(f"mov.b32 %r3, -1; redux.sync.{how}.s32 %r2, %r1, %r3;", x)
    assert found.eq(wanted(x)).all()


def test_atomics_take_every_lane() -> None:
    x = numbers()
    out = execute("ld.global.b32 %r1, [%rd2]; atom.global.gpu.relaxed.min.s32 %r2, [%rd1], %r1;", x, numbers(1))
    assert out[0] == x.min()


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("div.s32 %r2, %r1, 7;", lambda x: int(x / 7)),
        ("rem.s32 %r2, %r1, 7;", lambda x: x - int(x / 7) * 7),
        ("shr.s32 %r2, %r1, 40;", lambda x: -1 if x < 0 else 0),
        ("shr.u32 %r2, %r1, 4;", lambda x: x % 2**32 >> 4),
        ("shl.b32 %r2, %r1, 32;", lambda x: 0),
        ("bfe.u32 %r2, %r1, 3, 5;", lambda x: x % 2**32 >> 3 & 31),
        ("bfe.s32 %r2, %r1, 3, 5;", lambda x: ((x % 2**32 >> 3 & 31) ^ 16) - 16),
        ("mul.hi.u32 %r2, %r1, 1000;", lambda x: x % 2**32 * 1000 >> 32),
        ("prmt.b32 %r2, %r1, 0, 0x4321;", lambda x: x % 2**32 >> 8),
        ("shf.l.wrap.b32 %r2, %r1, %r1, 8;", lambda x: (x % 2**32 << 8 | x % 2**32 >> 24) % 2**32),
        ("popc.b32 %r2, %r1;", lambda x: (x % 2**32).bit_count()),
        ("max.relu.s32 %r2, %r1, -5;", lambda x: max(x, 0)),
        ("setp.gt.u32 %p1, %r1, 5; selp.b32 %r2, 1, 2, %p1;", lambda x: 1 if x % 2**32 > 5 else 2),
        ("cvt.s64.s32 %rd4, %r1; shr.s64 %rd4, %rd4, 4; cvt.u32.u64 %r2, %rd4;", lambda x: x >> 4),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};", lambda x: x % 2**16 << 16 | x % 2**32 >> 16),
    ],
)
def test_integers(operation: str, wanted: Any) -> None:
    x = torch.cat([numbers(), torch.tensor([0, 1, -1, 6, -6, 2**31 - 1, -(2**31)], dtype=torch.int32)])
    x = torch.cat([x, x.new_zeros(-len(x) % 32)])
    found = unary(operation, x)
    assert [v % 2**32 for v in found.tolist()] == [wanted(v) % 2**32 for v in x.tolist()]


def floats() -> Tensor:
    special = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3.0e38, 1e-40])
    return torch.cat([torch.randn(56, generator=torch.Generator().manual_seed(1)), special])


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        ("fma.rn.f32 %r2, %r1, %r1, 0fBF800000;", lambda x: (x.double() * x - 1).float()),
        ("div.full.f32 %r2, 0f3F800000, %r1;", lambda x: 1 / x),
        ("max.f32 %r2, %r1, 0f00000000;", lambda x: torch.where(x.isnan(), 0, x.clamp(min=0))),
        ("max.NaN.f32 %r2, %r1, 0f00000000;", lambda x: x.clamp(min=0)),
        ("ex2.approx.f32 %r2, %r1;", torch.exp2),
        ("setp.num.f32 %p1, %r1, %r1; selp.b32 %r2, %r1, 0, %p1;", lambda x: x.masked_fill(x.isnan(), 0)),
        ("setp.neu.f32 %p1, %r1, %r1; selp.f32 %r2, %r1, 0f00000000, %p1;", lambda x: torch.where(x.isnan(), x, 0)),
        ("cvt.rzi.s32.f32 %r2, %r1; cvt.rn.f32.s32 %r2, %r2;", lambda x: x.nan_to_num().trunc().clamp(-(2**31), 2**31)),
        ("cvt.rn.f16.f32 %rs1, %r1; cvt.f32.f16 %r2, %rs1;", lambda x: x.half().float()),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r2, %rs1;", lambda x: x.bfloat16().float()),
        ("cvt.rn.bf16x2.f32 %r3, 0f3F800000, %r1; shl.b32 %r2, %r3, 16;", lambda x: x.bfloat16().float()),
        *(
            (
                f"cvt.rn.{kind}.f32 %rs1, %r1; fma.rn.f32.{kind} %r2, %rs1, %rs1, %r1;",
                lambda x, dtype=dtype: (x.to(dtype).double().square() + x).float(),
            )
            for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16))
        ),
        (
            "cvt.rn.bf16.f32 %rs1, %r1; mul.bf16 %rs2, %rs1, %rs1; cvt.f32.bf16 %r2, %rs2;",
            lambda x: (x.bfloat16() * x.bfloat16()).float(),
        ),
    ],
)
def test_floats(operation: str, wanted: Any) -> None:
    torch.testing.assert_close(unary(operation, floats()), wanted(floats()), rtol=3e-7, atol=0, equal_nan=True)


def test_bfloat16_rounds_as_pytorch_does() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    assert (bfloat16(x.numpy()) == x.bfloat16().view(torch.int16).numpy().view(np.uint16)).all()


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_tensor_core_product(kind: str, dtype: torch.dtype) -> None:
    """Registers as in the manual: lane i holds row i // 4 and the columns from 2 (i % 4)."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator)
    lane = torch.arange(32)
    row, col = lane // 4, lane % 4 * 2

    def pairs(x: Tensor, rows: Tensor, cols: Tensor, down: bool = False) -> Tensor:
        second = x[rows + 1, cols] if down else x[rows, cols + 1]
        return torch.stack([x[rows, cols], second], 1).view(torch.int32)[:, 0]

    left = [pairs(a, row + r, col + k) for k in (0, 8) for r in (0, 8)]
    right = [pairs(b, col + k, row, down=True) for k in (0, 8)]
    third = [c[row + r, col + k].view(torch.int32) for r in (0, 8) for k in (0, 1)]
    x = torch.stack(left + right + third).contiguous()
    loads = "".join(f"ld.global.b32 %r{10 + i}, [%rd2+{128 * i}];" for i in range(10))
    body = f"""{loads}
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
        {{%r16, %r17, %r18, %r19}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
    """ + "".join(f"st.global.b32 [%rd3+{128 * i}], %r{16 + i};" for i in range(4))
    out = execute(body, x, torch.zeros(4, 32, dtype=torch.int32)).view(torch.float32)
    found = torch.empty(16, 8)
    for i, (r, k) in enumerate((r, k) for r in (0, 8) for k in (0, 1)):
        found[row + r, col + k] = out[i]
    torch.testing.assert_close(found, (a.double() @ b.double() + c).float(), rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_shared_memory(transposed: bool) -> None:
    """Lane i gets row i // 4, columns 2 (i % 4) and the next. A store writes the same back."""
    x = torch.arange(64, dtype=torch.int16).view(8, 8)
    trans = ".trans" if transposed else ""
    body = f"""
    shl.b32 %r1, %r0, 2; ld.global.b32 %r2, [%rd2]; st.shared.b32 [%r1], %r2; bar.sync 0;
    and.b32 %r3, %r0, 7; shl.b32 %r3, %r3, 4;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r4}}, [%r3];
    st.global.b32 [%rd3], %r4;
    stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r3+512], {{%r4}}; bar.sync 0;
    ld.shared.b32 %r5, [%r1+512]; st.global.b32 [%rd3+128], %r5;
    """
    out = execute(body, x.view(torch.int32), torch.zeros(64, dtype=torch.int32)).view(torch.int16).view(2, 8, 8)
    assert out[0].equal(x.T if transposed else x)
    assert out[1].equal(x)
