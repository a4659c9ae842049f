"""``dcdit extract``: a folder of images into shards of latents, for ``dcdit train --data latents`` and LightningDiT."""

import argparse
import os

from dcdit.data.latents import manifest
from dcdit.data.latents.encode import STORED, extract, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--images", metavar="DIR", help="images: one class per subfolder, or a flat folder of one class")
    add("--vae", metavar="DIR", help="local diffusers AutoencoderKL; nothing is ever downloaded")
    add("--out", metavar="DIR", help="where the shards go; a folder that holds some of them is completed")
    add("--size", type=int, default=256, metavar="N", help="pixels per side (default 256)")
    add("--batch-size", type=int, default=32, metavar="N", help="images per forward pass (default 32)")
    add("--shard-size", type=int, default=10_000, metavar="N", help="images per file (default 10000)")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", type=int, default=workers, metavar="N", help="processes that read images (default: at most 4)")
    add("--seed", type=int, default=0, help="fixes the draw from the autoencoder's posterior (default 0)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if there is one (default auto)")
    add("--precision", choices=tuple(STORED), default="fp32", help="bf16 stores float16 (default fp32)")
    add("--verify", metavar="DIR", help="only compare the shards of this folder with their checksums")


def run(args: argparse.Namespace) -> None:
    if args.verify is not None:
        problems = verify(args.verify)
        if problems:
            raise ValueError(f"{'; '.join(problems)} (remove what is damaged, and dcdit extract makes it anew)")
        print(f"{args.verify}: every shard is as {manifest.NAME} says")
        return
    for name in ("images", "vae", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; accepted: --images, --vae and --out, or --verify")
    made = extract(
        args.images,
        args.vae,
        args.out,
        args.size,
        args.batch_size,
        args.shard_size,
        args.workers,
        args.seed,
        args.device,
        args.precision,
    )
    print(
        f"{args.out}: {made.images} latents {tuple(made.shape)} in {len(made.shards)} shards, "
        f"{sum(shard.bytes for shard in made.shards) / 1e9:.3g} GB; "
        f"dcdit train --data latents --data-path {args.out}"
    )
