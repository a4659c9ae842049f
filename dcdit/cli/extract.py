"""``dcdit extract``: from a folder of images to latents, for ``dcdit train --data latents`` and LightningDiT."""

import argparse
import os
from pathlib import Path

from dcdit.cli.options import check_counts, seed
from dcdit.data.latents.encode import STORED_DTYPE, encode_images, verify_shards
from dcdit.data.latents.manifest import MANIFEST_FILE
from dcdit.utils.environment import resolve_device
from dcdit.utils.files import claimed
from dcdit.utils.processes import on_main_process

MOST_WORKERS = 256


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
    add("--seed", type=seed, default=0, help="fixes the draw from the autoencoder's posterior (default 0)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if there is one (default auto)")
    add("--precision", choices=tuple(STORED_DTYPE), default="fp32", help="bf16 stores float16 (default fp32)")
    add("--verify", metavar="DIR", help="only compare the shards of this folder with their checksums")


def run(args: argparse.Namespace) -> None:
    if args.verify is not None:
        problems = verify_shards(args.verify)
        if problems:
            raise ValueError(f"{'; '.join(problems)} (remove what is damaged, and dcdit extract makes it anew)")
        print(f"{args.verify}: every shard is as {MANIFEST_FILE} says")
        return
    for name in ("images", "vae", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; accepted: --images, --vae and --out, or --verify")
    check_counts(args, "batch_size", "shard_size")
    if not 0 <= args.workers <= MOST_WORKERS:
        raise ValueError(f"--workers is {args.workers}; accepted: 0 to {MOST_WORKERS}")
    from accelerate import PartialState

    state = PartialState(cpu=resolve_device(args.device).type == "cpu")
    with on_main_process(state.is_main_process, lambda: claimed(Path(args.out))):
        manifest = encode_images(
            args.images,
            args.vae,
            args.out,
            size=args.size,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            workers=args.workers,
            seed=args.seed,
            device=args.device,  # of several GPUs, accelerate has made one the current device of this process
            precision=args.precision,
            rank=state.process_index,
            world=state.num_processes,
            wait=state.wait_for_everyone,
        )
    if state.num_processes > 1:
        state.destroy_process_group()
    if manifest is None:
        return
    print(
        f"{args.out}: {manifest.images} latents {tuple(manifest.shape)} in {len(manifest.shards)} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e9:.3g} GB; "
        f"dcdit train --data latents --data-path {args.out}"
    )
