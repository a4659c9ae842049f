"""Random calls of every operation, outputs and gradients, against the definition in float64.

Sizes go down to 0; strides of arguments and of what flows back, dtypes, also mixed ones, modes, magnitudes, which
gradients are wanted, and autocast are random. Kernels run in Triton's interpreter where there is no GPU. "Error" is the
largest one over the largest that is allowed (see verdict.py).

    python -m tools.soak.operations --cases 100000 --jobs 2 --state FILE
    python -m tools.soak.operations --operation gather_tokens --backend torch --seed 0 --case 1234
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported

from dcdit.utils.tables import markdown_table
from tools.soak.part import Part
from tools.soak.processes import end_with
from tools.soak.random_calls import EVERY_DTYPE, MAKERS, Call, random_call
from tools.soak.verdict import error_over_allowed

CASES = {"torch": 100_000, "triton": 500}
"""Of each operation, by backend. The interpreter is slow."""
NOT_OURS = {("triton", "varlen_attention")}
"""Attention has no kernel of this package."""
CHUNK = 100
SHOWN = 20
"""Wrong cases of which a line is printed."""


class Work(NamedTuple):
    """Some cases of an operation on a backend."""

    backend: str
    operation: str
    seed: int
    first: int
    last: int


class Found(NamedTuple):
    """What they gave."""

    work: Work
    wrong: tuple[int, ...]
    worst: float


def run(cases: dict[str, int] | None = None, jobs: int | None = None, seed: int = 0, state: Path | None = None) -> Part:
    """Try as many cases of every operation as ``cases`` says for each backend.

    Args:
        cases: number of cases of each operation, by backend.
        jobs: processes.
        seed: of the first case.
        state: a file that what was found is appended to; what it holds already is not tried again.
    """
    cases = CASES if cases is None else cases
    every = [
        Work(backend, operation, seed, first, min(first + CHUNK, count))
        for backend, count in cases.items()
        for first in range(0, count, CHUNK)
        for operation in MAKERS
        if (backend, operation) not in NOT_OURS
    ]
    wanted = set(every)
    found = {work: found for work, found in _read(state).items() if work in wanted}
    with tqdm(total=sum(work.last - work.first for work in every), desc="operations", unit="case") as bar:
        bar.update(sum(work.last - work.first for work in found))
        for one in _in_processes([work for work in every if work not in found], jobs or os.cpu_count() or 1):
            found[one.work] = one
            for case in one.wrong[:SHOWN]:
                bar.write(f"wrong: python -m tools.soak.operations {_options(one.work, case)}")
            if state is not None:
                with state.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(one) + "\n")
            bar.update(one.work.last - one.work.first)
    rows = []
    for operation in sorted(MAKERS):
        for backend in cases:
            ours = [one for one in found.values() if (one.work.operation, one.work.backend) == (operation, backend)]
            if ours:
                count, wrong = sum(one.work.last - one.work.first for one in ours), sum(len(one.wrong) for one in ours)
                rows.append([operation, backend, f"{count:,}", f"{wrong:,}", f"{max(one.worst for one in ours):.2f}"])
    table = markdown_table(["operation", "backend", "cases", "wrong", "error"], rows)
    text = (__doc__ or "").partition("\n\n    python")[0]
    return Part(f"{text}\n\nSeed {seed}.\n\n{table}", sum(len(one.wrong) for one in found.values()))


def _read(state: Path | None) -> dict[Work, Found]:
    """What an earlier run found. The last line may be half a one."""
    if state is None or not state.exists():
        return {}
    whole = state.read_text(encoding="utf-8").rpartition("\n")[0]
    state.write_text(whole and whole + "\n", encoding="utf-8")
    lines = map(json.loads, whole.splitlines())
    return {Work(*work): Found(Work(*work), tuple(wrong), worst) for work, wrong, worst in lines}


def _in_processes(work: list[Work], jobs: int) -> Iterator[Found]:
    # Spawned: a forked process may inherit a lock of PyTorch's threads.
    with ProcessPoolExecutor(jobs, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        try:
            rest = iter(work)
            running = {pool.submit(_try, one) for one in islice(rest, 2 * jobs)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                running |= {pool.submit(_try, one) for one in islice(rest, len(done))}
        except BaseException:  # the pool would wait for what its processes have begun
            for process in active_children():
                process.kill()
            raise


def _try(work: Work) -> Found:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, about the infinities that some cases hold
    cases = range(work.first, work.last)
    errors = {case: error_over_allowed(_call(work, case), work.backend) for case in cases}
    return Found(work, tuple(case for case, error in errors.items() if not error <= 1), max(errors.values()))


def _call(work: Work, case: int) -> Call:
    return random_call(work.operation, f"{work.seed}-{work.operation}-{case}", EVERY_DTYPE[work.backend])


def _options(work: Work, case: int) -> str:
    return f"--operation {work.operation} --backend {work.backend} --seed {work.seed} --case {case}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak.operations", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=CASES["torch"], help="of each operation on the torch backend")
    parser.add_argument("--kernel-cases", type=int, default=CASES["triton"], help="on the triton backend")
    parser.add_argument("--jobs", type=int, help="processes (default: the number of cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, metavar="FILE", help="go on where an earlier run with this file ended")
    parser.add_argument("--operation", choices=MAKERS, help="with --case: show this one")
    parser.add_argument("--backend", choices=CASES, default="torch", help="with --case")
    parser.add_argument("--case", type=int, help="show one case: its arguments, and its error over the allowed one")
    args = parser.parse_args(argv)
    if args.case is not None:
        call = _call(Work(args.backend, args.operation, args.seed, args.case, args.case + 1), args.case)
        print(call)
        print(f"error over allowed: {error_over_allowed(call, args.backend):.3g}")
        return 0
    part = run({"torch": args.cases, "triton": args.kernel_cases}, args.jobs, args.seed, args.state)
    print(part.page)
    return int(part.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
