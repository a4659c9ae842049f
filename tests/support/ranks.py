"""Several ranks of one program, forked from a process that has imported what they need.

``python -m support.ranks COUNT ARGUMENT...`` is ``dcdit ARGUMENT...`` in so many ranks; it prints their exit codes.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def fork_ranks(count: int, work: Callable[[int], int | None]) -> list[int]:
    """Do ``work(rank)`` in processes that find one another as those of torchrun do; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(count):
        process = os.fork()
        if not process:
            _become(rank, count, port, work)
        ranks.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]


def _become(rank: int, count: int, port: int, work: Callable[[int], int | None]) -> None:
    code = 1
    try:
        if count > 1:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
        code = work(rank) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import torch

    from dcdit.cli import main

    torch.set_num_threads(1)
    print(fork_ranks(int(sys.argv[1]), lambda rank: main(sys.argv[2:])))
