"""A small exact renderer: textured rectangles, baked light, a pinhole camera.

Each surface is a flat rectangle, so that inverse depth and perspective texture coordinates are linear functions of the
pixel and everything is exact up to float32 rounding: depth is the depth of the surface at the pixel centre, and the
intrinsics and the pose that are given are the ones that are rendered. Textures live in one mip-mapped atlas and are
filtered along the longer axis of the pixel's footprint; pixels on silhouettes are supersampled. Light (an area lamp,
sun through a window, ambient occlusion) does not depend on the view and is baked into the textures, so that the same
surface point has the same colour in all views.

World: metres, z up (REP-103). Camera: optical frame, x right, y down, z forward. ``T_world_camera`` takes points from
the camera to the world. Pixel (0, 0) is the centre of the top-left pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

TEXEL = 0.005  # metres of surface per texel of the finest level
_LEVELS = 6
_GUTTER = 1 << (_LEVELS - 1)  # keeps neighbours in the atlas apart at the coarsest level
_LEVEL_SCALES = np.float32(0.5) ** np.arange(_LEVELS, dtype=np.float32)
_BAND = 48  # rows
_NEAR = 0.02  # metres
_GAMMA = 2.2
_SUBSAMPLES = np.array([(-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375)], np.float32)


@dataclass(frozen=True, eq=False)
class Rendering:
    """image: (H, W, 3) uint8 RGB. depth: (H, W) float32, metres along the optical axis at the pixel centre."""

    image: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True, eq=False)
class Face:
    """A textured rectangle seen from its front.

    origin: (3,) top-left corner, metres. right, down: (3,) unit vectors along the rows and columns of the texture.
    texture: (h, w, 3) float32 RGB in 0..1, display-referred, one texel per TEXEL metres.
    """

    origin: np.ndarray
    right: np.ndarray
    down: np.ndarray
    texture: np.ndarray

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in metres."""
        return self.texture.shape[1] * TEXEL, self.texture.shape[0] * TEXEL

    @property
    def normal(self) -> np.ndarray:
        """(3,) unit vector towards the viewer."""
        return -np.cross(self.right, self.down)

    @property
    def corners(self) -> np.ndarray:
        """(4, 3) metres, clockwise from the top left."""
        width, height = self.size
        steps = np.array([(0, 0), (width, 0), (width, height), (0, height)])
        return self.origin + steps[:, :1] * self.right + steps[:, 1:] * self.down


@dataclass(frozen=True, eq=False)
class Lighting:
    """A horizontal rectangular lamp, the sun through a window, and what is reflected from everywhere.

    lamp: (x0, y0, x1, y1, z) metres. window: (x, y0, z0, y1, z1), a rectangle in a plane of constant x.
    sun: (3,) unit vector towards the sun.
    """

    lamp: tuple[float, float, float, float, float]
    window: tuple[float, float, float, float, float]
    sun: np.ndarray
    lamp_power: float = 4.6
    sun_power: float = 4.5
    lamp_colour: tuple[float, float, float] = (1.0, 0.97, 0.92)
    sun_colour: tuple[float, float, float] = (1.0, 0.86, 0.64)
    ambient_colour: tuple[float, float, float] = (0.46, 0.50, 0.56)


# ------------------------------------------------------------------------------------------------ light, once per scene


def _first_hit(origins: np.ndarray, directions: np.ndarray, solids: Sequence[np.ndarray]) -> np.ndarray:
    """Distance to the first solid along each ray, inf where there is none.

    origins: (3, R); directions: (3, R) or (3, 1). solids: each (P, 4), a convex body n.x <= d as rows (n, d).
    """
    nearest = np.full(origins.shape[1], np.inf, np.float32)
    for planes in solids:
        normals, offsets = planes[:, :3].astype(np.float32), planes[:, 3:].astype(np.float32)
        speed = normals @ directions
        distance = offsets - normals @ origins
        with np.errstate(divide="ignore", invalid="ignore"):
            t = distance / speed
        # a ray along a plane and outside of it never enters: its t is -inf or nan, and both lose below
        enter = np.where(speed < 0, t, np.where((speed == 0) & (distance < 0), np.inf, -np.inf)).max(axis=0)
        leave = np.where(speed > 0, t, np.inf).min(axis=0)
        np.minimum(nearest, np.where((enter < leave) & (enter > 1e-4), enter, np.inf), out=nearest)
    return nearest


