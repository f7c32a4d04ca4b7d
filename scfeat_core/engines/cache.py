"""What was expensive to make, kept on disk between runs: $XDG_CACHE_HOME/scfeat, or ~/.cache/scfeat.

An entry is a file and a sidecar ``.json`` with the facts that it was made for (versions of libraries, device, ...), its
sha256, and how long it took. An entry with other facts is stale, one with another sha256 damaged: both are made again,
and the log says why. Without a place to write, everything works, and is made anew by each process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from scfeat_core.engines.contract import Facts

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between two looks at what another process makes


class Workshop(Protocol):
    """Where entries are made. What its methods raise ends the wait for an entry."""

    def make(self, job: Callable[[], bytes]) -> bytes: ...

    def wait(self, seconds: float) -> None:
        """For somebody else, who makes it."""
        ...


class Here:
    """In the thread that asks for it."""

    def make(self, job: Callable[[], bytes]) -> bytes:
        return job()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


def cache_folder() -> Path | None:
    """Where entries are kept; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "scfeat"
    home = os.path.expanduser("~")  # noqa: PTH111 (that of pathlib raises)
    return None if home == "~" else Path(home) / ".cache" / "scfeat"


class Cache:
    """Entries of one folder; several processes may share it. folder: None keeps nothing."""

    def __init__(self, folder: Path | None, workshop: Workshop | None = None) -> None:
        self.folder = folder
        self._workshop: Workshop = workshop or Here()

    def get(self, name: str, facts: Facts, make: Callable[[], bytes]) -> bytes:
        """The entry, made where it is missing, stale or damaged, by one process while others wait for it.

        name: of its file, with all in it that two users of the cache may want side by side. facts: plain JSON; where
        they differ from those of the entry, it is of no use. What ``make`` raises is passed on.
        """
        with self._locked(name) as problem:
            content, reason = self._read(name, facts)
            if content is not None:
                return content
            log.info("%s is made: %s", name, reason)
            start = time.perf_counter()
            content = self._workshop.make(make)
            seconds = time.perf_counter() - start
            log.info("%s was made in %.1f s (%.1f MB)", name, seconds, 1e-6 * len(content))
            problem = problem or self._store(name, facts, content, seconds)
            if problem:
                log.warning("%s is not kept, and will be made again by the next process: %s", name, problem)
            return content

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[str]:
        """Nobody else makes this entry meanwhile. Yields why nothing can be written; empty where it can."""
        try:
            file = self._lock(name)
        except OSError as error:
            yield str(error)
            return
        with file:
            yield ""

    def _lock(self, name: str) -> IO[str]:
        """Until it is closed."""
        if self.folder is None:
            raise OSError("there is no folder to keep it in: neither XDG_CACHE_HOME nor HOME is set")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (self._checked_folder() / f"{name}.lock").open("w")
        try:
            if not _taken(file):
                log.info("%s is being made by another process: waiting for it", name)
            while not _taken(file):
                self._workshop.wait(POLL)
        except BaseException:
            file.close()
            raise
        return file

    def _checked_folder(self) -> Path:
        """Raises OSError where somebody else may have put into it what is run here."""
        if self.folder is None:
            raise FileNotFoundError
        status = self.folder.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            raise PermissionError(f"{self.folder} belongs to, or can be written by, somebody else: chmod 700")
        return self.folder

    def _read(self, name: str, facts: Facts) -> tuple[bytes | None, str]:
        """The entry, or None and why there is none to use."""
        try:
            content = (self._checked_folder() / name).read_bytes()
        except FileNotFoundError:
            return None, "there is none yet"
        except OSError as error:
            return None, f"what is there cannot be read ({error})"
        try:
            record = json.loads((self._checked_folder() / f"{name}.json").read_text(encoding="utf-8"))
            found, digest = record["facts"], record["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"the one that is there has no readable record ({error!r})"
        if hashlib.sha256(content).hexdigest() != digest:
            return None, "the one that is there is damaged"
        return (content, "") if found == facts else (None, f"the one that is there is stale: {_changes(found, facts)}")

    def _store(self, name: str, facts: Facts, content: bytes, seconds: float) -> str:
        """Returns why it could not be written, or nothing."""
        record = {"facts": facts, "sha256": hashlib.sha256(content).hexdigest(), "seconds": round(seconds, 3)}
        try:
            _replace(self._checked_folder() / name, content)
            _replace(self._checked_folder() / f"{name}.json", (json.dumps(record, indent=1) + "\n").encode())
        except OSError as error:
            return str(error)
        return ""


def _taken(file: IO[str]) -> bool:
    """Whether the lock is ours; it may be asked for again."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _changes(found: Any, facts: Facts) -> str:
    """Which facts differ, in words."""
    if not isinstance(found, dict):
        return f"its facts were {found!r}"
    differing = [key for key in {**found, **facts} if found.get(key) != facts.get(key)]
    return ", ".join(f"{key} was {found.get(key)!r} and is {facts.get(key)!r}" for key in differing)


def _replace(path: Path, content: bytes) -> None:
    """Write all of it or nothing."""
    handle, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(partial).replace(path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise
