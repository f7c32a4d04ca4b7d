"""Publication to a subscriber in another process, for ``scfeat bench``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from scfeat.msg import Features

from scfeat_core.bench import own
from scfeat_ros import bench_stages


def subscribers() -> list[str]:
    """Those that this process has started; tests in other processes have their own."""
    mine = b"PPid:\t%d\n" % os.getpid()
    found = (path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if b"scfeat_ros.bench_stages" in read(path))
    return [folder.name for folder in found if mine in read(folder / "status")]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_messages_reach_a_subscriber_that_ends_with_the_block() -> None:
    message = Features(keypoints=np.zeros(20, np.float32), scores=np.zeros(10, np.float32))
    with bench_stages.publication() as publish:
        assert len(subscribers()) == 1
        begun = time.monotonic()
        for _ in range(50):  # reliable ones, more than the publisher keeps
            publish([message, message])
        assert time.monotonic() - begun < 30
    assert subscribers() == []


def test_a_subscriber_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with own.listened_ros() as (ros, missing):
        assert ros is not None and ros.publish is None
        assert missing.startswith("publication is not measured: expected the subscriber to run to the end")
