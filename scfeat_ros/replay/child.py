"""One job of many, in a process of its own: ``python -m scfeat_ros.replay.child FOLDER``.

The parent leaves the pickled job in the folder (:func:`hand_over`) and finds there how far it is, and in the end what
came of it. Files, and no pipes: whatever becomes of one side, the other does not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scfeat_core.errors import ScfeatError

# run(job, report, progress) -> summary, as scfeat_ros.replay.run.run_job: report takes lines of text, progress the
# number of frames that are done and that of all.
RunJob = Callable[[Any, Callable[[str], None], Callable[[int, int], None]], Mapping[str, Any]]

_COUNTS = struct.Struct("<qq")
_PARENT_PERIOD = 1.0  # seconds between two looks at whether the parent lives
_PATIENCE = 60.0  # seconds for an orphan to write what it has


def hand_over(folder: Path, run: RunJob | None, job: Any) -> None:
    """Write the job for a child. run: a function that can be imported; None: that of a replay."""
    (folder / "job").write_bytes(pickle.dumps((run, job)))


def progress_of(folder: Path) -> tuple[int, int]:
    """Frames done, and frames in all; (0, 0) as long as the child has not said."""
    with contextlib.suppress(OSError, struct.error):
        return _COUNTS.unpack((folder / "progress").read_bytes())
    return 0, 0


def result_of(folder: Path) -> dict[str, Any] | None:
    """What :func:`execute` gave in the child; None where it did not come to that."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((folder / "result").read_text(encoding="utf-8")))
    return None


def execute(run: RunJob | None, job: Any, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Run a job. {"summary": its figures or None, "error": why there are none, "interrupted": stopped by SIGINT}.

    A run that is interrupted raises KeyboardInterrupt, or says "interrupted" in the summary of what it had done.
    A traceback goes to stderr. Nothing is raised.
    """
    try:
        summary = dict((run or _replay())(job, _say, progress))
        interrupted = bool(summary.pop("interrupted", False))
        return {"summary": summary, "error": "", "interrupted": interrupted}
    except KeyboardInterrupt:
        return {"summary": None, "error": "", "interrupted": True}
    except ScfeatError as error:
        return {"summary": None, "error": str(error), "interrupted": False}
    except Exception as error:  # of one bag: the others go on
        with contextlib.suppress(OSError):  # of a log whose disk is full
            traceback.print_exc()
        return {"summary": None, "error": f"unexpected {type(error).__name__}: {error}", "interrupted": False}


def _replay() -> RunJob:
    from .run import run_job

    return run_job


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # of a log whose disk is full: the results may be on another
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def main(folder: Path) -> int:
    """The exit status is 0 where there is a result, whatever it is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in the background
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        run, job = pickle.loads((folder / "job").read_bytes())
        result = execute(run, job, _reporter(folder / "progress"))
    except KeyboardInterrupt:
        result = {"summary": None, "error": "", "interrupted": True}
    scratch = folder / "result.part"
    scratch.write_text(json.dumps(result), encoding="utf-8")
    scratch.replace(folder / "result")
    return 0


def _reporter(path: Path) -> Callable[[int, int], None]:
    file = os.open(path, os.O_WRONLY | os.O_CREAT)

    def write(done: int, total: int) -> None:
        os.pwrite(file, _COUNTS.pack(done, total), 0)

    return write


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot end its children: they see it, write what they have, and go."""
    while os.getppid() == parent:
        time.sleep(_PARENT_PERIOD)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
