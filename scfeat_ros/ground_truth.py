"""Ground-truth poses from files (TUM, EuRoC, KITTI) and from topics of a bag. Nothing of ROS is imported.

Stamps are read as decimal numbers: seconds since 1970 with nanoseconds do not fit into a float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.data.colmap import rotations
from scfeat_core.errors import DataError
from scfeat_core.replay.records import GroundTruth

from .bags import Bag, Topic

FORMATS = ("tum", "euroc", "kitti")
# Where the pose is in each type of message, and the frame that it is the pose of.
_POSES = {
    "geometry_msgs/msg/PoseStamped": "pose",
    "geometry_msgs/msg/PoseWithCovarianceStamped": "pose.pose",
    "geometry_msgs/msg/TransformStamped": "transform",
    "nav_msgs/msg/Odometry": "pose.pose",
}
POSE_TYPES = tuple(_POSES)
_LAYOUTS = (
    "TUM (8 columns: seconds x y z qx qy qz qw), EuRoC (csv: nanoseconds, x, y, z, qw, qx, qy, qz, ...) or KITTI "
    "(12 columns, with a times.txt)"
)
_UNIT = 0.05  # how far the length of a quaternion, or the product R R^T, may be from 1: files round to a few digits
_COLUMNS = {"tum": (8,), "kitti": (12,)}


def read_ground_truth(
    path: str | Path,
    format: str | None = None,
    times: str | Path | None = None,
    T_body_camera: np.ndarray | None = None,
) -> GroundTruth:
    """The poses in a file. format: tum, euroc or kitti; told by the columns where it is not given.

    times: seconds of each pose of KITTI, one a line; without it, times.txt beside the poses, or where the data set has
    it (sequences/NN/times.txt for poses/NN.txt). T_body_camera: (4, 4), takes points of the camera to the body that the
    poses are of (state_groundtruth of EuRoC: the IMU); None where they are those of the camera.

    Raises DataError, with the line, for a layout that is none of these, for values that are not finite, for stamps that
    are not ascending, and for what is no rotation.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise DataError(f"expected poses in {path}, found none: check the file")
    layout = format or _guess(rows, path)
    if layout not in FORMATS:
        raise DataError(f"expected a format of ground truth of {', '.join(FORMATS)}, found '{layout}'")
    places = [f"line {number} of {path}" for number, _ in rows]
    if layout == "kitti":
        stamps, poses = _kitti_times(path, times, len(rows)), _kitti_poses(_table(rows, path, layout), places)
    else:
        table = _table(rows, path, layout)
        stamps = _stamps([words[0] for _, words in rows], 0 if layout == "euroc" else 9, places)
        order = [4, 5, 6, 7] if layout == "euroc" else [7, 4, 5, 6]
        poses = _poses(table[:, 1:4], table[:, order], places)
    _check_ascending(stamps, places)
    return _truth(stamps, poses, T_body_camera, f"{path.name} ({layout.upper() if layout != 'euroc' else 'EuRoC'})")


def pose_topics(bag: Bag) -> list[Topic]:
    """Topics of a bag that :func:`truth_from_topic` can read, most messages first."""
    found = [topic for topic in bag.topics if topic.type in _POSES and topic.count > 0]
    return sorted(found, key=lambda topic: (-topic.count, topic.name))


