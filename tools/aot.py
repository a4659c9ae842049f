"""Compile every kernel ahead of time for the supported GPUs, on any machine, and report what the compilers allot.

Each ``launches/<family>.py`` calls its launchers on tiny CPU tensors while launches are recorded instead of started;
the recorded arguments go through Triton's own specialisation, so what is compiled here is what a GPU would run. A
kernel that spills (stack or local memory) fails the run.

    python -m tools.aot [--family packing] [--dtype bf16] [--target sm_90] [--width 1152]
"""

import argparse
import importlib
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

from tools.columns import columns
from tools.compiler import Compiler

LAUNCHES = Path(__file__).with_name("launches")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
WIDTHS = (24, 1152, 2048)
"""Always compiled, beside those of a family's shipped configurations: not a multiple of 16, XL's, and the widest."""

REGISTER_FILE = 65536
WARPS_PER_SM = {"sm_80": 64, "sm_90": 64, "sm_100": 64}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}


class Report(NamedTuple):
    """One kernel, one signature, one target."""

    kernel: str
    dtype: str
    """Of the tokens, the first of those asked for that lead to this signature; so is the width."""
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
    return sorted(path.stem for path in LAUNCHES.glob("*.py") if path.stem != "__init__")


def launches(family: str, dtype: str, width: int) -> list[Any]:
    """What a family starts for tokens of this dtype and width."""
    from dcdit.kernels.launch import record_launches

    with record_launches() as recorded:
        importlib.import_module(f"tools.launches.{family}").launches(DTYPES[dtype], width)
    if not recorded:
        raise RuntimeError(f"launches/{family}.py recorded no launch")
    return recorded


def widths(family: str) -> list[int]:
    """The widths of every shipped configuration of a family, and the fixed ones."""
    from dcdit.kernels.launch import observe_configs, shipped_configs

    used = set()
    for dtype in DTYPES:
        with observe_configs() as observed:
            launches(family, dtype, 1152)
        used |= {kernel for kernel, *_ in observed}
    found = set(WIDTHS)
    for kernel, entries in shipped_configs().items():
        found |= {entry["shape"]["D"] for entry in entries if kernel in used and "D" in entry["shape"]}
    return sorted(found)


def compile_family(family: str, target: str, dtypes: list[str], given: list[int] | None) -> list[Report]:
    """Compile each distinct launch of a family, over all dtypes and widths, for one target."""
    reports: list[Report] = []
    seen: set[Any] = set()
    for dtype in dtypes:
        for width in given or widths(family):
            reports += compile_launches(launches(family, dtype, width), dtype, width, target, seen)
    return reports


def compile_launches(
    recorded: list[Any], dtype: str, width: int, target_name: str, seen: set[Any] | None = None
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
    return columns([header, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=families(), default=families(), help="files in launches/")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="token dtype")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPU architecture")
    parser.add_argument(
        "--width", nargs="+", type=int, help="token widths D (default: those of the family's configurations, and a few)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    reports: list[Report] = []
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(compile_family, family, target, args.dtype, args.width)
            for family in args.family
            for target in args.target
        ]
        for future in tqdm(as_completed(futures), total=len(futures), unit="family", desc="aot", leave=False):
            reports += future.result()
    reports.sort()
    print(table(reports))
    spilled = sum(report.spills for report in reports)
    print(f"{len(reports)} compilations, {spilled} with spills")
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
