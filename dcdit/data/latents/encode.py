"""From a folder of images to shards of latents, for training here and with LightningDiT."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dcdit.data.autoencoder import load_autoencoder, shift_and_scale
from dcdit.data.decode import RULES
from dcdit.data.folder import check_size, image_files, read_centre
from dcdit.data.latents.manifest import (
    MANIFEST_FILE,
    Manifest,
    ShardEntry,
    content_problem,
    read_entries,
    read_manifest,
    remove_entries,
    size_problem,
    write_entry,
    write_manifest,
)
from dcdit.data.latents.shards import LABELS, LATENTS, MIRRORED, STATISTICS
from dcdit.data.loader import leave_signals_to_parent, started
from dcdit.data.samples import sample_rng, to_sample
from dcdit.utils.environment import resolve_device
from dcdit.utils.files import atomically
from dcdit.utils.outputs import check_not_read
from dcdit.utils.reading import sha256
from dcdit.utils.tensors import save_tensors

SHARD = "latents_shard{:05d}.safetensors"
VAE_WEIGHTS = "diffusion_pytorch_model*"
STORED_DTYPE = {"fp32": torch.float32, "bf16": torch.float16}
"""Of the latents on disk, by precision of the arithmetic. At the size of latents, float16 is finer than bfloat16."""


def encode_images(
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
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> Manifest | None:
    """Encode every image and its mirror image into shards in ``out``. Shards that are already there are kept.

    Images are cropped as in :func:`dcdit.data.folder.read_centre`. A latent is drawn once from the autoencoder's
    posterior, with noise that is a pure function of (seed, image number), and stored unscaled. Each file appears
    complete or not at all.

    Args:
        images: folder of images, as for :class:`dcdit.data.ImageFolder`.
        vae: folder of a diffusers ``AutoencoderKL``.
        out: folder for the shards.
        size: pixels per side.
        batch_size: images per forward pass.
        shard_size: images per shard.
        workers: processes that read images; 0 reads in this one.
        device: see :func:`dcdit.utils.environment.resolve_device`.
        precision: "fp32", or "bf16", which stores float16.
        rank, world: number of this process, and how many there are; they take turns over the missing shards.
        wait: returns when all processes have called it.

    Returns:
        The finished manifest. None for all processes but the first, which puts it together.

    Raises:
        FileNotFoundError, ValueError: no images, an unreadable one (named), no autoencoder, a size that is no multiple
            of its stride, ``out`` holds something else or is in ``images``, or another process left a shard out.
    """
    for name, value in {"batch_size": batch_size, "shard_size": shard_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; accepted: at least 1")
    check_size(size)
    out = Path(out)
    files, labels, class_names = image_files(Path(images))
    check_not_read(out, {"--images": images})
    encoder = _Encoder(vae, resolve_device(device), size, seed, precision)
    image_list = "".join(f"{label} {file.relative_to(images)}\n" for file, label in zip(files, labels, strict=True))
    recipe = {
        "size": size,
        "seed": seed,
        "precision": precision,
        "shard_size": shard_size,
        "decoding": RULES,
        "image_list": hashlib.sha256(image_list.encode(errors="surrogateescape")).hexdigest(),
        **encoder.identity(vae),
    }
    (shift,), (scale,) = shift_and_scale(encoder.autoencoder)
    manifest = Manifest(len(files), encoder.shape, shift, scale, list(class_names), recipe)
    finished = _finished_shards(out, manifest)
    wait()  # all processes look before any of them writes
    if rank == 0:
        _write_finished(out, manifest, finished)
        remove_entries(out, finished)
    names = [SHARD.format(number) for number in range(-(-len(files) // shard_size))]
    missing = [number for number, name in enumerate(names) if name not in finished]
    with _progress(len(files), disable=rank > 0) as bar:
        bar.update(sum(shard.images for shard in finished.values()))
        for number in missing[rank::world]:
            first = number * shard_size
            members = slice(first, first + shard_size)
            loader = DataLoader(
                _Images(files[members], size),
                batch_size,
                num_workers=workers,
                worker_init_fn=leave_signals_to_parent,
            )
            latents, mirrored = _encode(encoder, started(loader), first, bar)
            shard = _write_shard(out / names[number], latents, mirrored, labels[members])
            if rank == 0:
                finished[shard.file] = shard
                _write_finished(out, manifest, finished)
            else:
                write_entry(out, shard)
    wait()
    if rank:
        return None
    _write_finished(out, manifest, {**read_entries(out), **finished})
    remove_entries(out, names)
    if manifest.done < manifest.images:
        raise FileNotFoundError(f"{out} holds {manifest.done} of {manifest.images} images; run the same command again")
    _write_statistics(out / STATISTICS, manifest)
    return manifest


def verify_shards(folder: str | Path) -> list[str]:
    """Everything that is wrong with the shards of a folder, judged by every byte of them. Empty if nothing.

    Raises:
        ValueError: there is no readable manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"no {MANIFEST_FILE} in {str(folder)!r}; only what dcdit extract wrote can be verified")
    with _progress(sum(shard.bytes for shard in manifest.shards), unit="B") as bar:
        found = [content_problem(folder, shard, bar.update) for shard in manifest.shards]
    problems = [problem for problem in found if problem is not None]
    missing = manifest.images - manifest.done
    return [*problems, f"{missing} images are not done yet"] if missing else problems


# --- from pixels to latents ---------------------------------------------------------------------------------------


