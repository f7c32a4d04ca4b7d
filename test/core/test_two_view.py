from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from scfeat_core import geometry, two_view
from scfeat_core.errors import CalibrationError, ConfigError, FeatureError
from scfeat_core.geometry import warp_points
from scfeat_core.two_view import HOMOGRAPHY_TOLERANCE, MINIMUM_MATCHES, verify
from scfeat_core.types import Camera, GeometryModel

K0 = np.array([[500, 0, 319.5], [0, 505, 239.5], [0, 0, 1.0]])
K1 = np.array([[450, 0, 330.0], [0, 452, 235.0], [0, 0, 1.0]])
ROTATION = cv2.Rodrigues(np.array([0.02, 0.12, -0.05]))[0]
TRANSLATION = np.array([0.6, 0.1, 0.15])
CAMERA0 = Camera(K0, np.array([-0.28, 0.07, 1e-4, -2e-4, 0.0]), (640, 480))
CAMERAS1 = {
    "plumb_bob": Camera(K1, np.array([-0.1, 0.02, 0, 0, 0.0]), (640, 480)),
    "rational_polynomial": Camera(
        K1, np.array([0.5, -0.2, 0, 0, 0.1, 0.4, -0.1, 0.05]), (640, 480), "rational_polynomial"
    ),
    "equidistant": Camera(K1, np.array([-0.02, 0.01, -0.005, 0.001]), (640, 480), "equidistant"),
}


def project(points: np.ndarray, camera: Camera) -> np.ndarray:
    function = cv2.fisheye.projectPoints if camera.distortion_model == "equidistant" else cv2.projectPoints
    return function(points[:, None], np.zeros(3), np.zeros(3), camera.K, camera.D)[0][:, 0]


def scene(camera0: Camera, camera1: Camera, flat: bool = False, count: int = 300):
    """Matched pixels with 0.3 px of noise, the last third of them wrong."""
    rng = np.random.default_rng(0)
    points = rng.uniform([-2.0, -1.5, 4], [2.0, 1.5, 9], (count, 3))
    if flat:
        points[:, 2] = 6 + 0.2 * points[:, 0]
    pixels0 = project(points, camera0) + rng.normal(0, 0.3, (count, 2))
    pixels1 = project(points @ ROTATION.T + TRANSLATION, camera1) + rng.normal(0, 0.3, (count, 2))
    good = np.arange(count) < count * 2 // 3
    pixels1[~good] = rng.uniform([0, 0], [640, 480], (int((~good).sum()), 2))
    return pixels0.astype(np.float32), pixels1.astype(np.float32), good


def pinhole(k: np.ndarray) -> Camera:
    return Camera(k, np.zeros(5), (640, 480))


def test_fundamental_finds_the_matches_and_the_matrix():
    pixels0, pixels1, good = scene(pinhole(K0), pinhole(K1))
    result = verify(pixels0, pixels1, model="fundamental", threshold=1.5)
    assert result.model is GeometryModel.FUNDAMENTAL and result.threshold == 1.5
    assert result.inliers.dtype == bool and result.inliers.shape == good.shape
    assert result.inliers[good].mean() > 0.95 and result.inliers[~good].mean() < 0.1
    assert result.matrix.dtype == np.float64 and np.linalg.norm(result.matrix) == pytest.approx(1)
    exact0, exact1, _ = scene(pinhole(K0), pinhole(K1))
    assert np.median(geometry.epipolar_distance(exact0[good], exact1[good], result.matrix)) < 0.5
    # the documented meaning of the threshold: Sampson distance
    lines1 = geometry.epipolar_lines(pixels0.astype(float), result.matrix)
    lines0 = geometry.epipolar_lines(pixels1.astype(float), result.matrix.T)
    residual = (lines1 * np.column_stack([pixels1, np.ones(len(pixels1))])).sum(1)
    sampson = abs(residual) / np.sqrt((lines1[:, :2] ** 2).sum(1) + (lines0[:, :2] ** 2).sum(1))
    np.testing.assert_array_equal(result.inliers, sampson < 1.5)


