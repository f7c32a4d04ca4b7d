"""A furnished room to fly a camera through: what ``scfeat demo`` plays when it is given no bag.

Real sequences cannot be bundled, so this is drawn: walls, pillars, crates and books at many depths, lit by a lamp and
by the sun through a window, with exact depth, intrinsics and poses. Everything follows from the seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_core import scene_textures as textures
from scfeat_core.rendering import TEXEL, Face, Lighting, Renderer, Rendering, bake, expose
from scfeat_core.scene_textures import Texture

ROOM = np.array([8.0, 6.0, 3.0])  # metres; the room is (0, 0, 0)..ROOM
SIZE = (640, 480)
PERIOD = 14.0  # seconds for one round of the camera


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of the moving camera with its ground truth.

    image: (H, W, 3) uint8 RGB as the sensor gives it. depth: (H, W) float32 metres. K: (3, 3).
    pose: (4, 4) T_world_camera. exposure: gain of this frame.
    """

    image: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    pose: np.ndarray
    exposure: float


def intrinsics(size: tuple[int, int] = SIZE, field_of_view: float = 65.0) -> np.ndarray:
    """(3, 3) pinhole K, principal point in the middle. size: (width, height). field_of_view: horizontal, degrees."""
    width, height = size
    focal = width / 2 / np.tan(np.radians(field_of_view) / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])


def look_at(position: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """T_world_camera (4, 4) of a camera at ``position`` that looks at ``target``, z up. roll: radians."""
    forward = target - position
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, (0, 0, 1))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    pose = np.eye(4)
    pose[:3] = np.stack([right, down, forward, position], axis=1)
    return pose


def camera_path(n: int, fps: float = 30.0) -> np.ndarray:
    """(n, 4, 4) T_world_camera along a closed, smooth, hand-held walk, one frame every 1 / fps seconds."""
    phase = 2 * np.pi * np.arange(n) / fps / PERIOD
    position = np.stack(
        [
            4.0 + 1.75 * np.sin(phase),
            1.45 + 0.65 * np.sin(2 * phase + 0.6),
            1.5 + 0.14 * np.sin(3 * phase) + 0.008 * np.sin(9 * phase),
        ],
        axis=1,
    )
    target = np.stack(
        [
            4.0 + 0.9 * np.sin(phase + 0.9) + 0.04 * np.sin(7 * phase),
            4.6 + 0.3 * np.cos(phase),
            1.12 + 0.13 * np.sin(2 * phase) + 0.03 * np.sin(11 * phase),
        ],
        axis=1,
    )
    roll = 0.035 * np.sin(2 * phase + 1) + 0.01 * np.sin(8 * phase)
    return np.stack([look_at(p, t, float(r)) for p, t, r in zip(position, target, roll, strict=True)])


def exposure_path(n: int, fps: float = 30.0) -> np.ndarray:
    """(n,) gain of each frame: auto-exposure that hunts by about a stop around 1."""
    t = np.arange(n) / fps
    return np.exp(0.3 * np.sin(6 * np.pi * t / PERIOD) + 0.1 * np.sin(16 * np.pi * t / PERIOD))


