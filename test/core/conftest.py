"""Rendered views with exact cameras and depth, folders of them as data sets, made replays, and a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from scfeat_core.demo_scene import intrinsics, look_at
from scfeat_core.geometry import essential_from_pose, fundamental_from_pose
from scfeat_core.rendering import TEXEL, Face, Renderer
from scfeat_core.replay.records import FrameRecord, GroundTruth, Recording
from scfeat_core.scene_textures import fractal_noise
from scfeat_core.types import (
    Camera,
    GeometryModel,
    ImageQuality,
    Matches,
    PairResult,
    TrackFlag,
    Tracks,
    TwoViewGeometry,
)

VIEW_SIZE = (320, 240)
POINTS = 400


@dataclass(frozen=True, eq=False)
class RenderedViews:
    """images: (H, W, 3) uint8 RGB. K: (3, 3); R: (n, 3, 3) and t: (n, 3), x_cam = R X + t. points: (P, 3).

    xy: (n, P, 2) exact pixels of the points; seen: (n, P) bool, in view and not hidden. depths: (H, W) metres.
    """

    images: list[np.ndarray]
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    points: np.ndarray
    xy: np.ndarray
    seen: np.ndarray
    depths: list[np.ndarray]


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    """Commands set the number of torch's threads, on which the last bits of sums depend."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def rendered_views() -> RenderedViews:
    """Eight views of three textured boards before a wall, some rolled; neighbours see much of the same."""
    rng = np.random.default_rng(0)
    x, y, z = np.eye(3)
    slanted = (x - 0.5 * y) / np.hypot(1, 0.5)
    faces = [
        Face(np.array([-5.0, 4.5, 3.5]), x, -z, _texture(rng, 7.0, 10.0)),
        Face(np.array([-1.3, 3.0, 0.9]), x, -z, _texture(rng, 1.2, 1.0)),
        Face(np.array([0.2, 3.4, 0.5]), slanted, -z, _texture(rng, 1.4, 1.3)),
    ]
    renderer = Renderer(faces, [(255 * face.texture).astype(np.uint8) for face in faces], room_faces=0)
    k = intrinsics(VIEW_SIZE)
    places = np.stack([np.linspace(-1.2, 1.2, 8), 0.3 * np.sin(np.arange(8)), 0.4 * np.cos(np.arange(8))], 1)
    roll = (0, 0.1, -0.2, 0, 0.3, 0, -0.1, 0)
    poses = [look_at(place, 3.5 * y, angle) for place, angle in zip(places, roll, strict=True)]
    views = [renderer.render(pose, k, VIEW_SIZE) for pose in poses]
    r = np.stack([pose[:3, :3].T for pose in poses])
    t = -(r @ places[..., None])[..., 0]
    points = _surface_points(views[3].depth, poses[3], k, rng)
    in_camera = points @ r.swapaxes(1, 2) + t[:, None]
    xy = in_camera @ k.T
    xy = xy[..., :2] / xy[..., 2:]
    seen = np.stack([_is_seen(view.depth, xy[i], in_camera[i, :, 2]) for i, view in enumerate(views)])
    return RenderedViews([view.image for view in views], k, r, t, points, xy, seen, [view.depth for view in views])


def _texture(rng: np.random.Generator, height: float, width: float) -> np.ndarray:
    shape = round(height / TEXEL), round(width / TEXEL)
    noise = fractal_noise(rng, *shape, cell=0.4)[..., None] * rng.uniform(0.15, 0.2, 3) + rng.uniform(0.35, 0.65, 3)
    return np.clip(noise, 0, 1).astype(np.float32)


