from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from scfeat_core.errors import CalibrationError, FeatureError
from scfeat_core.extraction import Extractor
from scfeat_core.geometry import essential_from_pose, undistort_points
from scfeat_core.matching import match
from scfeat_core.stereo import baseline, check_rig, essential_matrix, match_stereo
from scfeat_core.types import Camera, Features

SIZE = (640, 480)
K0 = np.array([[410, 0, 322.0], [0, 412, 238.0], [0, 0, 1.0]])
K1 = np.array([[400, 0, 316.0], [0, 401, 243.0], [0, 0, 1.0]])
RADTAN = np.array([-0.28, 0.07, 2e-4, -1e-4, 0.0])
ROTATION = cv2.Rodrigues(np.array([0.02, -0.03, 0.015]))[0]
TRANSLATION = np.array([-0.12, 0.003, 0.002])  # x1 = R x0 + t: the second camera is to the right
MODELS = {
    "plumb_bob": (RADTAN, np.array([-0.25, 0.06, -1e-4, 2e-4, 0.0])),
    "rational_polynomial": (np.array([0.5, -0.2, 0, 0, 0.1, 0.7, -0.1, 0.05]),) * 2,
    "equidistant": (np.array([-0.02, 0.01, -0.005, 0.001]),) * 2,
}


def rig(model: str = "plumb_bob") -> tuple[Camera, Camera]:
    """A raw rig with R and P as a stereo calibration gives them."""
    rotation0, rotation1, p0, p1, *_ = cv2.stereoRectify(
        K0, np.zeros(5), K1, np.zeros(5), SIZE, ROTATION, TRANSLATION[:, None], alpha=0
    )
    d0, d1 = MODELS[model]
    return Camera(K0, d0, SIZE, model, rotation0, p0), Camera(K1, d1, SIZE, model, rotation1, p1)


def rectified(camera: Camera) -> Camera:
    return Camera(camera.P[:, :3], np.zeros(0), SIZE, "", np.eye(3), camera.P)


def world(count: int = 150) -> np.ndarray:
    """(count, 3) in the frame of the left camera, from 1 to 50 m."""
    rng = np.random.default_rng(0)
    depth = 1 / rng.uniform(1 / 50, 1, count)
    return np.column_stack([rng.uniform(-0.45, 0.45, (count, 2)), np.ones(count)]) * depth[:, None]


def project(points: np.ndarray, camera: Camera) -> np.ndarray:
    function = cv2.fisheye.projectPoints if camera.distortion_model == "equidistant" else cv2.projectPoints
    d = camera.D if camera.D.size else np.zeros(4)
    return function(points[:, None], np.zeros(3), np.zeros(3), camera.K, d)[0].reshape(-1, 2)


def features(points: np.ndarray, descriptors: np.ndarray, space: str = "test") -> Features:
    scores = np.linspace(1, 0, len(points)).astype(np.float32)
    return Features(points.astype(np.float32), scores, descriptors.astype(np.float32), SIZE, space)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def views(cameras: tuple[Camera, Camera], points: np.ndarray, noise: float = 0.2) -> tuple[Features, Features]:
    """Features of the points in both raw views, those of the right one in another order."""
    rng = np.random.default_rng(1)
    descriptors = unit(rng.normal(size=(len(points), 32)))
    pixels = [project(points, cameras[0]), project(points @ ROTATION.T + TRANSLATION, cameras[1])]
    pixels = [p + rng.normal(0, noise, p.shape) for p in pixels]
    order = rng.permutation(len(points))
    right = unit(descriptors + 0.05 * rng.normal(size=descriptors.shape))
    return features(pixels[0], descriptors), features(pixels[1][order], right[order])


