"""Under which name operators are registered with PyTorch.

A package for Hugging Face's ``kernels`` is made of these files too (``tools/kernel_package``), with a name of its own
in this place, so that it and any other version of it can be loaded beside this one.
"""


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"dcdit::{op_name}"
