"""Run Triton kernels on CPU tensors, as the PTX that they are compiled to."""

import struct
from typing import Any, NamedTuple

import pytest
from torch import Tensor
from triton.runtime.jit import JITFunction

from tools.compiler import Compiler
from tools.ptx.counts import Counts
from tools.ptx.instructions import translate
from tools.ptx.machine import Step, run
from tools.ptx.memory import GlobalMemory
from tools.ptx.program import Program, parse


class _Compiled(NamedTuple):
    program: Program
    steps: list[Step | None]
    threads: int
    shared: int
    arguments: list[tuple[int, str]]
    """Index and Triton type of each argument of the launch that is a parameter, in order."""


class Launcher:
    """Compiles kernels for one NVIDIA target and runs their PTX."""

    def __init__(self, capability: int, counted: bool = False) -> None:
        """``counted``: also count what each launch does, into :attr:`counts`."""
        self._compiler = Compiler("cuda", capability)
        self._counted = counted
        self.counts: list[Counts] = []
        self._compiled: dict[Any, _Compiled] = {}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run every ``kernel[grid](...)`` here, until the monkeypatch is undone."""

        def start(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **meta: Any) -> None:
            self.launch(kernel, grid, args, meta)

        monkeypatch.setattr(JITFunction, "run", start)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
        """Run a kernel; tensors are changed in place.

        Raises:
            MachineError: the kernel does something that is undefined on a GPU, or unknown here.
        """
        compiled = self._compile(kernel, args, meta)
        values = [_bits(args[index], kind) for index, kind in compiled.arguments]
        # The last parameters are scratch memory, which no kernel here uses.
        values += [0] * (len(compiled.program.parameters) - len(values))
        parameters = dict(zip(compiled.program.parameters, values, strict=True))
        counts = Counts(kernel.__name__) if self._counted else None
        memory = GlobalMemory([argument for argument in args if isinstance(argument, Tensor)], counts)
        run(compiled.program, compiled.steps, grid, compiled.threads, compiled.shared, parameters, memory, counts)
        if counts is not None:
            self.counts.append(counts)

    def _compile(self, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> _Compiled:
        key = self._compiler.key(kernel, args, meta)
        if key not in self._compiled:
            done, signature = self._compiler.compile(kernel, args, meta)
            program = parse(done.asm["ptx"])
            self._compiled[key] = _Compiled(
                program,
                [translate(instruction) for instruction in program.instructions],
                32 * done.metadata.num_warps,
                done.metadata.shared,
                [(i, kind) for i, kind in enumerate(signature.values()) if i < len(args) and kind != "constexpr"],
            )
        return self._compiled[key]


def _bits(value: Any, kind: str) -> int:
    if kind.startswith("*"):
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if kind in ("i1", "u1", "i32", "i64", "u32", "u64"):
        return int(value) % 2**64
    raise TypeError(f"a parameter of type {kind}: {value!r}")
