"""Pictures of keypoints, matches, tracks, masks and scores, drawn with OpenCV on copies; no window is ever opened."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from scfeat_core.geometry import scale_points
from scfeat_core.types import Array, FrameResult, PairResult, Tracks

Colour = tuple[int, int, int]  # RGB

LAYERS = ("matches", "tracks", "mask", "scores")
INLIER = (60, 220, 90)
OUTLIER = (235, 90, 70)
UNVERIFIED = (90, 190, 255)
KEYPOINT = (250, 200, 60)
LOOSE = (205, 205, 205)
OUTLINE = (255, 120, 240)
LONGEST, SHORTEST = 1280, 320  # pixels of the longer side of a picture of a frame
_SQUARE: np.ndarray = np.ones((3, 3), np.uint8)
_SHIFT = 4  # OpenCV draws at 1/16 pixel
_OLD = 64  # frames: from here on a track has the last colour
# Blue, cyan, green, yellow, red: a new track to an old one.
AGE_COLOURS: tuple[Colour, ...] = (
    (110, 150, 255),
    (70, 200, 250),
    (60, 230, 190),
    (120, 245, 110),
    (195, 240, 60),
    (250, 205, 60),
    (255, 150, 50),
    (255, 95, 70),
)


def draw_keypoints(image: np.ndarray, keypoints: np.ndarray, colour: Colour = KEYPOINT) -> np.ndarray:
    """A copy of the image with a dot at every keypoint.

    image: (H, W), (H, W, 1) or (H, W, 3) RGB uint8. keypoints: (N, 2) float, pixels. Returns (H, W, 3) uint8.
    """
    canvas = _rgb(image).copy()
    _lines(canvas, keypoints, keypoints, colour, thickness=3)
    return canvas


def draw_matches(
    image0: np.ndarray,
    image1: np.ndarray,
    keypoints0: np.ndarray,
    keypoints1: np.ndarray,
    inliers: np.ndarray | None = None,
) -> np.ndarray:
    """Both images side by side with a line for every match: inliers green and on top, the others red.

    image0, image1: as in draw_keypoints, of any two sizes. keypoints0, keypoints1: (M, 2) float, pixels, parallel.
    inliers: (M,) bool, all where not given. Returns (max(H0, H1), W0 + W1, 3) RGB uint8.
    """
    left, right = _rgb(image0), _rgb(image1)
    canvas = np.zeros((max(len(left), len(right)), left.shape[1] + right.shape[1], 3), np.uint8)
    canvas[: len(left), : left.shape[1]] = left
    canvas[: len(right), left.shape[1] :] = right
    ends = np.asarray(keypoints1, np.float32) + np.array([left.shape[1], 0], np.float32)
    good = np.ones(len(ends), bool) if inliers is None else np.asarray(inliers, bool)
    for chosen, colour in ((~good, OUTLIER), (good, INLIER)):
        _lines(canvas, keypoints0[chosen], ends[chosen], colour, thickness=1)
    return canvas


def draw_verified(
    image0: np.ndarray,
    image1: np.ndarray,
    keypoints0: np.ndarray,
    keypoints1: np.ndarray,
    inliers: np.ndarray,
) -> tuple[np.ndarray, int]:
    """As draw_matches, with all matches as dots, and lines only for some inliers that are spread over the image: those
    of hundreds would hide it. Returns the picture and the number of lines.
    """
    dotted = [
        draw_keypoints(draw_keypoints(image, points[~inliers], OUTLIER), points[inliers], INLIER)
        for image, points in ((image0, keypoints0), (image1, keypoints1))
    ]
    lines = np.flatnonzero(inliers)[_spread(keypoints0[inliers], image0.shape)]
    return draw_matches(dotted[0], dotted[1], keypoints0[lines], keypoints1[lines]), len(lines)


def _spread(points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Indices of points (N, 2), at most one in each cell of an 8 x 6 grid over an image of this shape."""
    cells = (points / np.array([shape[1], shape[0]]) * np.array([8, 6])).astype(int).clip(0, (7, 5))
    return np.unique(cells @ np.array([1, 8]), return_index=True)[1]


class Tails:
    """Where the tracks of one camera were in its latest frames: what the tails behind the points are drawn from.

    Holds the ids and positions of at most ``length`` frames, and nothing of older ones.
    """

    def __init__(self, length: int = 12) -> None:
        """length: frames, the newest one included."""
        self._frames: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=length)

    def __len__(self) -> int:
        """Frames that are held."""
        return len(self._frames)

    def add(self, tracks: Tracks) -> None:
        """The tracks of the next frame."""
        order = np.argsort(tracks.ids)
        self._frames.append((tracks.ids[order], tracks.keypoints[order]))

    def clear(self) -> None:
        """Forget all frames: the next one follows nothing."""
        self._frames.clear()

    def lines(self, tracks: Tracks) -> np.ndarray:
        """The way of each track, (T, L, 2) float32 pixels, newest position first; L: 1 and the frames held before.

        tracks: those that were added last. Where a track was not seen, and before it began, it stands still where it
        was seen next: over a gap the line is straight, and the lines of all tracks are equally long.
        """
        way = [tracks.keypoints]
        for ids, keypoints in list(self._frames)[-2::-1]:
            way.append(_looked_up(tracks.ids, ids, keypoints, otherwise=way[-1]))
        return np.stack(way, axis=1)


