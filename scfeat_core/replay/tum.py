"""Poses in the text format of the TUM benchmark: ``seconds tx ty tz qx qy qz qw``, one a line, T_world_camera."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scfeat_core.data.colmap import rotations
from scfeat_core.errors import DataError
from scfeat_core.feature_files import replaced


def write_tum(path: Path, stamps: np.ndarray, poses: np.ndarray, comment: str = "") -> None:
    """stamps: (N,) int64, nanoseconds. poses: (N, 4, 4), metres. comment: first line. Raises ScfeatError."""
    lines = [f"# {comment}"] if comment else []
    lines.append("# timestamp tx ty tz qx qy qz qw")
    values = np.column_stack((poses[:, :3, 3], quaternions(poses[:, :3, :3])))
    for stamp, row in zip(stamps.tolist(), values.tolist(), strict=True):
        lines.append(f"{_seconds(stamp)} " + " ".join(f"{value:.9f}" for value in row))
    with replaced(path) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_tum(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stamps (N,) int64, nanoseconds, and poses (N, 4, 4) float64, as they stand there. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        stamps = np.array([_nanoseconds(row[0]) for row in rows], np.int64)
        values = np.array([row[1:8] for row in rows], np.float64).reshape(-1, 7)
    except (OSError, ValueError) as error:
        raise DataError(f"expected poses as TUM writes them (8 numbers a line) at {path}, found: {error}") from error
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    poses[:, :3, 3] = values[:, :3]
    if len(poses):
        poses[:, :3, :3] = rotations(values[:, [6, 3, 4, 5]])
    return stamps, poses


def quaternions(matrices: np.ndarray) -> np.ndarray:
    """(N, 4) float64, x, y, z, w of unit length with w >= 0, of rotations (N, 3, 3).

    The largest eigenvector of a symmetric 4x4 matrix (Bar-Itzhack, 2000): stable for all angles, and the nearest one
    where a matrix is not quite a rotation.
    """
    m = np.asarray(matrices, np.float64).reshape(-1, 3, 3)
    k = np.empty((len(m), 4, 4))
    k[:, :3, :3] = m + m.transpose(0, 2, 1)
    trace = np.trace(m, axis1=1, axis2=2)
    k[:, :3, :3] -= trace[:, None, None] * np.eye(3)
    axis = np.stack((m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]), -1)
    k[:, :3, 3] = k[:, 3, :3] = axis
    k[:, 3, 3] = trace
    vectors = np.linalg.eigh(k)[1][:, :, -1]
    return np.where(vectors[:, 3:] < 0, -vectors, vectors)


def _seconds(stamp: int) -> str:
    sign = "-" if stamp < 0 else ""
    return f"{sign}{abs(stamp) // 1_000_000_000}.{abs(stamp) % 1_000_000_000:09d}"


def _nanoseconds(text: str) -> int:
    """Exactly, where there are at most nine digits after the point: a double holds only 200 ns of today's time."""
    whole, _, part = text.partition(".")
    if whole.lstrip("+-").isdecimal() and (part.isdecimal() or not part):
        value = int(whole.lstrip("+-")) * 1_000_000_000 + int(part[:9].ljust(9, "0") or 0)
        return -value if whole.startswith("-") else value
    return round(float(text) * 1e9)
