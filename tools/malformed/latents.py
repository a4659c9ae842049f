"""Arrays and latents to train on, in every file format."""

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed
from tools.malformed.running import MARK

ARRAYS, INDEX, ZIP, PAIRS, SHARDS, MANIFEST, STATISTICS, LABELS = (
    ".npz and .npy",
    "dataset.json",
    "zip of moments",
    "feature folders",
    "shards",
    "manifest.json",
    "latents_stats.pt",
    "list of labels",
)
MOMENTS = parts.npy(np.concatenate([np.zeros((4, 8, 8), "f4"), np.ones((4, 8, 8), "f4")]))
ZERO = parts.npy(np.zeros(1, np.int64))


# --- .npz and .npy ----------------------------------------------------------------------------------------------------


def arrays(base: Base, out: Path, latents: bytes, labels: bytes = ZERO) -> list[str]:
    return base.train_on("npz", parts.npz(out / "a.npz", latents=latents, labels=labels), out)


@malformed(ARRAYS, "a.npz", "said to be float32 .1000000000, 4, 16, 16., 4096000000000 bytes, and has 100")
def npz_claims_four_terabytes(base: Base, out: Path) -> list[str]:
    return arrays(base, out, parts.npy_header((10**9, 4, 16, 16)) + bytes(100))


@malformed(ARRAYS, "a.npz", "said to be")
def npz_claims_a_negative_size(base: Base, out: Path) -> list[str]:
    return arrays(base, out, parts.npy_header((-1, 4, 8, 8)) + bytes(1024))


@malformed(ARRAYS, "a.npz", "holds Python objects")
def npz_runs_code(base: Base, out: Path) -> list[str]:
    return arrays(base, out, parts.npy(np.array([parts.Runs(out / MARK)], object), pickled=True))


@malformed(ARRAYS, "a.npz", "header cannot be read")
def npz_header_of_another_kind(base: Base, out: Path) -> list[str]:
    return arrays(base, out, b"\x93NUMPY\x01\x00\x76\x00" + b"[" * 118)


@malformed(ARRAYS, "a.npz", "not finite")
def npz_of_nan(base: Base, out: Path) -> list[str]:
    return arrays(base, out, parts.npy(np.full((8, 4, 8, 8), np.nan, "f4")), parts.npy(np.zeros(8, int)))


@malformed(ARRAYS, "a.npz", "label 1000000000000 of item 0 is out of range")
def npz_label_of_a_trillion(base: Base, out: Path) -> list[str]:
    return arrays(base, out, parts.npy(np.zeros((1, 4, 8, 8), "f4")), parts.npy(np.array([10**12])))


@malformed(ARRAYS, "a.npz", "labels are float64")
def npz_labels_are_fractions(base: Base, out: Path) -> list[str]:
    return arrays(base, out, parts.npy(np.zeros((1, 4, 8, 8), "f4")), parts.npy(np.array([0.5])))


@malformed(ARRAYS, "a.npz", "unpacks from")
def npz_unpacks_to_two_gigabytes(base: Base, out: Path) -> list[str]:
    count = (2 << 30) // (4 * 4 * 8 * 8)
    parts.zeros(out / "a.npz", "latents.npy", 2 << 30, parts.npy_header((count, 4, 8, 8)))
    with zipfile.ZipFile(out / "a.npz", "a") as archive:
        archive.writestr("labels.npy", ZERO)
    return base.train_on("npz", out / "a.npz", out)


@malformed(ARRAYS, "a.npz", "not readable")
def npz_with_a_flipped_byte(base: Base, out: Path) -> list[str]:
    data = bytearray(base.latents.read_bytes())
    data[3000] ^= 255
    return base.train_on("npz", parts.write(out / "a.npz", bytes(data)), out)


@malformed(ARRAYS, "a.npz", "not readable")
def npz_cut_short(base: Base, out: Path) -> list[str]:
    return base.train_on("npz", parts.write(out / "a.npz", base.latents.read_bytes()[:2000]), out)


@malformed(ARRAYS, "a.npz", "Git LFS pointer")
def npz_is_a_pointer(base: Base, out: Path) -> list[str]:
    return base.train_on("npz", parts.write(out / "a.npz", parts.POINTER), out)


@malformed(ARRAYS, "a.npz", "named pipe")
def npz_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "a.npz")
    return base.train_on("npz", out / "a.npz", out)


@malformed(ARRAYS, "arrays", "latents.npy: it is said to be")
def npy_claims_more_than_it_is(base: Base, out: Path) -> list[str]:
    parts.write(out / "arrays" / "labels.npy", ZERO)
    parts.write(out / "arrays" / "latents.npy", parts.npy_header((10**9, 4, 8, 8)) + bytes(100))
    return base.train_on("npz", out / "arrays", out)


