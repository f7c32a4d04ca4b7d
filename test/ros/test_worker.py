"""The newest-frame slot and the inference thread: nobody waits, the newest wins, every loss is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from scfeat_ros.worker import Counts, Worker


def each(process: Callable[[Any], None]) -> Callable[[Mapping[str, Any]], Callable[[], dict[str, Exception]]]:
    """What a worker calls, from what is done with one frame."""

    def run(frames: Mapping[str, Any]) -> Callable[[], dict[str, Exception]]:
        errors: dict[str, Exception] = {}
        for source, frame in frames.items():
            try:
                process(frame)
            except Exception as error:
                errors[source] = error
        return lambda: errors

    return run


def send(worker: Worker, source: str, frame: Any) -> None:
    """A frame of a camera on its own arrives."""
    worker.receive(source)
    worker.submit(source, {source: frame})


@contextmanager
def running(process: Callable[[Any], None], failed: Callable[[Any, Exception], str] | None = None) -> Iterator[Worker]:
    worker: Worker = Worker(each(process), failed or (lambda frame, error: "error"))
    worker.start()
    try:
        yield worker
    finally:
        assert worker.stop(5.0)


def settle(worker: Worker, *sources: str) -> list[Counts]:
    """The counts once nothing waits any more."""
    end = time.monotonic() + 5.0
    while any(worker.counts(source).waiting for source in sources):
        assert time.monotonic() < end, "frames still waiting after 5 s"
        time.sleep(0.001)
    return [worker.counts(source) for source in sources]


def test_a_slow_process_gets_the_newest_frame_and_the_rest_is_counted() -> None:
    taken: list[int] = []
    entered, go_on = threading.Event(), threading.Event()

    def process(frame: int) -> None:
        taken.append(frame)
        entered.set()
        assert go_on.wait(5.0)

    with running(process) as worker:
        send(worker, "camera", 0)
        assert entered.wait(5.0)
        start = time.perf_counter()
        for frame in range(1, 1000):
            send(worker, "camera", frame)
        assert time.perf_counter() - start < 1.0, "submit waited for the process"
        assert worker.counts("camera") == Counts(received=1000, processed=0, dropped={"busy": 998}, waiting=2)
        go_on.set()
        assert settle(worker, "camera") == [Counts(received=1000, processed=2, dropped={"busy": 998})]
    assert taken == [0, 999]


def test_a_burst_at_high_rate_adds_up() -> None:
    taken: list[int] = []

    def process(frame: int) -> None:
        time.sleep(0.002)
        taken.append(frame)

    with running(process) as worker:
        for frame in range(500):
            send(worker, "camera", frame)
            time.sleep(0.0002)
            assert 0 <= worker.counts("camera").waiting <= 2
        (counts,) = settle(worker, "camera")
    assert counts.received == 500
    assert counts.processed == len(taken) and counts.processed + counts.dropped["busy"] == 500
    assert taken == sorted(taken) and taken[-1] == 499


def test_what_waits_may_be_dropped_for_a_reason_while_the_rest_goes_on() -> None:
    taken: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    def process(frame: str) -> None:
        taken.append(frame)
        entered.set()
        assert go_on.wait(5.0)

    with running(process) as worker:
        send(worker, "left", "in work")
        assert entered.wait(5.0)
        send(worker, "left", "old")
        send(worker, "right", "old")
        worker.clear("stale")
        assert worker.counts("left") == Counts(received=2, processed=0, dropped={"stale": 1}, waiting=1)
        assert worker.counts("right") == Counts(received=1, processed=0, dropped={"stale": 1})
        send(worker, "left", "new")
        go_on.set()
        assert settle(worker, "left") == [Counts(received=3, processed=2, dropped={"stale": 1})]
    assert taken == ["in work", "new"]


def test_sources_take_turns_and_are_counted_apart() -> None:
    taken: list[str] = []
    entered, go_on = threading.Event(), threading.Event()

    def process(frame: str) -> None:
        taken.append(frame)
        entered.set()
        assert go_on.wait(5.0)

    with running(process) as worker:
        send(worker, "left", "left 0")
        assert entered.wait(5.0)
        for number in range(1, 4):
            send(worker, "left", f"left {number}")
            send(worker, "right", f"right {number}")
        go_on.set()
        left, right = settle(worker, "left", "right")
    assert taken == ["left 0", "left 3", "right 3"]
    assert (left.processed, left.dropped) == (2, {"busy": 2})
    assert (right.processed, right.dropped) == (1, {"busy": 2})


def test_errors_are_counted_by_reason_and_the_thread_goes_on() -> None:
    seen: list[tuple[str, str]] = []

    def process(frame: str) -> None:
        if frame != "good":
            raise ValueError(frame)

    def failed(frame: str, error: Exception) -> str:
        seen.append((frame, str(error)))
        if frame == "handler":
            raise RuntimeError("the handler fails, too")
        return frame

    with running(process, failed) as worker:
        for frame in ("decode", "error", "handler", "decode", "good"):
            send(worker, "camera", frame)
            settle(worker, "camera")
        assert worker.counts("camera") == Counts(received=5, processed=1, dropped={"decode": 2, "error": 2})
    assert seen[0] == ("decode", "decode")


def test_stop_finishes_the_frame_in_work_drops_the_waiting_one_and_start_goes_on() -> None:
    entered = threading.Event()
    finished: list[int] = []

    def process(frame: int) -> None:
        entered.set()
        time.sleep(0.1)
        finished.append(frame)

    worker: Worker[int] = Worker(each(process), lambda frame, error: "error")
    worker.start()
    send(worker, "camera", 0)
    assert entered.wait(5.0)
    send(worker, "camera", 1)
    assert worker.stop(5.0)
    assert finished == [0]
    assert worker.counts("camera") == Counts(received=2, processed=1, dropped={"busy": 1})
    send(worker, "camera", 2)  # nobody is there to take it
    assert worker.counts("camera") == Counts(received=3, processed=1, dropped={"busy": 2})
    worker.start()
    send(worker, "camera", 3)
    settle(worker, "camera")
    assert worker.stop(5.0) and finished == [0, 3]
    assert worker.stop(5.0), "a second stop has nothing to do"


def test_a_frame_that_hangs_is_reported_and_blocks_a_second_start() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def process(frame: int) -> None:
        entered.set()
        go_on.wait(10.0)

    worker: Worker[int] = Worker(each(process), lambda frame, error: "error")
    worker.start()
    send(worker, "camera", 0)
    assert entered.wait(5.0)
    assert not worker.stop(0.05)
    with pytest.raises(RuntimeError, match="at work"):
        worker.start()
    go_on.set()
    assert worker.stop(5.0)


def test_a_processed_frame_is_not_kept_alive() -> None:
    """An image waits for its successor in memory otherwise."""
    import weakref

    class Frame:
        pass

    with running(lambda frame: None) as worker:
        frame = Frame()
        reference = weakref.ref(frame)
        send(worker, "camera", frame)
        settle(worker, "camera")
        del frame
        end = time.monotonic() + 2.0
        while reference() is not None and time.monotonic() < end:
            time.sleep(0.001)
        assert reference() is None


def test_what_waits_is_taken_at_once_and_a_group_is_replaced_as_a_whole() -> None:
    taken: list[dict[str, int]] = []
    entered, go_on = threading.Event(), threading.Event()

    def process(frames: Mapping[str, int]) -> Callable[[], dict[str, Exception]]:
        taken.append(dict(frames))
        entered.set()
        assert go_on.wait(5.0)
        return lambda: {"right": ValueError()} if 2 in frames.values() else {}

    worker: Worker[int] = Worker(process, lambda frame, error: "decode")
    worker.start()
    for number in range(3):
        for source in ("left", "right", "rear"):
            worker.receive(source)
        worker.submit("stereo", {"left": number, "right": number})
        assert entered.wait(5.0)
        if number:
            worker.submit("rear", {"rear": number})
        else:
            worker.drop("rear", "sync")
    go_on.set()
    left, right, rear = settle(worker, "left", "right", "rear")
    assert worker.stop(5.0)
    assert taken == [{"left": 0, "right": 0}, {"left": 2, "right": 2, "rear": 2}]
    assert left == Counts(3, 2, {"busy": 1})
    assert right == Counts(3, 1, {"busy": 1, "decode": 1})
    assert rear == Counts(3, 1, {"sync": 1, "busy": 1})


def test_an_error_of_all_is_counted_for_each_and_what_was_received_waits() -> None:
    def process(frames: Mapping[str, int]) -> Callable[[], dict[str, Exception]]:
        raise MemoryError

    worker: Worker[int] = Worker(process, lambda frame, error: type(error).__name__)
    worker.start()
    worker.receive("left")
    worker.receive("right")
    worker.receive("right")
    assert worker.counts("right") == Counts(received=2, waiting=2)
    worker.submit("stereo", {"left": 0, "right": 0})
    settle(worker, "left")
    assert worker.stop(5.0)
    assert worker.counts("left") == Counts(1, 0, {"MemoryError": 1})
    assert worker.counts("right") == Counts(2, 0, {"MemoryError": 1}, waiting=1)


def test_the_next_frame_is_processed_while_the_one_before_is_finished_and_no_other() -> None:
    processed: list[int] = []
    finished: list[int] = []
    published = {number: threading.Event() for number in (0, 3)}

    def process(frames: Mapping[str, int]) -> Callable[[], dict[str, Exception]]:
        (frame,) = frames.values()
        processed.append(frame)

        def finish() -> dict[str, Exception]:
            if frame in published:
                assert published[frame].wait(5.0)
            finished.append(frame)
            return {}

        return finish

    worker: Worker[int] = Worker(process, lambda frame, error: "error")
    worker.start()
    send(worker, "camera", 0)
    until(lambda: processed == [0])
    send(worker, "camera", 1)
    until(lambda: processed == [0, 1])  # while 0 waits to be published
    for frame in (2, 3):
        send(worker, "camera", frame)
    time.sleep(0.05)
    assert processed == [0, 1], "a frame was taken two ahead: a newer one could have come until then"
    assert finished == [] and worker.counts("camera") == Counts(4, 0, {"busy": 1}, waiting=3)
    published[0].set()
    until(lambda: processed == [0, 1, 3])
    assert not worker.stop(0.05), "stopped while a frame is being published"
    published[3].set()
    assert worker.stop(5.0)
    assert finished == [0, 1, 3] and worker.counts("camera") == Counts(4, 3, {"busy": 1})


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end, "waited 5 s"
        time.sleep(0.001)


def test_what_is_raised_while_frames_are_finished_is_counted_and_the_threads_go_on() -> None:
    seen: list[tuple[int, str, str]] = []

    def process(frames: Mapping[str, int]) -> Callable[[], dict[str, Exception]]:
        def finish() -> dict[str, Exception]:
            if frames["left"] == 0:
                raise ValueError("publish")
            return {}

        return finish

    def failed(frame: int, error: Exception) -> str:
        seen.append((frame, str(error), threading.current_thread().name))
        return "error"

    worker: Worker[int] = Worker(process, failed)
    worker.start()
    for number in range(2):
        worker.receive("left")
        worker.receive("right")
        worker.submit("stereo", {"left": number, "right": number})
        left, right = settle(worker, "left", "right")
    assert worker.stop(5.0)
    assert left == right == Counts(2, 1, {"error": 1})
    assert seen == [(0, "publish", "scfeat-output")] * 2


def test_frames_are_finished_in_their_order_however_long_each_takes() -> None:
    taken: list[int] = []
    finished: list[int] = []

    def process(frames: Mapping[str, int]) -> Callable[[], dict[str, Exception]]:
        (frame,) = frames.values()
        taken.append(frame)
        time.sleep(0.001 * (frame % 3))

        def finish() -> dict[str, Exception]:
            time.sleep(0.001 * ((frame + 1) % 3))
            finished.append(frame)
            return {}

        return finish

    worker: Worker[int] = Worker(process, lambda frame, error: "error")
    worker.start()
    for frame in range(200):
        send(worker, "camera", frame)
        time.sleep(0.001)
    (counts,) = settle(worker, "camera")
    assert worker.stop(5.0)
    assert finished == taken == sorted(set(taken)) and taken[-1] == 199
    assert counts == Counts(200, len(taken), {"busy": 200 - len(taken)})
