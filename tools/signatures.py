"""Print how many kernel variants each operation would compile, forward and backward, over 20 different kept counts.

Runs without the interpreter and without a GPU: launches are recorded and only Triton's own specialisation is applied.
"""

import json

import torch

from dcdit import ops
from dcdit.kernels.launch import Launch, record_launches
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload
from tools.compiler import Compiler

COUNTS = 20
READS_A_SIZE = {"select_tokens"}  # the exact mode reads a count that a recorded launch never wrote


def variants(name: str) -> tuple[int, int]:
    """(launches, distinct variants) of an operation over batches and kept counts that all differ."""
    compiler = Compiler("cuda", 90)
    launches: list[Launch] = []
    per_count = []
    for step in range(COUNTS):
        shape = Shape(3, (7, 9), 24, 0.1 + 0.04 * step, torch.bfloat16, torch.device("cpu"))
        workload = create_workload(name, shape, seed=step)
        with ops.use_backend("triton"), record_launches() as recorded:
            workload.run()
        launches += recorded
        per_count.append(len(recorded))
    assert min(per_count) == max(per_count), f"{name}: the number of launches depends on the kept count: {per_count}"
    keys = {compiler.key(kernel, args, meta) for kernel, _, args, meta in launches}
    return per_count[0], len(keys)


if __name__ == "__main__":
    print(json.dumps({name: variants(name) for name in WORKLOADS if name not in READS_A_SIZE}))
