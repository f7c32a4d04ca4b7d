"""Rendered views with exact cameras and depth, and folders of them as data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from scfeat_core.demo_scene import intrinsics, look_at
from scfeat_core.rendering import TEXEL, Face, Renderer
from scfeat_core.scene_textures import fractal_noise

VIEW_SIZE = (320, 240)
POINTS = 400


@dataclass(frozen=True, eq=False)
class RenderedViews:
    """images: (H, W, 3) uint8 RGB. K: (3, 3); R: (n, 3, 3) and t: (n, 3), x_cam = R X + t. points: (P, 3).

    xy: (n, P, 2) exact pixels of the points; seen: (n, P) bool, in view and not hidden.
    """

    images: list[np.ndarray]
    K: np.ndarray
    R: np.ndarray
    t: np.ndarray
    points: np.ndarray
    xy: np.ndarray
    seen: np.ndarray


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
    return RenderedViews([view.image for view in views], k, r, t, points, xy, seen)


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
