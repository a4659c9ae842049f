"""A folder of images into shards of latents, for training here and with LightningDiT."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dcdit.data.autoencoder import latent_range, load_autoencoder
from dcdit.data.folder import image_files, read_centre
from dcdit.data.latents import manifest as manifests
from dcdit.data.latents.manifest import Manifest, ShardEntry
from dcdit.data.latents.shards import LABELS, LATENTS, MIRRORED, STATISTICS
from dcdit.data.samples import sample_rng, to_sample
from dcdit.utils.environment import resolve_device
from dcdit.utils.files import atomically

WEIGHTS = "diffusion_pytorch_model*"
STORED = {"fp32": torch.float32, "bf16": torch.float16}
"""What is stored: float16 is finer than bf16 arithmetic at the size of latents."""


def extract(
    images: str | Path,
    vae: str | Path,
    out: str | Path,
    size: int = 256,
    batch_size: int = 32,
    shard_size: int = 10_000,
    workers: int = 0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> Manifest:
    """Encode every image, and every image mirrored, into ``out``; shards that are there already are not done again.

    Images are cropped as in :func:`dcdit.data.folder.read_centre`. A latent is drawn once from the autoencoder's
    posterior, with noise that is a pure function of (seed, image number), and stored in the autoencoder's own range.
    Each file appears whole or not at all.

    Args:
        images: folder of images, as for :class:`dcdit.data.ImageFolder`.
        vae: folder of a diffusers ``AutoencoderKL``.
        out: folder for the shards.
        size: pixels per side.
        batch_size: images per forward pass.
        shard_size: images per file.
        workers: processes that read images; 0 reads in this one.
        device: see :func:`dcdit.utils.environment.resolve_device`. precision: "fp32", or "bf16", which stores float16.

    Raises:
        FileNotFoundError, ValueError: no images, an unreadable one (named), no autoencoder, a size it cannot halve, or
            ``out`` holds something else.
    """
    for name, value in {"batch_size": batch_size, "shard_size": shard_size, "size": size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: at least 1")
    out = Path(out)
    files, labels, class_names = image_files(Path(images))
    encoder = _Encoder(vae, resolve_device(device), size, seed, precision)
    listing = "".join(f"{label} {file.relative_to(images)}\n" for file, label in zip(files, labels, strict=True))
    recipe = {
        "size": size,
        "seed": seed,
        "precision": precision,
        "shard_size": shard_size,
        "image_list": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
        **encoder.identity(vae),
    }
    (shift,), (scale,) = latent_range(encoder.autoencoder)
    plan = Manifest(len(files), encoder.shape, shift, scale, list(class_names), recipe)
    finished = _finished(out, plan)
    plan.shards = list(finished.values())
    with _progress(len(files)) as bar:
        for number, first in enumerate(range(0, len(files), shard_size)):
            name = f"latents_shard{number:05d}.safetensors"
            members = range(first, min(first + shard_size, len(files)))
            if name in finished:
                bar.update(len(members))
            else:
                batches = _pixels([files[image] for image in members], size, batch_size, workers)
                finished[name] = _write_shard(out / name, encoder, batches, members, labels, bar)
                plan.shards = [finished[done] for done in sorted(finished)]
                manifests.write(out, plan)
    _write_statistics(out / STATISTICS, plan)
    return plan


def verify(folder: str | Path) -> list[str]:
    """Everything wrong with the shards of a folder, every byte of them read. Empty where all is as the manifest says.

    Raises:
        ValueError: there is no readable manifest.
    """
    folder = Path(folder)
    manifest = manifests.read(folder)
    if manifest is None:
        raise ValueError(f"no {manifests.NAME} in {str(folder)!r}; only what dcdit extract wrote can be verified")
    with _progress(sum(shard.bytes for shard in manifest.shards), unit="B") as bar:
        problems = [manifests.content_problem(folder, shard, bar.update) for shard in manifest.shards]
    missing = manifest.images - manifest.done
    return [p for p in problems if p is not None] + ([f"{missing} images are not done yet"] if missing else [])


# --- parts ----------------------------------------------------------------------------------------------------------


class _Encoder:
    """Images to latents, each drawn with noise of its own."""

    def __init__(self, vae: str | Path, device: torch.device, size: int, seed: int, precision: str) -> None:
        self.autoencoder = load_autoencoder(vae, device)
        self.device, self.seed, self.precision = device, seed, precision
        config = self.autoencoder.config
        stride = 2 ** (len(config.block_out_channels) - 1)
        if size % stride:
            raise ValueError(f"size is {size}; accepted: a multiple of {stride}, the stride of the autoencoder")
        self.shape = [config.latent_channels, size // stride, size // stride]

    def identity(self, vae: str | Path) -> dict[str, Any]:
        """Configuration and weights, as the manifest keeps them."""
        config = {name: value for name, value in self.autoencoder.config.items() if not name.startswith("_")}
        weights = {file.name: manifests.sha256(file) for file in sorted(Path(vae).glob(WEIGHTS))}
        return json.loads(json.dumps({"vae": config, "vae_weights": weights}))

    @torch.no_grad()
    def __call__(self, pixels: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Latents of float32 (B, 3, size, size) in [-1, 1], and of its mirror image; ``first`` numbers the first."""
        noise = torch.stack(
            [
                torch.from_numpy(sample_rng(self.seed, first + i).standard_normal((2, *self.shape), "float32"))
                for i in range(len(pixels))
            ],
            dim=1,
        ).to(self.device)  # [2, B, C, h, w]
        pixels = pixels.to(self.device)
        return self._draw(pixels, noise[0]), self._draw(pixels.flip(-1), noise[1])

    def _draw(self, pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            posterior = self.autoencoder.encode(pixels).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise).to(STORED[self.precision]).cpu()