@malformed(LABELS, "train_lables.json", "accepted: .6, 9")
def cifar_labels_of_other_types(base: Base, out: Path) -> list[str]:
    for number in range(1, 6):
        parts.write(out / "cifar" / f"data_batch_{number}.png", parts.png(1024, 1))
    parts.write_json(out / "cifar" / "train_lables.json", [0, True, "2", None, 10**30])
    return base.train_on("cifar10", out / "cifar", out)


# --- moments: dataset.json and a zip ----------------------------------------------------------------------------------


def moments(base: Base, out: Path, index: Any) -> list[str]:
    for name in "ab":
        parts.write(out / "moments" / f"{name}.npy", MOMENTS)
    (parts.write if isinstance(index, str) else parts.write_json)(out / "moments" / "dataset.json", index)  # type: ignore[operator]
    return base.train_on("latents", out / "moments", out)


@malformed(INDEX, "dataset.json", "accepted: files inside the folder")
def index_leaves_the_folder(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": [["../outside.npy", 0], ["a.npy", 1]]})


@malformed(INDEX, "dataset.json", "accepted: files inside the folder")
def index_is_absolute(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": [[str(parts.write(out / "outside.npy", MOMENTS)), 0]]})


@malformed(INDEX, "dataset.json", "with label 10000000000.*; accepted")
def index_label_of_30_digits(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": [["a.npy", 10**30]]})


@malformed(INDEX, "dataset.json", "with label True")
def index_label_is_true(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": [["a.npy", True]]})


@malformed(INDEX, "dataset.json", "lists 'a.npy'; accepted: pairs")
def index_of_names_alone(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": ["a.npy", "b.npy"]})


@malformed(INDEX, "dataset.json", "no list of labels")
def index_is_a_list(base: Base, out: Path) -> list[str]:
    return moments(base, out, [["a.npy", 0]])


@malformed(INDEX, "dataset.json", "nested too deep")
def index_is_deep(base: Base, out: Path) -> list[str]:
    return moments(base, out, "[" * 100_000)


@malformed(INDEX, "dataset.json", "no JSON")
def index_cut_short(base: Base, out: Path) -> list[str]:
    return moments(base, out, '{"labels": [["a.npy", 0], ["b')


@malformed(INDEX, "dataset.json", "is there twice")
def index_key_twice(base: Base, out: Path) -> list[str]:
    return moments(base, out, '{"labels": [["a.npy", 0]], "labels": null}')


@malformed(INDEX, "dataset.json", "accepted: .npy")
def index_name_with_escape_codes(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": [[parts.FORGED, 0]]})


@malformed(INDEX, "dataset.json", "accepted")
def index_name_with_a_zero(base: Base, out: Path) -> list[str]:
    return moments(base, out, {"labels": [["a\0.npy", 0]]})


@malformed(INDEX, "a.npy", "named pipe")
def moments_are_a_pipe(base: Base, out: Path) -> list[str]:
    argv = moments(base, out, {"labels": [["a.npy", 0], ["b.npy", 0]]})
    (out / "moments" / "a.npy").unlink()
    os.mkfifo(out / "moments" / "a.npy")
    return argv


@malformed(INDEX, "a.npy", "said to be")
def moments_claim_more_than_they_are(base: Base, out: Path) -> list[str]:
    argv = moments(base, out, {"labels": [["a.npy", 0], ["b.npy", 0]]})
    parts.write(out / "moments" / "a.npy", parts.npy_header((10**9, 8, 8)) + bytes(100))
    return argv


@malformed(INDEX, "a.npy", "skipped: .*said to be", skipped=True)
def moments_are_left_out(base: Base, out: Path) -> list[str]:
    argv = moments(base, out, {"labels": [[f"{name}.npy", 0] for name in "abcdefgh"]})
    for name in "bcdefgh":
        parts.write(out / "moments" / f"{name}.npy", MOMENTS)
    parts.write(out / "moments" / "a.npy", parts.npy_header((10**9, 8, 8)) + bytes(100))
    return [*argv, "--set", "data.skip_damaged=true"]


@malformed(ZIP, "a.zip", "dataset.json is too large")
def zip_unpacks_to_two_gigabytes(base: Base, out: Path) -> list[str]:
    return base.train_on("latents", parts.zeros(out / "a.zip", "dataset.json", 2 << 30), out)


def zipped(base: Base, out: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(out / "a.zip", "w") as archive:
        for name, data in {"dataset": b'{"labels": [["x.npy", 0]]}', **members}.items():
            archive.writestr(f"{name}.json" if name == "dataset" else f"{name}.npy", data)
    return out / "a.zip"


@malformed(ZIP, "a.zip", "is said to have 3000000000 bytes")
def zip_claims_three_gigabytes(base: Base, out: Path) -> list[str]:
    return base.train_on("latents", parts.claim_size(zipped(base, out, x=MOMENTS), "x.npy", 3_000_000_000), out)


@malformed(ZIP, "a.zip/x.npy", "checksum")
def zip_with_a_flipped_byte(base: Base, out: Path) -> list[str]:
    data = bytearray(zipped(base, out, x=MOMENTS).read_bytes())
    data[data.index(b"NUMPY") + 500] ^= 255
    return base.train_on("latents", parts.write(out / "a.zip", bytes(data)), out)


@malformed(ZIP, "a.zip", "damaged or no zip|is said to have .* and the zip has|checksum")
def zip_points_behind_its_end(base: Base, out: Path) -> list[str]:
    data = bytearray(zipped(base, out, x=MOMENTS).read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 42 : entry + 46] = b"\xfe\xff\xff\xff"  # where the file begins
    return base.train_on("latents", parts.write(out / "a.zip", bytes(data)), out)


@malformed(ZIP, "a.zip", "no dataset.json in it")
def zip_of_something_else(base: Base, out: Path) -> list[str]:
    return base.train_on("latents", parts.zeros(out / "a.zip", "x.npy", 0), out)


@malformed(ZIP, "a.zip", "damaged or no zip: it is a web page")
def zip_is_a_web_page(base: Base, out: Path) -> list[str]:
    return base.train_on("latents", parts.write(out / "a.zip", parts.PAGE), out)


@malformed(ZIP, "a.zip", "named pipe")
def zip_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "a.zip")
    return base.train_on("latents", out / "a.zip", out)


# --- feature folders --------------------------------------------------------------------------------------------------


def pairs(base: Base, out: Path, label: bytes = ZERO, latent: bytes | None = None) -> list[str]:
    good = parts.npy(np.zeros((1, 4, 8, 8), "f4"))
    for number, (x, y) in enumerate([(good, ZERO), (latent or good, label)]):
        parts.write(out / "pairs" / "imagenet256_features" / f"{number}.npy", x)
        parts.write(out / "pairs" / "imagenet256_labels" / f"{number}.npy", y)
    return base.train_on("latents", out / "pairs", out)


@malformed(PAIRS, "imagenet256_labels/1.npy", "holds the label 1099511627776")
def pair_label_of_a_trillion(base: Base, out: Path) -> list[str]:
    return pairs(base, out, ZERO[:-8] + struct.pack("<q", 1 << 40))


@malformed(PAIRS, "imagenet256_labels/1.npy", "holds Python objects")
def pair_label_runs_code(base: Base, out: Path) -> list[str]:
    return pairs(base, out, parts.npy(np.array([parts.Runs(out / MARK)], object), pickled=True))


@malformed(PAIRS, "imagenet256_features/1.npy", "said to be")
def pair_latent_cut_short(base: Base, out: Path) -> list[str]:
    return pairs(base, out, latent=parts.npy(np.zeros((1, 4, 8, 8), "f4"))[:500])


# --- shards and their manifest ----------------------------------------------------------------------------------------


def shard(base: Base, out: Path, largest: int = 3, manifest: bool = True, **changes: Any) -> list[str]:
    folder = out / "shards"
    folder.mkdir()
    file = folder / "latents_shard00000.safetensors"
    save_file({"latents": torch.randn(8, 4, 8, 8), "labels": torch.arange(8) % (largest + 1)}, file)
    entry = {
        "file": file.name,
        "images": 8,
        "bytes": file.stat().st_size,
        "sha256": "",
        "sum": [],
        "sum_of_squares": [],
    }
    head = {"images": 8, "shape": [4, 8, 8], "shift": 0.0, "scale": 1.0, "class_names": list("abcd"), "recipe": {}}
    if manifest:
        entry.update(changes.pop("entry", {}))
        value = {**head, "format": "dcdit-latents-1", "shards": [entry], **changes}
        parts.write_json(folder / "manifest.json", value)
    return base.train_on("latents", folder, out)


@malformed(MANIFEST, "latents_shard00000.safetensors", "label 4 of item 4 is out of range")
def manifest_of_too_few_classes(base: Base, out: Path) -> list[str]:
    return shard(base, out, largest=7)


@malformed(MANIFEST, "manifest.json", "scale is nan")
def manifest_scale_is_nan(base: Base, out: Path) -> list[str]:
    return shard(base, out, scale=float("nan"))


@malformed(MANIFEST, "manifest.json", "scale is '1'")
def manifest_scale_is_text(base: Base, out: Path) -> list[str]:
    return shard(base, out, scale="1")


@malformed(MANIFEST, "manifest.json", "images is '8'")
def manifest_count_is_text(base: Base, out: Path) -> list[str]:
    return shard(base, out, images="8")


@malformed(MANIFEST, "shards", "holds 8 of 1000000000000")
def manifest_count_of_a_trillion(base: Base, out: Path) -> list[str]:
    return shard(base, out, images=10**12)


@malformed(MANIFEST, "manifest.json", "class_names is 'abcd'; accepted: list of text")
def manifest_names_are_no_list(base: Base, out: Path) -> list[str]:
    return shard(base, out, class_names="abcd")


@malformed(MANIFEST, "manifest.json", "shape is .*; accepted")
def manifest_shape_is_negative(base: Base, out: Path) -> list[str]:
    return shard(base, out, shape=[-4, 8, 8])


@malformed(MANIFEST, "manifest.json", "unknown key 'scales'.*did you mean 'scale'")
def manifest_unknown_key(base: Base, out: Path) -> list[str]:
    return shard(base, out, scales=1)


@malformed(MANIFEST, "manifest.json", "lists '../outside.safetensors'; accepted: files inside the folder")
def manifest_leaves_the_folder(base: Base, out: Path) -> list[str]:
    return shard(base, out, entry={"file": "../outside.safetensors"})


@malformed(MANIFEST, "manifest.json", "a shard is 5; accepted: a mapping")
def manifest_shard_is_a_number(base: Base, out: Path) -> list[str]:
    return shard(base, out, shards=[5])


@malformed(MANIFEST, "manifest.json", "bytes is True")
def manifest_size_is_true(base: Base, out: Path) -> list[str]:
    return shard(base, out, entry={"bytes": True})


@malformed(MANIFEST, "manifest.json", "shift is '0'; accepted: float")
def manifest_to_verify_is_malformed(base: Base, out: Path) -> list[str]:
    shard(base, out, shift="0")
    return ["extract", "--verify", str(out / "shards")]


@malformed(MANIFEST, "latents_shard00000.safetensors", "has .* bytes, the manifest says 1000000000000")
def manifest_size_of_a_terabyte(base: Base, out: Path) -> list[str]:
    return shard(base, out, entry={"bytes": 10**12})


@malformed(MANIFEST, "latents_shard00000.safetensors", "no regular file")
def manifest_of_a_pipe(base: Base, out: Path) -> list[str]:
    argv = shard(base, out)
    file = out / "shards" / "latents_shard00000.safetensors"
    file.unlink()
    os.mkfifo(file)
    return argv


@malformed(MANIFEST, "manifest.json", "named pipe")
def manifest_is_a_pipe(base: Base, out: Path) -> list[str]:
    argv = shard(base, out, manifest=False)
    os.mkfifo(out / "shards" / "manifest.json")
    return argv


@malformed(SHARDS, "latents_shard00000.safetensors", "latents is I64; accepted: F16")
def shard_of_integers(base: Base, out: Path) -> list[str]:
    argv = shard(base, out, manifest=False)
    file = out / "shards" / "latents_shard00000.safetensors"
    save_file({"latents": torch.zeros(8, 4, 8, 8).long(), "labels": torch.zeros(8).long()}, file)
    return argv


@malformed(SHARDS, "latents_shard00000.safetensors", r"has the shape \[8\]; accepted")
def shard_of_one_dimension(base: Base, out: Path) -> list[str]:
    argv = shard(base, out, manifest=False)
    file = out / "shards" / "latents_shard00000.safetensors"
    save_file({"latents": torch.zeros(8), "labels": torch.zeros(8).long()}, file)
    return argv


def statistics(base: Base, out: Path, content: Any) -> list[str]:
    argv = shard(base, out, manifest=False)
    torch.save(content, out / "shards" / "latents_stats.pt")
    return argv


@malformed(STATISTICS, "latents_stats.pt", "would call posix.mkdir")
def shard_statistics_run_code(base: Base, out: Path) -> list[str]:
    return statistics(base, out, {"mean": parts.Runs(out / MARK), "std": torch.ones(4)})


@malformed(STATISTICS, "latents_stats.pt", "accepted: finite numbers, a std above 0")
def shard_statistics_are_nan(base: Base, out: Path) -> list[str]:
    return statistics(base, out, {"mean": torch.full((4,), torch.nan), "std": torch.ones(4)})


@malformed(STATISTICS, "latents_stats.pt", "no mean and std of 4 channels")
def shard_statistics_are_text(base: Base, out: Path) -> list[str]:
    return statistics(base, out, {"mean": "0", "std": "1"})
