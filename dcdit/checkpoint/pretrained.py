"""A static DiT from the files that people have: facebookresearch/DiT, safetensors, diffusers, and our own runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dcdit import checkpoint
from dcdit.models import DiT, load_dit
from dcdit.models.presets import SCALES

TRANSFORMER, CONFIG, WEIGHTS = "transformer", "config.json", "diffusion_pytorch_model.safetensors"
"""What diffusers calls the parts of a pipeline."""
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Both names that diffusers has had for DiT."""


def load_static_dit(path: str | Path, num_heads: int | None = None) -> DiT:
    """A static DiT in eval mode on the CPU. Averaged weights are taken where there are any.

    Weights in diffusers' layout are read as what they were trained as, the original DiT: frequency_shift 0,
    mlp_norm_eps 1e-6 (:func:`dcdit.models.load_dit` says more).

    Args:
        path: a ``.pt`` or ``.pth`` state dict or training checkpoint of facebookresearch/DiT; a ``.safetensors`` file
            with the same keys; a ``.safetensors`` file, checkpoint folder or run folder of this package; or a folder
            of diffusers, the pipeline or its transformer, with safetensors weights.
        num_heads: of the attention. State dicts do not tell; without it, the published size of that width does.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, one that needs unpickling, or weights of something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no pretrained DiT {str(path)!r}")
    folder = path / TRANSFORMER if (path / TRANSFORMER / CONFIG).is_file() else path
    if (folder / CONFIG).is_file():
        return _from_diffusers(folder)
    if path.is_dir():
        return _own(path)
    if path.suffix in checkpoint.REFERENCE_SUFFIXES:
        return _from_state(path, checkpoint.read_state_dict(path), num_heads)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no pretrained DiT; accepted: .pt, .pth, .safetensors, or a folder")
    if checkpoint.read_metadata(path).get("format") == checkpoint.FORMAT:
        return _own(path)
    return _from_state(path, checkpoint.read_tensors(path)[0], num_heads)


def read_objective(path: str | Path) -> str | None:
    """What a model of this package learned, "dit" or "flow"; None for files of other origin, which do not say."""
    path = Path(path)
    foreign = path.is_dir() and not (path / checkpoint.MODEL).is_file() and not checkpoint.list_checkpoints(path)
    return None if foreign or not path.exists() else checkpoint.read_metadata(path).get("objective")


def _own(path: Path) -> DiT:
    model = checkpoint.load_model(path)
    if not isinstance(model, DiT):
        raise ValueError(f"{path} holds a {type(model).__name__}; accepted: a static DiT")
    return model


def _from_state(path: Path, state: Mapping[str, Tensor], num_heads: int | None) -> DiT:
    if "pos_embed.proj.weight" in state:
        raise ValueError(f"{path} has the layout of diffusers; accepted: the folder with its {CONFIG}")
    labels = state.get("y_embedder.embedding_table.weight")
    if num_heads is None and labels is not None:
        width = labels.shape[1]
        num_heads = {scale["hidden_size"]: scale["num_heads"] for scale in SCALES.values()}.get(width)
        if num_heads is None:
            raise ValueError(f"{path} has width {width}, no published one, so num_heads has to be given (--num-heads)")
    return _named(path, state, num_heads or 1)


def _from_diffusers(folder: Path) -> DiT:
    kind, side, num_heads = (
        _entry(folder / CONFIG, key) for key in ("_class_name", "sample_size", "num_attention_heads")
    )
    if kind not in CLASSES:
        raise ValueError(f"{folder / CONFIG} is of a {kind!r}; accepted: {', '.join(CLASSES)}")
    index = folder / f"{WEIGHTS}.index.json"
    names = sorted(set(_entry(index, "weight_map").values())) if index.is_file() else [WEIGHTS]
    state: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {str(folder)!r}; accepted: weights in safetensors, not pickled ones")
        state |= checkpoint.read_tensors(folder / name)[0]
    return _named(folder, state, num_heads, grid=(side, side), frequency_shift=0, mlp_norm_eps=1e-6)


def _named(path: Path, state: Mapping[str, Tensor], num_heads: int, **overrides: Any) -> DiT:
    try:
        return load_dit(state, num_heads, **overrides).float().eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _entry(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged or of something else: no {key!r} in it") from None