class Scene:
    """The furnished room. The seed decides textures and where the smaller things stand; building takes seconds.

    faces: everything that can be seen, as rendering.Face; the first six are the room.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        furniture = _Furniture(np.random.default_rng((seed, 1)))
        _furnish(furniture)
        self.faces = faces = furniture.room + furniture.faces
        lit = bake(faces, furniture.solids, ROOM, LIGHTING, np.random.default_rng((seed, 2)))
        self._renderer = Renderer(faces, lit, room_faces=len(furniture.room))

    def render(self, pose: np.ndarray, K: np.ndarray, size: tuple[int, int] = SIZE) -> Rendering:
        """One noise-free view at exposure 1. pose: (4, 4) T_world_camera inside the room. size: (width, height)."""
        return self._renderer.render(pose, K, size)

    def frames(self, n: int, fps: float = 30.0, size: tuple[int, int] = SIZE, noise: float = 1.5) -> Iterator[Frame]:
        """The first ``n`` frames of the walk, with exposure change and sensor noise (grey levels at mid grey)."""
        K = intrinsics(size)
        for i, (pose, exposure) in enumerate(zip(camera_path(n, fps), exposure_path(n, fps), strict=True)):
            view = self.render(pose, K, size)
            rng = np.random.default_rng((self.seed, 3, i))
            yield Frame(expose(view.image, float(exposure), noise, rng), view.depth, K, pose, float(exposure))


LIGHTING = Lighting(
    lamp=(3.0, 2.2, 5.0, 3.4, 2.95),
    window=(0.0, 2.4, 0.9, 4.6, 2.4),
    sun=np.array([-0.90, -0.16, 0.40]) / np.linalg.norm([-0.90, -0.16, 0.40]),
)


def _axis(values: tuple[float, float, float]) -> np.ndarray:
    return np.array(values, np.float64)


class _Furniture:
    """Collects the faces of what stands in the room, and its convex bodies for the shadows."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.faces: list[Face] = []
        self.solids: list[np.ndarray] = []
        self.room: list[Face] = []

    def texture(self, paint: Texture, width: float, height: float) -> np.ndarray:
        return paint(self.rng, max(2, round(height / TEXEL)), max(2, round(width / TEXEL)))

    def prism(self, outline: np.ndarray, bottom: float, top: float, side: Texture, cap: Texture) -> None:
        """An upright prism over a convex outline (V, 2), counter-clockwise from above; caps only where V is 4."""
        ring = np.roll(outline, -1, axis=0)
        lengths = np.linalg.norm(ring - outline, axis=1)
        # one texture around the whole body where its sides are narrow, so that it has no seams
        around = self.texture(side, float(lengths.sum()), top - bottom) if len(outline) > 4 else None
        start = 0
        planes = [(0, 0, 1, top), (0, 0, -1, -bottom)]
        for a, b, length in zip(outline, ring, lengths, strict=True):
            right = np.append((b - a) / length, 0)
            width = max(2, round(length / TEXEL))
            sheet = self.texture(side, length, top - bottom) if around is None else around[:, start : start + width]
            start += width
            if sheet.shape[1] == width:
                sheet_face = Face(np.append(a, top), right, _axis((0, 0, -1)), np.ascontiguousarray(sheet))
                self.faces.append(sheet_face)
            outward = np.array((right[1], -right[0]))
            planes.append((*outward, 0, float(outward @ a)))
        self.solids.append(np.array(planes, np.float64))
        if len(outline) == 4:
            self._caps(outline, bottom, top, cap)

    def _caps(self, outline: np.ndarray, bottom: float, top: float, cap: Texture) -> None:
        right, back = outline[1] - outline[0], outline[3] - outline[0]
        width, depth = float(np.linalg.norm(right)), float(np.linalg.norm(back))
        right, back = np.append(right / width, 0), np.append(back / depth, 0)
        upper = Face(np.append(outline[3], top), right, -back, self.texture(cap, width, depth))
        self.faces.append(upper)
        if bottom > 0:
            self.faces.append(Face(np.append(outline[0], bottom), right, back, self.texture(cap, width, depth)))

    def box(
        self,
        centre: tuple[float, float],
        size: tuple[float, float, float],
        yaw: float,
        side: Texture,
        cap: Texture | None = None,
        bottom: float = 0.0,
    ) -> None:
        """A box on the floor, or at height ``bottom``; yaw in degrees. Sizes snap to whole texels."""
        width, depth, height = (max(2, round(s / TEXEL)) * TEXEL for s in size)
        c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
        corners = np.array([(-width, -depth), (width, -depth), (width, depth), (-width, depth)]) / 2
        outline = np.asarray(centre) + corners @ np.array([(c, s), (-s, c)])
        self.prism(outline, bottom, bottom + height, side, cap or side)

    def column(self, centre: tuple[float, float], radius: float, side: Texture, sides: int = 14) -> None:
        """A pillar from floor to ceiling."""
        width = max(2, round(2 * radius * np.sin(np.pi / sides) / TEXEL)) * TEXEL
        angle = 2 * np.pi * np.arange(sides) / sides
        reach = width / 2 / np.sin(np.pi / sides)
        outline = np.asarray(centre) + reach * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        self.prism(outline, 0.0, float(ROOM[2]), side, side)


