"""The node in a process, for the tests of the live graph; live_graph.py has what talks to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for live_graph


@pytest.fixture
def start(ros: Any, spawn: Callable[..., Any]) -> Callable[..., Any]:
    """``start("-p", "device:=cpu", …)``: the node in a process, with the untrained network unless told otherwise."""

    def run(*arguments: str, weights: str = "random") -> Any:
        own = ("-p", f"weights:={weights}", "-p", "status_rate:=20.0")
        return spawn([sys.executable, "-m", "scfeat_ros.node", "--ros-args", *own, *arguments], OMP_NUM_THREADS="1")

    return run


@pytest.fixture
def small_disk() -> Callable[..., list[str]]:
    """``[*small_disk(folder, kilobytes, saved), *command]``: the command has a file system of that size at ``folder``,
    which exists, and what is there afterwards is copied to ``saved`` before it is gone. given: a folder whose files are
    there at the beginning.
    """

    def before(folder: Path, kilobytes: int, saved: Path, given: Path | None = None) -> list[str]:
        mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {folder}"
        if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("no file systems can be mounted here: unshare -rm")
        filled = mount if given is None else f"{mount} && cp -r {given}/. {folder}"
        return ["unshare", "-rm", "sh", "-c", f'{filled} && "$@"; code=$?; cp -r {folder} {saved}; exit $code', "sh"]

    return before
