"""COLMAP models as text: cameras.txt, images.txt, points3D.txt. Scenes must be of undistorted pinhole cameras.

COLMAP puts (0.5, 0.5) at the centre of the top-left pixel, we (0, 0): half a pixel is taken off everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scfeat_core.data.posed import PosedScene
from scfeat_core.data.tracks import Tracks, make_tracks
from scfeat_core.errors import CalibrationError, DataError
from scfeat_core.types import Camera

_PLACES = ("", "sparse", "sparse/0")
_SINGLE, _DOUBLE = (0, 0, 1, 2), (0, 1, 2, 3)  # where fx, fy, cx, cy are in the parameters
_PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE")
# name: (places of fx, fy, cx, cy; how many coefficients follow; name in ROS; how many zeros ROS wants behind them)
# The polynomials of COLMAP (src/colmap/sensor/models.h) are those of OpenCV, cut short.
_MODELS = {
    "SIMPLE_PINHOLE": (_SINGLE, 0, "plumb_bob", 0),
    "PINHOLE": (_DOUBLE, 0, "plumb_bob", 0),
    "SIMPLE_RADIAL": (_SINGLE, 1, "plumb_bob", 4),
    "RADIAL": (_SINGLE, 2, "plumb_bob", 3),
    "OPENCV": (_DOUBLE, 4, "plumb_bob", 1),
    "FULL_OPENCV": (_DOUBLE, 8, "rational_polynomial", 0),
    "SIMPLE_FISHEYE": (_SINGLE, 0, "equidistant", 4),
    "FISHEYE": (_DOUBLE, 0, "equidistant", 4),
    "SIMPLE_RADIAL_FISHEYE": (_SINGLE, 1, "equidistant", 3),
    "RADIAL_FISHEYE": (_SINGLE, 2, "equidistant", 2),
    "OPENCV_FISHEYE": (_DOUBLE, 4, "equidistant", 0),
}


def find_model(folder: Path) -> Path | None:
    """The folder of the model of a scene: text, or binary where there is no text."""
    for name in ("images.txt", "images.bin"):
        for place in _PLACES:
            if (folder / place / name).is_file():
                return folder / place
    return None


def read_model(name: str, folder: Path) -> PosedScene:
    """The scene, still without pairs, of a folder that :func:`find_model` found a model for. Raises DataError."""
    model = find_model(folder)
    if model is None or not (model / "images.txt").is_file():
        raise DataError(
            f"expected a COLMAP model as text in {model or folder}, found a binary one; convert it: "
            "colmap model_converter --input_path DIR --output_path DIR --output_type TXT"
        )
    cameras = _read_pinholes(model / "cameras.txt")
    try:
        heads, observed = _read_images(model / "images.txt")
        k = np.array([cameras[head[8]].K for head in heads]).reshape(-1, 3, 3)
        sizes = np.array([cameras[head[8]].size for head in heads], np.int32).reshape(-1, 2)
        poses = np.array([head[1:8] for head in heads], np.float64).reshape(-1, 7)
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"expected a COLMAP model in {model}, found {error!r} in images.txt; export the model again"
        ) from error
    files = tuple(head[9] for head in heads)
    images = folder / "images" if (folder / "images").is_dir() else folder
    tracks = _read_tracks(model / "points3D.txt", observed)
    pairs = np.zeros((0, 2), np.int32)
    return PosedScene(name, images, files, sizes, k, rotations(poses[:, :4]), poses[:, 4:], pairs, tracks)


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """(n, 3, 3) of (n, 4) quaternions w, x, y, z of any length but 0."""
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _lines(path: Path) -> list[str]:
    """All lines that are no comments. Empty ones count: they are images without points."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"expected a text file of a COLMAP model at {path}, found: {error}") from error
    return [line for line in text.splitlines() if not line.startswith("#")]


def read_cameras(path: Path) -> dict[str, Camera]:
    """The cameras of a cameras.txt by their id, in our pixels and under the names of sensor_msgs/CameraInfo.

    Raises DataError where it is no such file, CalibrationError for a model that ROS has no name for.
    """
    lines = [line.split() for line in _lines(path) if line.strip()]
    return {words[0]: _camera(words, path) for words in lines}


def _camera(words: list[str], path: Path) -> Camera:
    """words: CAMERA_ID MODEL WIDTH HEIGHT PARAMS..."""
    line = " ".join(words)
    if len(words) < 4:
        raise DataError(f"expected CAMERA_ID MODEL WIDTH HEIGHT PARAMS in each line of {path}, found '{line}'")
    if words[1] not in _MODELS:
        raise CalibrationError(
            f"expected one of the camera models {', '.join(_MODELS)} in {path}, found {words[1]}, which no distortion "
            "model of ROS can express: calibrate with OPENCV or OPENCV_FISHEYE, or undistort the images"
        )
    places, count, name, zeros = _MODELS[words[1]]
    try:
        values, size = np.array(words[4:], np.float64), (int(words[2]), int(words[3]))
    except ValueError as error:
        raise DataError(f"expected a size and the parameters of a camera in {path}, found '{line}'") from error
    if len(values) != places[-1] + 1 + count:
        raise DataError(f"expected {places[-1] + 1 + count} parameters of {words[1]} in {path}, found '{line}'")
    fx, fy, cx, cy = values[list(places)]
    k = np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])
    return Camera(k, np.append(values[places[-1] + 1 :], np.zeros(zeros)), size, name)


def _read_pinholes(path: Path) -> dict[str, Camera]:
    """The cameras of undistorted images."""
    for line in filter(str.strip, _lines(path)):
        words = line.split()
        if len(words) < 2 or words[1] not in _PINHOLES:
            raise DataError(
                f"expected undistorted images (PINHOLE or SIMPLE_PINHOLE) in {path}, found '{line.strip()}'; "
                "undistort them: colmap image_undistorter"
            )
    return read_cameras(path)


def _read_images(path: Path) -> tuple[list[list[str]], list[np.ndarray]]:
    """Two lines an image: ten words (id, quaternion, translation, camera, name), and (K, 3) of x, y, point id."""
    lines = _lines(path)
    heads = [line.split(maxsplit=9) for line in lines[0::2] if line.strip()]
    points = [np.array(line.split(), np.float64).reshape(-1, 3) for line in lines[1::2]]
    points += [np.zeros((0, 3))] * (len(heads) - len(points))  # an editor may have cut the last empty line
    if any(len(head) != 10 for head in heads):
        raise ValueError("a line of an image without ten words")
    return heads, points[: len(heads)]


def _read_tracks(path: Path, observed: Sequence[np.ndarray]) -> Tracks | None:
    """None where the model has no points."""
    if not path.is_file():
        return None
    rows = [line.split(maxsplit=4)[:4] for line in _lines(path) if line.strip()]
    try:
        table = np.array(rows, np.float64).reshape(-1, 4)
    except ValueError as error:
        raise DataError(
            f"expected POINT3D_ID X Y Z ... in each line of {path}, found {error}; export it again"
        ) from error
    table = table[table[:, 0].argsort()]
    image = np.repeat(np.arange(len(observed)), [len(rows) for rows in observed])
    x, y, point = np.concatenate([*observed, np.zeros((0, 3))]).T
    pid = np.searchsorted(table[:, 0], point)
    known = (pid < len(table)) & (point >= 0)
    known[known] = table[pid[known], 0] == point[known]
    xy = np.stack([x, y], 1)[known] - 0.5
    return make_tracks(table[:, 1:], xy, pid[known], image[known], len(observed)) if known.any() else None
