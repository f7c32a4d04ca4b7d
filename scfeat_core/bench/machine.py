"""Where the numbers come from: processor, threads, versions, and how busy the machine was."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from scfeat_core import __version__


def describe_machine() -> dict[str, Any]:
    """Names and versions; nothing that tells one machine of a kind from another."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "opencv_threads": cv2.getNumThreads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "scfeat": __version__,
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["cuda"], facts["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return facts


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(names, "") or platform.processor() or platform.machine()


def available_cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def load() -> float | None:
    """Processes that ran or wanted to, on average over the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def load_warnings(before: float | None, after: float | None, cores: int) -> Iterable[str]:
    """Before: what others did. After: that, and what was measured, which has at most all cores."""
    if before is not None and before > 0.5 * cores:
        yield f"the machine was busy before: load {before:g} on {cores} cores; only ratios mean anything"
    if after is not None and after > cores + 0.5:
        yield f"more ran than there are cores: load {after:g} on {cores} cores; only ratios mean anything"
