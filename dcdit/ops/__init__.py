"""Fused operations for dynamic tokens: drop-in, differentiable, one meaning on every backend.

One file per family, in the order of a model; the ``__all__`` of a file lists its operations:

- boundary: boundary probabilities, how hard each position is to predict
- selection: which tokens to keep, as a :class:`TokenSelection`
- packing: move tokens between the grid and the packed buffer
- modulation: adaLN on packed tokens
- attention: attention inside each packed sequence
- group_norm: group norm and SiLU of channels-last images, between convolutions
- dechunk: spread the packed tokens over the grid or the sequence again
- loss: the loss that steers how many tokens are kept
- noise: what samplers start from and add, the same on every device
"""
# ruff: noqa: F403

from dcdit.ops import (
    attention,
    boundary,
    dechunk,
    group_norm,
    loss,
    modulation,
    noise,
    packing,
    recompute,  # noqa: F401
    selection,
)
from dcdit.ops.attention import *
from dcdit.ops.backend import use_backend
from dcdit.ops.boundary import *
from dcdit.ops.dechunk import *
from dcdit.ops.group_norm import *
from dcdit.ops.loss import *
from dcdit.ops.modulation import *
from dcdit.ops.noise import *
from dcdit.ops.packing import *
from dcdit.ops.selection import *
from dcdit.ops.token_selection import TokenSelection

__all__ = ["TokenSelection", "use_backend"]
__all__ += attention.__all__
__all__ += boundary.__all__
__all__ += dechunk.__all__
__all__ += group_norm.__all__
__all__ += loss.__all__
__all__ += modulation.__all__
__all__ += noise.__all__
__all__ += packing.__all__
__all__ += selection.__all__
