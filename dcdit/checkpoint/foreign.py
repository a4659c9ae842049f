"""Files of other code bases: the DC-DiT reference implementation, facebookresearch/DiT, and diffusers.

This module opens the files and supplies what the weights do not say, such as the number of attention heads.
:mod:`dcdit.models.convert` then turns the state dict into a model.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dcdit.checkpoint.model import Tensors, read_tensors
from dcdit.checkpoint.state_dicts import find_state_dict, plain_names
from dcdit.models import DCDiT, DiT, load_dit, load_official
from dcdit.models.convert.diffusers import embedders_differ
from dcdit.models.presets import SCALES
from dcdit.utils.inside import listed_files
from dcdit.utils.pickles import check_dense, load_pickled
from dcdit.utils.reading import read_json
from dcdit.utils.weight_files import find_weights

PICKLE_SUFFIXES = (".pt", ".pth")
TRANSFORMER, CONFIG, WEIGHTS = "transformer", "config.json", "diffusion_pytorch_model"
"""Names of a pipeline's parts in diffusers."""
ACTIVATION = "gelu-approximate"
"""That of a DiT, as diffusers calls it."""
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Both names that diffusers has had for DiT."""


def read_state_dict(path: str | Path, ema: bool = True) -> dict[str, Tensor]:
    """A state dict that PyTorch pickled. Nothing but tensors and plain values is unpickled.

    Args:
        path: the state dict itself, or a training checkpoint with an entry such as ``"ema"``, ``"model"`` or
            ``"state_dict"`` (:mod:`dcdit.checkpoint.state_dicts`). What wrappers put into names (``module.``,
            ``_orig_mod.``) is removed. The argparse namespace that facebookresearch/DiT adds holds plain values and is
            accepted.
        ema: take averaged weights where there are any.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file needs real unpickling, which could run any code, or holds no state dict.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import read_state_dict
        >>> torch.save({"ema": {"module.weight": torch.ones(2)}, "opt": {}}, "checkpoint.pt")
        >>> read_state_dict("checkpoint.pt")
        {'weight': tensor([1., 1.])}
    """
    state = find_state_dict(load_pickled(path, allowed=[argparse.Namespace]), ema)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ValueError(f"{path} holds no state dict; accepted: names to tensors, or a dict with 'ema' and 'model'")
    check_dense(state, path)
    with _naming(Path(path)):
        return plain_names(state)


def load_official_file(path: Path, ema: bool) -> DCDiT:
    """A DC-DiT in eval mode from a ``.pt`` file of the reference implementation (AMD-AGI/DynamicChunkingDiT).

    Errors as in :func:`read_state_dict`; ValueError also for weights of something else or of no published width.
    """
    state = read_state_dict(path, ema)
    if "pos_embed" not in state:
        raise ValueError(f"{path} has no 'pos_embed'; accepted: a state dict of the DC-DiT reference implementation")
    if state["pos_embed"].dim() != 3:
        raise ValueError(f"{path}: pos_embed has shape {tuple(state['pos_embed'].shape)}; accepted: (1, positions, D)")
    _, positions, width = state["pos_embed"].shape
    heads = published_heads()
    if width not in heads:
        widths = ", ".join(map(str, heads))
        raise ValueError(f"{path} has width {width}; accepted: {widths}, others through dcdit.models.load_official")
    # The weights do not say sigma. It is 2 from 512 pixels on, a grid of 64 x 64.
    sigma = 2.0 if positions >= 64 * 64 else 1.0
    with _naming(path):
        return load_official(state, num_heads=heads[width], dechunk_sigma=sigma).eval()


def load_facebook_dit(path: Path, state: Tensors, num_heads: int | None = None) -> DiT:
    """A static DiT in eval mode, float32, from weights with the keys of facebookresearch/DiT.

    Args:
        path: where they come from, for error messages.
        num_heads: of the attention; by default that of the published size of this width.

    Raises:
        ValueError: keys or shapes of something else, or a width of no published size and no ``num_heads``.
    """
    if "pos_embed.proj.weight" in state:
        raise ValueError(f"{path} has the key format of diffusers; accepted: the folder with its {CONFIG}")
    labels = state.get("y_embedder.embedding_table.weight")
    if num_heads is None and labels is not None and labels.dim() == 2:
        width = labels.shape[1]
        num_heads = published_heads().get(width)
        if num_heads is None:
            raise ValueError(f"{path} has width {width}, no published one, so num_heads has to be given (--num-heads)")
    return _convert_dit(path, state, num_heads or 1)


def find_diffusers_dit(path: Path) -> Path | None:
    """The folder of diffusers with a transformer's ``config.json``: ``path``, or ``transformer/`` of a pipeline."""
    return next((folder for folder in (path / TRANSFORMER, path) if (folder / CONFIG).is_file()), None)


def load_diffusers_dit(folder: Path) -> DiT:
    """A static DiT in eval mode, float32, from a folder of diffusers with safetensors weights, in shards or not.

    If all blocks have the same embedders, the weights are read as those of the original DiT, which trained them:
    frequency_shift 0, mlp_norm_eps 1e-6. If embedders differ, diffusers trained them, and its conventions hold
    (:func:`dcdit.models.load_dit` says more). Without plain weights, a variant such as ``fp16`` is read.

    Raises:
        FileNotFoundError: no safetensors weights.
        ValueError: a damaged file, several variants, or a model that is no DiT.
    """
    kind = _entry(folder / CONFIG, "_class_name")
    if kind not in CLASSES:
        raise ValueError(f"{folder / CONFIG} is of a {kind!r}; accepted: {', '.join(CLASSES)}")
    side, num_heads = (_entry(folder / CONFIG, key) for key in ("sample_size", "num_attention_heads"))
    for key, value in (("sample_size", side), ("num_attention_heads", num_heads)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{folder / CONFIG} has the {key} {value!r}; accepted: a positive integer")
    weights = find_weights(folder, WEIGHTS)
    if weights is None:
        raise FileNotFoundError(
            f"no {WEIGHTS}.safetensors in {str(folder)!r}; accepted: weights in safetensors, not pickled ones"
        )
    state: dict[str, Tensor] = {}
    for name in listed_files(weights) if weights.suffix == ".json" else [weights.name]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {str(folder)!r}; accepted: weights in safetensors, not pickled ones")
        state |= read_tensors(folder / name)[0]
    optional = {"activation_fn": ACTIVATION, "norm_eps": 1e-5, **read_json(folder / CONFIG)}
    if optional["activation_fn"] != ACTIVATION:
        raise ValueError(
            f"{folder / CONFIG} has the activation_fn {optional['activation_fn']!r}; accepted: {ACTIVATION!r}, DiT's"
        )
    own = {"mlp_norm_eps": optional["norm_eps"]}
    conventions = own if embedders_differ(state) else {"frequency_shift": 0, "mlp_norm_eps": 1e-6}
    return _convert_dit(folder, state, num_heads, grid=(side, side), **conventions)


def published_heads() -> dict[int, int]:
    """Number of attention heads by width, for the published sizes."""
    return {scale["hidden_size"]: scale["num_heads"] for scale in SCALES.values()}


def _convert_dit(path: Path, state: Tensors, num_heads: int, **overrides: Any) -> DiT:
    """:func:`dcdit.models.load_dit`, with the path in its errors."""
    with _naming(path):
        return load_dit(state, num_heads, **overrides).float().eval()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path before what is wrong with the weights that come from it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _entry(path: Path, key: str) -> Any:
    values = read_json(path)
    if not isinstance(values, dict) or key not in values:
        raise ValueError(f"{path} is damaged or of something else: no {key!r} in it")
    return values[key]
