"""Gates of a transformer of dynamic width: what each block computes (DyDiT, arXiv 2410.03456, section 3).

A block computes some of its attention heads and some groups of its MLP's hidden units, which depends on the timestep,
and its MLP runs on some of the tokens. In training a gate is drawn: the logistic noise of a Gumbel-sigmoid is added to
its logit. It is 0 or 1 forward, and backward the sigmoid (straight-through).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.ops.autocast import without_autocast

TAU = 5.0
"""Temperature of the Gumbel-sigmoid."""
WIDTH_BIAS, TOKEN_BIAS = 15.0, 35.0
"""First logits, as in the published code: the model starts complete, and noise of temperature 5 closes no gate."""
TOKEN_GATE_SHARE = 16
"""Width of a token gate's hidden layer: D over this."""


class Widths(NamedTuple):
    """The gates of one block: float32, 1 where it computes and 0 elsewhere.

    Example:
        >>> import torch
        >>> from dcdit.nn import WidthGates
        >>> widths = WidthGates(dim=8, depth=2, heads=4, groups=4).eval()(torch.randn(1, 8)).of_blocks()
        >>> len(widths), widths[0].heads.tolist()  # a new model is complete
        (2, [[1.0, 1.0, 1.0, 1.0]])
    """

    heads: Tensor
    """(B, H): attention heads."""
    groups: Tensor
    """(B, G): groups of hidden units of the MLP."""


class Gates(NamedTuple):
    """The gates of all blocks in a forward pass: float32, 0 or 1. In training they have gradients.

    Example:
        >>> import torch
        >>> from dcdit.nn import Gates
        >>> gates = Gates(heads=torch.tensor([[[1.0, 0.0, 1.0]]]), groups=torch.tensor([[[1.0, 1.0]]]), tokens=None)
        >>> gates.counts().heads.tolist(), gates.counts().groups.tolist()  # of one image, one block
        ([[2]], [[2]])
    """

    heads: Tensor
    """(B, depth, H)"""
    groups: Tensor
    """(B, depth, G)"""
    tokens: Tensor | None
    """(B, depth, L): the tokens that the MLP runs on; None where it runs on all."""

    def counts(self) -> "GateCounts":
        """How many are open, without gradients."""
        heads, groups = (_count(gate) for gate in self[:2])
        return GateCounts(heads, groups, None if self.tokens is None else _count(self.tokens))

    def of_blocks(self) -> list[Widths]:
        """The widths of each block."""
        return [Widths(*pair) for pair in zip(self.heads.unbind(1), self.groups.unbind(1), strict=True)]


def _count(gate: Tensor) -> Tensor:
    return gate.detach().sum(2).round().long()


class GateCounts(NamedTuple):
    """How many gates are open: (B, depth) int64 each."""

    heads: Tensor
    groups: Tensor
    tokens: Tensor | None
    """None where every MLP runs on all tokens."""


class WidthGates(nn.Module):
    """Timestep-wise dynamic width: the gates of heads and MLP groups from the timestep's embedding.

    Two linear routers for each block; one Linear holds them all. Its rows are those of the first block, then those of
    the second, and so on, and within a block the heads, then the groups. The first head and the first group of a block
    have no gate: they always compute.

    Args:
        dim: D of the embedding.
        depth: number of blocks.
        heads, groups: H and G of a block, together at least 3.

    Example:
        >>> import torch
        >>> from dcdit.nn import WidthGates
        >>> gates = WidthGates(dim=8, depth=1, heads=4, groups=4).eval()
        >>> _ = torch.nn.init.constant_(gates.linear.bias, -99.0)
        >>> gates(torch.randn(1, 8)).heads.tolist()  # the first head has no gate
        [[[1.0, 0.0, 0.0, 0.0]]]
    """

    def __init__(self, dim: int, depth: int, heads: int, groups: int) -> None:
        super().__init__()
        self.depth, self.heads, self.groups = depth, heads, groups
        self.linear = nn.Linear(dim, depth * (heads - 1 + groups - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.constant_(self.linear.bias, WIDTH_BIAS)

    def forward(self, time: Tensor, noise: Tensor | None = None) -> Gates:
        """Of all blocks.

        Args:
            time: (B, D) embedding of the timestep.
            noise: (B, depth, H - 1 + G - 1) from :func:`logistic_noise`. In training mode None draws it.
        """
        with without_autocast(time):
            logits = self.linear(time.to(self.linear.weight.dtype)).float().unflatten(1, (self.depth, -1))
        gates = F.pad(self._drawn(logits, noise), (1, 0), value=1.0)
        heads, groups = gates[..., : self.heads], gates[..., self.heads :]
        return Gates(heads, F.pad(groups, (1, 0), value=1.0), None)

    def _drawn(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        p = gate_prob(logits, noise, self.training)
        return straight_through(p > 0.5, p)


class TokenGate(nn.Module):
    """Spatial-wise dynamic tokens: the gate of each token for the MLP of a block.

    Args:
        dim: D of the tokens.

    Example:
        >>> import torch
        >>> from dcdit.nn import TokenGate
        >>> gate = TokenGate(dim=16).eval()
        >>> bool((gate(torch.randn(2, 5, 16)) > 0.5).all())  # new: every token is open
        True
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, max(1, dim // TOKEN_GATE_SHARE))
        self.fc2 = nn.Linear(self.fc1.out_features, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.fc1.bias)
        nn.init.constant_(self.fc2.bias, TOKEN_BIAS)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, L, D) -> the probability of each token (B, L) float32; it is open above 0.5.

        Args:
            noise: (B, L) from :func:`logistic_noise`. In training mode None draws it.
        """
        logits = self.fc2(F.relu(self.fc1(x))).squeeze(-1).float()
        return gate_prob(logits, noise, self.training)


def token_mask(p: Tensor) -> Tensor:
    """The tokens (B, L) that :func:`dcdit.ops.select_tokens` keeps of p, without reading their number.

    float32 0 or 1, with the gradient of p (straight-through). Each image keeps at least one.
    """
    sel = ops.select_tokens(p, capacity=p.numel())
    return straight_through(sel.mask, p)


def gate_prob(logits: Tensor, noise: Tensor | None, training: bool) -> Tensor:
    """``sigmoid((logits + noise) / TAU)``, the Gumbel-sigmoid; without noise and outside of training the sigmoid.

    Args:
        noise: of the shape of the logits. None draws it in training.
    """
    if noise is None and training:
        noise = logistic_noise(logits.shape, logits.device)
    return logits.sigmoid() if noise is None else ((logits + noise) / TAU).sigmoid()


def logistic_noise(
    shape: torch.Size | tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Numbers of the standard logistic distribution, which the difference of two Gumbel numbers has, in float32."""
    return torch.rand(shape, device=device, generator=generator).logit(eps=1e-7)


def straight_through(hard: Tensor, p: Tensor) -> Tensor:
    """``hard`` as exact 0 and 1 in the dtype of p, with the gradient of p."""
    return hard.to(p.dtype) + (p - p.detach())
