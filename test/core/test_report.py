"""The table, the JSON file and the page say the same, and the page needs nothing but itself."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core.errors import ScfeatError
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
