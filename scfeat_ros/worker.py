"""One inference thread behind newest-frame slots: whoever submits never waits, and every frame that is lost is counted.

Nothing here knows ROS or images, so the same worker serves any ``process(frames)``.
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
    """Processes the newest frames of all groups in one thread; what waits when it is free is taken at once.

    A source is a camera. A group is what has to be processed together, such as the cameras of a stereo pair; a camera
    alone is a group of one, and has a slot of its own.

    process(frames) -> errors: runs in the thread. frames: source -> frame, of all groups that wait. errors: source ->
    exception for those that failed, the others count as processed; an exception that it raises is that of all of them.
    failed(frame, exception) -> reason: runs in the thread, logs as it likes, and names the reason to count.

    A set of frames that is replaced by a newer one of its group before the thread is free is dropped as "busy". The
    counts outlive ``stop`` and ``start``.
    """

    def __init__(
        self,
        process: Callable[[Mapping[str, Frame]], Mapping[str, Exception]],
        failed: Callable[[Frame, Exception], str],
    ) -> None:
        self._process = process
        self._failed = failed
        self._slots: dict[Hashable, Mapping[str, Frame]] = {}  # in the order in which the groups became ready
        self._ledgers: dict[str, _Ledger] = {}
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

    def receive(self, source: str) -> None:
        """Count a frame that arrived; until it is submitted and done, or dropped, it counts as waiting."""
        with self._changed:
            self._ledger(source).received += 1

    def drop(self, source: str, reason: str) -> None:
        """Count a frame that was received and will not be submitted."""
        with self._changed:
            self._ledger(source).dropped[reason] += 1

    def submit(self, group: Hashable, frames: Mapping[str, Frame]) -> None:
        """Hand over received frames, by source, that belong together, and return at once."""
        with self._changed:
            lost = frames if self._closing else self._slots.get(group, {})
            self._drop(lost, "busy")
            if not self._closing:
                self._slots[group] = frames
                self._changed.notify()

    def clear(self, reason: str) -> None:
        """Drop what waits; the frames in work go on."""
        with self._changed:
            self._clear(reason)

    def counts(self, source: str) -> Counts:
        with self._changed:
            return self._ledger(source).counts()

    def stop(self, timeout: float) -> bool:
        """Drop what waits and let the frames in work finish. False where that takes longer than ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            self._clear("busy")
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _ledger(self, source: str) -> _Ledger:
        return self._ledgers.setdefault(source, _Ledger())

    def _clear(self, reason: str) -> None:
        for frames in self._slots.values():
            self._drop(frames, reason)
        self._slots.clear()

    def _drop(self, frames: Mapping[str, Frame], reason: str) -> None:
        for source in frames:
            self._ledger(source).dropped[reason] += 1

    def _run(self) -> None:
        while (frames := self._take()) is not None:
            reasons = self._attempt(frames)
            with self._changed:
                for source in frames:
                    ledger = self._ledger(source)
                    if source in reasons:
                        ledger.dropped[reasons[source]] += 1
                    else:
                        ledger.processed += 1
            del frames  # not to keep images alive while waiting for the next

    def _take(self) -> dict[str, Frame] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._slots or self._closing)
            if self._closing:
                return None
            frames = {source: frame for slot in self._slots.values() for source, frame in slot.items()}
            self._slots.clear()
            return frames

    def _attempt(self, frames: Mapping[str, Frame]) -> dict[str, str]:
        """The reasons for which frames were dropped, by source."""
        try:
            errors = self._process(frames)
        except Exception as error:
            errors = dict.fromkeys(frames, error)
        return {source: self._reason(frames[source], error) for source, error in errors.items()}

    def _reason(self, frame: Frame, error: Exception) -> str:
        try:
            return self._failed(frame, error)
        except Exception:  # a handler that fails must not end the thread; the frame is counted all the same
            return "error"