def truth_from_topic(
    bag: Bag,
    topic: str,
    T_body_camera: np.ndarray | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> GroundTruth:
    """The poses of a topic of PoseStamped, PoseWithCovarianceStamped, TransformStamped or Odometry, by their stamps.

    They come as they are in the message: of its frame (Odometry, TransformStamped: child_frame_id) in header.frame_id.
    T_body_camera: as in :func:`read_ground_truth`. Messages of equal stamp and pose count once. warn: told how many
    messages are damaged, and so left out.

    Raises DataError where there is no such topic, or none of these types, where it speaks of several frames, where none
    of it can be read, and for what :func:`read_ground_truth` refuses.
    """
    chosen = _pose_topic(bag, topic)
    messages = _readable(bag, chosen, warn)
    frames = sorted({(m.header.frame_id, getattr(m, "child_frame_id", "")) for m in messages})
    if len(frames) > 1:
        listing = ", ".join(f"{child or 'pose'} in {parent}" for parent, child in frames)
        raise DataError(
            f"expected poses of one frame on {topic} in {bag.path}, found {listing}: several nodes published there; "
            "give the ground truth as a file"
        )
    stamps = np.array([m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in messages], np.int64)
    numbers = np.array([_numbers(message, _POSES[chosen.type]) for message in messages])
    order = np.argsort(stamps, kind="stable")  # the order of recording need not be that of the stamps
    stamps, numbers = stamps[order], numbers[order]
    again = np.append(False, (np.diff(stamps) == 0) & (numbers[1:] == numbers[:-1]).all(1))
    stamps, numbers = stamps[~again], numbers[~again]
    places = [f"the message at {stamp} ns on {topic} in {bag.path}" for stamp in stamps]
    poses = _poses(numbers[:, :3], numbers[:, 3:], places)
    _check_ascending(stamps, places)
    return _truth(stamps, poses, T_body_camera, f"{topic} ({chosen.type.rpartition('/')[2]})")


def nanoseconds_of(word: str, place: str, digits: int = 9) -> int:
    """A stamp, nanoseconds, of a decimal number. digits: 9 if that is seconds, 0 if nanoseconds. place: where it is.

    Raises DataError where it is no number, or not from 0 to 2^63 nanoseconds.
    """
    try:
        stamp = int(Decimal(word).scaleb(digits).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError) as error:  # not a number, NaN, infinity
        raise DataError(f"expected a stamp, found '{word}' in {place}: remove the line") from error
    if not 0 <= stamp < 2**63:
        raise DataError(f"expected a stamp from 0 to 2^63 nanoseconds, found '{word}' in {place}: check the unit")
    return stamp


# --------------------------------------------------------------------------------------------------------------- files


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and words of each line that is no comment."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"expected ground truth as {_LAYOUTS} at {path}, found a binary file") from error
    except OSError as error:
        raise DataError(f"expected ground truth at {path}, found: {error.strerror}; check the path") from error
    lines = enumerate(text.splitlines(), 1)
    return [
        (number, line.replace(",", " ").split())
        for number, line in lines
        if line.strip() and not line.lstrip().startswith(("#", "%"))
    ]


def _guess(rows: Sequence[tuple[int, list[str]]], path: Path) -> str:
    """By the number of columns, and that of EuRoC by stamps that are nanoseconds."""
    words = rows[0][1]
    if len(words) == 12:
        return "kitti"
    if len(words) >= 8 and words[0].isdigit() and len(words[0]) > 12:
        return "euroc"
    if len(words) == 8:
        return "tum"
    raise DataError(f"expected ground truth as {_LAYOUTS} in {path}, found {len(words)} columns in line {rows[0][0]}")


def _table(rows: Sequence[tuple[int, list[str]]], path: Path, layout: str) -> np.ndarray:
    """(P, columns) float64; what EuRoC has behind the pose is left out."""
    for number, words in rows:
        wrong = len(words) < 8 if layout == "euroc" else len(words) not in _COLUMNS[layout]
        if wrong:
            raise DataError(
                f"expected ground truth as {_LAYOUTS} in {path}, found {len(words)} columns in line {number}"
            )
    columns = 8 if layout == "euroc" else len(rows[0][1])
    try:
        return np.array([words[:columns] for _, words in rows], np.float64)
    except ValueError as error:
        raise DataError(f"expected numbers in {path}, found {error}: check the file") from error


def _stamps(words: Sequence[str], digits: int, places: Sequence[str]) -> np.ndarray:
    """(P,) int64 nanoseconds. digits: 9 for seconds, 0 for nanoseconds."""
    stamps = [nanoseconds_of(word, place, digits) for word, place in zip(words, places, strict=True)]
    return np.array(stamps, np.int64)


def _kitti_times(poses: Path, times: str | Path | None, count: int) -> np.ndarray:
    usual = (poses.parent / "times.txt", poses.parent.parent / "sequences" / poses.stem / "times.txt")
    path = Path(times) if times is not None else next(filter(Path.is_file, usual), None)
    if path is None:
        raise DataError(
            f"expected the times of the poses of {poses}, which KITTI keeps in a file of its own, found none of "
            f"{', '.join(map(str, usual))}: give the file of times"
        )
    rows = _rows(path)
    if len(rows) != count:
        raise DataError(f"expected a time for each of the {count} poses of {poses}, found {len(rows)} in {path}")
    places = [f"line {number} of {path}" for number, _ in rows]
    stamps = _stamps([words[0] for _, words in rows], 9, places)
    _check_ascending(stamps, places)
    return stamps


# --------------------------------------------------------------------------------------------------------------- poses


def _poses(positions: np.ndarray, quaternions: np.ndarray, places: Sequence[str]) -> np.ndarray:
    """(P, 4, 4) of positions (P, 3), metres, and quaternions (P, 4), w x y z."""
    _check(np.isfinite(positions).all(1) & np.isfinite(quaternions).all(1), "finite values", "NaN or infinity", places)
    length = np.linalg.norm(quaternions, axis=1)
    _check(length > 0, "a unit quaternion", "one of zero length", places)
    _check(np.abs(length - 1) < _UNIT, "a unit quaternion", "another length (are the columns in order?)", places)
    poses = np.tile(np.eye(4), (len(positions), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations(quaternions), positions
    return poses


def _kitti_poses(table: np.ndarray, places: Sequence[str]) -> np.ndarray:
    """(P, 4, 4) of (P, 12), the upper three rows."""
    _check(np.isfinite(table).all(1), "finite values", "NaN or infinity", places)
    poses = np.tile(np.eye(4), (len(table), 1, 1))
    poses[:, :3] = table.reshape(-1, 3, 4)
    r = poses[:, :3, :3]
    off = np.abs(r @ r.swapaxes(1, 2) - np.eye(3)).max((1, 2))
    _check((off < _UNIT) & (np.linalg.det(r) > 0), "a rotation in columns 1-3, 5-7, 9-11", "none", places)
    return poses


def _check(good: np.ndarray, expected: str, found: str, places: Sequence[str]) -> None:
    if not good.all():
        raise DataError(
            f"expected {expected} in each pose, found {found} in {places[int(np.argmin(good))]} "
            f"({int((~good).sum())} of {len(good)} poses): remove these"
        )


def _check_ascending(stamps: np.ndarray, places: Sequence[str]) -> None:
    step = np.diff(stamps)
    if (step <= 0).any():
        at = int(np.argmax(step <= 0)) + 1
        what = "the one before it again" if step[at - 1] == 0 else "an earlier one than before it"
        raise DataError(
            f"expected ascending stamps, found {what} in {places[at]}: sort the poses and drop repeated ones"
        )


def _truth(stamps: np.ndarray, poses: np.ndarray, T_body_camera: np.ndarray | None, source: str) -> GroundTruth:
    if T_body_camera is None:
        return GroundTruth(stamps, poses, source)
    return GroundTruth(stamps, poses @ np.asarray(T_body_camera, np.float64), f"{source}, moved from body to camera")


# --------------------------------------------------------------------------------------------------------------- topic


def _pose_topic(bag: Bag, name: str) -> Topic:
    found = [topic for topic in bag.topics if topic.name == name]
    poses = ", ".join(f"{t.name} [{t.type}] {t.count}" for t in pose_topics(bag)) or "no topic of poses"
    if not found:
        raise DataError(f"expected the topic {name} in {bag.path}, found none of that name; the bag holds {poses}")
    if found[0].type not in _POSES:
        raise DataError(
            f"expected poses on {name} in {bag.path} ({', '.join(_POSES)}), found {found[0].type}; "
            f"the bag holds {poses}"
        )
    return found[0]


def _readable(bag: Bag, topic: Topic, warn: Callable[[str], None]) -> list[Any]:
    """The messages on a topic but for the damaged ones. Raises DataError where there are none."""
    found, damaged = [], 0
    for message in bag.messages([topic]):
        try:
            found.append(bag.deserialize(message))
        except DataError:
            damaged += 1
    if not found:
        what = f"{damaged} messages that are damaged" if damaged else "none"
        more = f" ({bag.damage})" if bag.damage else ""
        raise DataError(f"expected poses on {topic.name} in {bag.path}, found {what}{more}")
    if damaged:
        warn(f"{damaged} of {len(found) + damaged} messages on {topic.name} are damaged: left out")
    return found


def _numbers(message: Any, where: str) -> tuple[float, ...]:
    """Position x y z and quaternion w x y z."""
    pose = message
    for name in where.split("."):
        pose = getattr(pose, name)
    p, q = (pose.translation, pose.rotation) if where == "transform" else (pose.position, pose.orientation)
    return p.x, p.y, p.z, q.w, q.x, q.y, q.z
