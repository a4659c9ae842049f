"""The state dict inside what a training script saved, and the names of its weights without those of wrappers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

AVERAGED = ("ema", "model_ema", "ema_state_dict")
LAST = ("model", "state_dict", "model_state_dict", "module")
"""Entries of training checkpoints that hold a state dict, or another checkpoint."""
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What ``torch.compile``, activation checkpointing and FSDP put into the names of weights, at any depth."""
MODULE = "module."
"""What DataParallel, DistributedDataParallel and averaged models put before every name."""
COUNT = "n_averaged"
"""What ``torch.optim.swa_utils.AveragedModel`` stores beside its weights."""


def find_state_dict(loaded: Any, ema: bool) -> Any:
    """What is in a loaded file under the first of the known entries, and inside that, and so on; else all of it.

    Args:
        ema: take averaged weights where there are any, rather than the last ones.
    """
    names = (*AVERAGED, *LAST) if ema else LAST
    while isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in names if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that they have without wrappers.

    Raises:
        ValueError: two weights would have the same name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in plain:
            raise ValueError(f"the weight {short!r} is there twice, once as {name!r}; accepted: one of them")
        plain[short] = tensor
    if all(name.startswith(MODULE) for name in plain.keys() - {COUNT}):
        plain = {name.removeprefix(MODULE): tensor for name, tensor in plain.items() if name != COUNT}
    return plain
