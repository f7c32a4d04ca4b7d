"""The Fast DDS profile for large images (config/fastdds.xml): where it is, and the variable that names it."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OLD_DISTRIBUTIONS = ("humble", "iron", "jazzy")
_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def profile_environment() -> dict[str, str]:
    """The variable for a process of ours, before it makes its first participant; empty without the file."""
    profile = _profile()
    return {} if profile is None else {_variable(): str(profile)}


def use_profile() -> None:
    """Give this process the profile, unless its user has chosen one; to be called before ``rclpy.init``."""
    if not any(os.environ.get(name) for name in _VARIABLES):
        os.environ.update(profile_environment())


def version_of(distribution: str) -> str:
    """Of an installed distribution; empty where it is not from a wheel, or not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _variable() -> str:
    """Jazzy and older know the old name only; later ones complain about it."""
    major = version_of("ros-rclpy").partition(".")[0]
    old = os.environ.get("ROS_DISTRO") in OLD_DISTRIBUTIONS or (major.isdigit() and int(major) <= 7)
    return _VARIABLES[0] if old else _VARIABLES[1]


def _profile() -> Path | None:
    """In the source tree, or where it was installed."""
    places = [Path(__file__).parent.parent, Path(sys.prefix) / "share" / "scfeat"]
    places += [Path(p) / "share" / "scfeat" for p in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if p]
    files = [place / "config" / "fastdds.xml" for place in places]
    return next((file for file in files if file.is_file()), None)
