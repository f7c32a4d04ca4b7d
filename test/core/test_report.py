"""The table, the JSON file and the page say the same, and the page needs nothing but itself."""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core.errors import ScfeatError
from scfeat_core.feature_files import replaced
from scfeat_core.report import (
    Picture,
    Series,
    encode,
    html_page,
    percentiles,
    rounded,
    table_rows,
    text_table,
    write,
    write_json,
)

FIGURES = {
    "frames": {"published": 1200000, "dropped_busy": 0},
    "ms": {"network": {"median": 56.4, "p95": 81.0}, "match": {"median": None, "p95": None}},
}


def test_rounding_happens_once_and_nan_is_nothing() -> None:
    assert rounded(1.25, 1) == 1.2
    assert rounded(7.6, 0) == 8
    assert rounded(float("nan")) is None
    assert rounded(None) is None
    assert percentiles([1, 2, 3, float("nan")]) == {"median": 2.0, "p95": 2.9}
    assert percentiles([]) == {"median": None, "p95": None}


def test_all_three_show_the_same_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "summary.json", FIGURES, {"device": "cpu"})
    stored = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert stored == {**FIGURES, "setup": {"device": "cpu"}}
    rows = table_rows(FIGURES)
    assert rows[0] == ("frames", "published", ["1200000"])
    assert rows[2] == ("ms", "network", ["median 56.4", "p95 81"])
    table = text_table(FIGURES)
    page = html_page("t", "s", FIGURES)
    for _, name, cells in rows:
        assert re.search(rf"^  {name} .*" + r"\s+".join(c.replace(" ", r"\s+") for c in cells), table, re.MULTILINE)
        assert f"<th>{name}</th>" in page
        assert all(f">{cell}</td>" in page for cell in cells)


class Checker(HTMLParser):
    """Balanced tags, and everything that is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_self_contained() -> None:
    picture = Picture(np.zeros((20, 30, 3), np.uint8), "a <b> & c")
    series = [Series("rate", np.array([1.0, 2, np.nan, 4, 5]), "Hz"), Series("nothing", np.full(3, np.nan))]
    page = html_page("<demo>", "one & two", FIGURES, [picture], series, {"versions": {"torch": "2.13"}, "size": 3})
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.links
    assert all(link == "data:," or link.startswith("data:image/jpeg;base64,") for link in checker.links)
    assert "url(" not in page
    assert "a &lt;b&gt; &amp; c" in page
    assert page.count("<polyline") == 2, "a gap splits the line, a series without values has none"


@pytest.mark.parametrize("frames", [101, 10_001, 12_001, 1_000_001])
def test_nothing_is_wider_than_a_telephone(tmp_path: Path, browse: Callable[..., dict[str, Any]], frames: int) -> None:
    """Nor are numbers below an axis that ends at the edge of the page."""
    series = [Series("Keypoints", np.arange(float(frames)))]
    picture = Picture(np.zeros((48, 640, 3), np.uint8), "matches")
    write(tmp_path / "page.html", html_page("demo", 30 * "text ", FIGURES, [picture], series, {"machine": "x86_64"}))
    seen = browse(tmp_path / "page.html", 400)
    assert seen["problems"] == [] and seen["lines"] == 1
    assert 380 < seen["room"] <= 400 and seen["width"] <= seen["room"]


@pytest.mark.parametrize("shape", [(24, 32, 3), (24, 32)])
def test_encoded_pictures_keep_their_colours(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    decoded = cv2.imdecode(np.frombuffer(encode(image), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded[..., ::-1] if len(shape) == 3 else decoded, image)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """The option that chooses the folder is named where there is one, and no other."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ScfeatError, match="summary.json, found: .*; free space, or choose another folder$"):
        write(tmp_path / "file" / "summary.json", "{}")
    with pytest.raises(ScfeatError, match=r"choose another folder \(--out\)$"):
        write(tmp_path / "file" / "summary.json", "{}", "--out")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    page = tmp_path / "page.html"
    write(page, "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        for path in (page, tmp_path / "new.html"):
            with pytest.raises(ScfeatError, match=f"{path.name}, found: File too large"):
                write(path, 50_000 * "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "before"


def test_pipes_and_links_stay_what_they_are(tmp_path: Path) -> None:
    """As in --json /dev/stdout."""
    reader, writer = os.pipe()
    write(Path(f"/dev/fd/{writer}"), "{}")
    os.close(writer)
    assert os.read(reader, 100) == b"{}"
    os.close(reader)
    with pytest.raises(ScfeatError, match="No space left"):
        write(Path("/dev/full"), "{}")
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "all.json")
    write(tmp_path / "link.json", "{}")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "there" / "all.json").read_text() == "{}"


