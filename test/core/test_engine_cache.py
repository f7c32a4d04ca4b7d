from __future__ import annotations

import json
import logging
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scfeat_core.engines.cache import Cache, cache_folder

FACTS = {"library": "1.0", "device": "this one"}
MAKES_SLOWLY = """
import sys, time
from pathlib import Path
from scfeat_core.engines.cache import Cache
folder, log = map(Path, sys.argv[1:])
def make():
    with log.open("a") as file:
        file.write("made\\n")
    time.sleep(1)
    return b"plan" * 1000
print(len(Cache(folder).get("plan", {"library": "1.0"}, make)))
"""


class Maker:
    def __init__(self, content: bytes = b"plan") -> None:
        self.content = content
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.content


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.INFO)


def test_an_entry_is_made_once_and_the_log_says_so(tmp_path, caplog):
    make = Maker(b"x" * 2_000_000)
    for _ in range(3):  # each as a process of its own would
        assert Cache(tmp_path / "deep" / "folder").get("plan", FACTS, make) == make.content
    assert make.calls == 1
    assert [line.message.partition(" in ")[0] for line in caplog.records] == [
        "plan is made: there is none yet",
        "plan was made",
    ]
    assert "(2.0 MB)" in caplog.text
    record = json.loads((tmp_path / "deep" / "folder" / "plan.json").read_text())
    assert record["facts"] == FACTS and record["seconds"] >= 0
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "plan").write_bytes(b"plam"), "the one that is there is damaged"),
        (lambda folder: (folder / "plan").write_bytes(b""), "the one that is there is damaged"),
        (lambda folder: (folder / "plan.json").unlink(), "no readable record (FileNotFoundError"),
        (lambda folder: (folder / "plan.json").write_text("{"), "no readable record (JSONDecodeError"),
        (lambda folder: (folder / "plan.json").write_text("[]"), "no readable record (TypeError"),
        (lambda folder: (folder / "plan").unlink(), "there is none yet"),
    ],
)
def test_a_damaged_entry_is_made_again(tmp_path, caplog, damage, reason):
    cache = Cache(tmp_path)
    cache.get("plan", FACTS, Maker())
    damage(tmp_path)
    caplog.clear()
    make = Maker()
    assert cache.get("plan", FACTS, make) == b"plan" and make.calls == 1
    assert reason in caplog.text
    assert cache.get("plan", FACTS, make) == b"plan" and make.calls == 1, "and then kept"


def test_a_stale_entry_is_made_again_and_what_changed_is_said(tmp_path, caplog):
    cache = Cache(tmp_path)
    cache.get("plan", FACTS, Maker(b"old"))
    assert cache.get("plan", {**FACTS, "library": "1.1"}, Maker(b"new")) == b"new"
    assert "plan is made: the one that is there is stale: library was '1.0' and is '1.1'" in caplog.text
    assert cache.get("other", FACTS, Maker(b"other")) == b"other"
    assert (tmp_path / "plan").read_bytes() == b"new"


def test_what_making_raises_is_passed_on_and_leaves_nothing(tmp_path):
    def fail() -> bytes:
        raise RuntimeError("no kernel")

    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError, match="no kernel"):
        cache.get("plan", FACTS, fail)
    assert cache.get("plan", FACTS, Maker()) == b"plan", "and nobody else waits for it"


def test_of_two_processes_one_makes_it_and_the_other_waits(tmp_path, repository):
    log = tmp_path / "log"
    command = [sys.executable, "-c", MAKES_SLOWLY, str(tmp_path / "cache"), str(log)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repository) for _ in range(2)]
    assert [child.communicate(timeout=60)[0] for child in children] == [b"4000\n"] * 2
    assert log.read_text() == "made\n"


def test_without_a_place_to_write_everything_works_and_says_so(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    for folder in (None, tmp_path / "file" / "scfeat", Path("/proc/scfeat")):
        caplog.clear()
        make = Maker()
        for _ in range(2):
            assert Cache(folder).get("plan", FACTS, make) == b"plan"
        assert make.calls == 2
        assert caplog.text.count("plan is not kept, and will be made again by the next process: ") == 2


def test_a_full_disk_is_no_error(tmp_path, repository):
    """A limit on the size of files stands for the disk."""
    script = (
        "import logging, sys; from pathlib import Path; from scfeat_core.engines.cache import Cache\n"
        "logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "print(len(Cache(Path(sys.argv[1])).get('plan', {}, lambda: b'x' * 100_000)))"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, cwd=repository, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "100000\n" in done.stdout and "plan is not kept" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["plan.lock"], "nothing is left of it"


def test_an_entry_in_a_folder_that_cannot_be_written_is_used(tmp_path, caplog):
    Cache(tmp_path).get("plan", FACTS, Maker())
    (tmp_path / "plan.lock").unlink()
    (tmp_path / "plan.lock").mkdir()  # cannot be opened, even by root
    make = Maker()
    assert Cache(tmp_path).get("plan", FACTS, make) == b"plan" and make.calls == 0


def test_a_folder_that_others_may_write_is_not_used(tmp_path, caplog):
    """What comes out of it is run."""
    folder = tmp_path / "scfeat"
    Cache(folder).get("plan", FACTS, Maker())
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    make = Maker(b"own")
    assert Cache(folder).get("plan", FACTS, make) == b"own" and make.calls == 1
    assert "plan is not kept" in caplog.text and "somebody else: chmod 700" in caplog.text
    assert (folder / "plan").read_bytes() == b"plan"


def test_an_entry_that_cannot_be_read_is_made_again(tmp_path, caplog):
    (tmp_path / "plan").mkdir()
    make = Maker()
    assert Cache(tmp_path).get("plan", FACTS, make) == b"plan" and make.calls == 1
    assert "plan is made: what is there cannot be read (" in caplog.text and "plan is not kept" in caplog.text


def test_somebody_without_a_home_has_no_cache(tmp_path, repository):
    """As in a container that runs as a user whom nobody knows there."""
    script = (
        "import os; from scfeat_core.engines.cache import cache_folder\n"
        "os.getuid() or os.setuid(54321)\nprint(cache_folder())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=repository,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("None\n", f"{Path.home() / '.cache' / 'scfeat'}\n")  # the latter where tests have no root


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "scfeat"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert cache_folder() == tmp_path / "me" / ".cache" / "scfeat"
