"""An attention kernel as those for GPUs are: it writes no row that belongs to no sequence, and needs finite memory."""

import torch
from torch import Tensor

from dcdit.ops import attention_kernels, reference


class UnwrittenPadding(torch.autograd.Function):
    """Attention inside each sequence. Padding rows of the result and of the gradients hold NaN: nothing wrote them.

    What a kernel reads past the end of the last sequence it reads with weight 0, which turns NaN there into NaN of the
    last token and of its gradients.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens)
        out = reference.varlen_attention(*qkv.unbind(1), cu_seqlens, 0)
        return _as_left_by_a_kernel(out, cu_seqlens, qkv)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        qkv, cu_seqlens = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in qkv.unbind(1)]
            out = reference.varlen_attention(*leaves, cu_seqlens, 0)
            for number, value in enumerate(torch.autograd.grad(out, leaves, grad.nan_to_num())):
                grad_qkv[:, number] = value
        return _as_left_by_a_kernel(grad_qkv, cu_seqlens, grad, qkv), None


def _as_left_by_a_kernel(rows: Tensor, cu_seqlens: Tensor, *read: Tensor) -> Tensor:
    end = int(cu_seqlens[-1])
    rows = rows.clone()
    rows[end:] = float("nan")
    if end:
        rows[end - 1] += sum(0 * x[end:].sum() for x in read)
    return rows


def install(monkeypatch, packed: bool = False) -> list[Tensor]:
    """Attention runs on this kernel, which takes q, k and v in one buffer if ``packed``. Returns its results."""
    results: list[Tensor] = []

    def packed_function(qkv, cu_seqlens, max_seqlen, causal, deterministic):
        results.append(UnwrittenPadding.apply(qkv, cu_seqlens))
        return results[-1]

    def function(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
        results.append(UnwrittenPadding.apply(torch.stack([q, k, v], 1), cu_q))
        return results[-1]

    name = "flash2" if packed else "torch_varlen"
    monkeypatch.setattr(attention_kernels, "choose_attention_backend", lambda *_: name)
    monkeypatch.setattr(attention_kernels, "_LOADED", {name: (function, frozenset(["window_size"]))})
    monkeypatch.setattr(attention_kernels, "_LOADED_PACKED", {name: packed_function} if packed else {})
    return results
