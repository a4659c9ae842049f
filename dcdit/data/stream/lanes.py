"""Which row of which shard each sample is, without knowing how many rows a shard has.

The samples of a run are dealt out to lanes, and each lane reads some of the shards of every epoch, one after another.
So a sample follows from its number, the seed and the deal alone, whichever process asks for it, and a process reads no
other lanes than those of its samples. A lane shuffles its rows in blocks, each of which is held in memory as a whole.
A block follows from the place at which it begins: to continue a lane, that block is read again and nothing before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dcdit.data.samples import DamagedFile
from dcdit.data.stream.shards import Row, Shards, is_damage
from dcdit.utils.text import one_line

AT_ONCE = 8
"""Most shards from which a process takes the samples of a batch."""
EMPTY_EPOCHS = 100
"""After so many epochs of which a lane could read nothing, there is nothing to read."""


@dataclass(frozen=True)
class Deal:
    """Runs of ``run`` consecutive samples go to ``lanes`` lanes in turn, which shuffle ``block`` rows at a time."""

    lanes: int
    run: int
    block: int

    def lane_of(self, n: int) -> tuple[int, int]:
        """The lane of sample n, and the sample's number in it."""
        turn, rest = divmod(n, self.lanes * self.run)
        lane, inside = divmod(rest, self.run)
        return lane, turn * self.run + inside

    def dealt(self, lane: int, n: int) -> int:
        """How many of the samples 0 to n - 1 go to a lane."""
        turns, rest = divmod(n, self.lanes * self.run)
        return turns * self.run + min(max(rest - lane * self.run, 0), self.run)


def deal_out(shards: int, local_batch: int, readers: int, rows: int) -> Deal:
    """The deal in which every one of the readers has lanes of its own, if there are as many shards.

    With fewer shards, several readers read the same lane, and each leaves out the samples of the others.

    Args:
        local_batch: samples per batch of a process.
        readers: processes times loading processes of each.
        rows: that a reader holds in memory to shuffle them.
    """
    if shards < readers:
        return Deal(_divisor(readers, shards), local_batch, max(rows, 1))
    at_once = _divisor(local_batch, min(AT_ONCE, shards // readers))
    return Deal(readers * at_once, local_batch // at_once, max(rows // at_once, 1))


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of a number up to a limit."""
    return next(candidate for candidate in range(min(number, at_most), 0, -1) if number % candidate == 0)


class Place(NamedTuple):
    """Where a lane is: so many rows of the block that begins at this row of this shard have been taken."""

    epoch: int = 0
    number: int = 0
    """Of the shard, in the order of the epoch."""
    row: int = 0
    taken: int = 0


class Stored(NamedTuple):
    """A row, and where it is."""

    number: int
    """Of the shard, in the order of the epoch."""
    shard: int
    """Of the shard, among all."""
    row: int
    values: Row


class Lane:
    """The rows that a lane shows, one after another, without an end. See the module.

    Args:
        shards: of the whole dataset.
        columns: that are read.
        order: epoch to the numbers of the shards that this lane reads in it.
        block: rows that are shuffled together. 1 shows them as they are.
        seed: of the order within blocks.
        place: where the lane is after its first ``position`` samples, which are not asked for.
        damaged: told what is wrong with a shard, of which the rest is then left out; it may raise instead.
    """

    def __init__(
        self,
        shards: Shards,
        columns: Sequence[str],
        order: Callable[[int], Sequence[int]],
        block: int,
        seed: Sequence[int],
        place: Place,
        position: int,
        damaged: Callable[[DamagedFile, tuple[int, int]], None],
    ) -> None:
        self.shards, self.columns, self.order, self.size = shards, columns, order, block
        self.seed, self.damaged = seed, damaged
        self._origin = place, position
        self._begin()

    def rows(self, position: int) -> Iterator[Stored]:
        """The row of this lane's sample ``position``, then the others of its block, which may take its place."""
        taken = self._move(position)
        if len(self._ahead) < self.size:  # one row for each that is taken, so that no batch waits for a whole block
            self._ahead += [stored for stored in [next(self._reading, None)] if stored is not None]
        block, order = self._block, self._shuffled
        return (block[order[(taken + i) % len(block)]] for i in range(len(block)))

    def place(self, position: int) -> Place:
        """The place behind this lane's sample ``position``."""
        taken = self._move(position)
        return Place(self._epoch, self._block[0].number, self._block[0].row, taken + 1)

    def _begin(self) -> None:
        place, position = self._origin
        self._epoch, self._first = place.epoch, position - place.taken
        self._reading = self._rows(place.epoch, place.number, place.row)
        self._block: list[Stored] = []
        self._ahead: list[Stored] = []
        self._next_block()

    def _move(self, position: int) -> int:
        """Go to the block of a sample; returns the sample's number in the block."""
        if position < self._first:
            self._begin()
        while position >= self._first + len(self._block):
            self._next_block()
        return position - self._first

    def _next_block(self) -> None:
        self._first += len(self._block)
        self._block, self._ahead = self._filled(self._ahead), []
        last = self._epoch + EMPTY_EPOCHS
        while not self._block and self._epoch < last:  # the epoch has ended, and blocks end with it
            self._epoch += 1
            self._reading = self._rows(self._epoch, 0, 0)
            self._block = self._filled([])
        if not self._block:
            names = [self.shards.names[shard] for shard in self.order(self._epoch)]
            raise DamagedFile(f"no rows that can be read in {', '.join(names[:3])} ({len(names)} shards)")
        first = self._block[0]
        rng = np.random.default_rng([*self.seed, self._epoch, first.number, first.row])
        self._shuffled = rng.permutation(len(self._block))

    def _filled(self, rows: list[Stored]) -> list[Stored]:
        while len(rows) < self.size and (stored := next(self._reading, None)) is not None:
            rows.append(stored)
        return rows

    def _rows(self, epoch: int, first_number: int, first_row: int) -> Iterator[Stored]:
        """The rows of an epoch from one on, in the order in which they lie in the shards."""
        shards = self.order(epoch)
        for number in range(first_number, len(shards)):
            row = first_row if number == first_number else 0
            try:
                for values in self.shards.rows(shards[number], row, self.columns):
                    yield Stored(number, shards[number], row, values)
                    row += 1
            except NameError:  # a fault of the program
                raise
            except Exception as error:  # a damaged shard raises anything in the libraries that read it
                name = self.shards.names[shards[number]]
                reason = DamagedFile(f"cannot read {name} from row {row} on: {one_line(error)}")
                if not is_damage(name, error):
                    raise reason from None
                self.damaged(reason, (shards[number], row))
