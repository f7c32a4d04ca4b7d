"""Child processes that end with their parent, and what a killed one leaves behind."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from scfeat_core.errors import ScfeatError

SHARED_MEMORY = Path("/dev/shm")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STARTING = 5.0  # seconds within which a participant on a busy machine has surely locked what it made


def handle_signals(handler: Any) -> None:
    """Set the handler of SIGINT and SIGTERM, as of :func:`signal.signal`."""
    for number in _SIGNALS:
        signal.signal(number, handler)


@contextmanager
def signals_handled(handler: Any) -> Iterator[None]:
    """:func:`handle_signals` while the block runs; then those of before come back. In the main thread only."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    handle_signals(handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Child:
    """A process with its output in a log file; a context manager that ends it: SIGINT, SIGTERM, then SIGKILL.

    It has a session of its own, so that Ctrl-C reaches only the parent, which ends its children in order.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as sink:
            self._popen = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal where one ended it."""
        return self._popen.poll()

    @property
    def output_size(self) -> int:
        """Bytes of its output so far: grows while it says something."""
        return self.log.stat().st_size

    def last_lines(self, count: int = 12) -> str:
        """The end of its output."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.output_size - 16384))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-count:])

    def last_line(self) -> str:
        """Its last line without what the ROS logger puts before a text."""
        return self.last_lines(1).rpartition("]: ")[2]

    def died(self) -> ScfeatError:
        """What is said where it has ended by itself, with the end of its log."""
        code = self.exit_code
        ended = f"ended by signal {-code}" if code is not None and code < 0 else f"ended with exit status {code}"
        return ScfeatError(
            f"expected the {self.name} to run to the end, found it {ended}; "
            f"the last lines of its log:\n{self.last_lines()}"
        )

    def check_alive(self) -> None:
        """Raises ScfeatError where it has ended."""
        if self.exit_code is not None:
            raise self.died()

    def stop(self, patience: float = 12.0) -> int:
        """End it, and whatever it started. Returns the exit status."""
        segments = shared_memory_of(self._popen.pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            if self._popen.poll() is None:
                self._popen.send_signal(number)
                try:
                    self._popen.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all of its group have ended
        code = self._popen.wait()
        if code < 0:
            remove_abandoned_shared_memory()
        for segment in segments:  # however young
            _remove_unlocked(segment)
        return code


def shared_memory_of(pid: int) -> set[Path]:
    """The Fast DDS segments that a process made; none where it ended.

    It keeps the lock file of each open. What it has mapped says less: those of others, too, even of other domains, as
    the ports that user data come by are counted through all domains of a machine.
    """
    found: set[str] = set()
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            found.add(str(entry.readlink()))
        except OSError:  # closed meanwhile
            continue
    locks = re.compile(rf"{SHARED_MEMORY}/fast(?:dds|rtps)_[0-9a-f]{{16}}_el")
    return {Path(name.removesuffix("_el")) for name in found if locks.fullmatch(name)}


def remove_abandoned_shared_memory(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Delete the Fast DDS segments of participants that were killed; returns what was deleted.

    A living participant holds a lock on ``fastdds_<id>_el`` beside its segment ``fastdds_<id>``: what can be locked is
    abandoned, unless it is so young that its participant may be about to take the lock. The same, but for the age, is
    done by ``fastdds shm clean``.
    """
    removed = []
    newest = time.time() - STARTING
    for lock in folder.glob("fast*_" + "[0-9a-f]" * 16 + "_el"):  # fastdds_ since Fast DDS 3, fastrtps_ before
        try:
            if lock.stat().st_mtime > newest:
                continue
        except OSError:
            continue
        removed += _remove_unlocked(lock.with_name(lock.name.removesuffix("_el")))
    return removed


def _remove_unlocked(segment: Path) -> list[Path]:
    """Delete a segment and its lock where no living participant holds that; returns what was deleted."""
    lock = segment.with_name(segment.name + "_el")
    try:
        if lock.exists():
            with lock.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed = [path for path in (segment, lock) if path.exists()]
        for path in removed:
            path.unlink(missing_ok=True)
    except OSError:
        return []  # in use, or another user's
    return removed
