"""The three modules of an H-Net with the original's names, arguments and results, in plain arithmetic row by row."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class RoutingModuleOutput:
    boundary_prob: Tensor
    boundary_mask: Tensor
    selected_probs: Tensor


@dataclass
class RoutingModuleState:
    has_seen_tokens: Tensor
    last_hidden_state: Tensor


@dataclass
class DeChunkState:
    last_value: Tensor


def predict(p: Tensor, mask: Tensor | None = None) -> RoutingModuleOutput:
    opened = p > 0.5 if mask is None else (p > 0.5) & mask
    return RoutingModuleOutput(torch.stack((1 - p, p), -1), opened, torch.maximum(p, 1 - p)[..., None])


class RoutingModule(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.q_proj_layer, self.k_proj_layer = (nn.Linear(d_model, d_model, bias=False) for _ in range(2))

    def allocate_inference_cache(self, batch_size, max_seqlen, device, dtype=None):
        return RoutingModuleState(
            torch.zeros(batch_size, dtype=torch.bool), torch.zeros(batch_size, self.d_model, dtype=dtype)
        )

    def dissimilarity(self, before: Tensor, x: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(self.q_proj_layer(before), self.k_proj_layer(x), dim=-1)) / 2

    def forward(self, hidden_states, cu_seqlens=None, mask=None, inference_params=None):
        p = torch.ones(hidden_states.shape[:-1], dtype=hidden_states.dtype)
        later = self.dissimilarity(hidden_states[..., :-1, :], hidden_states[..., 1:, :])
        p = torch.cat((p[..., :1], later), -1)
        if cu_seqlens is not None:
            first = torch.zeros_like(p, dtype=torch.bool)
            first[cu_seqlens[:-1]] = True
            p = torch.where(first, 1.0, p)
        if inference_params is not None:
            for row, count in enumerate(mask.sum(1).tolist()):
                inference_params.last_hidden_state[row] = hidden_states[row, count - 1].detach()
                inference_params.has_seen_tokens[row] = True
        return predict(p, mask)

    def step(self, hidden_states, inference_params):
        x = hidden_states.squeeze(1)
        p = self.dissimilarity(inference_params.last_hidden_state, x)
        p = torch.where(inference_params.has_seen_tokens, p, 1.0)
        inference_params.last_hidden_state.copy_(x)
        inference_params.has_seen_tokens.fill_(True)
        return predict(p)


class ChunkLayer(nn.Module):
    def forward(self, hidden_states, boundary_mask, cu_seqlens=None, mask=None):
        if cu_seqlens is not None:
            counts = [int(row.sum()) for row in boundary_mask.split(cu_seqlens.diff().tolist())]
            starts = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
            return hidden_states[boundary_mask], starts, max(counts), None
        rows = [row[opened] for row, opened in zip(hidden_states, boundary_mask, strict=True)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return padded, None, None, torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]

    def step(self, hidden_states, boundary_mask):
        return hidden_states[boundary_mask]


class DeChunkLayer(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model, self.block_size, self.headdim = d_model, 256, 8

    def allocate_inference_cache(self, batch_size, max_seqlen, device, dtype=None):
        return DeChunkState(torch.zeros(batch_size, self.d_model, dtype=dtype))

    def forward(self, hidden_states, boundary_mask, boundary_prob, cu_seqlens=None, inference_params=None, mask=None):
        q = boundary_prob[..., -1].clamp(1e-4, 1 - 1e-4)
        if cu_seqlens is None:
            out = torch.stack([*map(self.spread, hidden_states, boundary_mask, q)])
        else:
            opened = boundary_mask.nonzero().flatten().tolist()
            starts = [*(opened[i] for i in cu_seqlens[:-1].tolist()), len(q)]
            lengths = torch.tensor(starts).diff().tolist()
            chunks = hidden_states.split(cu_seqlens.diff().tolist())
            out = torch.cat([*map(self.spread, chunks, boundary_mask.split(lengths), q.split(lengths))])
        if inference_params is not None:
            inference_params.last_value.copy_(out[:, -1])
        return out

    def spread(self, chunks: Tensor, opened: Tensor, q: Tensor) -> Tensor:
        """The moving average of one sequence, held until the next chunk."""
        value, out, number = torch.zeros_like(chunks[0]), [], 0
        for place, opens in enumerate(opened.tolist()):
            if opens:
                value = q[place] * chunks[number] + (1 - q[place]) * value
                number += 1
            out.append(value)
        return torch.stack(out)

    def step(self, hidden_states, boundary_mask, boundary_prob, inference_params):
        value = inference_params.last_value.clone()
        for number, row in enumerate(boundary_mask.nonzero().flatten().tolist()):
            q = boundary_prob[row, -1].clamp(1e-4, 1 - 1e-4)
            value[row] = q * hidden_states[number, 0] + (1 - q) * value[row]
        inference_params.last_value.copy_(value)
        return value.unsqueeze(1)
