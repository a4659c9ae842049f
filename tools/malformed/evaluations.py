"""What ``dcdit evaluate`` reads besides images: extractors, statistics, its own earlier files; and profiles."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from dcdit.cli.main import main
from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed
from tools.malformed.running import MARK

IMAGES, STATISTICS, EXTRACTOR, SAMPLES, PROFILE, CACHE = (
    ".npz of images",
    "statistics",
    "extractor",
    "samples of an evaluation",
    "profile.json",
    "cached features",
)


# --- arrays of images and statistics ----------------------------------------------------------------------------------


@malformed(IMAGES, "a.npz", "holds no images")
def npz_images_of_no_pixels(base: Base, out: Path) -> list[str]:
    return base.evaluate(parts.npz(out / "a.npz", arr_0=parts.npy(np.zeros((20, 0, 0, 3), "u1"))), out)


@malformed(IMAGES, "a.npz", "said to be uint8")
def npz_images_of_a_million_by_a_million(base: Base, out: Path) -> list[str]:
    data = parts.npy_header((20, 10**6, 10**6, 3), "|u1") + bytes(100)
    return base.evaluate(parts.npz(out / "a.npz", arr_0=data), out)


@malformed(IMAGES, "a.npz", "holds .*; accepted: images as arr_0 or images")
def npz_names_with_escape_codes(base: Base, out: Path) -> list[str]:
    return base.evaluate(parts.npz(out / "a.npz", **{parts.FORGED: parts.npy(np.zeros(1))}), out)


@malformed(IMAGES, "a.npz", "not readable as .npz: it is empty")
def npz_of_images_is_empty(base: Base, out: Path) -> list[str]:
    return base.evaluate(parts.write(out / "a.npz", b""), out)


def reference(base: Base, out: Path, **arrays: object) -> list[str]:
    good: dict[str, object] = {"mu": np.zeros(48), "sigma": np.eye(48), **arrays}
    file = parts.npz(out / "stats.npz", **{name: parts.npy(array) for name, array in good.items()})
    return base.evaluate(base.images, out, "--reference", str(file))


@malformed(STATISTICS, "stats.npz", "sigma: not finite")
def statistics_of_nan(base: Base, out: Path) -> list[str]:
    return reference(base, out, sigma=np.full((48, 48), np.nan))


@malformed(STATISTICS, "stats.npz", "sigma has the eigenvalue -1")
def statistics_not_positive(base: Base, out: Path) -> list[str]:
    return reference(base, out, sigma=-np.eye(48))


@malformed(STATISTICS, "stats.npz", "count is int64 -5")
def statistics_of_a_negative_count(base: Base, out: Path) -> list[str]:
    return reference(base, out, count=np.int64(-5))


@malformed(STATISTICS, "stats.npz", "accepted: a printable text")
def statistics_of_an_extractor_with_escape_codes(base: Base, out: Path) -> list[str]:
    return reference(base, out, extractor=np.str_(parts.FORGED))


@malformed(STATISTICS, "stats.npz", "mu is <U3; accepted: float")
def statistics_of_text(base: Base, out: Path) -> list[str]:
    return reference(base, out, mu=np.array(["abc"] * 48))


# --- extractors -------------------------------------------------------------------------------------------------------


def network(base: Base, out: Path, module: torch.nn.Module) -> list[str]:
    torch.jit.script(module).save(str(out / "net.pt"))
    return base.evaluate(base.images, out, extractor=out / "net.pt")


class NoFeatures(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :0]


class Fails(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 0:
            raise ValueError("\x1b[31mall is well")
        return x


@malformed(EXTRACTOR, "extractor.pt", "is TorchScript, which is code, and no known one .SHA-256 .*--trust-extractor")
def extractor_of_a_stranger(base: Base, out: Path) -> list[str]:
    return [word for word in base.evaluate(base.images, out) if word != "--trust-extractor"]


@malformed(EXTRACTOR, "net.pt", r"pooled of shape \(12, 0\)")
def extractor_without_features(base: Base, out: Path) -> list[str]:
    return network(base, out, NoFeatures())


@malformed(EXTRACTOR, "net.pt", "fails on images")
def extractor_fails(base: Base, out: Path) -> list[str]:
    return network(base, out, Fails())


@malformed(EXTRACTOR, "net.pt", "holds no code")
def extractor_is_a_state_dict(base: Base, out: Path) -> list[str]:
    torch.save({"a": torch.zeros(1)}, out / "net.pt")
    return base.evaluate(base.images, out, extractor=out / "net.pt")


@malformed(EXTRACTOR, "net.pt", "no TorchScript file: it is damaged, perhaps cut short")
def extractor_cut_short(base: Base, out: Path) -> list[str]:
    file = parts.write(out / "net.pt", base.extractor.read_bytes()[:-200])
    return base.evaluate(base.images, out, extractor=file)


@malformed(EXTRACTOR, "net.pt", "no TorchScript file: it is a web page")
def extractor_is_a_web_page(base: Base, out: Path) -> list[str]:
    return base.evaluate(base.images, out, extractor=parts.write(out / "net.pt", parts.PAGE))


@malformed(EXTRACTOR, "net.pt", "named pipe")
def extractor_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "net.pt")
    return base.evaluate(base.images, out, extractor=out / "net.pt")


# --- its own earlier files --------------------------------------------------------------------------------------------


@malformed(SAMPLES, "sampling.json", "no JSON")
def sampling_cut_short(base: Base, out: Path) -> list[str]:
    parts.write(out / "samples.npz", b"x")
    parts.write(out / "sampling.json", "{")
    return base.draw(out)


@malformed(SAMPLES, "sampling.json", "work is None")
def sampling_without_settings(base: Base, out: Path) -> list[str]:
    parts.write(out / "samples.npz", b"x")
    parts.write_json(out / "sampling.json", {})
    return base.draw(out)


@malformed(SAMPLES, "sampling.json", "tflops is 'x'")
def sampling_of_other_types(base: Base, out: Path) -> list[str]:
    parts.write(out / "samples.npz", b"x")
    work = {"tflops": "x", "tflops_null": 0, "kept": None, "calls": []}
    parts.write_json(out / "sampling.json", {"settings": {}, "work": work})
    return base.draw(out)


@malformed(SAMPLES, "000000.npz", "no batch of dcdit evaluate")
def batch_cut_short(base: Base, out: Path) -> list[str]:
    parts.write(out / "batches" / "000000.npz", b"PK\x03\x04 cut")
    return base.draw(out)


@malformed(SAMPLES, "000000.npz", "no batch of dcdit evaluate .*named pipe")
def batch_is_a_pipe(base: Base, out: Path) -> list[str]:
    (out / "batches").mkdir()
    os.mkfifo(out / "batches" / "000000.npz")
    return base.draw(out)


@malformed(CACHE, "cache", "computed again, because of", skipped=True)
def features_of_something_else(base: Base, out: Path) -> list[str]:
    argv = base.evaluate(base.images, out)
    assert main(argv) == 0
    for file in (out / "cache").glob("*.safetensors"):
        save_file({"x": torch.zeros(1)}, file)
    return argv


# --- profiles ---------------------------------------------------------------------------------------------------------


def profile(base: Base, out: Path, value: object) -> list[str]:
    file = parts.write(out / "p.json", value if isinstance(value, str) else json.dumps(value))
    return base.sample(base.model, out, "--target-latency", "1", "--profile", str(file))


HEAD = {"batch": 4, "device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(), "reliable": True}


@malformed(PROFILE, "p.json", "no JSON")
def profile_cut_short(base: Base, out: Path) -> list[str]:
    return profile(base, out, '{"variants": [')


@malformed(PROFILE, "p.json", "no 'sides'")
def profile_of_something_else(base: Base, out: Path) -> list[str]:
    return profile(base, out, {"a": 1})


@malformed(PROFILE, "p.json", "ms is nan; accepted")
def profile_times_are_nan(base: Base, out: Path) -> list[str]:
    return profile(base, out, {**HEAD, "variants": [{"drop_fraction": 0.0, "ms": float("nan")}]})


@malformed(PROFILE, "p.json", "drop_fraction is '0'; accepted")
def profile_fraction_is_text(base: Base, out: Path) -> list[str]:
    return profile(base, out, {**HEAD, "variants": [{"drop_fraction": "0", "ms": 1.0}]})


@malformed(PROFILE, "p.json", "is no profile")
def profile_is_a_list(base: Base, out: Path) -> list[str]:
    return profile(base, out, [1, 2])


@malformed(PROFILE, "p.json", "was measured on")
def profile_device_with_escape_codes(base: Base, out: Path) -> list[str]:
    variants = [{"drop_fraction": rho, "ms": 1.0} for rho in (0.0, 0.5)]
    return profile(base, out, {**HEAD, "device": parts.FORGED, "variants": variants})


@malformed(PROFILE, "p.json", "named pipe")
def profile_is_a_pipe(base: Base, out: Path) -> list[str]:
    os.mkfifo(out / "p.json")
    return base.sample(base.model, out, "--target-latency", "1", "--profile", str(out / "p.json"))


@malformed(STATISTICS, "stats.npz", "holds Python objects")
def statistics_run_code(base: Base, out: Path) -> list[str]:
    data = parts.npy(np.array([parts.Runs(out / MARK)], object), pickled=True)
    file = parts.npz(out / "stats.npz", mu=data, sigma=parts.npy(np.eye(1)))
    return base.evaluate(base.images, out, "--reference", str(file))
