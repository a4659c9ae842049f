"""One process of a report: runs cases of one group, and writes a line before and after each.

    python -m benchmarks.gpu.worker --folder FOLDER --group GROUP --until SECONDS --cases CASE ...

benchmarks/gpu/driver.py starts it. torch is imported late: until then nobody would notice that the parent is gone.
"""

import argparse
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.lines import BEGAN, DONE, FAILED, LEFT_OUT, LeftOut, Lines
from benchmarks.gpu.plan import case_name

MODULES = {
    "tests": "tests",
    "ceilings": "ceilings",
    "forward, large batch": "forward",
    "forward, small batch": "forward",
    "operations": "operations",
    "training": "training",
}
"""Module of this package that has the cases of a group: ``create(group, setting, arguments)`` makes them."""


PREPARATION = "preparation"
"""The making of what the cases of a group share, as a case of its own."""


class Cases(Protocol):
    """What a module of a group makes. Making it makes the models and inputs that the cases share."""

    def run(self, case: str) -> Mapping[str, Any]:
        """The results of a case. Raises :class:`benchmarks.gpu.lines.LeftOut`, or any error."""


def run_cases(create: Callable[[], Cases], cases: Sequence[str], group: str, lines: Lines, until: float) -> int:
    """Run cases one after the other.

    Returns:
        Exit code: 0, or 3 after an error that leaves this process without what it needs: what the cases share, or a
        usable GPU.
    """
    preparation, start = case_name(group, PREPARATION), time.time()
    lines.write(preparation, BEGAN)
    try:
        made = create()
    except Exception as error:
        lines.write(preparation, FAILED, error=describe(error))
        return 3
    lines.write(preparation, DONE, seconds=round(time.time() - start, 2))
    for case in cases:
        if time.time() > until:
            return 0
        name, start = case_name(group, case), time.time()
        lines.write(name, BEGAN)
        try:
            results = made.run(case)
        except LeftOut as reason:
            lines.write(name, LEFT_OUT, reason=str(reason))
        except Exception as error:  # whatever it is, the report goes on with the next case
            lines.write(name, FAILED, error=describe(error), seconds=round(time.time() - start, 2))
            del error
            if not device_is_usable():
                return 3
        else:
            lines.write(name, DONE, seconds=round(time.time() - start, 2), **results)
        _free_memory()
    return 0


def describe(error: BaseException) -> str:
    """An error and where it came from, at a length that a line can bear."""
    last = traceback.extract_tb(error.__traceback__)[-4:]
    where = "; ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in last)
    return f"{type(error).__name__}: {str(error)[:1500]} ({where})"


def device_is_usable() -> bool:
    """Whether this process can still use its GPU: after an illegal access it cannot."""
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def _free_memory() -> None:
    """Graphs of the last case hold memory of their own, and may be part of a cycle."""

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--group", choices=MODULES, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True, help="the process that started this one")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--official")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    _end_with(args.parent)
    import torch

    from benchmarks.gpu.setting import create_setting, device_name

    setting = create_setting(args.rehearse)
    torch.manual_seed(0)
    if setting.rehearsal:
        torch.set_num_threads(1)
    lines = Lines(args.folder, device=device_name(args.rehearse))
    module = importlib.import_module(f"benchmarks.gpu.{MODULES[args.group]}")

    def create() -> Cases:
        return module.create(args.group, setting, lines, args)

    return run_cases(create, args.cases, args.group, lines, args.until)


def _end_with(parent: int) -> None:
    """End when the process that started this one is gone: a report that was killed must not go on measuring."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with all that this process started
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at a normal end, PyTorch's pool of compiling processes may take minutes to shut down
