"""Compile every kernel ahead of time for the supported GPUs, on any machine, and report what the compilers allot.

Each ``launches/<family>.py`` calls its launchers on tiny CPU tensors while launches are recorded instead of started;
the recorded arguments go through Triton's own specialisation, so what is compiled here is what a GPU would run. A
kernel that spills (stack or local memory) fails the run.

    python tests/kernels/aot.py [--family pack] [--dtype bf16] [--target sm_90] [--width 1152]
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
WIDTHS = (24, 1152)
"""Always compiled, beside the widths of the shipped configurations: one that is not a multiple of 16, and XL's."""

REGISTER_FILE = 65536
WARPS_PER_SM = {"sm_80": 64, "sm_90": 64, "sm_100": 64}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


class Report(NamedTuple):
    """One kernel, one signature, one target."""

    kernel: str
    dtype: str
    width: int
    target: str
    num_warps: int
    registers: int
    shared: int
    stack: int
    local: int
    wide: str
    """128-bit share of the global accesses: how many of how many."""
    occupancy: str

    @property
    def spills(self) -> bool:
        return self.stack > 0 or self.local > 0


def families() -> list[str]:
    return sorted(path.stem for path in (HERE / "launches").glob("*.py") if path.stem != "__init__")


def widths() -> list[int]:
    """The widths of every shipped configuration, and the fixed ones."""
    from dcdit.kernels._launch import CONFIG_FOLDER

    found = set(WIDTHS)
    for path in CONFIG_FOLDER.glob("*.json"):
        for entries in json.loads(path.read_text()).values():
            found |= {entry["shape"]["D"] for entry in entries if "D" in entry["shape"]}
    return sorted(found)


def compile_family(family: str, dtype: str, width: int, targets: list[str]) -> list[Report]:
    """Record the launches of a family and compile each distinct one for every target."""
    from dcdit.kernels._launch import record_launches

    with record_launches() as recorded:
        importlib.import_module(f"launches.{family}").launches(DTYPES[dtype], width)
    if not recorded:
        raise RuntimeError(f"launches/{family}.py recorded no launch")
    return [report for target in targets for report in _compile_all(recorded, dtype, width, target)]


def _compile_all(recorded: list[Any], dtype: str, width: int, target_name: str) -> Iterator[Report]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget(*TARGETS[target_name])
    backend = make_backend(target)
    seen = set()
    for kernel, args, meta in recorded:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **meta, debug=False)
        key = (kernel, str(specialization), str(options))
        if key in seen:
            continue
        seen.add(key)
        options, signature, constexprs, attrs = kernel._pack_args(
            backend, {**meta, "debug": False}, bound, specialization, options
        )
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__
        )
        usage = _nvidia_usage(compiled) if target.backend == "cuda" else _amd_usage(compiled)
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
        "wide": f"{sum(b >= 128 for b in bits)}/{len(bits)}",
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
        "wide": f"{sum(access == 'dwordx4' for access in accesses)}/{len(accesses)}",
    }


def _occupancy(target: str, metadata: Any, registers: int) -> str:
    """Upper bound of the resident warps' share, from registers and shared memory."""
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
    size = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(n) for cell, n in zip(row, size, strict=True)).rstrip() for row in [header, *rows]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=families(), default=families(), help="files in launches/")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="token dtype")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPU architecture")
    parser.add_argument(
        "--width", nargs="+", type=int, help="token widths D (default: those of the shipped configurations)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    work = [(f, d, w) for f in args.family for d in args.dtype for w in args.width or widths()]
    reports: list[Report] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(compile_family, *item, args.target) for item in work]
        for future in tqdm(futures, unit="compile", desc="aot", leave=False):
            reports += future.result()
    print(table(reports))
    spilled = sum(report.spills for report in reports)
    print(f"{len(reports)} compilations, {spilled} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
