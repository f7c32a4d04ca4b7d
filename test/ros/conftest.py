"""The node in a process, for the tests of the live graph; live_graph.py has what talks to it."""

from __future__ import annotations

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
