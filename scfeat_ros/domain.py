"""A ROS domain of one's own on this machine, for the demo and for tests."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scfeat_core.errors import ScfeatError

from .fastdds import profile_environment

DOMAINS = range(1, 102)  # above 101 the ports of a domain run into the ephemeral ones of Linux


def own_graph(domain: int, logs: Path) -> dict[str, str]:
    """The environment of processes that have a graph of their own on this machine, and room for large images."""
    return {
        "ROS_DOMAIN_ID": str(domain),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOCALHOST_ONLY": "1",  # what Humble knows
        "ROS_LOG_DIR": str(logs),
        "PYTHONUNBUFFERED": "1",
        "AMENT_PREFIX_PATH": os.environ.get("AMENT_PREFIX_PATH", sys.prefix),
        **profile_environment(),
    }


@contextmanager
def free_domain() -> Iterator[int]:
    """A ROS_DOMAIN_ID that no other user of this function has, on this machine, while the block runs.

    Held by a lock on a file in the temporary folder, so that it is free again however the process ends. Raises
    ScfeatError where all are taken.
    """
    for number in DOMAINS:
        path = Path(tempfile.gettempdir()) / f"ros-domain-{number}.lock"
        try:
            lock = path.open("w")
        except PermissionError:  # the file of another user of this machine
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            yield number
            return
    raise ScfeatError(
        f"all ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are taken on this machine: end other demos and tests"
    )
