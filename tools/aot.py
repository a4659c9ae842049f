"""Compile every kernel ahead of time for the supported GPUs, on any machine, and report what each one takes.

Every case of every operation (:mod:`dcdit.profiling.workloads`) is called on tiny CPU tensors while its launches are
recorded instead of started. The recorded arguments go through Triton's own specialisation, so a GPU would run what is
compiled here. A kernel that spills registers (to stack or local memory) fails the run.

    python -m tools.aot [--op gather_tokens] [--dtype bf16] [--target sm_90] [--width 1152]
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from dcdit.kernels import launch
from dcdit.profiling.workloads import OPERATIONS, Shape, create_workload
from tools.columns import columns
from tools.compiler import Compiler
from tools.recording import recorded_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
WIDTHS = (24, 1152, 2048)
"""Always compiled, beside the widths of shipped configurations: not a multiple of 16, that of XL, and the widest."""
BATCH, GRID, KEEP = 2, (4, 4), 0.5
"""What is compiled does not depend on these, as long as the positions of an image are a multiple of 16."""

REGISTER_FILE = 65536
WARPS_PER_SM = {"sm_80": 64, "sm_90": 64, "sm_100": 64}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


class Report(NamedTuple):
    """One kernel, one specialisation, one target."""

    kernel: str
    dtype: str
    """Of the tokens: the first of those asked for that lead to this specialisation. The width is, too."""
    width: int
    target: str
    num_warps: int
    registers: int
    shared: int
    stack: int
    local: int
    vectorized: str
    """Global accesses of 128 bits, of how many."""
    occupancy: str

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0


def launches(op: str, dtype: str, width: int) -> list[launch.Launch]:
    """What all cases of an operation start for tokens of this dtype and width."""
    operation = OPERATIONS[op]
    shape = Shape(BATCH, GRID, width, KEEP, DTYPES[dtype], torch.device("cpu"))
    workloads = [create_workload(operation.workload_name(case), shape) for case in operation.cases]
    recorded = [start for workload in workloads for start in recorded_launches(workload)]
    if not recorded:
        raise RuntimeError(f"{op} started no kernel")
    return recorded


def widths(op: str) -> list[int]:
    """The widths of every shipped configuration of an operation's kernels, and the fixed ones."""
    used = set()
    for dtype in DTYPES:
        with launch.observe_configs() as observed:
            launches(op, dtype, 1152)
        used |= {kernel for kernel, *_ in observed}
    shipped = launch.shipped_configs()
    shapes = [entry["shape"] for kernel in used for entry in shipped[kernel]]
    return sorted({*WIDTHS, *(shape["D"] for shape in shapes if "D" in shape)})


def compile_operation(op: str, target: str, dtypes: list[str], given: list[int] | None) -> list[Report]:
    """Compile each distinct launch of an operation, over all dtypes and widths, for one target."""
    reports: list[Report] = []
    seen: set[Any] = set()
    for dtype in dtypes:
        for width in given or widths(op):
            reports += compile_launches(launches(op, dtype, width), dtype, width, target, seen)
    return reports


def compile_launches(
    recorded: list[launch.Launch], dtype: str, width: int, target_name: str, seen: set[Any] | None = None
) -> Iterator[Report]:
    """Compile the recorded launches whose specialisation is not in ``seen``."""
    compiler = Compiler(*TARGETS[target_name])
    seen = set() if seen is None else seen
    for kernel, _, args, meta in recorded:
        key = compiler.key(kernel, args, meta)
        if key in seen:
            continue
        seen.add(key)
        compiled, _ = compiler.compile(kernel, args, meta)
        usage = _nvidia_usage(compiled) if TARGETS[target_name][0] == "cuda" else _amd_usage(compiled)
        yield Report(
            kernel=kernel.__name__,
            dtype=dtype,
            width=width,
            target=target_name,
            num_warps=compiled.metadata.num_warps,
            shared=compiled.metadata.shared,
            occupancy=_occupancy(target_name, compiled.metadata, usage["registers"]),
            **usage,
        )


def _nvidia_usage(compiled: Any) -> dict[str, Any]:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*|\bcp\.async\.c[ga][\w.]*[^;]*", compiled.asm["ptx"])
    bits = [_ptx_bits(access) for access in accesses]
    return {
        "registers": found["reg"],
        "stack": found["stack"],
        "local": found["local"],
        "vectorized": f"{sum(b >= 128 for b in bits)}/{len(bits)}",
    }


def _ptx_bits(access: str) -> int:
    if access.startswith("cp.async"):
        return 8 * int(re.findall(r"0x[0-9a-f]+|\d+", access.split("],")[-1])[0], 0)
    vector = re.search(r"\.v(\d)", access)
    width = re.search(r"\.[bufs](\d+)", access)
    assert width, access
    return int(width[1]) * (int(vector[1]) if vector else 1)


def _amd_usage(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match, name
        return int(match[1])

    accesses = re.findall(r"\b(?:global|buffer)_(?:load|store)_(\w+)", text)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local": field("vgpr_spill_count"),
        "vectorized": f"{sum(access == 'dwordx4' for access in accesses)}/{len(accesses)}",
    }


def _occupancy(target: str, metadata: Any, registers: int) -> str:
    """Resident warps of those that fit, at most, by registers and shared memory."""
    if target not in WARPS_PER_SM:
        return "-"
    warps = metadata.num_warps
    by_registers = REGISTER_FILE // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED_PER_SM[target] // (metadata.shared + 1024)
    blocks = min(by_registers, by_shared, 32)
    return f"{min(1.0, blocks * warps / WARPS_PER_SM[target]):.0%}"


def table(reports: list[Report]) -> str:
    header = [*Report._fields, ""]
    rows = [[str(value) for value in report] + ["SPILLS" if report.spills else ""] for report in reports]
    return columns([header, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=list(OPERATIONS), help="operations")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="token dtype")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPU architecture")
    parser.add_argument(
        "--width", nargs="+", type=int, help="token widths D (default: those of shipped configurations, and a few)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    reports: list[Report] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(compile_operation, op, target, args.dtype, args.width)
            for op in args.op
            for target in args.target
        ]
        for future in tqdm(as_completed(futures), total=len(futures), unit="op", desc="aot", leave=False):
            reports += future.result()
    reports.sort()
    print(table(reports))
    spilled = sum(report.spills for report in reports)
    print(f"{len(reports)} compilations, {spilled} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
