"""Every format of intrinsics from small files, with the numbers written out, and what is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scfeat_core.errors import CalibrationError, DataError
from scfeat_core.geometry import project_rays
from scfeat_ros.intrinsics import read_body_camera, read_intrinsics

KALIBR = """
cam0:
  cam_overlaps: [1]
  camera_model: pinhole
  distortion_coeffs: [-0.28, 0.07, 0.0002, 0.00002]
  distortion_model: radtan
  intrinsics: [458.6, 457.3, 367.2, 248.4]
  resolution: [752, 480]
  rostopic: /cam0/image_raw
  T_cam_imu:
  - [0.0, 1.0, 0.0, 0.1]
  - [-1.0, 0.0, 0.0, 0.2]
  - [0.0, 0.0, 1.0, 0.3]
  - [0.0, 0.0, 0.0, 1.0]
cam1:
  camera_model: pinhole
  distortion_coeffs: [0.01, -0.02, 0.03, -0.04]
  distortion_model: equidistant
  intrinsics: [300.0, 301.0, 319.5, 239.5]
  resolution: [640, 480]
  rostopic: /cam1/image_raw
"""
ROS = """
image_width: 640
image_height: 480
camera_name: front
camera_matrix: {rows: 3, cols: 3, data: [500, 0, 320, 0, 501, 240, 0, 0, 1]}
distortion_model: rational_polynomial
distortion_coefficients: {rows: 1, cols: 8, data: [1, 2, 3, 4, 5, 6, 7, 8]}
rectification_matrix: {rows: 3, cols: 3, data: [1, 0, 0, 0, 1, 0, 0, 0, 1]}
projection_matrix: {rows: 3, cols: 4, data: [510, 0, 320, -51, 0, 510, 240, 0, 0, 0, 1, 0]}
"""
ECHOED = """
header:
  stamp: {sec: 1, nanosec: 2}
  frame_id: camera
height: 480
width: 640
distortion_model: plumb_bob
d: [0.1, 0.2, 0.0, 0.0, 0.0]
k: [500.0, 0.0, 320.0, 0.0, 501.0, 240.0, 0.0, 0.0, 1.0]
r: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
p: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
---
"""
EUROC = """
sensor_type: camera
T_BS:
  cols: 4
  rows: 4
  data: [0.0, -1.0, 0.0, -0.02, 1.0, 0.0, 0.0, -0.06, 0.0, 0.0, 1.0, 0.01, 0.0, 0.0, 0.0, 1.0]