def partners(features0: Features, features1: Features) -> np.ndarray:
    """For each feature of the left view the index of the true one in the right view."""
    return (features0.descriptors @ features1.descriptors.T).argmax(1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_raw_rig_with_distortion_matches_along_epipolar_lines(model, kind):
    cameras = rig(model)
    left, right = views(cameras, world())
    truth = partners(left, right)
    if kind == "torch":
        left, right = (
            replace(f, keypoints=torch.tensor(f.keypoints), descriptors=torch.tensor(f.descriptors))
            for f in (left, right)
        )
    matches = match_stereo(left, right, *cameras, gate=2.0)
    assert isinstance(matches.indices0, torch.Tensor if kind == "torch" else np.ndarray)
    matches = matches.numpy()
    assert len(matches) == 150
    np.testing.assert_array_equal(matches.indices1, truth[matches.indices0])


def test_repeated_texture_is_told_apart_by_the_rows():
    """All descriptors are alike in pairs, so that without the gate every second match is a guess."""
    cameras = rig()
    left, right = views(cameras, world())
    truth = partners(left, right)
    alike = np.repeat(left.descriptors[::2], 2, 0)
    ambiguous0 = replace(left, descriptors=alike)
    ambiguous1 = replace(right, descriptors=np.empty_like(alike))
    ambiguous1.descriptors[truth] = alike
    matches = match_stereo(ambiguous0, ambiguous1, *cameras, gate=1.5)
    right_ones = (matches.indices1 == truth[matches.indices0]).mean()
    assert len(matches) > 140 and right_ones > 0.95


def test_points_beyond_infinity_or_off_the_row_never_match():
    cameras = tuple(rectified(camera) for camera in rig())
    x = np.array([[100.0, 100], [200, 150], [300, 200], [400, 250], [500, 300]])
    shifted = x - [[20, 0], [0, 0], [-1, 1], [-5, 0], [20, 3]]  # fine, at infinity, within the gate, behind, other row
    descriptors = np.eye(5, 8)
    matches = match_stereo(features(x, descriptors), features(shifted, descriptors), *cameras, gate=2.0)
    assert matches.indices0.tolist() == matches.indices1.tolist() == [0, 1, 2]
    swapped = match_stereo(features(shifted, descriptors), features(x, descriptors), *cameras, gate=2.0)
    assert 0 not in swapped.indices0 and 3 in swapped.indices0


def test_rectified_images_and_raw_ones_give_the_same_matches():
    cameras = rig()
    left, right = views(cameras, world(), noise=0)
    flat = tuple(rectified(camera) for camera in cameras)
    moved = [
        replace(
            f,
            keypoints=cv2.undistortPoints(f.keypoints[:, None].astype(float), c.K, c.D, R=c.R, P=c.P)[:, 0].astype(
                np.float32
            ),
        )
        for f, c in zip((left, right), cameras, strict=True)
    ]
    raw, other = match_stereo(left, right, *cameras), match_stereo(*moved, *flat)
    assert np.array_equal(raw.indices0, other.indices0) and np.array_equal(raw.indices1, other.indices1)
    assert len(raw) == 150


@pytest.mark.parametrize("model", MODELS)
def test_essential_matrix_is_that_of_the_rays_of_the_raw_images(model):
    cameras = rig(model)
    points = world()
    rays = [
        undistort_points(project(seen, camera), camera)
        for seen, camera in zip((points, points @ ROTATION.T + TRANSLATION), cameras, strict=True)
    ]
    homogeneous0, homogeneous1 = (np.column_stack([r, np.ones(len(r))]) for r in rays)
    matrix = essential_matrix(*cameras)
    assert np.linalg.norm(matrix) == pytest.approx(1)
    np.testing.assert_allclose((homogeneous1 @ matrix * homogeneous0).sum(1), 0, atol=1e-7)
    np.testing.assert_allclose(matrix, essential_from_pose(ROTATION, TRANSLATION), atol=1e-7)


def test_min_cosine_and_nothing_to_match():
    cameras = rig()
    left, right = views(cameras, world())
    assert len(match_stereo(left, right, *cameras, min_cosine=0.999)) < len(match_stereo(left, right, *cameras))
    empty = features(np.zeros((0, 2)), np.zeros((0, 32)))
    assert len(match_stereo(empty, right, *cameras)) == len(match_stereo(left, empty, *cameras)) == 0
    lost = replace(left, keypoints=left.keypoints * np.float32(np.nan))
    assert len(match_stereo(lost, right, *cameras)) == 0


def moved(camera: Camera, x: float, y: float = 0.0) -> Camera:
    p = camera.P.copy()
    p[:2, 3] = [-p[0, 0] * x, -p[1, 1] * y]
    return replace(camera, P=p)


def test_cameras_that_are_no_rig_are_named_with_the_fix():
    left, right = rig()
    for cameras, message in (
        ((replace(left, R=None), right), "R and P of the left camera .* found no R: calibrate both"),
        ((left, replace(right, R=None, P=None)), "right camera .* no R and P"),
        ((left, moved(right, 0)), "expected a baseline .* calibration of single cameras"),
        ((right, left), "expected the left camera first, .* swap them"),
        ((left, moved(right, 0.001, 0.2)), "side by side .* above each other"),
        ((left, replace(right, R=np.zeros((3, 3)))), "R to be a 3x3 rotation"),
        ((left, replace(right, P=right.P * np.nan)), "P with positive focal lengths"),
        ((left, replace(right, K=np.zeros((3, 3)))), "positive focal lengths"),
    ):
        with pytest.raises(CalibrationError, match=message):
            check_rig(*cameras)
    with pytest.raises(CalibrationError, match="baseline"):
        match_stereo(*views(rig(), world()), left, moved(right, 0))
    with pytest.raises(FeatureError, match="one space"):
        views0, views1 = views(rig(), world())
        match_stereo(views0, replace(views1, descriptor_space="other"), left, right)


def test_real_pairs_of_a_rectified_rig(shared_data):
    """KITTI: with the gate, matches have disparities; without it, one in twenty and more of them cannot be true."""
    bag = pytest.importorskip("rosbags.highlevel", reason="rosbags is not installed: run `make setup`")
    folder = shared_data / "bag" / "kitti_seq1"
    if not folder.is_dir():
        pytest.skip(f"no stereo recording: {folder} does not exist")
    images, cameras = {}, {}
    with bag.AnyReader([folder]) as reader:
        for connection, _, raw in reader.messages():
            side, _, kind = connection.topic.removeprefix("/kitti/").partition("/")
            message = reader.deserialize(raw, connection.msgtype)
            if kind == "image_raw/compressed":
                images.setdefault(side, cv2.imdecode(np.asarray(message.data), cv2.IMREAD_GRAYSCALE))
            elif kind == "camera_info":
                p = np.reshape(message.p, (3, 4))
                size = (message.width, message.height)
                cameras[side] = Camera(
                    np.reshape(message.k, (3, 3)), message.d, size, message.distortion_model, np.eye(3), p
                )
            if len(images) == len(cameras) == 2:
                break
    sides = ("left", "right")
    rig_cameras = [cameras[side] for side in sides]
    assert baseline(*rig_cameras) == pytest.approx(0.537, abs=0.001)
    left, right = (Extractor(max_keypoints=500, levels=1)(images[side]) for side in sides)
    gated, free = match_stereo(left, right, *rig_cameras), match(left, right)
    errors = [left.keypoints[m.indices0] - right.keypoints[m.indices1] for m in (gated, free)]
    possible = [(abs(e[:, 1]) <= 2) & (e[:, 0] >= -2) for e in errors]
    assert possible[0].all() and possible[1].mean() < 0.95
    assert possible[0].sum() > possible[1].sum() > 150
