"""Shards of rows: parquet files and tars of webdataset, in a folder or at any URL that ``datasets`` reads."""

import glob
import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dcdit.utils.reading import open_regular
from dcdit.utils.text import one_line

Row = dict[str, Any]
"""Column to value."""
PARQUET, TAR = ".parquet", ".tar"
FEW_FILES = 32
"""So few parquet files are divided into their row groups, each of which is then a shard."""
BATCH = 64
"""Rows of a parquet file that are decoded at a time."""
SPLIT = re.compile(r"(train|test|val|valid|validation|dev)(?=[-_.\d])", re.IGNORECASE)
"""Names of splits, as they begin the names of shards."""


class Shards(Protocol):
    """Several sequences of rows."""

    names: list[str]
    """Of every shard, for messages. They are as many as there are shards."""
    features: dict[str, Any]
    """Column to its type, as ``datasets`` describes it."""

    def rows(self, shard: int, first: int, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a shard from ``first`` on. Other columns than these may be left out.

        Whatever is wrong with the shard raises whatever it raises in the libraries that read it.
        """
        raise NotImplementedError


def open_shards(path: str) -> Shards:
    """The shards of a folder, pattern or URL, in the order of their names.

    Raises:
        ModuleNotFoundError: ``datasets`` is missing.
        FileNotFoundError: no shard there.
        ValueError: shards of both kinds, or of several splits; or the first one cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError("data.kind=stream needs datasets: pip install 'dcdit[stream]'") from None
    datasets.disable_progress_bars()
    files = _list(path)
    kind = PARQUET if files[0].endswith(PARQUET) else TAR
    try:
        return ParquetShards(files) if kind == PARQUET else TarShards(files)
    except Exception as error:  # a damaged shard raises anything in the libraries that read it
        reason = "it holds no rows" if isinstance(error, IndexError) else one_line(error)
        raise ValueError(f"{path} is not readable as shards ({files[0]}, ...): {reason}") from None


class ParquetShards:
    """The row groups of a few parquet files, or many parquet files.

    pyarrow's own reader is used and not the scanner of its ``dataset`` module, with which ``datasets`` reads parquet
    files: threads of that scanner outlive it, and end or block about every second process that ends soon after
    (pyarrow 26, ``std::terminate``). What is behind a URL is opened by ``datasets``, which tries again if it fails.
    """

    def __init__(self, files: list[str]) -> None:
        from datasets import Features

        self._parts: list[tuple[str, int | None]] = [(file, None) for file in files]
        if len(files) < FEW_FILES:
            self._parts = [(file, group) for file in files for group in range(_row_groups(file))]
        self.names = [file if group is None else f"{file}, row group {group}" for file, group in self._parts]
        with _open_parquet(files[0]) as parquet:
            self.features = dict(Features.from_arrow_schema(parquet.schema_arrow))

    def rows(self, shard: int, first: int, columns: Sequence[str]) -> Iterator[Row]:
        file, group = self._parts[shard]
        with _open_parquet(file) as parquet:
            for number in range(parquet.num_row_groups) if group is None else [group]:
                count = parquet.metadata.row_group(number).num_rows
                if first >= count:  # nothing of this row group is read
                    first -= count
                    continue
                for batch in parquet.iter_batches(BATCH, row_groups=[number], columns=columns, use_threads=False):
                    if first < len(batch):
                        yield from batch.slice(first).to_pylist()
                    first = max(first - len(batch), 0)


@contextmanager
def _open_parquet(file: str) -> Iterator[Any]:
    import pyarrow.parquet
    from datasets.utils.file_utils import xopen

    with xopen(file, "rb") as source, pyarrow.parquet.ParquetFile(source, pre_buffer=False) as parquet:
        yield parquet


def _row_groups(file: str) -> int:
    with _open_parquet(file) as parquet:
        return parquet.num_row_groups


class TarShards:
    """Tars of webdataset: files with one name up to the first dot are a row, and the rest of the name is a column.

    Fields are taken as the bytes that they are. ``datasets`` would parse JSON, NumPy, torch and other files, also in
    columns that nobody asked for, and give up the whole shard where it fails.
    """

    def __init__(self, files: list[str]) -> None:
        from datasets.data_files import DataFilesDict, DataFilesList
        from datasets.packaged_modules.webdataset.webdataset import WebDataset

        class Fields(WebDataset):
            DECODERS: dict[str, Any] = {}  # noqa: RUF012

        self.names = files
        found = DataFilesDict({"train": DataFilesList(files, origin_metadata=[()] * len(files))})
        with tempfile.TemporaryDirectory() as cache:  # nothing is cached, but a lock is written
            builder = Fields(cache_dir=cache, data_files=found)
            self._stream = builder.as_streaming_dataset(split="train").decode(False)
        self.features = dict(self._stream.features)

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return TarShards, (self.names,)

    def rows(self, shard: int, first: int, columns: Sequence[str]) -> Iterator[Row]:
        # Not the iterator of the dataset itself, which takes a loading process of PyTorch for one of its own.
        stream = self._stream.shard(num_shards=len(self.names), index=shard).skip(first)
        for row in stream.iter(batch_size=1):
            yield {column: values[0] for column, values in row.items()}
        if "://" not in self.names[shard] and not _ends(self.names[shard]):
            raise EOFError("it does not end with zeros as a tar does, so it was cut off")


def _ends(file: str) -> bool:
    """Whether a tar is whole. ``tarfile`` takes one that is cut off for one that ends there."""
    with open_regular(file) as tar:
        tar.seek(max(0, os.fstat(tar.fileno()).st_size - 512))
        return not tar.read().strip(b"\0")


def is_damage(name: str, error: Exception) -> bool:
    """Whether what was raised while a shard was read means that it is damaged, and not that a network is."""
    if "://" not in name:
        return True
    return isinstance(error, (ValueError, EOFError, tarfile.TarError, zlib.error)) and not isinstance(error, OSError)


# --- which files ---------------------------------------------------------------------------------------------------


def _list(path: str) -> list[str]:
    """The shards at a path, of one kind and one split."""
    files = _find(path)
    shards = [file for file in files if file.endswith((PARQUET, TAR))]
    if not shards:
        raise FileNotFoundError(
            f"no shards at {path!r}; accepted: a folder of {PARQUET} or {TAR} files, or a pattern or URL of such files"
        )
    kinds = {file.endswith(TAR) for file in shards}
    if len(kinds) > 1:
        raise ValueError(f"{path} holds {PARQUET} and {TAR} files; accepted: one kind, such as {path}/*{PARQUET}")
    splits = {match[1].lower() for file in shards if (match := SPLIT.match(file.rpartition("/")[2]))}
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds shards of several splits ({', '.join(sorted(splits))}); accepted: those of one, such as "
            f"{path.rstrip('/')}/{min(splits)}*"
        )
    return shards


def _find(path: str) -> list[str]:
    if "://" in path:
        from datasets.data_files import DataFilesList

        try:
            return sorted(DataFilesList.from_patterns([path]))
        except Exception as error:  # whatever goes wrong between here and there
            raise FileNotFoundError(f"no shards at {path!r}: {one_line(error)}") from None
    found = sorted(Path(path).iterdir()) if Path(path).is_dir() else sorted(map(Path, glob.glob(path)))
    # Reading a named pipe might never end, and hidden files are leftovers of programs that copy.
    return [str(file.absolute()) for file in found if file.is_file() and not file.name.startswith(".")]
