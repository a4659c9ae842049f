"""Count how many kernels each operation would compile, forward and backward, over 20 different kept counts.

A kernel is compiled anew for each specialisation: other dtypes, other constants, an argument that is a multiple of 16.
Kept counts must not be among them. Runs without a GPU: launches are recorded, nothing is compiled.

    python -m tools.signatures

prints ``{operation: [launches of one call, specialisations over all calls]}`` as JSON.
"""

import json

import torch

from dcdit.kernels.launch import Launch
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload
from tools.compiler import Compiler
from tools.recording import recorded_launches

COUNTS = 20


def specialisations(name: str) -> tuple[int, int]:
    """(launches, distinct specialisations) of an operation over batches and kept counts that all differ."""
    compiler = Compiler("cuda", 90)
    launches: list[Launch] = []
    per_count = []
    for step in range(COUNTS):
        shape = Shape(3, (7, 9), 24, 0.1 + 0.04 * step, torch.bfloat16, torch.device("cpu"))
        recorded = recorded_launches(create_workload(name, shape, seed=step))
        launches += recorded
        per_count.append(len(recorded))
    assert min(per_count) == max(per_count), f"{name}: the number of launches depends on the kept count: {per_count}"
    keys = {compiler.key(kernel, args, meta) for kernel, _, args, meta in launches}
    return per_count[0], len(keys)


if __name__ == "__main__":
    print(json.dumps({name: specialisations(name) for name in WORKLOADS}))
