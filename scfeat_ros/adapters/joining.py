"""Messages of several topics that belong together, found by a key that they share, such as the stamp of their image."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


class Join:
    """Hands out one item of each stream as soon as all of them are there with the same key.

    An item that came in before a partner of a finished key will find none any more, as each stream is in order, and is
    forgotten with it. unmatched: how many were, or did not fit. Not for use by several threads.
    """

    def __init__(self, streams: int, capacity: int = 30) -> None:
        """capacity: items of each stream that wait for their partners; the oldest one goes first."""
        self.unmatched = 0
        self._waiting: list[dict[Hashable, Any]] = [{} for _ in range(streams)]
        self._capacity = capacity

    def add(self, stream: int, key: Hashable, item: Any) -> tuple[Any, ...] | None:
        """The items with this key in the order of the streams, None while one of them is missing."""
        self._waiting[stream][key] = item
        if not all(key in waiting for waiting in self._waiting):
            self._trim(stream)
            return None
        return tuple(self._take(waiting, key) for waiting in self._waiting)

    def clear(self) -> None:
        """Nothing waits any more; what did is not counted."""
        for waiting in self._waiting:
            waiting.clear()

    def _take(self, waiting: dict[Hashable, Any], key: Hashable) -> Any:
        for older in list(waiting):
            item = waiting.pop(older)
            if older == key:
                return item
            self.unmatched += 1
        raise AssertionError("the key was there")

    def _trim(self, stream: int) -> None:
        waiting = self._waiting[stream]
        while len(waiting) > self._capacity:
            del waiting[next(iter(waiting))]
            self.unmatched += 1
