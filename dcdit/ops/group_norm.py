"""Group norm between convolutions, for images whose channels lie side by side in memory (channels-last)."""

from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.utils.text import shape_of

__all__ = ["group_norm_silu"]


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``SiLU(GroupNorm(x + shift))``: conditioning, norm and activation of a conv block (DC-DiT, arXiv 2603.06351).

    Mean and variance are those of the positions and the channels of a group of one image (Group Normalization,
    arXiv 1803.08494, equation 1). The backward keeps x and nothing of its size.

    Args:
        x: (B, L, C), or (B, C, H, W) in ``torch.channels_last`` memory format; any other strides are copied first.
            Its variance must be finite in float32: entries up to about 1e18.
        num_groups: groups of the norm; divides C.
        weight, bias: (C,), the affine of the norm.
        shift: (B, C), added to every position of an image before the norm.
        eps: added to the variance.

    Returns:
        The shape of x in x's dtype, with the channels side by side in memory. Differentiable in every tensor.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> x = torch.randn(2, 96, 8, 8).to(memory_format=torch.channels_last)
        >>> weight, bias, shift = torch.rand(96), torch.rand(96), torch.randn(2, 96)
        >>> y = ops.group_norm_silu(x, 32, weight, bias, shift=shift)
        >>> plain = torch.nn.functional.group_norm(x + shift[:, :, None, None], 32, weight, bias)
        >>> torch.allclose(y, torch.nn.functional.silu(plain), atol=1e-5)
        True
    """
    checks.check_float(x=x, weight=weight, bias=bias, shift=shift)
    if x.dim() not in (3, 4):
        raise ValueError(f"x has shape {shape_of(x)}; accepted: (B, L, C) or (B, C, H, W)")
    checks.check_not_empty("x", x, 1 if x.dim() == 4 else 2, "channel")
    images, channels = x.shape[0], x.shape[1 if x.dim() == 4 else 2]
    checks.check_groups(num_groups, channels)
    checks.check_shape("weight", weight, (channels,), "(C,)")
    checks.check_shape("bias", bias, (channels,), "(C,)")
    if shift is not None:
        checks.check_shape("shift", shift, (images, channels), "(B, C)")
    checks.check_device(x=x, weight=weight, bias=bias, shift=shift)
    tokens = x if x.dim() == 3 else x.permute(0, 2, 3, 1).flatten(1, 2)
    with without_autocast(x):
        y = backend_for(x).group_norm_silu(tokens, num_groups, weight, bias, shift, float(eps))
    return y if x.dim() == 3 else y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
