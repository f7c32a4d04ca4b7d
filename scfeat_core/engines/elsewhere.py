"""What takes long made beside what goes on: in a thread, and there in a process of its own, one thing at a time.

Tracing a network changes the state of all of torch while it lasts, holds Python's lock, and takes the processor from
the images: so that happens in another process, of low priority, which can be ended at any moment. What is left to the
thread is to load the result and to compare it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from typing import IO, Any, Generic, TypeVar

import torch

log = logging.getLogger(__name__)

NICE = 5  # of the process: a quarter of a processor that the images would have for themselves
PATIENCE = 30.0  # seconds for the thread to end: loading and comparing cannot be interrupted
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl.h

Result = TypeVar("Result")


class Stopped(Exception):
    """Nobody needs it any more."""


class OtherProcess:
    """A workshop of the cache (cache.py) for a thread that may be told to stop by another one."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        # Of the process: none goes on after stop(), which the garbage collector may call anywhere, inside of it, too.
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None

    def make(self, job: Callable[[], bytes]) -> bytes:
        """What the job returns, which must be a function of a module, or a partial of one with arguments that can be
        pickled; with as many threads of torch as here. Raises RuntimeError with its last words where it fails, and
        Stopped.
        """
        order = pickle.dumps((torch.get_num_threads(), job))
        with tempfile.TemporaryFile() as said:
            process = self._start(said)
            try:
                content, _ = process.communicate(order)
            finally:
                _end(process)
            if self._stopped.is_set():
                raise Stopped
            if process.returncode != 0:
                raise RuntimeError(_last_line(said) or f"the process that made it ended with {process.returncode}")
            return content

    def wait(self, seconds: float) -> None:
        """For another process that makes it. Raises Stopped."""
        if self._stopped.wait(seconds):
            raise Stopped

    def stop(self) -> None:
        """End what is being made, now and for good; from any thread."""
        with self._lock:
            self._stopped.set()
            if self._process is not None:
                _end(self._process)

    def _start(self, said: IO[bytes]) -> subprocess.Popen[bytes]:
        # With the same modules, wherever they were found; out of reach of a terminal's Ctrl-C.
        code = f"import sys; sys.path[:] = {sys.path!r}; from scfeat_core.engines.elsewhere import main; main()"
        with self._lock:
            if self._stopped.is_set():
                raise Stopped
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
            if self._stopped.is_set():
                _end(process)
                raise Stopped
            return process


class Beside(Generic[Result]):
    """One thing at a time, made in a thread; to be used by one thread at a time.

    workshop: for what is made there.
    """

    def __init__(self) -> None:
        self.workshop = OtherProcess()
        self._thread: threading.Thread | None = None
        self._at_exit: weakref.finalize[..., Any] | None = None
        self._results: list[Result] = []

    @property
    def busy(self) -> bool:
        """Until its result was taken."""
        return self._thread is not None

    def start(self, make: Callable[[], Result]) -> None:
        """Only while not busy. make: raises nothing but Stopped, and knows nothing of this object."""
        results = self._results

        def work() -> None:
            with contextlib.suppress(Stopped):
                results.append(make())

        self._thread = threading.Thread(target=work, name="scfeat-engine", daemon=True)
        # A thread that is inside a library while the interpreter ends takes the process down.
        self._at_exit = weakref.finalize(self, _stop, self.workshop, self._thread)
        self._thread.start()

    def take(self) -> Result | None:
        """The result, once; None while there is none."""
        if self._thread is None or not self._results:
            return None
        self._ended()
        return self._results.pop()

    def close(self) -> None:
        """Make nothing any more, for good; returns when the thread has ended."""
        self.workshop.stop()
        self._ended()
        self._results.clear()

    def _ended(self) -> None:
        if self._at_exit is not None:
            self._at_exit.detach()
        if self._thread is not None:
            _join(self._thread)
        self._thread = None


def _stop(workshop: OtherProcess, thread: threading.Thread) -> None:
    workshop.stop()
    _join(thread)


def _join(thread: threading.Thread) -> None:
    if thread is threading.current_thread():  # whose garbage was collected here
        return
    thread.join(PATIENCE)
    if thread.is_alive():
        log.error("an engine has been loading for more than %g s; it is left alone", PATIENCE)


def _end(process: subprocess.Popen[Any]) -> None:
    """With the compilers that it started."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


# -- the other process -------------------------------------------------------------------------------------------------


def main() -> None:
    """Do the job that is on standard input; its bytes go to standard output, all that libraries say to the errors."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    os.nice(NICE)
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        threads, job = pickle.load(sys.stdin.buffer)
        torch.set_num_threads(threads)
        try:
            content = job()
        except Exception as error:
            sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
            sys.stderr.flush()
            os._exit(1)
        output.write(content)
    os._exit(0)  # libraries that crash on their way out have done what they were asked for
