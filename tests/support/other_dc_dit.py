"""A DC-DiT that is built like the reference implementation: its names of classes, parts and arguments.

The arithmetic is plain: images are handled one at a time and every distance is computed, so that nothing here resembles
what it is compared with.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.nn.norm import RMSNorm

GRID = (6, 6)
HEADS = 2


@dataclass
class RoutingModuleOutput:
    boundary_prob: Tensor
    boundary_mask: Tensor
    selected_probs: Tensor
    boundary_mask_natural: Tensor


class RoutingModule(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fp32 = False
        width = dim // 4
        self.proj = nn.Conv2d(dim, width, 1)
        self.context_predictor = nn.Conv2d(width, width, 3, padding=1)
        self.residual_scorer = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 1)
        )

    def forward(self, hidden_states, mask, num_rows, num_cols, tail_dropping_fraction=0.0):
        batch, length, dim = hidden_states.shape
        z = self.proj(hidden_states.transpose(1, 2).reshape(batch, dim, num_rows, num_cols))
        p = torch.sigmoid(self.residual_scorer(z - self.context_predictor(z)).view(batch, length))
        forced = torch.zeros(length, dtype=torch.bool)
        forced[0] = forced[-1] = True
        p = torch.where(forced, 1.0, p)
        natural = (p > 0.5) & mask  # int32, as the mask
        fractions = torch.as_tensor(tail_dropping_fraction, dtype=torch.float32).expand(batch)
        kept = natural.clone()
        for image in range(batch):
            places = natural[image].nonzero().flatten().tolist()
            count = int(torch.tensor(len(places), dtype=torch.float32) * fractions[image])
            for place in sorted(places, key=lambda n: (p[image, n].item(), n))[:count]:
                kept[image, place] = 0
        selected = torch.where(p > 0.5, p, 1 - p)[..., None]
        return RoutingModuleOutput(torch.stack((1 - p, p), -1), kept, selected, natural)


class ChunkLayer(nn.Module):
    def forward(self, hidden_states, boundary_mask, boundary_prob, mask):
        places = [row.nonzero().flatten() for row in boundary_mask]
        rows = [hidden_states[image, place] for image, place in enumerate(places)]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(place) for place in places])
        valid = torch.arange(padded.shape[1]) < lengths[:, None]
        return padded, valid, nn.utils.rnn.pad_sequence(places, batch_first=True)


class DeChunkLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel_sigma, self.plug_back_mode, self.fp32 = 1.0, "nearest_2d", False

    def forward(
        self, hidden_states, boundary_mask, boundary_prob, mask, chunk_sort_indices, next_mask, num_rows, num_cols
    ):
        at = torch.cartesian_prod(torch.arange(num_rows), torch.arange(num_cols)).to(hidden_states)
        out = []
        for image in range(len(hidden_states)):
            places = chunk_sort_indices[image, next_mask[image]]
            h, q = hidden_states[image, next_mask[image]], boundary_prob[image, places, 1].clamp(1e-4, 1 - 1e-4)
            weight = torch.exp(-(torch.cdist(at[places], at[places]) ** 2) / (2 * self.kernel_sigma**2)) * q
            smoothed = weight / (weight.sum(1, keepdim=True) + 1e-8) @ h
            rows = q[:, None] * h + (1 - q[:, None]) * smoothed
            distance = ((at[:, None] - at[places]) ** 2).sum(-1)
            out.append(rows[distance.argmin(1)])  # the first of equals, in raster order
        return torch.stack(out)


class FlashAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None, cu_seqlens=None, max_seqlen=None):
        q, k, v = self.qkv(x[0]).unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        bounds = cu_seqlens.tolist()
        parts = [F.scaled_dot_product_attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(bounds)]
        self._last_attn_flops = sum((b - a) ** 2 for a, b in itertools.pairwise(bounds))
        return self.proj(torch.cat(parts, 1).transpose(0, 1).flatten(1))[None]


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        assert x.dim() == 3
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class HNetDiTBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = FlashAttention(dim), Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, residual, cond, mask=None, mixer_kwargs=None):
        varlen = {name: mixer_kwargs[name] for name in ("cu_seqlens", "max_seqlen")}
        modulation = torch.repeat_interleave(self.adaLN_modulation(cond), varlen["cu_seqlens"].diff(), dim=0)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation[None].chunk(6, -1)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift, mask=mask, **varlen)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift), None


class ConvBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x, residual, cond, mask=None, mixer_kwargs=None):
        grid = (mixer_kwargs["num_rows"], mixer_kwargs["num_cols"])
        h = F.silu(self.conv(x.unflatten(1, grid).permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
        return x + h + cond[:, None], None


class Isotropic(nn.Module):
    def __init__(self, *layers, dim):
        super().__init__()
        self.layers, self.rmsnorm = nn.ModuleList(layers), RMSNorm(dim)

    def forward(self, hidden_states, mask, cond=None, **mixer_kwargs):
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, cond=cond, mask=mask, mixer_kwargs=mixer_kwargs)
        return self.rmsnorm(hidden_states)


class HNet(nn.Module):
    def __init__(self, dim, stage_idx=0, stages=1):
        super().__init__()
        self.stage_idx, self.is_innermost, self.pad_dimension = stage_idx, stage_idx == stages, None
        if self.is_innermost:
            self.main_network = Isotropic(HNetDiTBlock(dim), HNetDiTBlock(dim), dim=dim)
            return
        self.encoder, self.decoder = (Isotropic(ConvBlock(dim), dim=dim) for _ in range(2))
        self.main_network = HNet(dim, stage_idx + 1, stages)
        self.routing_module, self.chunk_layer, self.dechunk_layer = RoutingModule(dim), ChunkLayer(), DeChunkLayer()
        self.residual_proj = nn.Linear(dim, dim)

    def forward(self, hidden_states, mask, cond=None, pos_embed=None, flop_counter=None, **kwargs):
        if self.is_innermost:
            hidden_states = hidden_states if pos_embed is None else hidden_states + pos_embed
            return self.main_network(hidden_states, mask=mask, cond=cond, **kwargs), []
        grid = {name: kwargs[name] for name in ("num_rows", "num_cols")}
        x = self.encoder(hidden_states, mask=mask, cond=cond, **kwargs)
        residual = self.residual_proj(x)
        fraction = kwargs.get("tail_dropping_fraction", 0.0)
        routed = self.routing_module(x, mask=mask, tail_dropping_fraction=fraction, **grid)
        h, valid, places = self.chunk_layer(x, routed.boundary_mask, routed.boundary_prob, mask=mask)
        lengths = valid.sum(1)
        inner = {name: value for name, value in kwargs.items() if name not in grid}
        inner |= {"cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).int(), "max_seqlen": int(lengths.max())}
        packed_position = pos_embed[0, places][valid][None]
        packed, _ = self.main_network(h[valid][None], mask=None, cond=cond, pos_embed=packed_position, **inner)
        h = torch.zeros_like(h).masked_scatter(valid[..., None], packed[0])
        out = self.dechunk_layer(h, routed.boundary_mask, routed.boundary_prob, mask, places, valid, **grid)
        c = routed.selected_probs
        out = out * (1 + c - c.detach()) + residual
        return self.decoder(out, mask=mask, cond=cond, **kwargs), [routed]


class OtherDCDiT(nn.Module):
    """(B, C, H, W) and a condition (B, D) -> (B, C, H, W); float64."""

    def __init__(self, dim=32, channels=3, stages=1):
        super().__init__()
        torch.manual_seed(0)
        self.x_embedder, self.final_layer = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.pos_embed = nn.Parameter(torch.randn(1, GRID[0] * GRID[1], dim), requires_grad=False)
        self.hnet = HNet(dim, stages=stages)
        self.double()

    def forward(self, x, cond, tail_dropping_fraction=0.0):
        tokens = self.x_embedder(x.flatten(2).transpose(1, 2))
        mask = torch.ones(tokens.shape[:2], dtype=torch.int32)
        tokens, self._last_boundary_predictions = self.hnet(
            tokens, cond=cond, mask=mask, pos_embed=self.pos_embed, num_rows=GRID[0], num_cols=GRID[1],
            tail_dropping_fraction=tail_dropping_fraction,
        )  # fmt: skip
        return self.final_layer(tokens).transpose(1, 2).unflatten(2, GRID)