def draw_frame(
    image: np.ndarray,
    result: FrameResult,
    layers: Collection[str] = LAYERS,
    *,
    tails: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    text: str = "",
) -> np.ndarray:
    """What the front end made of a frame, over its image in gray.

    image: (H, W) or (H, W, C) of 1, 3 or 4 channels (RGB), uint8, uint16, or floating in [0, 1]; 16 bits are scaled so
    that the brightest pixel is white. layers: of LAYERS, drawn where the frame has them. ``scores``: heat map of
    ``result.features.score_map`` (h, w). ``mask``: what mask (H, W) hides is darkened, and outlined. ``tracks``: points
    with tails (T, L, 2) pixels (see Tails), blue for new tracks to red for old ones. ``matches``: from where each
    matched point came, inliers green, outliers red, blue where nothing was verified. Points without either are small
    and gray. text: a line at the bottom.

    Returns (H', W', 3) RGB uint8 of the size of the image where that can be looked at: a longer side above LONGEST is
    scaled down to it, one below SHORTEST is enlarged by a whole number.
    """
    gray = _gray(image)
    height, width = gray.shape
    canvas = _resized(gray)
    if "scores" in layers and result.features.score_map is not None:
        canvas = _heated(canvas, result.features.score_map)
    if "mask" in layers and mask is not None:
        canvas = _shaded(canvas, mask)
    scale_xy = np.array([canvas.shape[1] / width, canvas.shape[0] / height], np.float32)
    strokes = [_Stroke(scale_points(s.lines, scale_xy), s.colour, s.dot) for s in _strokes(result, layers, tails)]
    canvas = _with_strokes(canvas, strokes)
    _write(canvas, text)
    return canvas


def age_classes(ages: np.ndarray) -> np.ndarray:
    """(T,) int64, the row of AGE_COLOURS for tracks of so many frames: by the logarithm, the last from 64 frames on."""
    share = np.log2(np.maximum(ages, 1)) / np.log2(_OLD)
    return (share * len(AGE_COLOURS)).astype(np.int64).clip(0, len(AGE_COLOURS) - 1)


def match_colours(pair: PairResult) -> list[tuple[np.ndarray, Colour]]:
    """Which matches (M,) bool have which colour, to be drawn in this order: what matters most comes last."""
    if pair.geometry is None:
        return [(np.ones(len(pair.matches), bool), UNVERIFIED)]
    return [(~pair.geometry.inliers, OUTLIER), (pair.geometry.inliers, INLIER)]


@dataclass(frozen=True, eq=False)
class _Stroke:
    """Lines (n, L, 2) float32 pixels of one colour, with a disc of ``dot`` pixels at the first point of each."""

    lines: np.ndarray
    colour: Colour
    dot: int

    @property
    def points(self) -> np.ndarray:
        """(n, 2, 2): the first points as lines of no length, which OpenCV draws as discs."""
        return self.lines[:, [0, 0]]


def _strokes(result: FrameResult, layers: Collection[str], tails: np.ndarray | None) -> list[_Stroke]:
    """All lines and points of a frame; what is drawn later lies on top."""
    keypoints = result.features.keypoints
    loose = np.ones(len(keypoints), bool)
    strokes = []
    if "tracks" in layers and result.tracks is not None:
        loose[result.tracks.indices] = False
        strokes += _track_strokes(result.tracks, tails)
    if "matches" in layers and result.pair is not None:
        loose[result.pair.matches.indices1] = False
        strokes += _match_strokes(result.pair)
    return [_Stroke(keypoints[loose][:, None], LOOSE, 2), *strokes]


def _track_strokes(tracks: Tracks, tails: np.ndarray | None) -> list[_Stroke]:
    lines = tracks.keypoints[:, None] if tails is None else tails
    classes = age_classes(tracks.ages)
    return [_Stroke(lines[classes == i], colour, 3) for i, colour in enumerate(AGE_COLOURS)]


def _match_strokes(pair: PairResult) -> list[_Stroke]:
    lines = np.stack([pair.keypoints1, pair.keypoints0], axis=1)
    return [_Stroke(lines[chosen], colour, 3) for chosen, colour in match_colours(pair)]


