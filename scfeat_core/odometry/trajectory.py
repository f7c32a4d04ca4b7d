"""How far a path is from the truth: the absolute and the relative error of the pose, by evo; paths in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.odometry.estimation import Odometry
from scfeat_core.replay import tum
from scfeat_core.replay.paths import similarity
from scfeat_core.replay.records import GroundTruth
from scfeat_core.replay.truth import STILL, poses_at

FEWEST = 3  # positions that fix a similarity
RELATIVE_STEP = 1.0  # seconds over which the relative error is taken
_OFF = 0.5  # of the step: pairs of frames that are further from it have frames without a pose between them


@dataclass(frozen=True)
class TrajectoryScores:
    """Errors of the tracked frames that have a true pose, after the similarity (Sim3) that fits their positions best.

    ate_m, ate_median_m, ate_max_m: metres, distances between positions; ate_m is the root of the mean square. rpe_m,
    rpe_deg: root mean square errors of the motion over ``rpe_step`` frames, about a second, metres and degrees; None
    where no two frames are so far apart, and rpe_missing says why. scale: metres per unit of the path. frames: how many
    were compared. truth_m: metres, length of the true path between these. still_m: metres, what ate_m would be of a
    camera that never moved. (Sturm et al., "A benchmark for the
    evaluation of RGB-D SLAM systems", 2012.)
    """

    ate_m: float
    ate_median_m: float
    ate_max_m: float
    rpe_m: float | None
    rpe_deg: float | None
    rpe_step: int
    scale: float
    frames: int
    truth_m: float
    still_m: float
    rpe_missing: str = ""


def evaluate(odometry: Odometry, truth: GroundTruth) -> TrajectoryScores:
    """Compare a path with the truth.

    Raises DataError where fewer than three tracked frames have a true pose, or where these do not move, and ScfeatError
    where evo is not installed.
    """
    evo = _evo()
    true = poses_at(truth, odometry.stamps)
    both = odometry.tracked & np.isfinite(true).all((1, 2))
    _check(odometry, truth, both, true)
    reference, path = (_path(evo, odometry.stamps[both], poses[both]) for poses in (true, odometry.poses))
    # Not by evo, which refuses a straight path: any turn about it fits, and none changes these errors.
    scale, rotation, translation = similarity(path.positions_xyz, reference.positions_xyz)
    path.scale(scale)
    path.transform(evo.se3(rotation, translation))
    absolute = _errors(evo.APE(evo.PoseRelation.translation_part), reference, path)
    seconds = 1e-9 * odometry.stamps[both]
    step = max(1, round(RELATIVE_STEP / _interval(seconds)))
    spans = seconds[step:] - seconds[:-step]
    far = abs(spans - RELATIVE_STEP) <= _OFF * RELATIVE_STEP

    def relative(relation: Any) -> float | None:
        if not far.any():
            return None
        errors = _errors(evo.RPE(relation, step, evo.Unit.frames, all_pairs=True), reference, path)
        return _root_mean_square(errors[far])

    return TrajectoryScores(
        _root_mean_square(absolute),
        float(np.median(absolute)),
        float(absolute.max()),
        relative(evo.PoseRelation.translation_part),
        relative(evo.PoseRelation.rotation_angle_deg),
        step,
        float(scale),
        int(both.sum()),
        float(reference.path_length),
        _root_mean_square(np.linalg.norm(reference.positions_xyz - reference.positions_xyz.mean(0), axis=1)),
        "" if far.any() else _no_pairs(seconds),
    )


def _interval(seconds: np.ndarray) -> float:
    """Median of the steps, of a clock that may have gone back."""
    steps = np.diff(seconds)
    return float(np.median(steps[steps > 0])) if (steps > 0).any() else RELATIVE_STEP


def _no_pairs(seconds: np.ndarray) -> str:
    return (
        f"expected two frames {RELATIVE_STEP:g} s apart, both with a pose and a true one, found {len(seconds)} such "
        f"frames over {np.ptp(seconds):.2f} s: replay more of the recording"
    )


def write_tum(path: Path, odometry: Odometry) -> None:
    """The tracked poses, in the scale of the path itself. Raises ScfeatError where it cannot be written."""
    known = odometry.tracked
    tum.write_tum(path, odometry.stamps[known], odometry.poses[known], "T_world_camera, in an unknown scale")


def _check(odometry: Odometry, truth: GroundTruth, both: np.ndarray, true: np.ndarray) -> None:
    if not odometry.tracked.any():
        raise DataError("expected a path to compare with the ground truth, found no frame with a pose")
    if both.sum() < FEWEST:
        raise DataError(
            f"expected ground truth at {FEWEST} or more of the frames with a pose, {_span(odometry.stamps)}, found it "
            f"at {int(both.sum())}: it covers {_span(truth.stamps)}; are the clocks the same?"
        )
    moved, way = (float(np.ptp(poses[both, :3, 3], axis=0).max()) for poses in (true, odometry.poses))
    if moved < STILL or way == 0:
        found = f"a truth that moves by {1000 * moved:.2g} mm only" if moved < STILL else "a path without any motion"
        raise DataError(
            f"expected a camera that moves by {100 * STILL:g} cm or more, found {found}: no scale fits that"
        )


def _span(stamps: np.ndarray) -> str:
    return f"{1e-9 * stamps[0]:.3f} to {1e-9 * stamps[-1]:.3f} s" if len(stamps) else "nothing"


def _path(evo: Any, stamps: np.ndarray, poses: np.ndarray) -> Any:
    return evo.PoseTrajectory3D(poses_se3=list(poses.copy()), timestamps=1e-9 * stamps)


def _errors(metric: Any, reference: Any, path: Any) -> np.ndarray:
    metric.process_data((reference, path))
    return np.asarray(metric.error)


def _root_mean_square(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean()))


class _Evo:
    """What is used of evo."""

    def __init__(self) -> None:
        from evo.core.lie_algebra import se3
        from evo.core.metrics import APE, RPE, PoseRelation, Unit
        from evo.core.trajectory import PoseTrajectory3D

        self.APE, self.RPE, self.PoseRelation, self.Unit, self.se3 = APE, RPE, PoseRelation, Unit, se3
        self.PoseTrajectory3D = PoseTrajectory3D


def _evo() -> _Evo:
    try:
        return _Evo()
    except ModuleNotFoundError as error:
        raise ScfeatError(
            f"expected the Python module '{error.name}' to compare paths, found it not installed: "
            "pip install 'scfeat-python[replay]'"
        ) from error