def _surface_points(depth: np.ndarray, pose: np.ndarray, k: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pixels = rng.integers(0, depth.shape[::-1], (POINTS, 2))
    rays = np.column_stack([pixels, np.ones(POINTS)]) @ np.linalg.inv(k).T
    return rays * depth[pixels[:, 1], pixels[:, 0], None] @ pose[:3, :3].T + pose[:3, 3]


def _is_seen(depth: np.ndarray, xy: np.ndarray, distance: np.ndarray) -> np.ndarray:
    inside = ((xy >= 0) & (xy <= np.subtract(VIEW_SIZE, 1))).all(-1)
    x, y = np.clip(np.round(xy), 0, np.subtract(VIEW_SIZE, 1)).astype(int).T
    return inside & (abs(depth[y, x] - distance) < 0.02 * distance)


@pytest.fixture
def write_scene(rendered_views: RenderedViews) -> Callable[..., Path]:
    """``write_scene(folder)`` makes a scene with cameras.json, and pairs.txt and tracks.npz unless told otherwise.

    ``images``: which of the views; ``cut``: top, bottom, left, right of the part of them that is stored.
    """

    def write(
        folder: Path,
        images: Sequence[int] = range(8),
        cut: tuple[int, int, int, int] = (0, 240, 0, 320),
        pairs: bool = True,
        tracks: bool = True,
    ) -> Path:
        views, (top, bottom, left, right) = rendered_views, cut
        (folder / "images").mkdir(parents=True)
        k = views.K - [[0, 0, left], [0, 0, top], [0, 0, 0]]
        cameras = []
        for i in images:
            picture = views.images[i][top:bottom, left:right]
            cv2.imwrite(str(folder / "images" / f"{i}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            camera = {"file": f"{i}.png", "w": right - left, "h": bottom - top}
            cameras.append(camera | {"K": k.tolist(), "R": views.R[i].tolist(), "t": views.t[i].tolist()})
        (folder / "cameras.json").write_text(json.dumps(cameras))
        if pairs:
            listed = [f"{i}.png {j}.png" for i in images for j in images if 0 < j - i < 4]
            (folder / "pairs.txt").write_text("\n".join(listed))
        if tracks:
            _write_tracks(folder / "tracks.npz", views, images, cut)
        return folder

    return write


def _write_tracks(path: Path, views: RenderedViews, images: Sequence[int], cut: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = cut
    xy = views.xy - (left, top)
    seen = views.seen & ((xy >= 0) & (xy <= (right - left - 1, bottom - top - 1))).all(-1)
    pid = [np.flatnonzero(seen[i]) for i in images]
    xy64 = np.concatenate([xy[i, rows] for i, rows in zip(images, pid, strict=True)]) * 64
    offset = np.cumsum([0, *(len(rows) for rows in pid)]).astype(np.int32)
    packed = {"xy64": xy64.round().astype(np.uint16), "pid": np.concatenate(pid).astype(np.uint16), "offset": offset}
    np.savez(path, points=views.points.astype(np.float32), **packed)


# -- replays -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_recording() -> Callable[..., Recording]:
    """``make_recording(frames=12, …)``: a camera that moves along x past points, all of which it sees, exactly.

    step: metres a frame. turn: radians a frame, about y. calibrated, truth, verified: whether there is a camera, ground
    truth, a two-view geometry. outliers: share of the matches that are wrong, and known to be. off: pixels that are
    added to y of each second frame. dropped: index -> reason. points: how many.
    """

    def make(
        frames: int = 12,
        *,
        points: int = 120,
        step: float = 0.05,
        turn: float = 0.0,
        calibrated: bool = True,
        truth: bool = True,
        verified: bool = True,
        outliers: float = 0.25,
        off: float = 0.0,
        dropped: Mapping[int, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Recording:
        rng = np.random.default_rng(1)
        k = np.array([[300.0, 0, 160], [0, 300, 120], [0, 0, 1]])
        camera = Camera(k, np.zeros(5), (320, 240))
        pixels = np.column_stack([rng.uniform((10, 10), (310, 230), (points, 2)), np.ones(points)])
        scene = pixels @ np.linalg.inv(k).T * rng.uniform(4, 8, (points, 1))
        stamps = 10**9 + 50_000_000 * np.arange(frames)
        poses = np.tile(np.eye(4), (frames, 1, 1))
        poses[:, 0, 3] = step * np.arange(frames)
        for i in range(frames):
            poses[i, :3, :3] = cv2.Rodrigues(np.array([0, turn * i, 0]))[0]
        wrong = np.arange(points) < outliers * points
        kept: list[FrameRecord] = []
        for i in range(frames):
            if dropped and i in dropped:
                kept.append(FrameRecord(i, int(stamps[i]), dropped[i], f"{dropped[i]} of image {i}"))
                continue
            seen = (scene - poses[i, :3, 3]) @ poses[i, :3, :3] @ k.T
            xy = (seen[:, :2] / seen[:, 2:] + (0, off * (i % 2))).astype(np.float32)
            kept.append(_replayed(i, int(stamps[i]), xy, kept, poses, k, calibrated, verified, wrong))
        described = {"bag": "made", "topic": "/camera/image_raw", "method": "scfeat", "settings": {"grid": 0}}
        return Recording(
            {**described, **(facts or {})},
            kept,
            camera if calibrated else None,
            GroundTruth(stamps, poses, "made") if truth else None,
        )

    return make


def _replayed(
    index: int,
    stamp: int,
    xy: np.ndarray,
    before: list[FrameRecord],
    poses: np.ndarray,
    k: np.ndarray,
    calibrated: bool,
    verified: bool,
    wrong: np.ndarray,
) -> FrameRecord:
    """A record of points (N, 2) that all are matched to the frame before."""
    count, all_points = len(xy), np.arange(len(xy))
    old = next((frame for frame in reversed(before) if not frame.dropped), None)
    sequence = 0 if old is None else old.sequence + 1
    pair = None
    if old is not None:
        relative = np.linalg.inv(poses[index]) @ poses[old.index]
        relative[2, 3] += 1e-12  # a camera that stands has no geometry, and this one needs one
        if calibrated:
            model, matrix = GeometryModel.ESSENTIAL, essential_from_pose(relative[:3, :3], relative[:3, 3])
        else:
            model = GeometryModel.FUNDAMENTAL
            matrix = fundamental_from_pose(k, k, relative[:3, :3], relative[:3, 3])
        matches = Matches(all_points, all_points, np.ones(count, np.float32))
        geometry = TwoViewGeometry(model, matrix, ~wrong, 1.0) if verified else None
        pair = PairResult(old.sequence, old.stamp, matches, old.keypoints, xy, geometry)
    flags = np.full(count, int(TrackFlag.NEW) if old is None else 0, np.uint8)
    ids = (all_points + 1).astype(np.uint32)
    ages = np.full(count, sequence + 1, np.uint32)
    tracks = Tracks(ids, ages, all_points, xy, None, None, flags, np.zeros(0, np.uint32))
    timings = {"network": 20.0 + index % 3, "match": 2.0, "decode": 1.0}
    quality = ImageQuality(0.5, 0.0, 0.0, 0.6)
    scores = np.ones(count, np.float32)
    return FrameRecord(index, stamp, "", "", sequence, (320, 240), xy, scores, pair, tracks, quality, "", timings)


class _Lazy(Sequence[FrameRecord]):
    """Records that are made anew when they are asked for, as those of a run folder. most: that lived at once."""

    def __init__(self, frames: Sequence[FrameRecord]) -> None:
        self._frames = frames
        self._alive = self.most = 0

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        frame = self._frames[index]
        record = replace(frame, keypoints=frame.keypoints.copy())
        weakref.finalize(record.keypoints, self._gone)
        self._alive += 1
        self.most = max(self.most, self._alive)
        return record

    def _gone(self) -> None:
        self._alive -= 1


@pytest.fixture(scope="session")
def lazily() -> Callable[[Sequence[FrameRecord]], _Lazy]:
    """``lazily(frames)``: the same as a sequence that holds none of them; ``most``: how many others held at once."""
    return _Lazy


_PROBE = """<script>
const problems = [];
addEventListener('error', event => problems.push(String(event.message || event.target.tagName)), true);
addEventListener('securitypolicyviolation', event => problems.push('blocked: ' + event.blockedURI));
console.error = console.warn = text => problems.push(String(text));
addEventListener('load', () => {
  const area = document.querySelector('.area[data-x]'), box = area && area.getBoundingClientRect();
  if (area) area.dispatchEvent(new PointerEvent('pointermove', { clientX: box.left + box.width / 2 }));
  const found = {
    problems, tips: [...document.querySelectorAll('.tip')].map(tip => tip.innerText),
    images: [...document.images].map(image => image.naturalWidth), tables: document.querySelectorAll('table').length,
    lines: document.querySelectorAll('polyline').length,
    headings: [...document.querySelectorAll('h2')].map(heading => heading.innerText),
    loaded: performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:')),
    width: document.documentElement.scrollWidth, room: document.documentElement.clientWidth,
  };
  const result = document.createElement('pre');
  result.id = 'probe'; result.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
  parent.document.body.append(result);
});
</script>"""


@pytest.fixture(scope="session")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """``browse(page, width=1200)``: what a real browser makes of a page: problems (errors, warnings, what its policy
    forbids), images (their widths, 0 of damaged ones), tables, lines, headings, tips, loaded (from elsewhere),
    width, room. In a frame, as a window cannot be as narrow as that of a telephone."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no browser: install chromium, or google-chrome")

    def open_page(page: Path, width: int = 1200) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("browser")
        probed = folder / "page.html"
        text = page.read_text(encoding="utf-8")
        before_the_policy = text.replace("<meta charset", f"{_PROBE}<meta charset", 1)
        style = f"border: 0; width: {width}px; height: 900px"
        frame = f'<iframe srcdoc="{html.escape(before_the_policy)}" style="{style}"></iframe>'
        probed.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}', encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width + 100},1000", "--timeout=20000"]
        result = subprocess.run(
            [*command, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=90, check=False
        )
        found = re.search(r'<pre id="probe">([^<]+)</pre>', result.stdout)
        assert found, f"the page did not load: {result.stderr[-2000:]}"
        return json.loads(base64.b64decode(found[1]))

    return open_page
