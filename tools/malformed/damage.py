"""Valid files with random damage: cut short, bytes changed, filled with zeros, or swapped for another file."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tools.malformed import parts
from tools.malformed.base import Base

Victim = Callable[[Base, Path], tuple[Path, list[str]]]
"""Puts a valid file into an empty folder; returns it, and the command line that reads it."""


def _model(base: Base, out: Path) -> tuple[Path, list[str]]:
    file = parts.write(out / "a.safetensors", base.model.read_bytes())
    return file, base.sample(file, out)


def _pickle(base: Base, out: Path) -> tuple[Path, list[str]]:
    torch.save(base.official_state, out / "a.pt")
    return out / "a.pt", base.sample(out / "a.pt", out)


def _static(base: Base, out: Path) -> tuple[Path, list[str]]:
    torch.save(base.static_state, out / "a.pt", _use_new_zipfile_serialization=False)
    return out / "a.pt", [*base.upcycle(out / "a.pt", out), "--set", "optim.steps=1"]


def _config(base: Base, out: Path) -> tuple[Path, list[str]]:
    file = parts.write(out / "a.yaml", base.config.read_bytes())
    return file, base.train_with(file, out)


def _arrays(base: Base, out: Path) -> tuple[Path, list[str]]:
    file = parts.write(out / "a.npz", base.latents.read_bytes())
    return file, base.train_on("npz", file, out)


def _moments(base: Base, out: Path) -> tuple[Path, list[str]]:
    from tools.malformed.latents import MOMENTS, zipped

    file = zipped(base, out, x=MOMENTS)
    return file, [*base.train_on("latents", file, out), "--batch-size", "4"]


def _manifest(base: Base, out: Path) -> tuple[Path, list[str]]:
    from tools.malformed.latents import shard

    argv = shard(base, out)
    return out / "shards" / "manifest.json", argv


def _shard(base: Base, out: Path) -> tuple[Path, list[str]]:
    from tools.malformed.latents import shard

    argv = shard(base, out)
    return out / "shards" / "latents_shard00000.safetensors", argv


def _image(base: Base, out: Path) -> tuple[Path, list[str]]:
    folder = base.copy_of_images(out)
    return folder / "00.png", base.evaluate(folder, out)


def _statistics(base: Base, out: Path) -> tuple[Path, list[str]]:
    arrays = {"mu": parts.npy(np.zeros(48)), "sigma": parts.npy(np.eye(48)), "count": parts.npy(np.int64(9))}
    file = parts.npz(out / "stats.npz", compressed=True, **arrays)
    return file, base.evaluate(base.images, out, "--reference", str(file))


def _extractor(base: Base, out: Path) -> tuple[Path, list[str]]:
    file = parts.write(out / "net.pt", base.extractor.read_bytes())
    return file, base.evaluate(base.images, out, extractor=file)


def _of_a_run(name: str) -> Victim:
    def victim(base: Base, out: Path) -> tuple[Path, list[str]]:
        run = base.copy_of_run(out)
        file = run / name if "." in name and (run / name).exists() else max(run.glob(f"checkpoints/*/{name}"))
        return file, ["train", "--resume", str(run), "--set", "optim.steps=3"]

    return victim


def _of_a_vae(name: str) -> Victim:
    def victim(base: Base, out: Path) -> tuple[Path, list[str]]:
        folder = base.copy_of_vae(out)
        return folder / name, base.sample(base.latent_model, out, "--vae", str(folder))

    return victim


def _profile(base: Base, out: Path) -> tuple[Path, list[str]]:
    from tools.malformed.evaluations import HEAD

    variants = [{"drop_fraction": rho, "ms": 2.0 - rho, "spread": 0.01} for rho in (0.0, 0.5)]
    file = parts.write_json(out / "p.json", {**HEAD, "variants": variants})
    return file, base.sample(base.model, out, "--target-latency", "0.00045", "--profile", str(file))


VICTIMS: dict[str, Victim] = {
    "model file": _model,
    "pickled state dict": _pickle,
    "pickled state dict, old format": _static,
    "configuration": _config,
    ".npz of latents": _arrays,
    "zip of moments": _moments,
    "manifest.json": _manifest,
    "shard": _shard,
    "image": _image,
    "statistics": _statistics,
    "extractor": _extractor,
    "trainer.json": _of_a_run("trainer.json"),
    "optimizer.safetensors": _of_a_run("optimizer.safetensors"),
    "log.jsonl": _of_a_run("log.jsonl"),
    "config.yaml of a run": _of_a_run("config.yaml"),
    "config.json of an autoencoder": _of_a_vae("config.json"),
    "weights of an autoencoder": _of_a_vae("diffusion_pytorch_model.safetensors"),
    "profile.json": _profile,
}
"""Every kind of file that a command reads."""


def damage(data: bytes, rng: random.Random) -> bytes:
    """The content of a file with one kind of damage."""
    changed = bytearray(data)
    kind = rng.randrange(6)
    # Headers are short, and where the rare faults are.
    place = rng.randrange(max(1, min(len(data), 400 if rng.random() < 0.5 else len(data))))
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(20):
            changed[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 3:
        end = min(len(data), place + 64)
        changed[place:end] = bytes(end - place)
    elif kind == 4:
        changed[place:place] = rng.randbytes(rng.randrange(1, 16))
    else:
        changed[place : place + 1] = rng.choice(
            [b"-", b"9" * 30, b"\x1b[31m", b"NaN", b"true", b"null", b"[", b"{", b'"']
        )
    return bytes(changed)
