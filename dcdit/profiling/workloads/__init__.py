"""Every operation of :mod:`dcdit.ops`, described once: its arguments, its plain formulation, what it reads and writes.

Each module of this package describes one family in a tuple ``OPERATIONS``; a new module is found without a line here.
Benchmarks, ``dcdit tune``, the ahead-of-time check and one test of all operations run what they find here.
"""

import importlib
import pkgutil

from dcdit.profiling.workloads.core import (
    Call,
    Case,
    Inputs,
    Operation,
    Shape,
    Workload,
    run_forward,
    run_forward_backward,
    tensors_of,
)

__all__ = [
    "CASES",
    "OPERATIONS",
    "WORKLOADS",
    "Call",
    "Operation",
    "Shape",
    "Workload",
    "create_workload",
    "run_forward",
    "run_forward_backward",
    "tensors_of",
]


def _described() -> list[Operation]:
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return [operation for module in modules for operation in getattr(module, "OPERATIONS", ())]


OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _described()}
"""Every operation by its name."""
CASES: dict[str, tuple[Operation, Case]] = {
    operation.workload_name(name): (operation, case)
    for operation in OPERATIONS.values()
    for name, case in operation.cases.items()
}
"""Every case of every operation: ``gather_tokens`` is the default case, ``gather_tokens_packed`` another one."""
WORKLOADS: dict[str, Operation] = {
    name: operation for name, (operation, case) in CASES.items() if name in OPERATIONS or case.timed
}
"""The cases that are timed: the default of every operation, and a few more."""


def create_workload(name: str, shape: Shape, seed: int = 0) -> Workload:
    """One case of an operation, ready to run.

    Args:
        name: one of ``CASES``.
        shape: sizes, dtype and device of the arguments.
        seed: of their values.

    Raises:
        ValueError: no such case.
    """
    if name not in CASES:
        raise ValueError(f"unknown workload {name!r}; accepted: {', '.join(CASES)}")
    return Workload(*CASES[name], Inputs(shape, seed))
