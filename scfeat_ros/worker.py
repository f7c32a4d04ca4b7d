"""Two threads behind newest-frame slots: whoever submits never waits, and every frame that is lost is counted.

The first thread processes frames, the second finishes them (publishes what was found) while the first has the next ones
in work. Nothing here knows ROS or images, so the same worker serves any ``process(frames)``.
"""

from __future__ import annotations

import threading
import time
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


Errors = Mapping[str, Exception]
Finish = Callable[[], Errors]


class Worker(Generic[Frame]):
    """Processes the newest frames of all groups in one thread and finishes them, in their order, in a second one.

    A source is a camera. A group is what has to be processed together, such as the cameras of a stereo pair; a camera
    alone is a group of one, and has a slot of its own.

    process(frames) -> finish: runs in the first thread, on all frames that wait, by source. finish() -> errors: runs in
    the second thread, while the first may be at the next frames, but never at those after them: what waits is taken
    only when nothing but the frames in work is unfinished. errors: source -> exception for those that failed, the
    others count as processed; an exception that process or finish raises is that of all of them. finish is called once
    for each call of process that returned, in the same order.
    failed(frame, exception) -> reason: runs in the second thread, logs as it likes, and names the reason to count.

    A set of frames that is replaced by a newer one of its group before the first thread is free is dropped as "busy".
    The counts outlive ``stop`` and ``start``.
    """

    def __init__(
        self,
        process: Callable[[Mapping[str, Frame]], Finish],
        failed: Callable[[Frame, Exception], str],
    ) -> None:
        self._process = process
        self._failed = failed
        self._slots: dict[Hashable, Mapping[str, Frame]] = {}  # in the order in which the groups became ready
        self._processed: tuple[Mapping[str, Frame], Finish] | None = None  # on the way to the second thread
        self._ledgers: dict[str, _Ledger] = {}
        lock = threading.RLock()  # of all that is here; two conditions, so that each thread wakes only for its own work
        self._frames_wait = threading.Condition(lock)
        self._finish_waits = threading.Condition(lock)
        self._closing = True
        self._no_more = True  # frames will be processed
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        if self._threads:
            raise RuntimeError(
                "expected a stopped worker, found its threads at work: call stop() and look at its answer"
            )
        self._closing = self._no_more = False
        # Daemons, so that a device that hangs cannot keep the process from ending.
        for name, run in (("scfeat-inference", self._run), ("scfeat-output", self._run_output)):
            self._threads.append(threading.Thread(target=run, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def receive(self, source: str) -> None:
        """Count a frame that arrived; until it is submitted and done, or dropped, it counts as waiting."""
        with self._frames_wait:
            self._ledger(source).received += 1

    def drop(self, source: str, reason: str) -> None:
        """Count a frame that was received and will not be submitted."""
        with self._frames_wait:
            self._ledger(source).dropped[reason] += 1

    def submit(self, group: Hashable, frames: Mapping[str, Frame]) -> None:
        """Hand over received frames, by source, that belong together, and return at once."""
        with self._frames_wait:
            lost = frames if self._closing else self._slots.get(group, {})
            self._drop(lost, "busy")
            if not self._closing:
                self._slots[group] = frames
                self._frames_wait.notify()

    def clear(self, reason: str) -> None:
        """Drop what waits; the frames in work go on."""
        with self._frames_wait:
            self._clear(reason)

    def counts(self, source: str) -> Counts:
        with self._frames_wait:
            return self._ledger(source).counts()

    def stop(self, timeout: float) -> bool:
        """Drop what waits and let the frames in work finish. False where that takes longer than ``timeout`` seconds."""
        end = time.monotonic() + timeout
        with self._frames_wait:
            self._closing = True
            self._clear("busy")
            self._frames_wait.notify()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._threads.clear()
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

    # -- the first thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (frames := self._take()) is not None:
            finish = self._attempt(frames)
            with self._finish_waits:
                self._processed = frames, finish
                self._finish_waits.notify()
            del frames, finish  # not to keep images alive while waiting for the next
        with self._finish_waits:
            self._no_more = True
            self._finish_waits.notify()

    def _take(self) -> dict[str, Frame] | None:
        with self._frames_wait:
            while not (self._closing or (self._slots and self._processed is None)):
                self._frames_wait.wait()
            if self._closing:
                return None
            frames = {source: frame for slot in self._slots.values() for source, frame in slot.items()}
            self._slots.clear()
            return frames

    def _attempt(self, frames: Mapping[str, Frame]) -> Finish:
        try:
            return self._process(frames)
        except Exception as error:
            errors = dict.fromkeys(frames, error)
            return lambda: errors

    # -- the second thread ---------------------------------------------------------------------------------------------

    def _run_output(self) -> None:
        while (work := self._next()) is not None:
            frames, finish = work
            reasons = self._reasons(frames, finish)
            with self._frames_wait:
                self._count(frames, reasons)
            del work, frames, finish

    def _next(self) -> tuple[Mapping[str, Frame], Finish] | None:
        with self._finish_waits:
            while not (self._processed or self._no_more):
                self._finish_waits.wait()
            work, self._processed = self._processed, None
            self._frames_wait.notify()
            return work

    def _reasons(self, frames: Mapping[str, Frame], finish: Finish) -> dict[str, str]:
        """Why frames were dropped, by source."""
        try:
            errors = finish()
        except Exception as error:
            errors = dict.fromkeys(frames, error)
        return {source: self._reason(frames[source], error) for source, error in errors.items()}

    def _reason(self, frame: Frame, error: Exception) -> str:
        try:
            return self._failed(frame, error)
        except Exception:  # a handler that fails must not end the thread; the frame is counted all the same
            return "error"

    def _count(self, frames: Mapping[str, Frame], reasons: Mapping[str, str]) -> None:
        for source in frames:
            ledger = self._ledger(source)
            if source in reasons:
                ledger.dropped[reasons[source]] += 1
            else:
                ledger.processed += 1
