"""When a number of a tensor may be read on the host. Call it qualified: tests replace it to run the path of a GPU."""

import torch
from torch import Tensor


def reads_are_free(x: Tensor) -> bool:
    """True where reading a number on the host costs neither a device sync nor a graph break."""
    return not x.is_cuda and not torch.compiler.is_compiling()
