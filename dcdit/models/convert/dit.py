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
        **overrides: other fields of :class:`DiTConfig` that the weights do not tell. diffusers stores no position
            table, so its format needs ``grid`` (there ``(sample_size, sample_size)``).

    Raises:
        ValueError: keys or shapes of another architecture, or a missing grid.
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
    """
    if layout not in EXPORTS:
        raise ValueError(f"unknown layout {layout!r}; accepted: {', '.join(EXPORTS)}")
    return EXPORTS[layout](model)
