"""Where a folder of Hugging Face's libraries keeps its weights: in one file or in shards, plain or a variant."""

import re
from pathlib import Path


def find_weights(folder: Path, stem: str) -> Path | None:
    """The safetensors file with the weights, or the index of its shards (``.json``). None if there is neither.

    A variant, such as ``fp16`` in ``model.fp16.safetensors`` and ``model.safetensors.index.fp16.json``, is taken where
    the plain weights are not there.

    Args:
        stem: start of the names, e.g. ``diffusion_pytorch_model``.

    Raises:
        ValueError: several variants, and no plain weights.
    """
    for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
        if (folder / name).is_file():
            return folder / name
    by_variant = {variant_of(path): path for path in sorted(folder.glob(f"{stem}.*")) if variant_of(path)}
    if len(by_variant) > 1:
        raise ValueError(f"{folder} holds the variants {', '.join(map(str, by_variant))}; accepted: one of them")
    return next(iter(by_variant.values()), None)


def variant_of(path: Path) -> str | None:
    """The variant that a file of :func:`find_weights` is of. None for plain weights, and for other files."""
    found = re.fullmatch(r"[^.]+\.(\w+)\.safetensors|[^.]+\.safetensors\.index\.(\w+)\.json", path.name)
    return None if found is None else found[1] or found[2]
