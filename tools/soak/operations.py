"""Random calls of every operation, outputs and gradients, against the definition in float64.

Sizes go down to 0; strides, dtypes, also mixed ones, modes and magnitudes are random. Kernels run in Triton's
interpreter where there is no GPU. "Error" is the largest one over the largest that is allowed (see verdict.py).

    python -m tools.soak.operations --cases 100000 --jobs 2
    python -m tools.soak.operations --operation gather_tokens --backend torch --seed 0 --case 1234
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from typing import NamedTuple

import torch
from tqdm import tqdm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported

from dcdit.utils.tables import markdown_table
from tools.soak.part import Part
from tools.soak.random_calls import EVERY_DTYPE, MAKERS, Call, Maker
from tools.soak.verdict import error_over_allowed

CASES = {"torch": 100_000, "triton": 500}
"""Of each operation, by backend. The interpreter is slow."""
NOT_OURS = {("triton", "varlen_attention")}
"""Attention has no kernel of this package."""
CHUNK = 100
SHOWN = 20
"""Wrong cases of which a line is printed."""


class Found(NamedTuple):
    """What some cases of an operation on a backend gave."""

    backend: str
    operation: str
    cases: int
    wrong: tuple[int, ...]
    worst: float


def run(cases: dict[str, int] | None = None, jobs: int | None = None, seed: int = 0) -> Part:
    """Try as many cases of every operation as ``cases`` says for each backend."""
    cases = CASES if cases is None else cases
    work = [
        (backend, operation, seed, first, min(first + CHUNK, count))
        for backend, count in cases.items()
        for operation in MAKERS
        if (backend, operation) not in NOT_OURS
        for first in range(0, count, CHUNK)
    ]
    totals: dict[tuple[str, str], Found] = {}
    with tqdm(total=sum(last - first for *_, first, last in work), desc="operations", unit="case") as bar:
        for found in _in_processes(work, jobs or os.cpu_count() or 1):
            key = found.operation, found.backend
            before = totals.get(key, Found(found.backend, found.operation, 0, (), 0.0))
            for case in found.wrong[: max(0, SHOWN - len(before.wrong))]:
                bar.write(f"wrong: python -m tools.soak.operations {_options(found, seed, case)}")
            totals[key] = Found(
                found.backend,
                found.operation,
                before.cases + found.cases,
                before.wrong + found.wrong,
                max(before.worst, found.worst),
            )
            bar.update(found.cases)
    rows = [
        [operation, backend, f"{total.cases:,}", f"{len(total.wrong):,}", f"{total.worst:.2f}"]
        for (operation, backend), total in sorted(totals.items())
    ]
    table = markdown_table(["operation", "backend", "cases", "wrong", "error"], rows)
    text = (__doc__ or "").partition("\n\n    python")[0]
    return Part(f"{text}\n\nSeed {seed}.\n\n{table}", sum(len(total.wrong) for total in totals.values()))


def _in_processes(work: list[tuple[str, str, int, int, int]], jobs: int) -> Iterator[Found]:
    # Spawned: a forked process may inherit a lock of PyTorch's threads.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        rest = iter(work)
        running = {pool.submit(_try, *arguments) for arguments in islice(rest, 2 * jobs)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
            running |= {pool.submit(_try, *arguments) for arguments in islice(rest, len(done))}


def _try(backend: str, operation: str, seed: int, first: int, last: int) -> Found:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # numpy's, about the infinities that some cases hold
    errors = {case: error_over_allowed(_call(backend, operation, seed, case), backend) for case in range(first, last)}
    wrong = tuple(case for case, error in errors.items() if not error <= 1)
    return Found(backend, operation, last - first, wrong, max(errors.values()))


def _call(backend: str, operation: str, seed: int, case: int) -> Call:
    return MAKERS[operation](Maker(f"{seed}-{operation}-{case}", EVERY_DTYPE[backend]))


def _options(found: Found, seed: int, case: int) -> str:
    return f"--operation {found.operation} --backend {found.backend} --seed {seed} --case {case}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak.operations", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=CASES["torch"], help="of each operation on the torch backend")
    parser.add_argument("--kernel-cases", type=int, default=CASES["triton"], help="on the triton backend")
    parser.add_argument("--jobs", type=int, help="processes (default: the number of cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operation", choices=MAKERS, help="with --case: show this one")
    parser.add_argument("--backend", choices=CASES, default="torch", help="with --case")
    parser.add_argument("--case", type=int, help="show one case: its arguments, and its error over the allowed one")
    args = parser.parse_args(argv)
    if args.case is not None:
        call = _call(args.backend, args.operation, args.seed, args.case)
        print(call)
        print(f"error over allowed: {error_over_allowed(call, args.backend):.3g}")
        return 0
    part = run({"torch": args.cases, "triton": args.kernel_cases}, args.jobs, args.seed)
    print(part.page)
    return int(part.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
