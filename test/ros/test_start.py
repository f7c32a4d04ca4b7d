"""What a process loads, and which executor it gets: both are paid for by everything that comes after."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from rclpy.executors import SingleThreadedExecutor

from scfeat_ros.node import make_executor

# 150 MB and seconds (torch), or 30 MB and more that only training, evaluation and pictures need.
HEAVY = {"torch", "scipy", "matplotlib", "pandas", "sympy"}
NEEDED = {"scfeat_ros.pipeline": {"torch"}}


@pytest.mark.parametrize(
    "module",
    [
        "scfeat_ros.node",  # with wrong parameters it ends at once, and it can be interrupted while torch loads
        "scfeat_ros.pipeline",
        "scfeat_ros.messages",
        "scfeat_ros.monitor",
        "scfeat_ros.adapters.vins",
        "scfeat_ros.adapters.rtabmap",
    ],
)
def test_nothing_heavy_is_imported_that_is_not_needed(module: str) -> None:
    code = f"import sys, {module}; print(*({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == NEEDED.get(module, set())


def test_a_front_end_is_made_without_what_only_compilers_need() -> None:
    """sympy alone is 34 MB; some functions of torch import it on the quiet."""
    code = (
        "import sys, numpy as np; from scfeat_core.frontend import Frontend;"
        "Frontend().process(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8), 0);"
        f"print(*({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch"]


def test_the_executor_is_that_of_events_where_there_is_one(ros: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        from rclpy.experimental import EventsExecutor  # noqa: F401

        expected = "EventsExecutor"
    except ImportError:
        expected = "SingleThreadedExecutor"
    executor = make_executor(ros.context)
    assert type(executor).__name__ == expected
    executor.shutdown()
    monkeypatch.setitem(sys.modules, "rclpy.experimental", None)  # as on Jazzy
    executor = make_executor(ros.context)
    assert isinstance(executor, SingleThreadedExecutor) and executor.context is ros.context
    executor.shutdown()