def test_homography_of_a_plane():
    pixels0, pixels1, good = scene(pinhole(K0), pinhole(K1), flat=True)
    result = verify(pixels0, pixels1, model="homography", threshold=2.0)
    assert result.model is GeometryModel.HOMOGRAPHY and np.linalg.norm(result.matrix) == pytest.approx(1)
    assert result.inliers[good].mean() > 0.95 and result.inliers[~good].mean() < 0.02
    error = np.linalg.norm(geometry.warp_points(pixels0.astype(float), result.matrix) - pixels1, axis=1)
    np.testing.assert_array_equal(result.inliers, error < 2.0)


@pytest.mark.parametrize("name", CAMERAS1)
def test_essential_undoes_the_distortion_of_both_cameras(name):
    cameras = (CAMERA0, CAMERAS1[name])
    pixels0, pixels1, good = scene(*cameras)
    result = verify(pixels0, pixels1, model="essential", cameras=cameras, threshold=1.5)
    assert result.model is GeometryModel.ESSENTIAL and result.threshold == 1.5
    assert result.inliers[good].mean() > 0.95 and result.inliers[~good].mean() < 0.1
    truth = geometry.essential_from_pose(ROTATION, TRANSLATION)
    error = min(np.linalg.norm(result.matrix - truth), np.linalg.norm(result.matrix + truth))
    assert error < 0.03
    ignored = tuple(replace(camera, D=np.zeros(0), distortion_model="") for camera in cameras)
    assert verify(pixels0, pixels1, model="essential", cameras=ignored).num_inliers < result.num_inliers


@pytest.mark.parametrize("model", MINIMUM_MATCHES)
@pytest.mark.parametrize("kind", ["coincident", "collinear", "random"])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 7, 8, 12, 60])
def test_degenerate_matches_never_raise(model, kind, count):
    rng = np.random.default_rng(count)
    points = {
        "coincident": np.full((count, 2), 100.0),
        "collinear": np.column_stack([np.arange(count), 2.0 * np.arange(count)]) + 20,
        "random": rng.uniform(0, 480, (count, 2)),
    }[kind]
    result = verify(points, rng.permutation(points), model=model, cameras=(pinhole(K0), pinhole(K1)))
    assert result.inliers.shape == (count,)
    if count < MINIMUM_MATCHES[model] or kind == "coincident":
        assert result.model is GeometryModel.NONE and not result.matrix.any()
    if result.model is GeometryModel.NONE:
        assert result.num_inliers == 0
    else:
        assert result.num_inliers >= MINIMUM_MATCHES[model]


def test_points_that_are_not_finite_are_outliers():
    pixels0, pixels1, _ = scene(pinhole(K0), pinhole(K1))
    expected = verify(pixels0[2:], pixels1[2:])
    pixels0[0], pixels1[1, 0] = np.nan, np.inf
    result = verify(pixels0, pixels1)
    assert not result.inliers[:2].any()
    np.testing.assert_array_equal(result.inliers[2:], expected.inliers)
    assert verify(pixels0 * np.nan, pixels1).model is GeometryModel.NONE


@pytest.mark.parametrize("model", [*MINIMUM_MATCHES, "auto"])
def test_runs_agree_to_the_bit(model):
    pixels0, pixels1, _ = scene(pinhole(K0), pinhole(K1))
    first, second = (verify(pixels0, pixels1, model=model, cameras=(pinhole(K0), pinhole(K1))) for _ in range(2))
    assert np.array_equal(first.matrix, second.matrix) and np.array_equal(first.inliers, second.inliers)


def test_torch_points_are_accepted():
    pixels0, pixels1, _ = scene(pinhole(K0), pinhole(K1))
    result = verify(torch.from_numpy(pixels0), torch.from_numpy(pixels1))
    assert np.array_equal(result.inliers, verify(pixels0, pixels1).inliers)


@pytest.mark.parametrize("kind", ["general", "plane"])
def test_rays_that_are_known_already_change_nothing(kind):
    cameras = (CAMERA0, CAMERAS1["equidistant"])
    pixels0, pixels1, _ = motion(kind, cameras)
    pixels0[3] = np.nan
    rays = tuple(
        geometry.undistort_points(pixels, camera) for pixels, camera in zip((pixels0, pixels1), cameras, strict=True)
    )
    for model in ("auto", "essential", "homography"):
        expected = verify(pixels0, pixels1, model=model, cameras=cameras)
        found = verify(pixels0, pixels1, model=model, cameras=cameras, rays=rays)
        assert found.model is expected.model and np.array_equal(found.inliers, expected.inliers)
        assert np.array_equal(found.matrix, expected.matrix)
        other = verify(pixels0, pixels1, model=model, cameras=cameras, rays=(rays[0], rays[1] + [0.5, 0]))
        assert not np.array_equal(other.matrix, expected.matrix), "they are used"


