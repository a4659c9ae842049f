"""Images or latents with labels from a stream of shards."""

import functools
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.decode import ImageBytes
from dcdit.data.folder import check_size, read_square
from dcdit.data.latents.files import PerProcess
from dcdit.data.samples import DamagedFile, DataWarning, Samples, check_split, sample_rng, skip_or_raise, to_sample
from dcdit.data.stream.columns import find_columns
from dcdit.data.stream.lanes import Deal, Lane, Place, Stored, deal_out
from dcdit.data.stream.shards import Shards, open_shards
from dcdit.utils.processes import is_first_process
from dcdit.utils.text import short

LOOKED_AT = 1000
"""Rows in which a first one is looked for that is not damaged."""
MOST_SAMPLES, MOST_ROWS = 1 << 48, 1_000_000
"""Numbers in a checkpoint are below the first, and its blocks have at most so many rows, as ``data.shuffle_buffer``."""
IN_ORDER = Deal(1, 1, 1)


class StreamDataset(Samples):
    """Rows of parquet files or tars of webdataset, here or at any URL, read one after another and shuffled in memory.

    How many samples there are is not known. Sample n follows from (seed, n) and from how samples are dealt out to
    lanes (see :mod:`dcdit.data.stream.lanes`). :func:`dcdit.data.batches` decides that when it starts, so that no two
    of its loading processes read the same shard, and :meth:`restore` takes over how it was decided before. Samples in
    ascending order are cheap; to go back reads everything again.

    Args:
        path: folder, pattern or URL of shards, see :func:`~dcdit.data.stream.shards.open_shards`.
        size: images are cropped to, as :class:`dcdit.data.ImageFolder` does. Latents are as they are stored.
        split: ``"train"`` or ``"held_out"``, which is read in order.
        held_out: fraction of the shards in the held-out split, at least one if it is above 0.
        flip: mirror training images at random. Latents are never mirrored.
        seed: of the order and of crops; held-out samples do not depend on it.
        scale: a model sees stored latents times this.
        skip_damaged: leave out what cannot be read, with a warning, instead of stopping. In place of a damaged sample
            the next one of its block is shown. Whatever a network does stops the run.
        column, label_column, classes, num_classes: see :func:`~dcdit.data.stream.columns.find_columns`.
        shuffle_buffer: rows that each loading process holds in memory to shuffle them; 1 shuffles the shards only.
        held_out_path: shards of the held-out split, instead of a fraction of those at ``path``.

    Raises:
        ModuleNotFoundError, FileNotFoundError, ValueError: see :func:`~dcdit.data.stream.shards.open_shards` and
            :func:`~dcdit.data.stream.columns.find_columns`; or too few shards for the split.

    Example:
        >>> import io
        >>> import tarfile
        >>> from PIL import Image
        >>> from dcdit.data import StreamDataset
        >>> picture = io.BytesIO()
        >>> Image.new("L", (8, 8), 255).save(picture, "PNG")
        >>> with tarfile.open("0000.tar", "w") as tar:
        ...     for name, content in (("a.png", picture.getvalue()), ("a.cls", b"1")):
        ...         member = tarfile.TarInfo(name)
        ...         member.size = len(content)
        ...         tar.addfile(member, io.BytesIO(content))
        >>> x, label = StreamDataset("0000.tar", size=4, held_out=0, num_classes=2)[0]
        >>> x.unique().tolist(), label
        ([1.0], 1)
    """

    def __init__(
        self,
        path: str,
        size: int = 256,
        split: str = "train",
        held_out: float = 0.1,
        flip: bool = True,
        seed: int = 0,
        scale: float | None = None,
        skip_damaged: bool = False,
        column: str | None = None,
        label_column: str | None = None,
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        shuffle_buffer: int = 1000,
        held_out_path: str | None = None,
    ) -> None:
        check_size(size)
        check_split(split)
        self.path = path if split == "train" or held_out_path is None else held_out_path
        self.source: Shards = open_shards(self.path)
        count = len(self.source.names)
        self.shards = list(range(count)) if held_out_path else _split(self.path, count, split, held_out)
        self.columns = find_columns(self.source.features, self.path, column, label_column, classes, num_classes)
        self._read = (self.columns.value, self.columns.label)
        self.class_names = self.columns.class_names
        self.random = split == "train"
        self.flip = flip and self.random
        self.seed = seed if self.random else 0
        self.shuffle_buffer = shuffle_buffer
        self.skip_damaged = skip_damaged
        self.scale = 1.0 if scale is None else scale
        self._damaged: frozenset[tuple[int, int]] = frozenset()
        self._deal: Deal | None = None
        self._start = 0
        """Samples before this one are not asked for."""
        self._places: dict[int, Place] = {}
        """Of the lanes that are not at their beginning, at the start."""
        self._passed: dict[int, tuple[int, Place]] = {}
        """Lane to the number of its samples that the run has used, and its place behind them."""
        self._lanes: PerProcess[dict[int, Lane]] = PerProcess(_no_lanes)
        self.size = size
        first = self._first_value()
        self.shape = (3, size, size) if isinstance(first, ImageBytes) else (first.shape[0], *first.shape[1:])
        if scale is not None and isinstance(first, Tensor):
            self.notes = {"latent_range": json.dumps([[0.0], [scale]])}

    # --- samples ---------------------------------------------------------------------------------------------------

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        number, position = self.deal.lane_of(n)
        lane = self._lane(number)
        for stored in lane.rows(position):
            item = stored.shard, stored.row
            try:
                return self._sample(stored, item, n)
            except DamagedFile as error:
                self._skip(error, item)
        raise DamagedFile(f"{self.path}: none of the rows in the block of sample {n} can be read")

    def place(self, n: int) -> Tensor:
        """Where sample n leaves its lane, int64 (6,), for :meth:`passed`."""
        number, position = self.deal.lane_of(n)
        return torch.tensor([number, position + 1, *self._lane(number).place(position)], device="cpu")

    def _sample(self, stored: Stored, item: tuple[int, int], n: int) -> tuple[Tensor, int]:
        source = self._name(item)
        label = self.columns.label_of(stored.values, source)
        value = self.columns.value_of(stored.values, source)
        if isinstance(value, Tensor):
            if tuple(value.shape) != self.shape:
                raise DamagedFile(f"{source}, latent is {tuple(value.shape)}; accepted: {self.shape} as the first")
            return value * self.scale, label
        rng = sample_rng(self.seed, n)
        pixels = read_square(value, self.size, rng.random() if self.random else 0.5)
        if self.flip and rng.integers(2):
            pixels = pixels[:, ::-1]
        return to_sample(pixels), label

    def _first_value(self) -> ImageBytes | Tensor:
        """The first value that can be read. It says what all of them are."""
        lane = Lane(self.source, self._read, lambda epoch: self.shards, 1, (), Place(), 0, self._skip)
        for position in range(LOOKED_AT):
            stored = next(lane.rows(position))
            item = stored.shard, stored.row
            try:
                return self.columns.value_of(stored.values, self._name(item))
            except DamagedFile as error:
                self._skip(error, item)
        raise DamagedFile(f"{self.path}: none of the first {LOOKED_AT} rows can be read")

    def _name(self, item: tuple[int, int]) -> str:
        return f"{self.source.names[item[0]]}, row {item[1]}"

    def _skip(self, error: DamagedFile, item: tuple[int, int]) -> None:
        if not self.skip_damaged:
            raise error
        if item not in self._damaged:
            self._damaged |= {item}
            skip_or_raise(DamagedFile(f"{error} ({len(self._damaged)} so far)"), skip=True)

    # --- how samples are dealt out, and where a run is ---------------------------------------------------------------

    def begin(self, local_batch: int, world: int, workers: int) -> None:
        """Deal out the samples so that every loading process reads shards of its own, unless :meth:`restore` has.

        Args:
            local_batch: samples per batch of a process.
            world: processes.
            workers: loading processes of each; 0 loads in the process itself.
        """
        readers = world * max(workers, 1)
        if self._deal is None:
            rows = self.shuffle_buffer
            self._deal = deal_out(len(self.shards), local_batch, readers, rows) if self.random else IN_ORDER
        if self.random and self._deal.lanes < readers and is_first_process():
            warnings.warn(
                f"{self.path}: {readers} processes read {self._deal.lanes} of {len(self.shards)} shards at a time, so "
                "several read the same; accepted too: fewer data.workers, or more shards",
                DataWarning,
                stacklevel=2,
            )

    @property
    def deal(self) -> Deal:
        if self._deal is None:
            self.begin(1, 1, 0)
            assert self._deal is not None
        return self._deal

    def passed(self, places: Tensor) -> None:
        """Note that a run has used the samples of :meth:`place`, (B, 6)."""
        for lane, position, *place in places.tolist():
            self._passed[lane] = max((position, Place(*place)), self._passed.get(lane, (0, Place())))

    def state(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, Any]:
        """What :meth:`restore` needs to go on behind the samples that were passed, as JSON has it.

        Args:
            gather: puts lists of all processes together. All of them have to call this.
        """
        passed = dict.fromkeys(range(self.deal.lanes), (0, Place())) | {
            lane: (0, place) for lane, place in self._places.items()
        }
        for lane, position, place in gather([(lane, *behind) for lane, behind in self._passed.items()]):
            passed[lane] = max(passed[lane], (position, Place(*place)))
        deal = self.deal
        return {
            "shards": len(self.shards),
            "names": self._digest(),
            "lanes": deal.lanes,
            "run": deal.run,
            "block": deal.block,
            "places": [list(passed[lane][1]) for lane in range(deal.lanes)],
        }

    def restore(self, state: Any, start: int) -> None:
        """Go on where a run was after its first ``start`` samples.

        Args:
            state: of :meth:`state`. Without one, or with one of other shards, every lane begins anew at that sample.

        Raises:
            ValueError: it is none.
        """
        self._start, self._passed, self._lanes = start, {}, PerProcess(_no_lanes)
        if state is None:
            return
        deal, places = _checked(state)
        if (state["shards"], state.get("names")) != (len(self.shards), self._digest()):
            warnings.warn(
                f"{self.path}: these are not the shards of the checkpoint, so they are read from the first epoch on",
                DataWarning,
                stacklevel=2,
            )
            return
        self._deal, self._places = deal, dict(enumerate(places))

    def _lane(self, number: int) -> Lane:
        lanes = self._lanes.get()
        if number not in lanes:
            place, position = self._places.get(number, Place()), self.deal.dealt(number, self._start)
            order = functools.partial(self._order, number)
            lanes[number] = Lane(
                self.source, self._read, order, self.deal.block, (self.seed, number, 2), place, position, self._skip
            )
        return lanes[number]

    def _order(self, lane: int, epoch: int) -> list[int]:
        """The shards that a lane reads in an epoch. Every shard belongs to one lane in each epoch."""
        if not self.random:
            return self.shards
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(self.shards)
        return order[lane :: self.deal.lanes].tolist()

    def _digest(self) -> str:
        """Of the names of the shards, wherever they are."""
        names = (self.source.names[shard].rpartition("/")[2] for shard in self.shards)
        return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _split(path: str, count: int, split: str, held_out: float) -> list[int]:
    """The shards of a split. Every seed holds out the same."""
    order = np.random.default_rng(0).permutation(count)
    cut = max(1, round(count * held_out)) if held_out else 0
    shards = np.sort(order[:cut] if split == "held_out" else order[cut:]).tolist()
    if not shards:
        raise ValueError(
            f"{path} has {count} shards, none of them in split {split!r} with held_out={held_out}; accepted: "
            "data.held_out=0, data.held_out_path, or more shards"
        )
    return shards


def _no_lanes() -> dict[int, Lane]:
    """The lanes of a process that has read nothing yet."""
    if "fsspec.asyn" in sys.modules:  # a forked process has the lock of its parent, which nobody will open
        sys.modules["fsspec.asyn"].reset_lock()
    return {}


def _checked(state: Any) -> tuple[Deal, list[Place]]:
    """The deal and the places of a state. ValueError where a file says what no run does."""
    try:
        deal, places = Deal(state["lanes"], state["run"], state["block"]), [Place(*p) for p in state["places"]]
        numbers = [*vars(deal).values(), *(number for place in places for number in place)]
        if not all(type(number) is int and 0 <= number < MOST_SAMPLES for number in numbers):
            raise ValueError
        if not (1 <= deal.lanes <= state["shards"] and len(places) == deal.lanes):
            raise ValueError
        if not (deal.run and 1 <= deal.block <= MOST_ROWS):
            raise ValueError
        return deal, places
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"the checkpoint has the stream {short(state)}; accepted: what dcdit train writes") from None
