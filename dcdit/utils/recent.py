"""A cache that keeps what was used last."""

from collections.abc import Callable, Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentlyUsed(dict[K, V]):
    """Values by key, at most ``limit`` of them: the one that was not used for longest goes first."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def use(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, which is made where there is none."""
        self[key] = value = self.pop(key) if key in self else make()
        while len(self) > self._limit:
            del self[next(iter(self))]
        return value
