"""How far a camera turned between two images, from a gyroscope."""

from __future__ import annotations

import threading

import numpy as np

from scfeat_core.errors import CalibrationError, ConfigError
from scfeat_core.geometry import skew

_LATE = 1_000_000_000  # nanoseconds: what comes out of order is closer than this, a clock that was set is further back
_ORTHOGONAL = 1e-3  # how far R R' may be from the identity: matrices are written with few digits


class GyroBuffer:
    """The angular velocities of the last seconds, and the rotations between two instants.

    Samples may be added by one thread while others ask for rotations. Memory is fixed: the oldest make room.

    capacity: samples; 8192 are 40 s at 200 Hz and 4 s at 2 kHz. max_gap: seconds between two samples beyond which what
    happened between them is not known. rejected: samples that were not finite, came twice, or came out of order.
    """

    def __init__(self, capacity: int = 8192, max_gap: float = 0.05) -> None:
        if capacity < 2 or not max_gap > 0:
            raise ConfigError(f"expected room for 2 samples and max_gap > 0, found {capacity} and {max_gap}")
        self.rejected = 0
        self._max_gap = round(1e9 * max_gap)
        self._stamps = np.zeros(capacity, np.int64)
        self._rates = np.zeros((capacity, 3))
        self._count = 0  # of all samples since the buffer was empty; the next one goes to this modulo the capacity
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return min(self._count, len(self._stamps))

    def add(self, stamp: int, rate: np.ndarray) -> bool:
        """Take a sample; False where it is of no use, which ``rejected`` counts.

        stamp: nanoseconds. rate: (3,), rad/s about the axes of the sensor, right-handed (sensor_msgs/Imu, REP 103). A
        stamp that lies a second or more before the previous one says that a clock was set or that a recording starts
        again: everything before is forgotten. Raises CalibrationError for another shape.
        """
        rate = np.asarray(rate, np.float64)
        if rate.shape != (3,):
            raise CalibrationError(f"expected an angular velocity (3,) in rad/s, found an array of shape {rate.shape}")
        with self._lock:
            if not np.isfinite(rate).all() or self._comes_late(stamp):
                self.rejected += 1
                return False
            place = self._count % len(self._stamps)
            self._stamps[place], self._rates[place] = stamp, rate
            self._count += 1
            return True

    def clear(self) -> None:
        """Forget all samples."""
        with self._lock:
            self._count = 0

    def rotation(self, stamp0: int, stamp1: int, rotation_camera_imu: np.ndarray | None = None) -> np.ndarray | None:
        """(3, 3) float64 that takes rays of the camera at stamp0 to rays of the camera at stamp1 (nanoseconds).

        rotation_camera_imu: (3, 3), takes vectors of the sensor's axes to those of the camera; None where both are the
        same. None where the samples do not say: there are none, they have a gap, they end more than ``max_gap`` before
        stamp1 (nearer, the last one holds on), or stamp1 is before stamp0.

        The rates are integrated by the trapezoidal rule between samples, and each piece is turned into a rotation by
        the exponential map. Raises CalibrationError where rotation_camera_imu is not a rotation.
        """
        extrinsic = None if rotation_camera_imu is None else check_rotation(rotation_camera_imu)
        with self._lock:
            stamps, rates = self._ordered()
        pieces = self._pieces(stamps, rates, stamp0, stamp1)
        if pieces is None:
            return None
        # A body that turns by Exp(w dt) sees fixed directions turn back.
        turn = _product(exponential(pieces)).T
        return turn if extrinsic is None else extrinsic @ turn @ extrinsic.T

    def _comes_late(self, stamp: int) -> bool:
        """Whether the sample is older than the newest one; forgets all where it is much older."""
        if self._count == 0:
            return False
        back = int(self._stamps[(self._count - 1) % len(self._stamps)]) - stamp
        if back >= _LATE:
            self._count = 0
        return 0 <= back < _LATE

    def _ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of stamps and rates, oldest first."""
        if self._count <= len(self._stamps):
            return self._stamps[: self._count].copy(), self._rates[: self._count].copy()
        start = self._count % len(self._stamps)
        return np.roll(self._stamps, -start), np.roll(self._rates, -start, 0)

    def _pieces(self, stamps: np.ndarray, rates: np.ndarray, stamp0: int, stamp1: int) -> np.ndarray | None:
        """Rotation vectors (n, 3), one between each two samples, and what is left of the interval at its ends."""
        if stamp1 < stamp0 or len(stamps) == 0:
            return None
        first = max(int(np.searchsorted(stamps, stamp0, "right")) - 1, 0)  # the last sample that is not after stamp0
        last = min(int(np.searchsorted(stamps, stamp1, "left")), len(stamps) - 1)  # the first not before stamp1
        inside = slice(first, last + 1)
        times, values = stamps[inside] - stamp0, rates[inside]
        end = stamp1 - stamp0
        gaps = np.diff(times, prepend=min(0, times[0]), append=max(end, times[-1]))
        if gaps.max() > self._max_gap:
            return None
        knots = np.concatenate(([0], times[(times > 0) & (times < end)], [end]))
        at_knots = np.stack([np.interp(knots, times, axis) for axis in values.T], -1)
        return (at_knots[1:] + at_knots[:-1]) / 2 * (1e-9 * np.diff(knots))[:, None]


def exponential(vectors: np.ndarray) -> np.ndarray:
    """Rotations (n, 3, 3) of rotation vectors (n, 3), radians (Rodrigues' formula), to full precision near 0, too."""
    angle = np.linalg.norm(vectors, axis=-1)[:, None, None]
    cross = skew(vectors)
    # sin(a) / a and (1 - cos(a)) / a^2, the latter by the half angle: no cancellation.
    return np.eye(3) + np.sinc(angle / np.pi) * cross + np.sinc(angle / (2 * np.pi)) ** 2 / 2 * (cross @ cross)


def _product(rotations: np.ndarray) -> np.ndarray:
    """The product R0 R1 ... of (n, 3, 3), pairwise: log n steps."""
    while len(rotations) > 1:
        if len(rotations) % 2:
            rotations = np.concatenate((rotations, np.eye(3)[None]))
        rotations = rotations[0::2] @ rotations[1::2]
    return rotations[0]


def check_rotation(matrix: np.ndarray, what: str = "rotation_camera_imu") -> np.ndarray:
    """The matrix as (3, 3) float64. Raises CalibrationError where it is not a rotation."""
    rotation = np.asarray(matrix, np.float64)
    good = rotation.shape == (3, 3) and np.isfinite(rotation).all()
    if not good or np.abs(rotation @ rotation.T - np.eye(3)).max() > _ORTHOGONAL or np.linalg.det(rotation) < 0:
        raise CalibrationError(
            f"{what}: expected a rotation (3, 3), orthogonal with determinant 1, found {rotation.tolist()}"
        )
    return rotation
