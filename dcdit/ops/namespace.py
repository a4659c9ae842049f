"""Under which name operators are registered with PyTorch.

A package for Hugging Face's ``kernels`` is made of these files too (``tools/kernel_package``), with another name in
this place. So one process can load it, and any other version of it, beside this one.
"""


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"dcdit::{op_name}"
