"""Conditions on sizes where the compiler may not know them, because they depend on data."""

import torch


def known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; False where the compiler cannot tell."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return bool(condition)


def differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes differ. Where the compiler cannot tell, the compiled code checks that they are equal."""
    if not torch.compiler.is_compiling():
        return a != b
    if known_true(a != b):
        return True
    torch._check(a == b)
    return False
