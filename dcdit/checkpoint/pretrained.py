"""A model from any path that holds one.

The functions here recognise what is at the path; :mod:`~dcdit.checkpoint.folders` finds the file in a run, and
:mod:`~dcdit.checkpoint.model` and :mod:`~dcdit.checkpoint.foreign` read it.
"""

from pathlib import Path
from typing import TypeVar

from dcdit.checkpoint.folders import MODEL_FILE, list_checkpoints, model_file
from dcdit.checkpoint.foreign import (
    PICKLE_SUFFIXES,
    find_diffusers_dit,
    load_diffusers_dit,
    load_facebook_dit,
    load_official_file,
    read_state_dict,
)
from dcdit.checkpoint.model import (
    FORMAT,
    Model,
    load_model_file,
    read_file_metadata,
    read_tensors,
    refuse_not_finite,
)
from dcdit.checkpoint.state_dicts import plain_names
from dcdit.models import DiT


def load_model(path: str | Path, ema: bool = True) -> Model:
    """A model in eval mode on the CPU, from a file or folder of this package or a file of the reference implementation.

    Args:
        path: a ``.safetensors`` file of :func:`dcdit.checkpoint.save_model`; a checkpoint folder; a run folder (its
            newest checkpoint is taken); or a ``.pt`` state dict of the DC-DiT reference implementation, which must load
            without unpickling foreign objects.
        ema: of a folder, take the averaged weights.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, one that does not say what model it holds, weights that do not fit it or that are
            not finite.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import load_model, save_model
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> save_model("model.safetensors", model)
        >>> same = load_model("model.safetensors")
        >>> same.training, torch.equal(same.blocks[0].fc1.weight, model.blocks[0].fc1.weight)
        (False, True)
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _finite(load_official_file(path, ema), path)
    file = model_file(path, ema)
    return _finite(load_model_file(file), file)


def read_metadata(path: str | Path, ema: bool = True) -> dict[str, str]:
    """What a model's file says about itself, notes included, without reading the weights.

    Path and errors as in :func:`load_model`. Empty for a state dict of the reference implementation.

    Example:
        >>> from dcdit.checkpoint import read_metadata, save_model
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> save_model("model.safetensors", model, notes={"data": "photographs"})
        >>> metadata = read_metadata("model.safetensors")
        >>> metadata["architecture"], metadata["data"]
        ('DiT', 'photographs')
    """
    path = Path(path)
    return {} if path.suffix in PICKLE_SUFFIXES else read_file_metadata(model_file(path, ema))


def load_static_dit(path: str | Path, num_heads: int | None = None) -> DiT:
    """A static DiT in eval mode on the CPU. Averaged weights are taken where there are any.

    Args:
        path: a ``.pt`` or ``.pth`` state dict or training checkpoint of facebookresearch/DiT; a ``.safetensors`` file
            with the same keys; a ``.safetensors`` file, checkpoint folder or run folder of this package; or a folder
            of diffusers, the pipeline or its transformer, with safetensors weights
            (:func:`~dcdit.checkpoint.foreign.load_diffusers_dit` says how they are read).
        num_heads: of the attention. State dicts do not say it; by default it is that of the published size of the same
            width.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, one that needs unpickling, weights of something else, or weights that are not
            finite.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import load_static_dit
        >>> from dcdit.models import create_model, to_dit
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> torch.save(to_dit(model), "DiT.pt")  # as facebookresearch/DiT publishes its weights
        >>> load_static_dit("DiT.pt", num_heads=2).config == model.config
        True
    """
    return _finite(_load_static_dit(Path(path), num_heads), path)


def _load_static_dit(path: Path, num_heads: int | None) -> DiT:
    if not path.exists():
        raise FileNotFoundError(f"no pretrained DiT {str(path)!r}")
    diffusers = find_diffusers_dit(path)
    if diffusers is not None:
        return load_diffusers_dit(diffusers)
    if path.is_dir():
        return _load_own_dit(path)
    if path.suffix in PICKLE_SUFFIXES:
        return load_facebook_dit(path, read_state_dict(path), num_heads)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no pretrained DiT; accepted: .pt, .pth, .safetensors, or a folder")
    if read_file_metadata(path).get("format") == FORMAT:
        return _load_own_dit(path)
    return load_facebook_dit(path, plain_names(read_tensors(path)[0]), num_heads)


def read_objective(path: str | Path) -> str | None:
    """What a model of this package learned, "dit" or "flow". None for files of other code bases, which do not say.

    Example:
        >>> from dcdit.checkpoint import read_objective, save_model
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> save_model("model.safetensors", model, notes={"objective": "flow"})
        >>> read_objective("model.safetensors")
        'flow'
    """
    path = Path(path)
    foreign = path.is_dir() and not (path / MODEL_FILE).is_file() and not list_checkpoints(path)
    return None if foreign or not path.exists() else read_metadata(path).get("objective")


AnyModel = TypeVar("AnyModel", bound=Model)


def _finite(model: AnyModel, source: str | Path) -> AnyModel:
    """The model itself. ValueError if a weight is not finite: it draws garbage, on a GPU without any other error."""
    refuse_not_finite(model.state_dict(), source)
    return model


def _load_own_dit(path: Path) -> DiT:
    model = load_model(path)
    if not isinstance(model, DiT):
        raise ValueError(f"{path} holds a {type(model).__name__}; accepted: a static DiT")
    return model