def _decorate(wall: np.ndarray, picture: np.ndarray, left: float, top: float) -> None:
    """Put a picture on a wall texture. left, top: metres from its corner."""
    x, y = round(left / TEXEL), round(top / TEXEL)
    h, w = picture.shape[:2]
    shade = wall[y + 4 : y + h + 8, x + 4 : x + w + 8]
    shade *= np.float32(0.72)
    wall[y : y + h, x : x + w] = picture


def _build_room(furniture: _Furniture) -> None:
    t, (length, depth, height) = furniture.texture, ROOM
    floor = t(textures.planks((0.60, 0.42, 0.27), board=0.16), length, depth)
    ceiling = t(textures.plaster((0.93, 0.91, 0.87)), length, depth)
    x0, y0, x1, y1, _ = LIGHTING.lamp
    lamp = [(round(x / TEXEL), round(y / TEXEL)) for x, y in ((x0, y0), (x1, y1))]
    cv2.rectangle(ceiling, lamp[0], lamp[1], (1.6, 1.55, 1.45), -1)
    back = t(textures.plaster((0.90, 0.85, 0.76), dado=(0.30, 0.42, 0.43)), length, height)
    front = t(textures.plaster((0.88, 0.84, 0.78)), length, height)
    left = t(textures.plaster((0.86, 0.78, 0.66), dado=(0.30, 0.42, 0.43)), depth, height)
    right = t(textures.brick, depth, height)
    warm = [(0.93, 0.88, 0.76), (0.80, 0.30, 0.22), (0.93, 0.66, 0.26), (0.16, 0.36, 0.44), (0.13, 0.12, 0.14)]
    cool = [(0.20, 0.33, 0.42), (0.90, 0.82, 0.66), (0.86, 0.44, 0.28), (0.55, 0.72, 0.70), (0.95, 0.93, 0.88)]
    pale = [(0.88, 0.88, 0.84), (0.25, 0.42, 0.35), (0.86, 0.55, 0.48), (0.90, 0.76, 0.40), (0.16, 0.18, 0.22)]
    _decorate(back, t(textures.poster(warm), 1.0, 1.3), 2.35, 0.45)
    _decorate(back, t(textures.poster(cool), 1.3, 0.9), 3.75, 0.62)
    _decorate(back, t(textures.poster(pale), 0.7, 0.95), 5.4, 0.7)
    _decorate(back, t(textures.poster(warm), 0.45, 0.6), 7.2, 0.75)
    _decorate(right, t(textures.poster(pale), 1.1, 0.8), 2.6, 0.8)
    _decorate(left, t(textures.poster(cool), 0.8, 1.0), 4.85, 0.7)
    _decorate(front, t(textures.poster(warm), 1.4, 1.0), 3.0, 0.8)
    _, wy0, wz0, wy1, wz1 = LIGHTING.window
    _decorate(left, t(textures.window, wy1 - wy0, wz1 - wz0), wy0, height - wz1)
    x, y, z = _axis((1, 0, 0)), _axis((0, 1, 0)), _axis((0, 0, 1))
    furniture.room = [
        Face(_axis((0, depth, 0)), x, -y, floor),
        Face(_axis((0, 0, height)), x, y, ceiling),
        Face(_axis((0, depth, height)), x, -z, back),
        Face(_axis((length, 0, height)), -x, -z, front),
        Face(_axis((0, 0, height)), y, -z, left),
        Face(_axis((length, depth, height)), -y, -z, right),
    ]