class _Images(Dataset[Tensor]):
    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return to_sample(read_centre(self.files[index], self.size))


def _pixels(files: list[Path], size: int, batch_size: int, workers: int) -> Iterator[Tensor]:
    yield from DataLoader(_Images(files, size), batch_size, num_workers=workers)


def _finished(out: Path, plan: Manifest) -> dict[str, ShardEntry]:
    """The shards that an earlier call of the same plan left whole, by file name."""
    earlier = manifests.read(out)
    if earlier is None:
        stray = next(out.glob("*.safetensors"), None)
        if stray is not None:
            raise ValueError(f"{stray} is not of dcdit extract ({out} has no {manifests.NAME}); choose another --out")
        return {}
    old, new = (dataclasses.asdict(manifest) for manifest in (earlier, plan))
    for before, now in ((old, new), (old["recipe"], new["recipe"])):
        for key in sorted(now.keys() - {"shards", "recipe"}):
            if before.get(key) != now[key]:
                raise ValueError(
                    f"{out} holds latents with another {key} ({_short(before.get(key))}, not {_short(now[key])}); "
                    "choose another --out"
                )
    return {shard.file: shard for shard in earlier.shards if manifests.size_problem(out, shard) is None}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def _write_shard(
    path: Path, encoder: _Encoder, batches: Iterator[Tensor], members: range, labels: list[int], bar: Any
) -> ShardEntry:
    from safetensors.torch import save_file

    parts: list[tuple[Tensor, Tensor]] = []
    first = members.start
    for pixels in batches:
        parts.append(encoder(pixels, first))
        first += len(pixels)
        bar.update(len(pixels))
    latents, mirrored = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
    if not (latents.isfinite().all() and mirrored.isfinite().all()):
        raise ValueError(f"the autoencoder gives numbers that are not finite for images of {path.name}")
    tensors = {LATENTS: latents, MIRRORED: mirrored, LABELS: torch.tensor([labels[image] for image in members])}
    atomically(path, lambda file: save_file(tensors, file, {"format": "pt"}))
    channels = latents.double().movedim(1, 0).flatten(1)
    return ShardEntry(
        file=path.name,
        images=len(members),
        bytes=path.stat().st_size,
        sha256=manifests.sha256(path),
        sum=channels.sum(1).tolist(),
        sum_of_squares=channels.square().sum(1).tolist(),
    )


def _write_statistics(path: Path, manifest: Manifest) -> None:
    """``mean`` and ``std`` of every channel, float32 (1, C, 1, 1), as LightningDiT reads them."""
    channels, height, width = manifest.shape
    count = manifest.images * height * width
    total, squares = (
        torch.tensor([getattr(shard, name) for shard in manifest.shards], dtype=torch.float64).sum(0)
        for name in ("sum", "sum_of_squares")
    )
    mean = total / count
    std = ((squares - count * mean.square()) / (count - 1)).sqrt()
    statistics = {"mean": mean, "std": std}
    stored = {name: value.float().reshape(1, channels, 1, 1) for name, value in statistics.items()}
    # Saved straight to the file, the temporary file's name would be part of it.
    data = io.BytesIO()
    torch.save(stored, data)
    atomically(path, lambda file: file.write_bytes(data.getvalue()))


def _progress(total: int, unit: str = "image") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=unit == "B", dynamic_ncols=True)
