"""Make the Triton kernels importable as ``dcdit.kernels``.

The sources live in the top-level ``kernels/`` folder. A wheel puts them in ``dcdit/kernels/`` (without an ``__init__``,
so this module wins over the folder); a checkout leaves them beside the package. Both spell the same import, and nothing
answers to a bare ``import kernels``, which is the name of Hugging Face's package.
"""

from pathlib import Path

_installed = Path(__file__).with_suffix("")
_checkout = Path(__file__).resolve().parent.parent / "kernels"

__path__ = [str(_installed if _installed.is_dir() else _checkout)]