rate_hz: 20
resolution: [752, 480]
camera_model: pinhole
intrinsics: [458.6, 457.3, 367.2, 248.4] #fu, fv, cu, cv
distortion_model: radial-tangential
distortion_coefficients: [-0.28, 0.07, 0.0002, 0.00002]
"""
KITTI = """P0: 7.07e+02 0 6.01e+02 0 0 7.07e+02 1.83e+02 0 0 0 1 0
P1: 7.07e+02 0 6.01e+02 -3.8e+02 0 7.07e+02 1.83e+02 0 0 0 1 0
Tr: 1 0 0 0 0 1 0 0 0 0 1 0
"""


def file(folder: Path, text: str, name: str = "calibration.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_kalibr(tmp_path: Path) -> None:
    path = file(tmp_path, KALIBR)
    left = read_intrinsics(path, (752, 480))
    np.testing.assert_array_equal(left.K, [[458.6, 0, 367.2], [0, 457.3, 248.4], [0, 0, 1]])
    assert (left.distortion_model, left.D.tolist()) == ("plumb_bob", [-0.28, 0.07, 0.0002, 0.00002])
    for right in (
        read_intrinsics(path, (640, 480)),
        read_intrinsics(path, camera="cam1"),
        read_intrinsics(path, camera="/cam1/image_raw"),
        read_intrinsics(path, topic="/cam1/image_raw"),
    ):
        assert (right.distortion_model, right.D.tolist()) == ("equidistant", [0.01, -0.02, 0.03, -0.04])
        assert right.size == (640, 480)


def test_of_two_cameras_that_both_fit_one_must_be_named(tmp_path: Path) -> None:
    path = file(tmp_path, KALIBR.replace("[640, 480]", "[752, 480]"))
    with pytest.raises(DataError, match=r"cam0 /cam0/image_raw \(752x480\), cam1.*say which one"):
        read_intrinsics(path, (752, 480), topic="/front/image")
    assert read_intrinsics(path, (752, 480), topic="/cam0/image_raw").distortion_model == "plumb_bob"
    with pytest.raises(DataError, match="camera 'cam7'.*cam0"):
        read_intrinsics(path, camera="cam7")


def test_kalibr_without_distortion(tmp_path: Path) -> None:
    text = KALIBR.split("cam1:")[0].replace("radtan", "none").replace("[-0.28, 0.07, 0.0002, 0.00002]", "[]")
    camera = read_intrinsics(file(tmp_path, text))
    np.testing.assert_allclose(project_rays(np.array([[0.5, 0.25]]), camera), [[596.5, 362.725]])


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("camera_model: pinhole", "camera_model: omni", "found omni.*pinhole-radtan"),
        ("camera_model: pinhole", "camera_model: ds", "found ds"),
        ("distortion_model: radtan", "distortion_model: fov", "found fov.*pinhole-equi"),
    ],
)
def test_kalibr_models_without_a_name_in_ros_are_refused(tmp_path: Path, old: str, new: str, found: str) -> None:
    with pytest.raises(CalibrationError, match=found):
        read_intrinsics(file(tmp_path, KALIBR.split("cam1:")[0].replace(old, new)))


def test_camera_info_manager(tmp_path: Path) -> None:
    camera = read_intrinsics(file(tmp_path, ROS), (640, 480), camera="front")
    np.testing.assert_array_equal(camera.K, [[500, 0, 320], [0, 501, 240], [0, 0, 1]])
    assert (camera.distortion_model, camera.D.tolist()) == ("rational_polynomial", [1, 2, 3, 4, 5, 6, 7, 8])
    assert camera.P is not None
    assert camera.P[0, 3] == -51
    np.testing.assert_array_equal(camera.R, np.eye(3))


def test_echoed_camera_info_of_both_ros(tmp_path: Path) -> None:
    ros1 = ECHOED
    for name in "dkrp":
        ros1 = ros1.replace(f"\n{name}: ", f"\n{name.upper()}: ")
    for text in (ECHOED, ros1):
        camera = read_intrinsics(file(tmp_path, text))
        np.testing.assert_array_equal(camera.K, [[500, 0, 320], [0, 501, 240], [0, 0, 1]])
        assert (camera.size, camera.D.tolist()) == ((640, 480), [0.1, 0.2, 0, 0, 0])
        assert camera.R is None
        assert camera.P is None


def test_euroc_sensor(tmp_path: Path) -> None:
    path = file(tmp_path, EUROC, "sensor.yaml")
    camera = read_intrinsics(path, (752, 480))
    np.testing.assert_array_equal(camera.K, [[458.6, 0, 367.2], [0, 457.3, 248.4], [0, 0, 1]])
    assert (camera.distortion_model, camera.D.tolist()) == ("plumb_bob", [-0.28, 0.07, 0.0002, 0.00002])
    pose = read_body_camera(path)
    assert pose is not None
    np.testing.assert_array_equal(pose[:3, 3], [-0.02, -0.06, 0.01])


def test_body_camera_of_kalibr_is_the_inverse_of_what_it_says(tmp_path: Path) -> None:
    path = file(tmp_path, KALIBR)
    pose = read_body_camera(path, "cam0")
    assert pose is not None
    # a point at the centre of the camera, seen from the IMU: -R' t
    np.testing.assert_allclose(pose[:3, 3], [0.2, -0.1, -0.3])
    np.testing.assert_allclose(pose[:3, :3], [[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    assert read_body_camera(path, "cam1") is None
    with pytest.raises(DataError, match="T_cam_imu to be a rotation"):
        read_body_camera(file(tmp_path, KALIBR.replace("- [0.0, 0.0, 1.0, 0.3]", "- [0.0, 0.0, 2.0, 0.3]")), "cam0")


def test_kitti(tmp_path: Path) -> None:
    path = file(tmp_path, KITTI, "calib.txt")
    camera = read_intrinsics(path, (1226, 370), camera="P1")
    np.testing.assert_array_equal(camera.K, [[707, 0, 601], [0, 707, 183], [0, 0, 1]])
    assert camera.P is not None
    assert camera.P[0, 3] == -380
    with pytest.raises(DataError, match="say which one"):
        read_intrinsics(path, (1226, 370))
    with pytest.raises(DataError, match="expected the size of the images"):
        read_intrinsics(path, camera="P0")


COLMAP = {  # parameters, coefficients in ROS, its name
    "SIMPLE_PINHOLE": ("500 320 240", [], "plumb_bob"),
    "PINHOLE": ("500 501 320 240", [], "plumb_bob"),
    "SIMPLE_RADIAL": ("500 320 240 0.1", [0.1, 0, 0, 0, 0], "plumb_bob"),
    "RADIAL": ("500 320 240 0.1 -0.02", [0.1, -0.02, 0, 0, 0], "plumb_bob"),
    "OPENCV": ("500 501 320 240 0.1 -0.02 0.003 0.004", [0.1, -0.02, 0.003, 0.004, 0], "plumb_bob"),
    "FULL_OPENCV": (
        "500 501 320 240 0.1 -0.02 0.003 0.004 0.005 0.06 -0.007 0.0008",
        [0.1, -0.02, 0.003, 0.004, 0.005, 0.06, -0.007, 0.0008],
        "rational_polynomial",
    ),
    "SIMPLE_FISHEYE": ("500 320 240", [0, 0, 0, 0], "equidistant"),
    "FISHEYE": ("500 501 320 240", [0, 0, 0, 0], "equidistant"),
    "SIMPLE_RADIAL_FISHEYE": ("500 320 240 0.1", [0.1, 0, 0, 0], "equidistant"),
    "RADIAL_FISHEYE": ("500 320 240 0.1 -0.02", [0.1, -0.02, 0, 0], "equidistant"),
    "OPENCV_FISHEYE": ("500 501 320 240 0.1 -0.02 0.003 0.004", [0.1, -0.02, 0.003, 0.004], "equidistant"),
}


@pytest.mark.parametrize("model", COLMAP)
def test_colmap(tmp_path: Path, model: str) -> None:
    parameters, coefficients, name = COLMAP[model]
    path = file(tmp_path, f"# Camera list\n3 {model} 640 480 {parameters}\n", "cameras.txt")
    for camera in (read_intrinsics(path, (640, 480)), read_intrinsics(tmp_path, camera="3")):
        fy = 501 if parameters.startswith("500 501") else 500
        np.testing.assert_array_equal(camera.K, [[500, 0, 319.5], [0, fy, 239.5], [0, 0, 1]])
        assert (camera.distortion_model, camera.D.tolist(), camera.size) == (name, coefficients, (640, 480))


@pytest.mark.parametrize("model", COLMAP)
def test_colmap_sees_a_ray_half_a_pixel_from_where_we_do(tmp_path: Path, model: str) -> None:
    pycolmap = pytest.importorskip(
        "pycolmap", reason="pycolmap is not installed: pip install 'scfeat-python[reconstruct]'"
    )
    parameters = COLMAP[model][0]
    path = file(tmp_path, f"1 {model} 640 480 {parameters}\n", "cameras.txt")
    rays = np.array([[0.3, -0.2], [0.0, 0.0], [-0.5, 0.4]])
    try:
        camera = pycolmap.Camera(
            model=model, width=640, height=480, params=[float(word) for word in parameters.split()]
        )
    except (KeyError, ValueError):
        pytest.skip(f"this pycolmap does not know {model}")
    theirs = camera.img_from_cam(np.column_stack([rays, np.ones(3)]))
    np.testing.assert_allclose(project_rays(rays, read_intrinsics(path)) + 0.5, theirs, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "error", "found"),
    [
        ("1 FOV 640 480 500 500 320 240 0.9", CalibrationError, "found FOV.*undistort the images"),
        ("1 OPENCV 640 480 500 500 320 240", DataError, "8 parameters of OPENCV"),
        ("1 PINHOLE 640 480 500 x 320 240", DataError, "found '1 PINHOLE"),
        ("1 PINHOLE 640 480 0 500 320 240", CalibrationError, "positive focal lengths"),
        ("1 PINHOLE 640 480 5 5 3 2\n2 PINHOLE 640 480 6 6 3 2", DataError, r"1 \(640x480\), 2.*say which one"),
        ("", DataError, "found none of these"),
        ("a: [", DataError, "no valid YAML"),
        ("just a text", DataError, "found none of these"),
        ("frames: 3", DataError, "found the keys frames"),
        ("camera_matrix: {data: [1, 2]}\nimage_width: 640\nimage_height: 480", DataError, "cannot reshape"),
        ("camera_matrix: 5\nimage_width: 640\nimage_height: 480", DataError, "not iterable"),
        ("intrinsics: [1, 2, 3, 4]", DataError, "no 'resolution'"),
        (ROS.replace("500, 0, 320", ".nan, 0, 320"), CalibrationError, "finite 3x3 K"),
        (ROS.replace("[1, 2, 3, 4, 5, 6, 7, 8]", "[1, 2, 3]"), CalibrationError, "3 coefficients"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=found):
        read_intrinsics(file(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="check the path"):
        read_intrinsics(tmp_path / "missing.yaml")
    with pytest.raises(DataError, match="check the path"):
        read_intrinsics(tmp_path)
    (tmp_path / "cameras.bin").write_bytes(b"\x01\x00\xff\xfe")
    with pytest.raises(DataError, match="binary file.*model_converter"):
        read_intrinsics(tmp_path / "cameras.bin")


def test_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="640x480.*1280x960"):
        read_intrinsics(file(tmp_path, ROS.replace("640", "1280").replace("480", "960")), (640, 480))


def test_files_beside_the_real_bags(shared_data: Path) -> None:
    sizes = {
        "tum_fr1_rpy": (640, 480),
        "euroc_v101": (752, 480),
        "hololens_office": (540, 360),
        "kitti_seq1": (1226, 370),
    }
    for name, size in sizes.items():
        assert read_intrinsics(shared_data / "bag" / name / "camera_info.yaml", size).size == size
