"""Launches of EMA de-chunking, for the ahead-of-time check."""

import torch

from dcdit.kernels import dechunk_ema


def launches(dtype: torch.dtype, width: int) -> None:
    h, cu_seqlens = torch.empty(4, width, dtype=dtype), torch.empty(3, dtype=torch.int32)
    rows = torch.empty(6, width, dtype=dtype)
    for shape, source_cu_seqlens in (((2, 3), None), ((6,), cu_seqlens)):
        p, packed_rows = torch.empty(shape), torch.empty(shape, dtype=torch.int32)
        token_map = dechunk_ema.TokenMap(packed_rows, cu_seqlens, source_cu_seqlens)
        for residual in (None, rows):
            dechunk_ema.dechunk_ema_fwd(h, p, residual, token_map)
        for wanted in ((True, True, True), (True, True, False), (True, False, False), (False, False, True)):
            dechunk_ema.dechunk_ema_bwd(rows, h, p, token_map, *wanted)
