"""Reconstructed camera poses against true ones, after the similarity that fits them best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scfeat_core.evaluation.metrics import rotation_angle
from scfeat_core.reconstruction.cameras import require_pycolmap
from scfeat_core.replay.records import GroundTruth
from scfeat_core.replay.truth import poses_at

MIN_POSES = 3


@dataclass(frozen=True)
class PoseErrors:
    """images: compared. position: root mean square and largest distance, in the unit of the truth. share: the former
    of the extent of the true positions (diagonal of their box). rotation: mean, degrees, after the turn of the world
    that fits the rotations best; positions on a line, as of a car, would leave one open."""

    images: int
    position: float
    position_max: float
    share: float
    rotation: float


def pose_errors(poses: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> PoseErrors | None:
    """poses, truth: name of an image -> (4, 4) T_world_camera.

    None with fewer than MIN_POSES common images, or where these do not determine a similarity (all in one place).
    """
    names = [name for name in poses if name in truth]
    if len(names) < MIN_POSES:
        return None
    found, true = (np.array([source[name] for name in names]) for source in (poses, truth))
    extent = float(np.linalg.norm(np.ptp(true[:, :3, 3], axis=0)))
    similarity = require_pycolmap().estimate_sim3d(found[:, :3, 3], true[:, :3, 3]) if extent > 0 else None
    if similarity is None:
        return None
    rotation = similarity.rotation.matrix()
    moved = similarity.scale * found[:, :3, 3] @ rotation.T + similarity.translation
    distances = np.linalg.norm(moved - true[:, :3, 3], axis=1)
    position = float(np.sqrt((distances**2).mean()))
    return PoseErrors(
        len(names),
        position,
        float(distances.max()),
        position / extent,
        _rotation_error(found[:, :3, :3], true[:, :3, :3]),
    )


def _rotation_error(found: np.ndarray, true: np.ndarray) -> float:
    """Mean angle, degrees, of rotations (N, 3, 3) after the turn that fits them best (chordal mean)."""
    u, _, vt = np.linalg.svd((true @ found.swapaxes(1, 2)).sum(0))
    turn = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
    return float(np.mean([rotation_angle(turn @ each, target) for each, target in zip(found, true, strict=True)]))


def truth_of(names: Sequence[str], stamps: Sequence[int], truth: GroundTruth | None) -> dict[str, np.ndarray]:
    """The true pose (4, 4), T_world_camera, of each image where it is known. stamps: of the images, nanoseconds."""
    if truth is None or not names:
        return {}
    poses = poses_at(truth, np.array(stamps, np.int64))
    return {name: pose for name, pose in zip(names, poses, strict=True) if np.isfinite(pose).all()}