def _furnish(furniture: _Furniture) -> None:
    """Stand everything up. The camera walks at y < 2.3: nothing stands there."""
    _build_room(furniture)
    rng, add = furniture.rng, furniture
    wood, dark, painted = (0.66, 0.47, 0.29), (0.44, 0.30, 0.20), (0.35, 0.45, 0.42)

    def about(x: float, y: float, spread: float = 0.08) -> tuple[float, float]:
        return x + float(rng.uniform(-spread, spread)), y + float(rng.uniform(-spread, spread))

    def turned(yaw: float) -> float:
        return yaw + float(rng.uniform(-8, 8))

    add.box((4.3, 3.45), (2.6, 1.7, 0.01), turned(0), textures.rug)
    add.column((2.35, 3.55), 0.19, textures.concrete)
    add.column((6.15, 3.9), 0.19, textures.concrete)
    add.box((1.25, 5.8), (1.6, 0.36, 2.1), 0, textures.books, textures.planks(dark))
    add.box((6.95, 5.78), (1.3, 0.40, 1.25), 0, textures.books, textures.planks(dark))
    # a terrazzo bench with things on it
    bench = about(4.25, 3.5)
    yaw = turned(6)
    add.box(bench, (1.5, 0.55, 0.45), yaw, textures.terrazzo((0.82, 0.80, 0.75)))
    on_bench = (
        ((-0.45, 0.0), (0.30, 0.24, 0.26), 25, textures.metal((0.70, 0.22, 0.18)), 0.45),
        ((0.10, 0.05), (0.34, 0.24, 0.06), -12, textures.metal((0.86, 0.78, 0.60)), 0.45),
        ((0.10, 0.05), (0.30, 0.20, 0.05), 8, textures.metal((0.18, 0.34, 0.46)), 0.51),
        ((0.52, 0.0), (0.16, 0.16, 0.38), 40, textures.terrazzo((0.30, 0.36, 0.40)), 0.45),
    )
    for (dx, dy), size, angle, paint, bottom in on_bench:
        add.box((bench[0] + dx, bench[1] + dy), size, turned(angle), paint, bottom=bottom)
    # crates
    low = about(6.9, 3.0)
    add.box(low, (0.8, 0.7, 0.6), turned(-18), textures.crate(wood))
    add.box(low, (0.55, 0.5, 0.45), turned(14), textures.crate(painted), bottom=0.6)
    pile = about(3.2, 5.2)
    add.box(pile, (0.75, 0.75, 0.7), turned(10), textures.crate(dark))
    add.box((pile[0] + 0.05, pile[1]), (0.5, 0.5, 0.42), turned(-25), textures.crate(wood), bottom=0.7)
    add.box(about(5.35, 5.25), (0.65, 0.6, 0.95), turned(-8), textures.metal((0.24, 0.40, 0.44)))
    add.box(about(1.25, 3.1), (0.6, 0.6, 0.5), turned(22), textures.crate(painted))
    add.box(about(7.5, 4.6), (0.5, 0.5, 1.5), turned(0), textures.terrazzo((0.66, 0.42, 0.34)))
    add.box(about(0.55, 4.9), (0.5, 0.5, 0.75), turned(5), textures.metal((0.80, 0.62, 0.26)))
    # free-standing panels: thin, with the room seen past both edges
    add.box(about(3.35, 4.35), (0.9, 0.04, 1.5), turned(20), _print_of(rng, 0), textures.planks(dark))
    add.box(about(5.2, 4.35), (0.8, 0.04, 1.25), turned(-24), _print_of(rng, 1), textures.planks(dark))


def _print_of(rng: np.random.Generator, kind: int) -> Texture:
    grounds = [
        [(0.94, 0.74, 0.32), (0.16, 0.22, 0.32), (0.80, 0.28, 0.22), (0.95, 0.92, 0.85), (0.14, 0.13, 0.15)],
        [(0.30, 0.50, 0.50), (0.94, 0.88, 0.74), (0.88, 0.50, 0.30), (0.14, 0.20, 0.26), (0.95, 0.93, 0.88)],
    ]
    return textures.poster(grounds[kind])