def _looked_up(wanted: np.ndarray, ids: np.ndarray, values: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """values of the wanted ids; ids are sorted."""
    if len(ids) == 0:
        return otherwise
    places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where((ids[places] == wanted)[:, None], values[places], otherwise)


def _gray(image: np.ndarray) -> np.ndarray:
    """(H, W) uint8."""
    if image.dtype.kind == "f":
        image = cv2.convertScaleAbs(image.astype(np.float32, copy=False), alpha=255)
    if image.ndim == 3:
        image = image[..., 0] if image.shape[2] == 1 else cv2.cvtColor(image[..., :3], cv2.COLOR_RGB2GRAY)
    return image if image.dtype == np.uint8 else cv2.convertScaleAbs(image, alpha=255 / max(int(image.max()), 1))


def _resized(gray: np.ndarray) -> np.ndarray:
    """As gray RGB of a size that can be looked at; a copy."""
    longer = max(gray.shape)
    if longer > LONGEST:
        height, width = (max(round(side * LONGEST / longer), 1) for side in gray.shape)
        gray = cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)
    elif longer < SHORTEST:
        factor = -(-SHORTEST // longer)
        gray = np.repeat(np.repeat(gray, factor, axis=0), factor, axis=1)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)


def _heated(canvas: np.ndarray, score_map: Array) -> np.ndarray:
    """The scores as colours over the darkened picture, from the median of this frame (black) to its highest ones."""
    scores = np.asarray(score_map, np.float32)
    sample = scores[::4, ::4]  # the quantiles of all pixels take longer than all the rest
    low, high = np.quantile(sample, (0.5, 0.998))
    # The root, as peaks are few and far above the rest; and wider by a pixel all around, as they are that narrow.
    share = cv2.sqrt(np.clip((scores - low) / max(high - low, 1e-12), 0, 1, dtype=np.float32))
    scaled = cv2.dilate(cv2.convertScaleAbs(share, alpha=255), _SQUARE)
    scaled = cv2.resize(scaled, canvas.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    heat = cv2.cvtColor(cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(canvas, 0.35, heat, 0.85, 0)


def _shaded(canvas: np.ndarray, mask: Array) -> np.ndarray:
    """What the mask hides at a third of its brightness, with an outline."""
    kept = (np.asarray(mask) != 0).view(np.uint8)
    kept = cv2.resize(kept, canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    shaded = cv2.convertScaleAbs(canvas, alpha=0.35)
    cv2.copyTo(canvas, kept, shaded)
    shaded[cv2.morphologyEx(kept, cv2.MORPH_GRADIENT, _SQUARE) != 0] = OUTLINE
    return shaded


def _with_strokes(canvas: np.ndarray, strokes: Collection[_Stroke]) -> np.ndarray:
    """All strokes, on a dark ground of one more pixel around them, so that they can be seen on white as on black."""
    ground = np.zeros(canvas.shape[:2], np.uint8)
    for stroke in strokes:
        _polylines(ground, stroke.lines, 1, 1, cv2.LINE_8)
        _polylines(ground, stroke.points, 1, stroke.dot, cv2.LINE_8)
    cv2.copyTo(cv2.convertScaleAbs(canvas, alpha=0.25), cv2.dilate(ground, _SQUARE), canvas)
    for stroke in strokes:
        _polylines(canvas, stroke.lines, stroke.colour, 1)
    for stroke in strokes:
        _polylines(canvas, stroke.points, stroke.colour, stroke.dot, cv2.LINE_8)  # smooth ones take 5 times as long
    return canvas


def _write(canvas: np.ndarray, text: str) -> None:
    """A line of text on a dark strip at the bottom, in letters so small that it fits in, if they can be read then."""
    if not text:
        return
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
    size = float(np.clip(0.5 * (canvas.shape[1] - 12) / max(width, 1), 0.35, 0.5))
    strip = canvas[-round(40 * size) :]
    strip[:] = strip // 4
    cv2.putText(
        canvas,
        text,
        (6, len(canvas) - round(12 * size)),
        cv2.FONT_HERSHEY_SIMPLEX,
        size,
        (235, 235, 235),
        1,
        cv2.LINE_AA,
    )


def _rgb(image: np.ndarray) -> np.ndarray:
    gray = image.ndim == 2 or image.shape[2] == 1
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if gray else image


def _lines(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, colour: Colour, thickness: int) -> None:
    _polylines(canvas, np.stack([start, end], axis=1), colour, thickness)


def _polylines(
    canvas: np.ndarray, lines: np.ndarray, colour: Colour | int, thickness: int, kind: int = cv2.LINE_AA
) -> None:
    """lines: (n, L, 2) pixels."""
    fixed = np.ascontiguousarray(np.rint(lines * (1 << _SHIFT)).astype(np.int32))
    cv2.polylines(canvas, list(fixed), False, colour, thickness, kind, _SHIFT)
