"""What a chain of packed transformer blocks calls: operations without the checks of their arguments.

The blocks of a forward pass, dozens of them, run on one packed buffer. The first block calls
:func:`check_packed` and a public operation, whose checks hold for all blocks after it. Everywhere else call the public
operations: here a bad argument has no message, and on a GPU it may read memory that is not its own.
"""

import torch
from torch import Tensor

from dcdit.ops import attention_kernels, checks
from dcdit.ops.attention import attend, kernel_for
from dcdit.ops.attention_sdpa import lengths_are_equal
from dcdit.ops.autocast import without_autocast
from dcdit.ops.autograd import apply
from dcdit.ops.backend import backend_for
from dcdit.ops.padding import ZeroPaddingOfGradient, zero_padding_


def check_packed(t: Tensor, cu_seqlens: Tensor, max_seqlen: int, padding: bool) -> None:
    """Check where the sequences of a packed buffer t (T, D) begin and end, as :func:`dcdit.ops.varlen_attention` does.

    Raises:
        ValueError, TypeError: they do not fit the buffer.
    """
    checks.check_device(t=t, cu_seqlens=cu_seqlens)
    checks.check_int32("a packed block", cu_seqlens=cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, t.shape[0], exact=not padding)
    checks.check_max_seqlen(cu_seqlens, max_seqlen)


def modulated_layer_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float = 1e-6) -> Tensor:
    """:func:`dcdit.ops.modulated_layer_norm`."""
    with without_autocast(t):
        return backend_for(t).modulated_layer_norm(t, shift, scale, cu_seqlens, eps)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """:func:`dcdit.ops.gated_add`."""
    with without_autocast(x):
        return backend_for(x).gated_add(x, y, gate, cu_seqlens)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`dcdit.ops.gated_add_modulated_layer_norm`."""
    with without_autocast(x):
        return backend_for(x).gated_add_modulated_layer_norm(x, y, gate, shift, scale, cu_seqlens, eps)


def self_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, padding: bool, zero_padding: bool) -> Tensor:
    """:func:`dcdit.ops.varlen_attention` of q, k and v that lie in one buffer, (T, 3, heads, d_h) -> (T, heads, d_h).

    Whoever calls this guarantees that the padding rows of qkv and of the gradient of the result are finite, which
    ``varlen_attention`` does not ask for: kernels may read them with weight 0, and 0 times NaN is NaN. So no row has to
    be copied. In exchange, padding rows of the result are zero only where ``zero_padding`` asks for it or a gradient is
    wanted. Elsewhere nothing writes them, and they may hold anything, NaN too. Padding rows of the gradient are zero.
    """
    with without_autocast(qkv):
        wants_gradient = torch.is_grad_enabled() and qkv.requires_grad
        dense = not wants_gradient and lengths_are_equal(qkv, cu_seqlens, max_seqlen, padding)
        name = kernel_for(qkv, cu_seqlens, dense=dense)
        if name is None:
            q, k, v = qkv.unbind(1)
            return attend(q, k, v, cu_seqlens, max_seqlen, False, "auto", padding, cu_seqlens, max_seqlen)
        if padding and wants_gradient:
            # A weight's gradient is a sum over all rows, in which padding rows must count as nothing.
            qkv = apply(ZeroPaddingOfGradient, qkv, cu_seqlens)
        out = attention_kernels.run_packed_kernel(name, qkv, cu_seqlens, max_seqlen)
        return zero_padding_(out, cu_seqlens) if padding and (zero_padding or wants_gradient) else out
