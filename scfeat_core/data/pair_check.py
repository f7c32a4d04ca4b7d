"""Does the fundamental matrix that a loader returns belong to its pictures? Asked of SIFT, which knows no poses.

A transposed matrix, a calibration of another resolution, a swapped pose or a file that was exchanged all train without
an error, only badly. They show here: matches of the two views then lie far from their epipolar lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from torch import Tensor

from scfeat_core.data.posed import PosedBatch, PosedPairs, UnusablePairError
from scfeat_core.geometry import epipolar_distance
from scfeat_core.matching import match_descriptors

NEAR = 2.0  # pixels
MIN_MATCHES = 15  # a pair with fewer says nothing
MIN_PAIRS = 3  # and so does a scene with fewer of them
# Medians over the pairs. At 320x240, right matrices gave over 0.85 and under 0.2 pixels; wrong ones (transposed, K of
# another size, x_world = R X + t) at most 0.05 and at least 5 pixels, a focal length that is off by a fifth 0.24 and 2.
MIN_SHARE = 0.5  # of matches near their lines
MAX_BEST_HALF = 1.0  # pixels
MAX_POINT_DISTANCE = 2.0  # pixels, of true correspondences
_RATIO = 0.75  # in both directions; 0.7 leaves too few matches in half of the pairs


@dataclass(frozen=True)
class PairCheck:
    """matches: of SIFT, mutual and past the ratio test. best_half: pixels, median of the smaller half of their
    distances to the epipolar lines; share: of them within 2 pixels. points: sparse true correspondences;
    point_distance: their median distance. NaN where there is nothing to measure.
    """

    scene: str
    name: str
    matches: int
    best_half: float
    share: float
    points: int
    point_distance: float


@dataclass(frozen=True)
class Verdict:
    """Medians over the pairs of a scene (or of all) that have enough matches; agrees: None where these are too few."""

    scene: str
    pairs: int
    measured: int
    matches: float
    best_half: float
    share: float
    point_distance: float
    agrees: bool | None


@dataclass(frozen=True)
class CheckReport:
    """rows: one a pair. scenes: one a scene, in alphabetical order. overall: of all pairs."""

    rows: tuple[PairCheck, ...]
    scenes: tuple[Verdict, ...]
    overall: Verdict

    @property
    def agrees(self) -> bool:
        """Whether nothing speaks against the geometry; also where nothing could be measured."""
        return self.overall.agrees is not False and not self.suspects

    @property
    def suspects(self) -> list[str]:
        """Scenes whose pictures and matrices do not agree."""
        return [scene.scene for scene in self.scenes if scene.agrees is False]


def check_pairs(pairs: PosedPairs, count: int, rng: np.random.Generator) -> CheckReport:
    """Compare the geometry of ``count`` random pairs, as the loader cuts them, with SIFT matches. Colours stay true.

    Every scene is drawn equally often. A pair that cannot be read counts as drawn, and is missing from the report.
    """
    config = replace(pairs.config, augmentation="none", scene_weight="equal")
    plain = PosedPairs(pairs.scenes, config)
    rows = []
    for _ in range(count):
        index = plain.draw(rng)
        try:
            batch = plain.load(index, rng)
        except UnusablePairError:
            continue
        number, first, second = plain.pair(index)
        scene = plain.scenes[number]
        rows.append(check_batch(batch, scene.name, f"{scene.files[first]} {scene.files[second]}"))
    names = sorted({row.scene for row in rows})
    verdicts = tuple(_judge(name, [row for row in rows if row.scene == name]) for name in names)
    return CheckReport(tuple(rows), verdicts, _judge("all", rows))


def check_batch(batch: PosedBatch, scene: str = "", name: str = "") -> PairCheck:
    """The check of one pair (B = 1)."""
    fundamental = batch.fundamental[0].double().numpy()
    points0, points1 = sift_matches(_gray(batch.image0[0]), _gray(batch.image1[0]))
    errors = np.sort(_symmetric_distance(points0, points1, fundamental))
    valid = batch.valid[0]
    truth = _symmetric_distance(batch.points0[0][valid].numpy(), batch.points1[0][valid].numpy(), fundamental)
    best_half = _median(errors[: (len(errors) + 1) // 2])
    share = float(np.mean(errors < NEAR)) if len(errors) else np.nan
    return PairCheck(scene, name, len(errors), best_half, share, len(truth), _median(truth))


def sift_matches(gray0: np.ndarray, gray1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corresponding pixels (M, 2) float64 of two uint8 images: mutual nearest neighbours past the ratio test."""
    sift = cv2.SIFT.create(nfeatures=2000, contrastThreshold=0.01)
    (keys0, d0), (keys1, d1) = (sift.detectAndCompute(gray, None) for gray in (gray0, gray1))
    if not len(keys0) or not len(keys1):
        return np.zeros((0, 2)), np.zeros((0, 2))
    d0, d1 = (d / np.linalg.norm(d, axis=1, keepdims=True) for d in (d0, d1))
    matches = match_descriptors(d0, d1, max_ratio=_RATIO)
    xy0, xy1 = (np.asarray(cv2.KeyPoint.convert(keys), np.float64) for keys in (keys0, keys1))
    return xy0[matches.indices0], xy1[matches.indices1]


def format_report(report: CheckReport) -> str:
    """A table, one line a scene and one for all, and what it means."""
    lines = ["scene                     pairs matches  best half px  % within 2  tracks px"]
    for row in (*report.scenes, report.overall):
        mark = {True: "", False: "  <- does not agree", None: "  (too little to judge)"}[row.agrees]
        numbers = (row.matches, ".0f", 7), (row.best_half, ".2f", 14), (100 * row.share, ".0f", 11)
        cells = [_cell(*number) for number in (*numbers, (row.point_distance, ".2f", 12))]
        lines.append(f"{row.scene:24s}{row.measured:4d}/{row.pairs:<3d}{''.join(cells)}{mark}")
    if report.agrees:
        lines.append("SIFT matches agree with the fundamental matrices.")
    else:
        lines.append(
            f"SIFT matches do not agree with the fundamental matrices of: {', '.join(report.suspects) or 'all'}. "
            "Check that K belongs to the stored resolution, that x_cam = R X + t, and that images are undistorted."
        )
    return "\n".join(lines)


def _cell(value: float, form: str, width: int) -> str:
    return f"{'-' if np.isnan(value) else format(value, form):>{width}s}"


def _judge(scene: str, rows: Sequence[PairCheck]) -> Verdict:
    told = [row for row in rows if row.matches >= MIN_MATCHES]
    matches, best_half, share = (
        _median([getattr(row, key) for row in told]) for key in ("matches", "best_half", "share")
    )
    points = _median([row.point_distance for row in rows if row.points])
    agrees = share >= MIN_SHARE and best_half <= MAX_BEST_HALF and not points > MAX_POINT_DISTANCE
    verdict = agrees if len(told) >= MIN_PAIRS else None
    return Verdict(scene, len(rows), len(told), matches, best_half, share, points, verdict)


def _gray(image: Tensor) -> np.ndarray:
    """(H, W) uint8 of (3, H, W) in [0, 1]."""
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _symmetric_distance(points0: np.ndarray, points1: np.ndarray, fundamental: np.ndarray) -> np.ndarray:
    """(N,) pixels, the larger of the distances to the epipolar lines in the two views."""
    forth = epipolar_distance(points0, points1, fundamental)
    return np.maximum(forth, epipolar_distance(points1, points0, fundamental.T))


def _median(values: Sequence[float] | np.ndarray) -> float:
    return float(np.median(values)) if len(values) else np.nan
