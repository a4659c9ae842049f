"""Malformed files given to the commands that read them: a table of made ones, and valid files with random damage.

A command must end in one line that names the file and what is wrong, with exit status 2. It must take at most 20
seconds and 3 GiB of address space, run nothing that the file holds, and print no control character. (A file whose
damage is where no command looks may be used, and damaged samples are left out, and named, where that was asked for.)
"""

import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

from dcdit.utils.tables import markdown_table
from tools.malformed import CASES, VICTIMS, Base, damage, problem, problem_of, run_command
from tools.malformed import run as run_case
from tools.soak.part import Part

DAMAGES = 60
"""Random damages of each kind of file."""
SEED = 0
DIVERGED = "not finite at step"
"""What training says of numbers that can be read and make no sense, such as a weight of 1e38."""
ENDS = ("refused", "used", "diverged")
"""How a command may end."""


def run(damages: int = DAMAGES) -> Part:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = Base(Path(folder))
        made, slowest, first = _made(base)
        damaged, second = _damaged(base, damages)
    wrong = [*first, *second]
    found = "\n".join(f"- {text}" for text in wrong)
    rows = [[reader, str(count), f"{slowest[reader]:.1f} s"] for reader, count in made.items()]
    page = "\n\n".join(
        [
            __doc__.strip(),
            markdown_table(["made to be malformed", "inputs", "slowest"], rows),
            markdown_table(["with random damage", "inputs", *ENDS], damaged),
            *([found] if found else []),
        ]
    )
    return Part(page, len(wrong))


def _made(base: Base) -> tuple[Counter[str], dict[str, float], list[str]]:
    """(inputs of each reader, slowest command of each, what went wrong)."""
    made, slowest, wrong = Counter[str](), defaultdict[str, float](float), list[str]()
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_case(case, base, Path(folder))
        made[case.reader] += 1
        slowest[case.reader] = max(slowest[case.reader], outcome.seconds)
        if (found := problem(case, outcome)) is not None:
            wrong.append(f"{case.name}: {found}")
    return made, slowest, wrong


def _damaged(base: Base, damages: int) -> tuple[list[list[str]], list[str]]:
    """(a row for each kind of file, what went wrong)."""
    rows, wrong = list[list[str]](), list[str]()
    for kind, victim in VICTIMS.items():
        codes = Counter[str]()
        for number in range(damages):
            rng = random.Random(f"{SEED} {kind} {number}")
            with tempfile.TemporaryDirectory() as folder:
                file, argv = victim(base, Path(folder))
                file.write_bytes(damage(file.read_bytes(), rng))
                outcome = run_command(argv, Path(folder))
            diverged = outcome.code == 2 and DIVERGED in "".join(outcome.lines)
            codes["diverged" if diverged else "refused" if outcome.code else "used"] += 1
            if (found := problem_of(outcome, DIVERGED if diverged else str(file.parent))) is not None:
                wrong.append(f"{kind}, damage {number}: {found}")
        rows.append([kind, str(damages), *(str(codes[end]) for end in ENDS)])
    return rows, wrong
