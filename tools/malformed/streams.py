"""Shards to train on, and what a checkpoint says of them."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed
from tools.malformed.running import MARK

SHARDS = "shards of a stream"
LATENT = np.zeros((4, 8, 8), "f4")


def parquet(base: Base, out: Path, *options: str, **changes: Any) -> list[str]:
    """A file of eight good rows and one with changes."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"latent": parts.npy(LATENT), "label": 0}] * 8
    out.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist([*rows, {**rows[0], **changes}]), out / "a.parquet")
    return base.train_on("stream", out / "a.parquet", out, *settings(*options))


def settings(*options: str) -> list[str]:
    return [word for option in options for word in ("--set", option)]


def tar(base: Base, out: Path, members: dict[str, bytes], size: int | None = None) -> list[str]:
    with tarfile.open(out / "a.tar", "w") as archive:
        for name, content in {"0.npy": parts.npy(LATENT), "0.cls": b"0", **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if size is not None:
            info = tarfile.TarInfo("9.npy")
            info.size = size
            archive.fileobj.write(info.tobuf())  # type: ignore[union-attr]
    return base.train_on("stream", out / "a.tar", out)


@malformed(SHARDS, "a.parquet", "not readable as shards")
def parquet_of_zeros(base: Base, out: Path) -> list[str]:
    parts.write(out / "a.parquet", bytes(1000))
    return base.train_on("stream", out / "a.parquet", out)


@malformed(SHARDS, "a.parquet", "row 8: label is 4; accepted: 0 to 3")
def parquet_label_out_of_range(base: Base, out: Path) -> list[str]:
    return parquet(base, out, label=4)


@malformed(SHARDS, "a.parquet", "row 8: it holds Python objects")
def parquet_array_runs_code(base: Base, out: Path) -> list[str]:
    return parquet(base, out, latent=parts.npy(np.array([parts.Runs(out / MARK)], object), pickled=True))


@malformed(SHARDS, "a.parquet", "row 8: it is said to be float32 .1000000000, 4, 16, 16.")
def parquet_array_claims_four_terabytes(base: Base, out: Path) -> list[str]:
    return parquet(base, out, latent=parts.npy_header((10**9, 4, 16, 16)) + bytes(100))


@malformed(SHARDS, "a.parquet", "skipped: .*row 8.* so far", skipped=True)
def parquet_row_is_left_out(base: Base, out: Path) -> list[str]:
    return parquet(base, out, "data.skip_damaged=true", latent=b"nothing")


@malformed(SHARDS, "a.tar", "not readable as shards")
def tar_of_zeros(base: Base, out: Path) -> list[str]:
    parts.write(out / "a.tar", bytes(1000))
    return base.train_on("stream", out / "a.tar", out)


@malformed(SHARDS, "a.tar", "unexpected end of data")
def tar_claims_four_terabytes(base: Base, out: Path) -> list[str]:
    return tar(base, out, {}, size=1 << 42)


@malformed(SHARDS, "a.tar", "row 1: it holds Python objects")
def tar_array_runs_code(base: Base, out: Path) -> list[str]:
    data = parts.npy(np.array([parts.Runs(out / MARK)], object), pickled=True)
    return tar(base, out, {"1.npy": data, "1.cls": b"0"})


@malformed(SHARDS, "a.tar", "row 1: cls is .*; accepted: 0 to 3")
def tar_label_is_no_number(base: Base, out: Path) -> list[str]:
    return tar(base, out, {"1.npy": parts.npy(LATENT), "1.cls": b"\x1b[31m"})


@malformed(SHARDS, "shards", "no shards at")
def shard_is_a_pipe(base: Base, out: Path) -> list[str]:
    (out / "shards").mkdir()
    os.mkfifo(out / "shards" / "a.parquet")
    return base.train_on("stream", out / "shards", out)


@malformed(SHARDS, "the checkpoint", "has the stream .*accepted: what dcdit train writes")
def checkpoint_of_a_stream_that_no_run_writes(base: Base, out: Path) -> list[str]:
    run = base.copy_of_run(out)
    (trainer,) = run.glob("checkpoints/step_00000001/trainer.json")
    content = json.loads(trainer.read_text())
    stream = {"shards": 1, "names": "", "lanes": 1, "run": 1, "block": 1 << 60, "places": [[0, 0, 0, 0]]}
    trainer.write_text(json.dumps({**content, "stream": stream}))
    parquet(base, out)
    options = ["data.kind=stream", f"data.path={out / 'a.parquet'}"]
    return ["train", "--resume", str(trainer.parent), *settings(*options)]
