"""``dcdit.ops`` as a kernel package for Hugging Face's ``kernels`` and its ``kernel-builder``."""

from tools.kernel_package.build import build

__all__ = ["build"]