def _hemisphere(normal: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Cosine-weighted directions about normals. normal: (3, R). uniform: (2,) in 0..1. Returns (3, R) float32."""
    radius, angle = np.sqrt(uniform[0]), 2 * np.pi * uniform[1]
    helper = np.where(np.abs(normal[0]) < 0.9, np.array([[1.0], [0], [0]]), np.array([[0], [1.0], [0]]))
    side = np.cross(normal, helper, axis=0)
    side /= np.linalg.norm(side, axis=0)
    up = np.cross(normal, side, axis=0)
    around = np.cos(angle) * side + np.sin(angle) * up
    return (radius * around + np.sqrt(1 - uniform[0]) * normal).astype(np.float32)


def _cells(face: Face, cell: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Centres of the light-map cells of a face, a millimetre above it: (3, rows * cols), and (rows, cols)."""
    width, height = face.size
    rows, cols = max(3, round(height / cell)), max(3, round(width / cell))
    v, u = np.mgrid[:rows, :cols]
    u, v = (u.ravel() + 0.5) / cols * width, (v.ravel() + 0.5) / rows * height
    points = (face.origin + 1e-3 * face.normal)[:, None] + np.outer(face.right, u) + np.outer(face.down, v)
    return points.astype(np.float32), (rows, cols)


def _room_distance(points: np.ndarray, directions: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Distance along rays to the walls of the box (0, 0, 0)..room that holds the points (3, R)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(directions > 0, room[:, None] - points, -points) / directions
    return np.where(np.isfinite(t), t, np.inf).min(axis=0)


def _lamp_light(points: np.ndarray, normals: np.ndarray, solids: Sequence[np.ndarray], lamp: Lighting) -> np.ndarray:
    x0, y0, x1, y1, z = lamp.lamp
    side = 3
    light = np.zeros(points.shape[1], np.float32)
    for u, v in (np.mgrid[:side, :side].reshape(2, -1).T + 0.5) / side:
        ray = np.array([[x0 + u * (x1 - x0)], [y0 + v * (y1 - y0)], [z]], np.float32) - points
        length = np.sqrt((ray * ray).sum(axis=0))
        ray /= length
        facing = np.clip((ray * normals).sum(axis=0), 0, None) * np.clip(ray[2], 0, None)
        light += (_first_hit(points, ray, solids) > length) * facing / length**2 * (lamp.lamp_power / side**2)
    return light


def _sun_light(points: np.ndarray, normals: np.ndarray, solids: Sequence[np.ndarray], lamp: Lighting) -> np.ndarray:
    plane, y0, z0, y1, z1 = lamp.window
    sun = lamp.sun.astype(np.float32)[:, None]
    reach = (plane - points[0]) / sun[0]
    y, z = points[1] + reach * sun[1], points[2] + reach * sun[2]
    through = (reach > 0) & (y > y0) & (y < y1) & (z > z0) & (z < z1)
    lit = through & (_first_hit(points, sun, solids) > reach)
    return lit * np.clip((normals * sun).sum(axis=0), 0, None) * np.float32(lamp.sun_power)


def _ambient_light(
    points: np.ndarray, normals: np.ndarray, solids: Sequence[np.ndarray], room: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """1 in the open, less near other surfaces, with a reach of about half a metre."""
    strata = (np.mgrid[:3, :3].reshape(2, -1).T + rng.random((9, 2))) / 3
    openness = np.zeros(points.shape[1], np.float32)
    for uniform in strata:
        rays = _hemisphere(normals, uniform)
        distance = np.minimum(_first_hit(points, rays, solids), _room_distance(points, rays, room))
        openness += 1 - np.exp(-2 * distance)
    return openness / len(strata)


def bake(
    faces: Sequence[Face],
    solids: Sequence[np.ndarray],
    room: np.ndarray,
    lighting: Lighting,
    rng: np.random.Generator,
    cell: float = 0.1,
) -> list[np.ndarray]:
    """Textures of the faces under the light, by ray casting: each (h, w, 3) uint8, display-referred.

    solids: the convex bodies that cast shadows, each (P, 4) rows (n, d) of n.x <= d. room: (3,) the walls are those of
    (0, 0, 0)..room. cell: metres of a cell of the light maps.
    """
    points, shapes = zip(*(_cells(face, cell) for face in faces), strict=True)
    counts = [p.shape[1] for p in points]
    where = np.concatenate(points, axis=1)
    normals = np.repeat(np.array([face.normal for face in faces], np.float32).T, counts, axis=1)
    light = (
        np.outer(_lamp_light(where, normals, solids, lighting), lighting.lamp_colour)
        + np.outer(_sun_light(where, normals, solids, lighting), lighting.sun_colour)
        + np.outer(_ambient_light(where, normals, solids, room, rng), lighting.ambient_colour)
    ).astype(np.float32)
    maps = np.split(light, np.cumsum(counts)[:-1])
    return [_shade(face, m.reshape(*s, 3)) for face, m, s in zip(faces, maps, shapes, strict=True)]


def _shade(face: Face, light: np.ndarray) -> np.ndarray:
    """Texture under its light map (rows, cols, 3): (h, w, 3) uint8."""
    height, width = face.texture.shape[:2]
    # the gamma curve of a product is the product of the curves: only the small map needs the power
    gain = np.power(np.clip(cv2.GaussianBlur(light, (3, 3), 0.6), 0.003, None), 1 / _GAMMA).astype(np.float32)
    lit = face.texture * cv2.resize(gain, (width, height), interpolation=cv2.INTER_LINEAR)
    # soft shoulder instead of clipping: highlights keep their texture
    lit = np.where(lit < 0.75, lit, 1 - 0.25 * np.exp(np.float32(-4) * (np.maximum(lit, 0.75) - np.float32(0.75))))
    return cv2.convertScaleAbs(np.maximum(lit, 0), alpha=255)


# --------------------------------------------------------------------------------------------------------------- atlas


@dataclass(frozen=True, eq=False)
class Atlas:
    """All textures with their coarser levels in one image.

    image: (H, W, 3) uint8. origins: (F, 2) float32 texel of each face's first texel centre in the finest level.
    level_offsets: (2, L) float32 where each level starts in the image.
    """

    image: np.ndarray
    origins: np.ndarray
    level_offsets: np.ndarray


def build_atlas(textures: Sequence[np.ndarray]) -> Atlas:
    """Pack textures (h, w, 3) uint8 on shelves, each with a replicated border, and add the coarser levels."""
    align, width = 1 << (_LEVELS - 1), 4096
    order = sorted(range(len(textures)), key=lambda i: -textures[i].shape[0])
    width = max(width, max(t.shape[1] for t in textures) + 2 * _GUTTER + align)
    places = np.zeros((len(textures), 4), int)
    x = y = shelf = 0
    for i in order:
        h, w = (-(-(s + 2 * _GUTTER) // align) * align for s in textures[i].shape[:2])
        if x + w > width:
            x, y, shelf = 0, y + shelf, 0
        places[i] = (x, y, w, h)
        x, shelf = x + w, max(shelf, h)
    height = y + shelf
    base = np.zeros((height, width, 3), np.uint8)
    for texture, (px, py, w, h) in zip(textures, places, strict=True):
        th, tw = texture.shape[:2]
        base[py : py + h, px : px + w] = cv2.copyMakeBorder(
            texture, _GUTTER, h - th - _GUTTER, _GUTTER, w - tw - _GUTTER, cv2.BORDER_REPLICATE
        )
    image = np.zeros((height, width + width // 2, 3), np.uint8)
    image[:, :width] = base
    offsets, level, top = [(0, 0)], base, 0
    for _ in range(1, _LEVELS):
        level = cv2.resize(level, (level.shape[1] // 2, level.shape[0] // 2), interpolation=cv2.INTER_AREA)
        image[top : top + level.shape[0], width : width + level.shape[1]] = level
        offsets.append((width, top))
        top += level.shape[0]
    return Atlas(image, (places[:, :2] + _GUTTER).astype(np.float32), np.array(offsets, np.float32).T)


# ----------------------------------------------------------------------------------------------------------- rasteriser


@dataclass(frozen=True, eq=False)
class _View:
    """Faces as linear functions of the pixel: value = c . (x, y, 1), float64.

    inverse_depth, atlas_x, atlas_y: (F, 3); the latter two are texture coordinates times inverse depth.
    limits: (F, 4) first and last atlas coordinate x0, x1, y0, y1 of each face. foot: (2, F) atlas point under the
    camera. height: (F,) metres of the camera above the plane. boxes: (F, 4) x0, y0, x1, y1 of the pixels that may
    show the face, empty where it is behind.
    """

    inverse_depth: np.ndarray
    atlas_x: np.ndarray
    atlas_y: np.ndarray
    limits: np.ndarray
    foot: np.ndarray
    height: np.ndarray
    boxes: np.ndarray


def _clip_to_near(polygon: np.ndarray) -> np.ndarray:
    """The part of a convex polygon (V, 3) in the camera frame with z >= _NEAR."""
    kept: list[np.ndarray] = []
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if a[2] >= _NEAR:
            kept.append(a)
        if (a[2] >= _NEAR) != (b[2] >= _NEAR):
            kept.append(a + (b - a) * (_NEAR - a[2]) / (b[2] - a[2]))
    return np.array(kept).reshape(-1, 3)


def _screen_box(corners: np.ndarray, K: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    polygon = _clip_to_near(corners)
    if len(polygon) < 3:
        return (0, 0, 0, 0)
    pixels = polygon @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    # half a pixel more on each side: the supersampled silhouettes use the same boxes
    low = np.clip(np.floor(pixels.min(axis=0)), 0, size).astype(int)
    high = np.clip(np.ceil(pixels.max(axis=0)) + 1, 0, size).astype(int)
    return (int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def _plane_rows(x: np.ndarray, y: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c . (x, y, 1) where x and y broadcast (a row and a column, or two lists of points)."""
    return np.float32(c[0]) * x + (np.float32(c[1]) * y + np.float32(c[2]))


def _footprint_axis(delta: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norm = np.sqrt((delta * delta).sum(axis=0)) + np.float32(1e-6)
    return delta[0] * (length / norm), delta[1] * (length / norm)


class Renderer:
    """Renders fixed faces from any pose. Stateless after construction: the same arguments give the same image.

    ``room_faces`` first faces enclose the scene from inside: of these, the one that a ray leaves through is seen.
    """

    def __init__(self, faces: Sequence[Face], textures: Sequence[np.ndarray], room_faces: int = 6) -> None:
        if len(faces) > 65535:
            raise ValueError(f"expected at most 65535 faces, found {len(faces)}")
        self._room_faces = room_faces
        self._atlas = build_atlas(textures)
        self._origins = np.array([f.origin for f in faces])
        self._right = np.array([f.right for f in faces])
        self._down = np.array([f.down for f in faces])
        self._normals = np.array([f.normal for f in faces])
        self._corners = np.array([f.corners for f in faces])
        self._sizes = np.array([f.size for f in faces])

    def render(self, pose: np.ndarray, K: np.ndarray, size: tuple[int, int]) -> Rendering:
        """One view. pose: (4, 4) T_world_camera. K: (3, 3). size: (width, height) pixels."""
        width, height = size
        pose, K = np.asarray(pose, np.float64), np.asarray(K, np.float64)
        view = self._view(pose, K, size)
        x, y = np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]
        face, inverse, u, v = self._raster_grid(view, x, y)
        image = self._sample(view, face, inverse, u, v, float(K[0, 0]))
        self._smooth_silhouettes(view, face, inverse, image, float(K[0, 0]))
        return Rendering(image, 1 / inverse)

    def _view(self, pose: np.ndarray, K: np.ndarray, size: tuple[int, int]) -> _View:
        rotation, position = pose[:3, :3], pose[:3, 3]
        rays = rotation @ np.linalg.inv(K)  # pixel -> world direction with unit depth
        offset = self._origins - position
        height = -(offset * self._normals).sum(axis=1)
        edge_on = np.abs(height) < 1e-9
        height[edge_on] = -1  # as good as behind: such a face has no area in the image
        inverse = (self._normals @ rays) / -height[:, None]
        start = np.stack([(offset * self._right).sum(axis=1), (offset * self._down).sum(axis=1)], axis=1)
        foot = (-start / TEXEL - 0.5) + self._atlas.origins
        atlas_x = self._right @ rays / TEXEL + foot[:, :1] * inverse
        atlas_y = self._down @ rays / TEXEL + foot[:, 1:] * inverse
        low = self._atlas.origins - 0.5
        high = low + self._sizes / TEXEL
        limits = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
        in_camera = (self._corners - position) @ rotation
        boxes = np.array(
            [_screen_box(c, K, size) if h > 0 else (0, 0, 0, 0) for c, h in zip(in_camera, height, strict=True)]
        )
        return _View(inverse, atlas_x, atlas_y, limits, foot.T.astype(np.float32), height.astype(np.float32), boxes)

    def _raster_grid(self, view: _View, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Visible face, inverse depth and atlas coordinates of each pixel of a grid."""
        shape = (y.shape[0], x.shape[1])
        face = np.zeros(shape, np.uint16)
        inverse, u, v = (np.zeros(shape, np.float32) for _ in range(3))
        for i, (x0, y0, x1, y1) in enumerate(view.boxes):
            if x1 > x0 and y1 > y0:
                window = np.s_[y0:y1, x0:x1]
                self._raster_face(view, i, x[:, x0:x1], y[y0:y1], face[window], inverse[window], u[window], v[window])
        np.divide(u, inverse, out=u)
        np.divide(v, inverse, out=v)
        return face, inverse, u, v

    def _raster_face(
        self,
        view: _View,
        i: int,
        x: np.ndarray,
        y: np.ndarray,
        face: np.ndarray,
        inverse: np.ndarray,
        u: np.ndarray,
        v: np.ndarray,
    ) -> None:
        """Draw one face into the buffers where it is nearer than what they hold."""
        w = _plane_rows(x, y, view.inverse_depth[i])
        if i < self._room_faces:
            # a convex room is left through the nearest plane in front: the largest inverse depth
            seen = w > inverse
        else:
            seen = w > inverse
            for c, sign, limit in zip(
                (view.atlas_x[i], view.atlas_x[i], view.atlas_y[i], view.atlas_y[i]),
                (1, -1, 1, -1),
                view.limits[i],
                strict=True,
            ):
                seen &= _plane_rows(x, y, sign * (c - limit * view.inverse_depth[i])) >= 0
        if not seen.any():
            return
        np.copyto(face, np.uint16(i), where=seen)
        np.copyto(inverse, w, where=seen)
        np.copyto(u, _plane_rows(x, y, view.atlas_x[i]), where=seen)
        np.copyto(v, _plane_rows(x, y, view.atlas_y[i]), where=seen)

    def _sample(
        self, view: _View, face: np.ndarray, inverse: np.ndarray, u: np.ndarray, v: np.ndarray, focal: float
    ) -> np.ndarray:
        """Filtered texture at atlas coordinates: arrays (H, W) -> (H, W, 3) uint8."""
        image = np.empty((*face.shape, 3), np.uint8)
        for top in range(0, len(face), _BAND):  # small enough for the caches: twice as fast as all at once
            rows = np.s_[top : top + _BAND]
            image[rows] = self._sample_band(view, face[rows], inverse[rows], u[rows], v[rows], focal)
        return image

    def _sample_band(
        self, view: _View, face: np.ndarray, inverse: np.ndarray, u: np.ndarray, v: np.ndarray, focal: float
    ) -> np.ndarray:
        """As _sample, for a few rows.

        The footprint of a pixel on a plane is about depth / focal wide, and longer by 1 / cos(angle) in the direction
        of sight; two taps share the longer axis, and two levels share the scale.
        """
        depth = 1 / inverse
        across = depth * np.float32(1 / (focal * TEXEL))
        delta = np.stack([u - np.take(view.foot[0], face), v - np.take(view.foot[1], face)])
        height = np.take(view.height, face) * np.float32(1 / TEXEL)
        slant = np.sqrt((delta * delta).sum(axis=0) / (height * height) + 1)
        along = across * np.minimum(slant, 4)
        step_x, step_y = _footprint_axis(delta, (along - across) * np.float32(0.35))
        level = np.clip(np.log2(np.maximum(np.maximum(across, along * np.float32(0.5)), 1)), 0, _LEVELS - 1.001)
        lower = level.astype(np.int32)
        blend = (level - lower)[..., None]
        taps = []
        for sign in (-1, 1):
            for k in (0, 1):
                scale = np.take(_LEVEL_SCALES, lower + k)
                at_x, at_y = (np.take(axis, lower + k) for axis in self._atlas.level_offsets)
                taps.append(
                    (
                        (u + sign * step_x + np.float32(0.5)) * scale - np.float32(0.5) + at_x,
                        (v + sign * step_y + np.float32(0.5)) * scale - np.float32(0.5) + at_y,
                    )
                )
        map_x, map_y = (np.concatenate(axis) for axis in zip(*taps, strict=True))
        colours = cv2.remap(self._atlas.image, map_x, map_y, cv2.INTER_LINEAR)
        a0, a1, b0, b1 = colours.reshape(4, *face.shape, 3)
        fine, coarse = cv2.add(a0, b0, dtype=cv2.CV_32F), cv2.add(a1, b1, dtype=cv2.CV_32F)
        fine += (coarse - fine) * blend
        return cv2.convertScaleAbs(fine, alpha=0.5)

    def _smooth_silhouettes(
        self, view: _View, face: np.ndarray, inverse: np.ndarray, image: np.ndarray, focal: float
    ) -> None:
        """Replace pixels where two faces meet by the mean of four samples inside the pixel."""
        edge = np.zeros(face.shape, bool)
        across, down = face[:, 1:] != face[:, :-1], face[1:] != face[:-1]
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        edge[1:] |= down
        edge[:-1] |= down
        rows, cols = np.nonzero(edge)
        if not len(rows):
            return
        x = (cols[:, None].astype(np.float32) + _SUBSAMPLES[:, 0]).ravel()
        y = (rows[:, None].astype(np.float32) + _SUBSAMPLES[:, 1]).ravel()
        count, side = len(x), 512
        padding = -count % side
        face_at = np.zeros(count + padding, np.uint16)
        w, u, v = (np.zeros(count + padding, np.float32) for _ in range(3))
        # points come in rows of the image: those of a box are one slice, then a choice by column
        for i, (x0, y0, x1, y1) in enumerate(view.boxes):
            if x1 <= x0 or y1 <= y0:
                continue
            first, last = np.searchsorted(rows, (y0 - 1, y1 + 1))
            columns = cols[first:last]
            near = np.flatnonzero((columns >= x0 - 1) & (columns <= x1)) + first
            at = (near[:, None] * 4 + np.arange(4)).ravel()
            faces, inverses, us, vs = face_at[at], w[at], u[at], v[at]
            self._raster_face(view, i, x[at], y[at], faces, inverses, us, vs)
            face_at[at], w[at], u[at], v[at] = faces, inverses, us, vs
        w[count:], hidden = 1, w[:count] <= 0
        np.divide(u, w, out=u, where=w > 0)
        np.divide(v, w, out=v, where=w > 0)
        w[:count][hidden] = 1
        grid = (-1, side)
        samples = self._sample(
            view, face_at.reshape(grid), w.reshape(grid), u.reshape(grid), v.reshape(grid), focal
        ).reshape(-1, 3)[:count]
        image[rows, cols] = (samples.reshape(-1, 4, 3).astype(np.uint16).sum(axis=1) + 2) // 4


# --------------------------------------------------------------------------------------------------------------- sensor


def expose(image: np.ndarray, exposure: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """What a sensor makes of an image: exposure in linear light, then shot and read noise.

    image: (H, W, 3) uint8. exposure: gain, 1 leaves the brightness. noise: standard deviation in grey levels at mid
    grey, 0 for none. Returns (H, W, 3) uint8.
    """
    linear = (np.arange(256) / 255) ** _GAMMA * exposure
    display = linear ** (1 / _GAMMA)
    display = np.where(display < 0.8, display, 1 - 0.2 * np.exp(-(display - 0.8) / 0.2)) if exposure > 1 else display
    curve = np.clip(display * 255, 0, 255).astype(np.float32)
    exposed = cv2.LUT(image, curve)
    if noise > 0:
        spread = noise * (0.5 + 0.5 * np.sqrt(curve / 128)).astype(np.float32)
        exposed += rng.standard_normal(image.shape, np.float32) * cv2.LUT(image, spread)
    return cv2.convertScaleAbs(cv2.max(exposed, 0.0))
