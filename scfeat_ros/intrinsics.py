"""Intrinsics of a camera from the files that calibration tools write. Nothing of ROS is imported.

Kalibr (camchain.yaml), ROS (the YAML of camera_info_manager, and what ``ros2 topic echo`` prints), COLMAP
(cameras.txt), EuRoC (sensor.yaml) and KITTI (calib.txt), told apart by their content. Pixel (0, 0) is the centre of the
top-left pixel in all of them but COLMAP's, which is converted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from scfeat_core.data.colmap import read_cameras
from scfeat_core.errors import CalibrationError, DataError
from scfeat_core.geometry import check_camera
from scfeat_core.types import Camera

_FORMATS = (
    "a camchain.yaml of Kalibr, a camera_info YAML of ROS, a cameras.txt of COLMAP, a sensor.yaml of EuRoC or a "
    "calib.txt of KITTI"
)
_COLMAP_LINE = re.compile(r"\d+\s+[A-Z][A-Z_]+\s+\d+\s+\d+\s")
_KITTI_LINE = re.compile(r"(P\d):((?:\s+[-+.\deE]+){12})\s*", re.ASCII)
# Names of Kalibr and of the EuRoC data set, and how many coefficients belong to them.
_DISTORTIONS = {
    "radtan": ("plumb_bob", 4),
    "radial-tangential": ("plumb_bob", 4),
    "equidistant": ("equidistant", 4),
    "equi": ("equidistant", 4),
    "none": ("plumb_bob", 0),
}


def read_intrinsics(
    path: str | Path, image_size: tuple[int, int] | None = None, camera: str | None = None, topic: str | None = None
) -> Camera:
    """The intrinsics in a file. image_size: (width, height) of the images that they are meant for.

    camera: which one, where the file has several: cam0 or the rostopic (Kalibr), the id (COLMAP), P0 (KITTI), the
    camera_name (ROS). Without it, that of the image topic ``topic`` where the file names topics, then the only one that
    fits the images. image_size is needed where the file does not say it (KITTI).

    Raises DataError where the file is none of these, or where it is not clear which camera is meant; CalibrationError
    where its camera model is not supported, a value makes no sense, or the size is another one than that of the images.
    """
    path = Path(path)
    found = _choose(_read(path), path, image_size, camera, topic)
    if found.size == (0, 0):
        if image_size is None:
            raise DataError(f"expected the size of the images, which {path} does not say: give it")
        found = replace(found, size=image_size)
    if image_size is not None and found.size != image_size:
        raise CalibrationError(
            f"expected the calibration of images of {_by(image_size)}, found one for {_by(found.size)} in {path}: "
            "calibrate at the size that is used"
        )
    check_camera(found)
    return found


def read_body_camera(path: str | Path, camera: str | None = None) -> np.ndarray | None:
    """T_body_camera (4, 4) float64 of a file of Kalibr (T_cam_imu: the IMU is the body) or EuRoC (T_BS).

    None where the file says nothing of it. camera: as in :func:`read_intrinsics`. Raises DataError where the matrix is
    no rigid motion.
    """
    path = Path(path)
    loaded = _load(path, _text(path))
    if "T_BS" in loaded:
        return _rigid(_data(loaded["T_BS"]), path, "T_BS")
    chain = _chain(loaded)
    names = [name for name, entry in chain.items() if camera in (None, name, entry.get("rostopic"))]
    if len(names) != 1 or "T_cam_imu" not in chain[names[0]]:
        return None
    return np.linalg.inv(_rigid(chain[names[0]]["T_cam_imu"], path, "T_cam_imu"))


# --------------------------------------------------------------------------------------------------------------- files


def _read(path: Path) -> dict[tuple[str, str], Camera]:
    """All cameras of a file by (name, topic); a size of (0, 0) where the file does not say it."""
    if path.is_dir() and (path / "cameras.txt").is_file():
        path = path / "cameras.txt"
    text = _text(path)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if lines and _COLMAP_LINE.match(lines[0]):
        return {(name, ""): camera for name, camera in read_cameras(path).items()}
    kitti = [match for match in map(_KITTI_LINE.fullmatch, lines) if match]
    if kitti:
        return {(match[1], ""): _kitti_camera(match[2]) for match in kitti}
    loaded = _load(path, text)
    try:
        return _from_yaml(loaded, path)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise DataError(f"expected {_FORMATS} at {path}, found a file with {reason}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        hint = "; a binary model: colmap model_converter --output_type TXT" if path.suffix == ".bin" else ""
        raise DataError(f"expected {_FORMATS} at {path}, found a binary file{hint}") from error
    except OSError as error:
        raise DataError(f"expected {_FORMATS} at {path}, found: {error.strerror}; check the path") from error


def _load(path: Path, text: str) -> dict[str, Any]:
    """The first document that is not empty; the tags and the first line of OpenCV's YAML are none of ours."""
    text = re.sub(r"^%YAML:.*$", "", text, count=1, flags=re.MULTILINE).replace("!!opencv-matrix", "")
    try:
        loaded = next(filter(None, yaml.safe_load_all(text)), None)
    except yaml.YAMLError as error:
        raise DataError(
            f"expected {_FORMATS} at {path}, found no valid YAML: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(loaded, dict):
        raise DataError(f"expected {_FORMATS} at {path}, found none of these")
    return loaded


def _from_yaml(loaded: dict[str, Any], path: Path) -> dict[tuple[str, str], Camera]:
    chain = _chain(loaded)
    if chain:
        return {(name, str(entry.get("rostopic", ""))): _kalibr(entry, path) for name, entry in chain.items()}
    if "camera_matrix" in loaded:
        return {(str(loaded.get("camera_name", "")), ""): _camera_info_manager(loaded)}
    if "intrinsics" in loaded:
        return {("", ""): _kalibr(loaded, path)}
    lower = {str(key).lower(): value for key, value in loaded.items()}
    if {"k", "d", "distortion_model"} <= lower.keys():
        return {("", ""): _echoed(lower)}
    raise DataError(f"expected {_FORMATS} at {path}, found the keys {', '.join(map(str, loaded))}")


def _chain(loaded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(name): entry for name, entry in loaded.items() if isinstance(entry, dict) and "intrinsics" in entry}


def _kalibr(entry: Mapping[str, Any], path: Path) -> Camera:
    """A camera of Kalibr's chain, or EuRoC's sensor.yaml, which has the same fields."""
    model = str(entry.get("camera_model", "pinhole"))
    distortion = str(entry.get("distortion_model", "none"))
    if model != "pinhole":
        raise CalibrationError(
            f"expected the camera model pinhole in {path}, found {model}: no distortion model of ROS can express it; "
            "calibrate with pinhole-radtan, or with pinhole-equi for a fisheye"
        )
    if distortion not in _DISTORTIONS:
        raise CalibrationError(
            f"expected one of the distortion models {', '.join(_DISTORTIONS)} in {path}, found {distortion}: calibrate "
            "with pinhole-radtan, or with pinhole-equi for a fisheye"
        )
    name, count = _DISTORTIONS[distortion]
    coefficients = _numbers(entry.get("distortion_coeffs", entry.get("distortion_coefficients", [])))[:count]
    if len(coefficients) != count:
        raise DataError(f"expected {count} coefficients of {distortion} in {path}, found {len(coefficients)}")
    fx, fy, cx, cy = _numbers(entry["intrinsics"])
    width, height = (int(value) for value in entry["resolution"])
    return Camera(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), coefficients, (width, height), name)


