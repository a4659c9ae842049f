"""A static DiT from and to the key formats of facebookresearch/DiT and diffusers."""

from typing import Any

from torch import Tensor

from dcdit.models.convert.diffusers import is_diffusers, load_diffusers, to_diffusers
from dcdit.models.convert.facebook import load_facebook, to_facebook
from dcdit.models.convert.mapping import StateDict
from dcdit.models.dit import DiT

EXPORTS = {"facebook": to_facebook, "diffusers": to_diffusers}


def load_dit(state_dict: StateDict, num_heads: int, **overrides: Any) -> DiT:
    """A static DiT from a state dict of facebookresearch/DiT or of diffusers' ``DiTTransformer2DModel``.

    The two differ by more than names: diffusers spaces the timestep frequencies by 1/127 instead of 1/128 and uses eps
    1e-5 before the MLP. Each key format gets its own convention, so that outputs equal those of the code base it comes
    from. For weights that the original trained and diffusers only stores, pass ``frequency_shift=0,
    mlp_norm_eps=1e-6``.

    diffusers keeps embedders in every block. If they are copies, the model has one; if they differ, it has one for each
    block (``separate_embedders``).

    Args:
        state_dict: in either key format; its keys tell which. Every tensor keeps its dtype.
        num_heads: of the attention; the weights do not tell.
        **overrides: other fields of :class:`dcdit.models.DiTConfig` that the weights do not tell. diffusers stores no
            position table, so its format needs ``grid`` (there ``(sample_size, sample_size)``).

    Raises:
        ValueError: keys or shapes of another architecture, or a missing grid.

    Example:
        >>> import torch
        >>> from dcdit.models import create_model, load_dit, to_dit
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> weights = to_dit(model)  # or torch.load("DiT-XL-2-256x256.pt", weights_only=True)
        >>> same = load_dit(weights, num_heads=2)
        >>> same.config == model.config, all(torch.equal(to_dit(same)[name], weights[name]) for name in weights)
        (True, True)
    """
    load = load_diffusers if is_diffusers(state_dict) else load_facebook
    return load(state_dict, num_heads, overrides)


def to_dit(model: DiT, layout: str = "facebook") -> dict[str, Tensor]:
    """The inverse of :func:`load_dit`: copies of the weights in one of the two key formats.

    Args:
        layout: the key format, ``"facebook"`` or ``"diffusers"``. The second drops the position table and repeats the
            embedders in every block.

    Raises:
        ValueError: unknown layout, or one that cannot hold embedders of every block.

    Example:
        >>> from dcdit.models import create_model, to_dit
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> sorted(name for name in to_dit(model) if name.startswith("blocks.0.attn"))
        ['blocks.0.attn.proj.bias', 'blocks.0.attn.proj.weight', 'blocks.0.attn.qkv.bias', 'blocks.0.attn.qkv.weight']
        >>> [name for name in to_dit(model, "diffusers") if "to_q" in name]
        ['transformer_blocks.0.attn1.to_q.weight', 'transformer_blocks.0.attn1.to_q.bias']
    """
    if layout not in EXPORTS:
        raise ValueError(f"unknown layout {layout!r}; accepted: {', '.join(EXPORTS)}")
    return EXPORTS[layout](model)