def test_misuse_is_named():
    points = np.zeros((10, 2))
    with pytest.raises(FeatureError, match=r"found 10 and 9.*index the keypoints"):
        verify(points, points[1:])
    with pytest.raises(FeatureError, match=r"shape \(10, 3\)"):
        verify(np.zeros((10, 3)), points)
    with pytest.raises(FeatureError, match="needs the cameras"):
        verify(points, points, model="essential")
    with pytest.raises(CalibrationError, match="focal lengths"):
        verify(points, points, model="essential", cameras=(pinhole(np.zeros((3, 3))),) * 2)
    with pytest.raises(CalibrationError, match="3x3 K"):
        verify(points, points, model="essential", cameras=(pinhole(np.ones(4)),) * 2)
    with pytest.raises(ConfigError, match="'affine'"):
        verify(points, points, model="affine")


# -- the choice of the model -------------------------------------------------------------------------------------------


def motion(kind: str, cameras: tuple[Camera, Camera], outliers: float = 0.3, noise: float = 0.4, seed: int = 0):
    """Matched pixels of 400 points, their truth, and E; the last ones are wrong.

    general: a box of points. plane: all on one slanted wall. turn: the camera only rotates. floor: a fifth of the
    points rise above a plane that holds the rest. crawl: points as in a box, but the camera moves by a hundredth of
    their distance.
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform([-2.0, -1.5, 4], [2.0, 1.5, 9], (400, 3))
    translation = TRANSLATION
    if kind in ("plane", "floor"):
        flat = 6 + 0.3 * points[:, 0] - 0.2 * points[:, 1]
        points[:, 2] = np.where(rng.uniform(size=400) < (0.2 if kind == "floor" else 0), points[:, 2], flat)
    if kind == "turn":
        translation = np.zeros(3)
    if kind == "crawl":
        translation = 0.1 * TRANSLATION
    pixels0 = project(points, cameras[0]) + rng.normal(0, noise, (400, 2))
    pixels1 = project(points @ ROTATION.T + translation, cameras[1]) + rng.normal(0, noise, (400, 2))
    good = np.arange(400) >= 400 * outliers
    pixels1[~good] = rng.uniform([0, 0], [640, 480], (int((~good).sum()), 2))
    return pixels0.astype(np.float32), pixels1.astype(np.float32), good


EXPECTED = {"general": False, "crawl": False, "floor": False, "plane": True, "turn": True}
RIGS = {
    "uncalibrated": (pinhole(K0), pinhole(K1)),
    "pinhole": (pinhole(K0), pinhole(K1)),
    **{name: (CAMERA0, camera) for name, camera in CAMERAS1.items()},
}


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("name", RIGS)
@pytest.mark.parametrize("outliers", [0.1, 0.5])
def test_auto_takes_a_homography_where_nothing_else_is_determined(kind, name, outliers):
    given = None if name == "uncalibrated" else RIGS[name]
    general = GeometryModel.FUNDAMENTAL if given is None else GeometryModel.ESSENTIAL
    for seed in range(3):
        pixels0, pixels1, good = motion(kind, RIGS[name], outliers, seed=seed)
        result = verify(pixels0, pixels1, cameras=given)
        assert result.model is (GeometryModel.HOMOGRAPHY if EXPECTED[kind] else general)
        assert result.inliers[good].mean() > 0.9 and result.inliers[~good].mean() < 0.1
        assert np.linalg.norm(result.matrix) == pytest.approx(1)


@pytest.mark.parametrize("name", RIGS)
def test_homography_of_auto_acts_on_pixels_without_distortion(name):
    cameras = RIGS[name]
    pixels0, pixels1, good = motion("turn", cameras, noise=0.1)
    result = verify(pixels0, pixels1, cameras=None if name == "uncalibrated" else cameras)
    assert result.threshold == pytest.approx(HOMOGRAPHY_TOLERANCE)
    ideal0, ideal1 = (
        geometry.warp_points(geometry.undistort_points(pixels, camera), camera.K)
        for pixels, camera in zip((pixels0, pixels1), cameras, strict=True)
    )
    error = np.linalg.norm(geometry.warp_points(ideal0, result.matrix) - ideal1, axis=1)
    assert np.median(error[good]) < 0.3
    expected = geometry.unit_norm(cameras[1].K @ ROTATION @ np.linalg.inv(cameras[0].K))
    moved = geometry.warp_points(ideal0, expected) - geometry.warp_points(ideal0, result.matrix)
    assert np.abs(moved).max() < 1.0


def test_auto_says_none_where_nothing_agrees():
    rng = np.random.default_rng(0)
    for count in (0, 3, 7, 9):
        assert verify(rng.uniform(0, 480, (count, 2)), rng.uniform(0, 480, (count, 2))).inliers.sum() < 9
    assert verify(np.full((30, 2), 100.0), np.full((30, 2), 100.0)).model is GeometryModel.NONE
    line = np.column_stack([np.arange(60), 2.0 * np.arange(60)])
    assert verify(line, rng.permutation(line)).num_inliers < 30


def test_a_camera_that_stands_still_gives_a_homography():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 480, (200, 2))
    for cameras in (None, (pinhole(K0), pinhole(K0))):
        result = verify(points, points + rng.normal(0, 0.2, (200, 2)), cameras=cameras)
        assert result.model is GeometryModel.HOMOGRAPHY and result.inliers.mean() > 0.95
        np.testing.assert_allclose(result.matrix / result.matrix[2, 2], np.eye(3), atol=0.3)


@pytest.mark.parametrize("name", ["oxford_graf", "strecha_fountain-P11"])
def test_auto_on_real_pairs(name, shared_data):
    """A wall seen twice, and a fountain: SIFT matches that pass the ratio test."""
    folder = shared_data / "eval" / name
    first, second = ("1.png", "2.png") if name == "oxford_graf" else ("0004.jpg", "0005.jpg")
    images = [cv2.imread(str(folder / file), cv2.IMREAD_GRAYSCALE) for file in (first, second)]
    images = [cv2.resize(image, (640, round(640 * image.shape[0] / image.shape[1]))) for image in images]
    (points0, d0), (points1, d1) = (cv2.SIFT.create(1000).detectAndCompute(image, None) for image in images)
    found = [m for m, n in cv2.BFMatcher().knnMatch(d0, d1, 2) if m.distance < 0.8 * n.distance]
    xy0 = np.array([points0[m.queryIdx].pt for m in found])
    xy1 = np.array([points1[m.trainIdx].pt for m in found])
    result = verify(xy0, xy1)
    assert result.model is (GeometryModel.HOMOGRAPHY if name == "oxford_graf" else GeometryModel.FUNDAMENTAL)
    assert result.inliers.mean() > 0.5


def test_distances_to_a_homography_by_definition():
    """d' (I + A A')^-1 d, with A by finite differences."""
    rng = np.random.default_rng(0)
    points0 = rng.uniform(0, 640, (40, 2))
    matrix = np.array([[1.1, 0.05, -9], [-0.1, 0.95, 4], [2e-4, -1e-4, 1]])
    points1 = warp_points(points0, matrix) + rng.normal(0, 2, (40, 2))
    steps = [1e-4 * np.eye(2)[axis] for axis in (0, 1)]
    columns = [(warp_points(points0 + step, matrix) - warp_points(points0 - step, matrix)) / 2e-4 for step in steps]
    jacobians = np.stack(columns, -1)
    difference = points1 - warp_points(points0, matrix)
    weights = np.linalg.inv(np.eye(2) + jacobians @ jacobians.swapaxes(1, 2))
    expected = (difference[:, None] @ weights @ difference[:, :, None]).ravel()
    np.testing.assert_allclose(two_view._homography_residuals(points0, points1, matrix), expected, rtol=1e-5)
    points0[0] = [-5000, 0]  # on the line that goes to infinity
    assert two_view._homography_residuals(points0, points1, matrix)[0] == np.inf