def _camera_info_manager(info: Mapping[str, Any]) -> Camera:
    rectification, projection = (_data(info.get(f"{name}_matrix", [])) for name in ("rectification", "projection"))
    size = int(info.get("image_width", 0)), int(info.get("image_height", 0))
    coefficients = _data(info.get("distortion_coefficients", []))
    k, model = _data(info["camera_matrix"]).reshape(3, 3), str(info.get("distortion_model", "plumb_bob"))
    return Camera(k, coefficients, size, model, *_stereo(rectification, projection))


def _echoed(info: Mapping[str, Any]) -> Camera:
    """What ``ros2 topic echo`` and ``rostopic echo`` print of a sensor_msgs/CameraInfo, keys in small letters."""
    k, d = _numbers(info["k"]).reshape(3, 3), _numbers(info["d"])
    size = int(info.get("width", 0)), int(info.get("height", 0))
    stereo = _stereo(_numbers(info.get("r", [])), _numbers(info.get("p", [])))
    return Camera(k, d, size, str(info["distortion_model"]), *stereo)


def _stereo(rotation: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """R and P; None where one is missing or all zeros, as for single cameras."""
    if not (rotation.any() and projection.any()):
        return None, None
    return rotation.reshape(3, 3), projection.reshape(3, 4)


def _kitti_camera(words: str) -> Camera:
    """A rectified camera. words: its projection matrix, row by row."""
    projection = np.array(words.split(), np.float64).reshape(3, 4)
    return Camera(projection[:, :3].copy(), np.zeros(0), (0, 0), "plumb_bob", np.eye(3), projection)


def _data(matrix: Any) -> np.ndarray:
    """The numbers of a matrix as OpenCV, camera_info_manager and EuRoC write it, or of a bare list."""
    return _numbers(matrix["data"] if isinstance(matrix, dict) else matrix)


def _numbers(values: Iterable[Any]) -> np.ndarray:
    return np.array(list(values), np.float64).ravel()


def _rigid(values: Any, path: Path, name: str) -> np.ndarray:
    try:
        matrix = np.array(values, np.float64).reshape(4, 4)
    except (TypeError, ValueError) as error:
        raise DataError(f"expected {name} of 4x4 numbers in {path}, found {values}") from error
    r = matrix[:3, :3]
    rigid = np.allclose(r @ r.T, np.eye(3), atol=1e-3) and np.linalg.det(r) > 0
    if not rigid or not np.isfinite(matrix).all() or not np.array_equal(matrix[3], (0, 0, 0, 1)):
        raise DataError(f"expected {name} to be a rotation and a translation in {path}, found {matrix.tolist()}")
    return matrix


# -------------------------------------------------------------------------------------------------------------- choice


def _choose(
    cameras: dict[tuple[str, str], Camera],
    path: Path,
    image_size: tuple[int, int] | None,
    name: str | None,
    topic: str | None,
) -> Camera:
    """The camera that is asked for, or the only one that can be meant."""
    listing = ", ".join(f"{' '.join(filter(None, key)) or 'unnamed'} ({_by(c.size)})" for key, c in cameras.items())
    if name is not None:
        named = [camera for key, camera in cameras.items() if name in key]
        if not named:
            raise DataError(f"expected a camera '{name}' in {path}, found {listing}: choose one of these")
        return named[0]
    of_topic = [camera for key, camera in cameras.items() if topic is not None and key[1] == topic]
    fitting = of_topic or [camera for camera in cameras.values() if image_size in (None, camera.size)]
    candidates = fitting or list(cameras.values())
    if len(candidates) != 1:
        raise DataError(f"expected one camera in {path}, found {listing}: say which one")
    return candidates[0]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
