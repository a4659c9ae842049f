"""Which weights an evaluation draws with: looked up once, by one process, and the same in all of them."""

from dataclasses import dataclass
from pathlib import Path

from dcdit.checkpoint import model_file
from dcdit.evaluate.generate import weights_hash


@dataclass(frozen=True)
class Weights:
    """A model file and the hash of what is in it."""

    file: Path
    sha256: str

    def check(self) -> None:
        """ValueError if the file holds something else by now."""
        if weights_hash(self.file, ema=False) != self.sha256:
            raise ValueError(f"{self.file} has changed while it was read; run the same command again")


def find_weights(checkpoint: str | Path, ema: bool, main_process: bool = True) -> Weights:
    """The weights at a path as it is now; see :func:`dcdit.checkpoint.load_model` for the paths.

    Every process of accelerate has to call this. The main one looks; a training run may write a newer checkpoint
    before another process would.

    Raises:
        FileNotFoundError, OSError: nothing there that can be read. Every process raises it.
    """
    from accelerate.utils import broadcast_object_list

    found: list[Weights | Exception | None] = [None]
    if main_process:
        try:
            file = model_file(checkpoint, ema)
            if not file.exists():
                raise FileNotFoundError(f"no file {str(file)!r}")
            found = [Weights(file, weights_hash(file, ema))]
        except Exception as error:
            found = [error]
    broadcast_object_list(found)
    (weights,) = found
    if isinstance(weights, Exception):
        raise weights
    assert weights is not None
    return weights