WRITE = "import sys; from pathlib import Path; from scfeat_core.report import write; "
FOUND = Path(__file__).resolve().parents[2]  # the packages


def python(code: str, *words: object, before: Sequence[str] = (), **options: Any) -> str:
    """What a process says on stderr that runs the code after ``WRITE``."""
    line = [*before, sys.executable, "-c", WRITE + code, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(FOUND)}
    return subprocess.run(line, env=environment, stderr=subprocess.PIPE, text=True, timeout=60, **options).stderr


@pytest.mark.parametrize(
    "name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/proc/thread-self/fd/1", "link", "folder/stdout"]
)
@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_log_that_stdout_goes_to_is_written_on(tmp_path: Path, name: str, mode: str) -> None:
    """As in ``>> log --json /dev/stdout``: the file stays the one that the shell has open, with all that is in it."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "folder").symlink_to("/dev")
    log = tmp_path / "log"
    log.write_text("before\n")
    with log.open(mode) as stdout:
        stdout.write("shell\n")
        stdout.flush()
        code = "print('table'); write(Path(sys.argv[1]), '{}\\n'); print('after')"
        assert python(code, tmp_path / name, stdout=stdout) == ""
        stdout.write("end\n")
    own = ["shell", "table", "{}", "after", "end"]
    assert log.read_text().split() == (["before", *own] if mode == "a" else own)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "link", "log"]


def test_the_log_of_another_process_is_written_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stdout:
        stdout.write("before\n")
        stdout.flush()
        assert python("write(Path(sys.argv[1]), '{}')", f"/proc/{os.getpid()}/fd/{stdout.fileno()}") == ""
    assert log.read_text() == "before\n{}"


def test_a_closed_stdout_is_named() -> None:
    code = "import os; os.close(1); write(Path('/dev/stdout'), '{}')"
    assert "expected to write /dev/stdout, found: " in python(code)


def test_files_in_shared_memory_are_files(tmp_path: Path) -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("there is no /dev/shm")
    path = folder / f"{tmp_path.name}.{os.getpid()}.json"
    try:
        write(path, "first")
        number = path.stat().st_ino
        write(path, "second")
        assert path.read_text() == "second" and path.stat().st_ino != number
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_who_may_read_a_file_stays(tmp_path: Path, mode: int) -> None:
    """Also those who may not, while it is written."""
    path = tmp_path / "all.json"
    path.write_text("{}")
    path.chmod(mode)
    with replaced(path) as scratch:
        scratch.write_text("new")
        assert not stat.S_IMODE(scratch.stat().st_mode) & ~mode
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode
    if os.geteuid() == 0:
        os.chown(path, 12345, 12346)
        write(path, "newer")
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12345, 12346, mode)


MOUNTED = 'mount --bind "$1" "$2"; '
READ_ONLY = 'd=$(dirname "$2"); mount --bind $d $d; ' + MOUNTED + "mount -o remount,bind,ro $d; "
NO_FOLDER = 'chmod 555 "$(dirname "$2")"; '


@pytest.mark.parametrize("how", [MOUNTED, READ_ONLY, NO_FOLDER])
def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path: Path, how: str) -> None:
    """A mounted one (as with ``docker run -v file:file``), in a system that is read-only, too; one in the folder of
    another user."""
    outside, path = tmp_path / "outside.json", tmp_path / "folder" / "all.json"
    path.parent.mkdir()
    path.write_text("long before")
    outside.write_text("long before")
    without_rights = "setpriv --bounding-set=-all " if how is NO_FOLDER else ""
    before = ["unshare", "-rm", "sh", "-ec", how + f'shift 2; exec {without_rights}"$@"', "sh", str(outside), str(path)]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no file systems can be mounted here: unshare -rm")
    shown = outside if "mount" in how else path
    number = shown.stat().st_ino
    try:
        assert python("write(Path(sys.argv[1]), '{}')", path, before=before) == ""
        if how is not MOUNTED:
            new = path.parent / "new.json"
            assert f"write {new}, found: " in python("write(Path(sys.argv[1]), '{}')", new, before=before)
    finally:
        path.parent.chmod(0o755)
    assert shown.read_text() == "{}" and shown.stat().st_ino == number
    assert [file.name for file in path.parent.iterdir()] == ["all.json"]