class _Encoder:
    """From pixels to latents; each latent is drawn with its own noise."""

    def __init__(self, vae: str | Path, device: torch.device, size: int, seed: int, precision: str) -> None:
        self.autoencoder = load_autoencoder(vae, device)
        self.device, self.seed, self.precision = device, seed, precision
        config = self.autoencoder.config
        stride = 2 ** (len(config.block_out_channels) - 1)
        if size % stride:
            raise ValueError(f"size is {size}; accepted: a multiple of {stride}, the stride of the autoencoder")
        self.shape = [config.latent_channels, size // stride, size // stride]

    def identity(self, vae: str | Path) -> dict[str, Any]:
        """Configuration and checksums of the weights, as the manifest stores them."""
        config = {name: value for name, value in self.autoencoder.config.items() if not name.startswith("_")}
        weights = {file.name: sha256(file) for file in sorted(Path(vae).glob(VAE_WEIGHTS))}
        return json.loads(json.dumps({"vae": config, "vae_weights": weights}))

    @torch.no_grad()
    def __call__(self, pixels: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The latents of a batch of images and of their mirror images, each (B, C, h, w).

        Args:
            pixels: float32 (B, 3, size, size) in [-1, 1].
            first: number of the first image.
        """
        shape = (2, *self.shape)
        draws = [sample_rng(self.seed, first + i).standard_normal(shape, "float32") for i in range(len(pixels))]
        noise = torch.stack([torch.from_numpy(draw) for draw in draws], dim=1).to(self.device)  # [2, B, C, h, w]
        pixels = pixels.to(self.device)
        return self._draw(pixels, noise[0]), self._draw(pixels.flip(-1), noise[1])

    def _draw(self, pixels: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            posterior = self.autoencoder.encode(pixels).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise).to(STORED_DTYPE[self.precision]).cpu()


class _Images(Dataset[Tensor]):
    def __init__(self, files: list[Path], size: int) -> None:
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return to_sample(read_centre(self.files[index], self.size))


def _encode(encoder: _Encoder, batches: Iterable[Tensor], first: int, bar: Any) -> tuple[Tensor, Tensor]:
    """The latents of all batches and those of the mirror images; ``first`` is the number of the first image."""
    parts: list[tuple[Tensor, Tensor]] = []
    for pixels in batches:
        parts.append(encoder(pixels, first))
        first += len(pixels)
        bar.update(len(pixels))
    latents, mirrored = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
    return latents, mirrored


# --- files --------------------------------------------------------------------------------------------------------


def _finished_shards(out: Path, manifest: Manifest) -> dict[str, ShardEntry]:
    """The complete shards of an earlier call with the same arguments, by file name.

    Raises:
        ValueError: ``out`` holds shards of another call, or shards without a manifest.
    """
    earlier = read_manifest(out)
    if earlier is None:
        stray = next((file for pattern in ("*.safetensors", STATISTICS) for file in out.glob(pattern)), None)
        if stray is not None:
            raise ValueError(f"{stray} is not of dcdit extract ({out} has no {MANIFEST_FILE}); choose another --out")
        return {}
    old, new = dataclasses.asdict(earlier), dataclasses.asdict(manifest)
    for before, now in ((old, new), (old["recipe"], new["recipe"])):
        for key in sorted(now.keys() - {"shards", "recipe"}):
            if before.get(key) != now[key]:
                raise ValueError(
                    f"{out} holds latents with another {key} ({_short(before.get(key))}, not {_short(now[key])}); "
                    "choose another --out"
                )
    known = {**read_entries(out), **{shard.file: shard for shard in earlier.shards}}
    return {name: shard for name, shard in known.items() if size_problem(out, shard) is None}


def _write_finished(out: Path, manifest: Manifest, finished: dict[str, ShardEntry]) -> None:
    manifest.shards = [finished[name] for name in sorted(finished)]
    write_manifest(out, manifest)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def _write_shard(path: Path, latents: Tensor, mirrored: Tensor, labels: list[int]) -> ShardEntry:
    if not (latents.isfinite().all() and mirrored.isfinite().all()):
        raise ValueError(f"the autoencoder gives numbers that are not finite for images of {path.name}")
    tensors = {LATENTS: latents, MIRRORED: mirrored, LABELS: torch.tensor(labels, device="cpu")}
    atomically(path, lambda file: save_tensors(file, tensors, {"format": "pt"}))
    channels = latents.double().movedim(1, 0).flatten(1)  # [C, N * h * w]
    return ShardEntry(
        file=path.name,
        images=len(labels),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        sum=channels.sum(1).tolist(),
        sum_of_squares=channels.square().sum(1).tolist(),
    )


def _write_statistics(path: Path, manifest: Manifest) -> None:
    """Write ``mean`` and ``std`` of every channel, float32 (1, C, 1, 1), as LightningDiT reads them."""
    channels, height, width = manifest.shape
    count = manifest.images * height * width
    sums = [[shard.sum, shard.sum_of_squares] for shard in manifest.shards]
    total, squares = torch.tensor(sums, dtype=torch.float64, device="cpu").sum(0)
    mean = total / count
    std = ((squares - count * mean.square()) / (count - 1)).sqrt()
    stored = {name: value.float().reshape(1, channels, 1, 1) for name, value in {"mean": mean, "std": std}.items()}
    content = io.BytesIO()  # torch has an error of its own for files that it cannot write
    torch.save(stored, content)

    def write(file: Path) -> None:
        with file.open("wb") as target:
            target.write(content.getbuffer())

    atomically(path, write)


def _progress(total: int, unit: str = "image", disable: bool = False) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, unit_scale=unit == "B", dynamic_ncols=True, disable=disable)
