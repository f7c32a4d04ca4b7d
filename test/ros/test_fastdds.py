"""The Fast DDS profile reaches our processes, and gives way to a choice of the user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scfeat_ros.fastdds import profile_environment, use_profile

NAMES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")


@pytest.fixture(autouse=True)
def without_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)


def test_one_variable_names_the_file(repository: Path) -> None:
    use_profile()
    given = {name: os.environ[name] for name in NAMES if name in os.environ}
    assert given == profile_environment()
    assert [Path(value) for value in given.values()] == [repository / "config" / "fastdds.xml"]


@pytest.mark.parametrize(("distribution", "name"), [("humble", NAMES[1]), ("jazzy", NAMES[1])])
def test_older_distributions_know_the_old_name(monkeypatch: pytest.MonkeyPatch, distribution: str, name: str) -> None:
    monkeypatch.setenv("ROS_DISTRO", distribution)
    assert list(profile_environment()) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_the_choice_of_the_user_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/etc/own.xml")
    use_profile()
    assert {key: os.environ.get(key) for key in NAMES} == {**dict.fromkeys(NAMES), name: "/etc/own.xml"}
