"""One inference thread behind newest-frame slots: whoever submits never waits, and every frame that is lost is counted.

Nothing here knows ROS or images, so the same worker serves any ``process(frame)``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class Counts:
    """The ledger of one source: ``received == processed + sum(dropped.values()) + waiting`` at any moment."""

    received: int = 0
    processed: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0


class _Ledger:
    """Counters of one source; guarded by the lock of the worker."""

    def __init__(self) -> None:
        self.received = 0
        self.processed = 0
        self.dropped: Counter[str] = Counter()

    def counts(self) -> Counts:
        waiting = self.received - self.processed - self.dropped.total()
        return Counts(self.received, self.processed, dict(self.dropped), waiting)


class Worker(Generic[Frame]):
    """Processes the newest frame of each source, sources in turn, in one thread.

    process(frame): runs in the thread; an exception drops the frame.
    failed(frame, exception) -> reason: runs in the thread, logs as it likes, and names the reason to count.

    A frame that is replaced by a newer one of its source before the thread is free is dropped as "busy". The counts
    outlive ``stop`` and ``start``.
    """

    def __init__(self, process: Callable[[Frame], None], failed: Callable[[Frame, Exception], str]) -> None:
        self._process = process
        self._failed = failed
        self._slots: dict[Hashable, Frame] = {}  # in the order in which the sources became ready
        self._ledgers: dict[Hashable, _Ledger] = {}
        self._changed = threading.Condition()
        self._closing = True
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError(
                "expected a stopped worker, found its thread at work: call stop() and look at its answer"
            )
        self._closing = False
        # A daemon, so that a device that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="scfeat-inference", daemon=True)
        self._thread.start()

    def submit(self, source: Hashable, frame: Frame) -> None:
        """Hand over a frame and return at once."""
        with self._changed:
            ledger = self._ledgers.setdefault(source, _Ledger())
            ledger.received += 1
            if self._closing or source in self._slots:
                ledger.dropped["busy"] += 1
            if not self._closing:
                self._slots[source] = frame
                self._changed.notify()

    def counts(self, source: Hashable) -> Counts:
        with self._changed:
            return self._ledgers.setdefault(source, _Ledger()).counts()

    def stop(self, timeout: float) -> bool:
        """Drop what waits and let the frame in work finish. False where that takes longer than ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            for source in self._slots:
                self._ledgers[source].dropped["busy"] += 1
            self._slots.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            source, frame = taken
            reason = self._attempt(frame)
            with self._changed:
                ledger = self._ledgers[source]
                if reason is None:
                    ledger.processed += 1
                else:
                    ledger.dropped[reason] += 1
            del taken, frame  # not to keep an image alive while waiting for the next

    def _take(self) -> tuple[Hashable, Frame] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._slots or self._closing)
            if self._closing:
                return None
            source = next(iter(self._slots))
            return source, self._slots.pop(source)

    def _attempt(self, frame: Frame) -> str | None:
        """None, or the reason for which the frame was dropped."""
        try:
            self._process(frame)
            return None
        except Exception as error:
            return self._reason(frame, error)

    def _reason(self, frame: Frame, error: Exception) -> str:
        try:
            return self._failed(frame, error)
        except Exception:  # a handler that fails must not end the thread; the frame is counted all the same
            return "error"
