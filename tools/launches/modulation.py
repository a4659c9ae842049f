"""Launches of the modulation family, for the ahead-of-time check."""

import torch

from dcdit.kernels import modulation


def launches(dtype: torch.dtype, width: int) -> None:
    x, y, grad = (torch.empty(6, width, dtype=dtype) for _ in range(3))
    cu_seqlens, stats = torch.empty(3, dtype=torch.int32), torch.empty(2, 6)
    for table_dtype in {dtype, torch.float32}:
        shift, scale, gate = torch.empty(2, 6 * width, dtype=table_dtype).chunk(6, dim=1)[:3]
        modulation.modulated_layer_norm_fwd(x, shift, scale, cu_seqlens, 1e-6)
        modulation.gated_add_fwd(x, y, gate, cu_seqlens)
        modulation.gated_add_modulated_layer_norm_fwd(x, y, gate, shift, scale, cu_seqlens, 1e-6)
        for norm_gradients in (True, False):
            # Frozen modulation asks for the tokens' gradients alone.
            modulation.modulation_bwd(None, grad, x, None, None, scale, stats, cu_seqlens, True, False, norm_gradients)
            for grad_added in (grad, None):
                modulation.modulation_bwd(
                    grad_added, grad, x, y if norm_gradients else None, gate, scale, stats, cu_seqlens,
                    True, True, norm_gradients,
                )  # fmt: skip
        modulation.modulation_bwd(grad, None, grad, y, gate, None, None, cu_seqlens, False, True, False)
