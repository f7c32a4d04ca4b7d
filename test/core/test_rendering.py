"""The rendered scene is a ground truth: its depth, poses and intrinsics must be exact, and its images must agree."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from scfeat_core.demo_scene import ROOM, SIZE, Scene, camera_path, exposure_path, intrinsics, look_at
from scfeat_core.geometry import epipolar_distance, fundamental_from_pose, scale_matrix
from scfeat_core.rendering import Face, expose

POSES = camera_path(420)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(seed=0)


def relative(pose0: np.ndarray, pose1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R, t of X1 = R X0 + t."""
    transform = np.linalg.inv(pose1) @ pose0
    return transform[:3, :3], transform[:3, 3]


def project_into(
    depth0: np.ndarray, pose0: np.ndarray, pose1: np.ndarray, K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of view 0 is in view 1, (H, W, 2) pixels, and its depth there."""
    height, width = depth0.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    points = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(K).T * depth0[..., None]
    rotation, translation = relative(pose0, pose1)
    moved = points @ rotation.T + translation
    pixels = moved @ K.T
    return pixels[..., :2] / pixels[..., 2:], moved[..., 2]


def visible_in(depth1: np.ndarray, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Which projected pixels land inside view 1 on the surface that it shows."""
    height, width = depth1.shape
    inside = (depth > 0.05) & (pixels >= 1).all(-1) & (pixels[..., 0] < width - 2) & (pixels[..., 1] < height - 2)
    seen = cv2.remap(depth1, *np.moveaxis(pixels.astype(np.float32), -1, 0), cv2.INTER_LINEAR)
    return inside & (np.abs(seen - depth) < 0.005 * depth)


def ray_cast(faces: list[Face], pose: np.ndarray, K: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Depth at pixels (N, 2) by intersecting every ray with every rectangle, in float64."""
    rays = np.column_stack([pixels, np.ones(len(pixels))]) @ np.linalg.inv(K).T @ pose[:3, :3].T
    nearest = np.full(len(pixels), np.inf)
    for face in faces:
        speed = rays @ face.normal
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = (face.origin - pose[:3, 3]) @ face.normal / speed
            at = pose[:3, 3] + rays * depth[:, None] - face.origin
        across, down = at @ face.right, at @ face.down
        width, height = face.size
        hit = (speed < 0) & (depth > 0) & (across >= 0) & (across <= width) & (down >= 0) & (down <= height)
        nearest = np.where(hit, np.minimum(nearest, depth), nearest)
    return nearest


@pytest.mark.parametrize("index", [0, 130, 300])
def test_depth_is_that_of_the_nearest_surface_at_the_pixel_centre(scene: Scene, index: int) -> None:
    K = intrinsics()
    depth = scene.render(POSES[index], K).depth
    pixels = np.random.default_rng(index).integers((0, 0), SIZE, (4000, 2))
    expected = ray_cast(scene.faces, POSES[index], K, pixels.astype(float))
    found = depth[pixels[:, 1], pixels[:, 0]]
    wrong = np.abs(found - expected) > 1e-4 * expected
    # a pixel centre within rounding of a silhouette may fall on either side of it
    assert wrong.mean() < 1e-3
    assert depth.min() > 0.3
    assert depth.max() < np.linalg.norm(ROOM)


def test_depth_holds_for_any_camera_in_the_room(scene: Scene) -> None:
    """Views that are rolled, look up, or stand at a wall, at another size and focal length."""
    rng = np.random.default_rng(7)
    size = (201, 151)
    for _ in range(8):
        position = rng.uniform((0.5, 0.5, 0.4), (7.5, 2.2, 2.6))
        pose = look_at(position, rng.uniform((0, 0, 0), ROOM), roll=rng.uniform(-3, 3))
        K = intrinsics(size, field_of_view=rng.uniform(40, 110))
        pixels = rng.integers((0, 0), size, (500, 2))
        depth = scene.render(pose, K, size).depth[pixels[:, 1], pixels[:, 0]]
        expected = ray_cast(scene.faces, pose, K, pixels.astype(float))
        assert (np.abs(depth - expected) > 1e-4 * expected).mean() < 5e-3


def test_images_agree_where_depth_and_poses_say_so(scene: Scene) -> None:
    K = intrinsics()
    first, second = scene.render(POSES[100], K), scene.render(POSES[112], K)
    pixels, depth = project_into(first.depth, POSES[100], POSES[112], K)
    seen = visible_in(second.depth, pixels, depth)
    assert seen.mean() > 0.5

    def difference(shift: float) -> float:
        maps = np.moveaxis((pixels + shift).astype(np.float32), -1, 0)
        warped = cv2.remap(second.image, *maps, cv2.INTER_LINEAR).astype(float)
        return float(np.abs(warped - first.image)[seen].mean())

    assert difference(0) < 6
    # half a pixel off is visibly worse: the images follow the geometry to a fraction of that
    assert difference(0) < 0.75 * min(difference(0.5), difference(-0.5))


def test_real_matches_satisfy_the_epipolar_geometry_of_the_poses(scene: Scene) -> None:
    K = intrinsics()
    first, second = (scene.render(POSES[i], K).image for i in (200, 215))
    sift = cv2.SIFT_create(1500)
    (points0, words0), (points1, words1) = (sift.detectAndCompute(image, None) for image in (first, second))
    pairs = [m for m, n in cv2.BFMatcher().knnMatch(words0, words1, k=2) if m.distance < 0.75 * n.distance]
    x0 = np.array([points0[m.queryIdx].pt for m in pairs])
    x1 = np.array([points1[m.trainIdx].pt for m in pairs])
    distance = epipolar_distance(x0, x1, fundamental_from_pose(K, K, *relative(POSES[200], POSES[215])))
    assert len(pairs) > 150, "there is too little texture to match"
    assert np.median(distance) < 0.4
    assert (distance < 1.5).mean() > 0.85


def test_things_hide_each_other(scene: Scene) -> None:
    K = intrinsics()
    first, second = scene.render(POSES[60], K), scene.render(POSES[110], K)
    pixels, depth = project_into(first.depth, POSES[60], POSES[110], K)
    inside = (pixels > 2).all(-1) & (pixels < np.array(SIZE) - 3).all(-1)
    nearest = cv2.remap(second.depth, *np.moveaxis(pixels.astype(np.float32), -1, 0), cv2.INTER_LINEAR)
    hidden = inside & (nearest < 0.9 * depth)
    assert hidden.sum() > 0.02 * inside.sum()
    assert np.percentile(first.depth, 95) > 2 * np.percentile(first.depth, 5)


def test_a_larger_image_shrinks_to_the_smaller_one(scene: Scene) -> None:
    """Pixel centres, and that textures are filtered to the size of the pixel rather than sampled."""
    small = (320, 240)
    K = intrinsics(small)
    image = scene.render(POSES[150], K, small).image
    large = scene.render(POSES[150], scale_matrix(4) @ K, (1280, 960)).image
    shrunk = cv2.resize(large, small, interpolation=cv2.INTER_AREA)
    gray0, gray1 = (cv2.cvtColor(i, cv2.COLOR_RGB2GRAY).astype(np.float64) for i in (image, shrunk))
    (dx, dy), _ = cv2.phaseCorrelate(gray0, gray1)
    assert abs(dx) < 0.05
    assert abs(dy) < 0.05
    assert np.abs(gray0 - gray1).mean() < 4


def test_the_seed_decides_everything(scene: Scene) -> None:
    first, again = next(scene.frames(1)), next(Scene(seed=0).frames(1))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.depth, again.depth)
    assert np.abs(first.image.astype(int) - next(Scene(seed=1).frames(1)).image).mean() > 10


def test_frames_carry_their_truth(scene: Scene) -> None:
    small = (160, 120)
    frames = list(scene.frames(3, fps=2.0, size=small))
    np.testing.assert_array_equal([frame.pose for frame in frames], camera_path(3, fps=2.0))
    np.testing.assert_allclose([frame.exposure for frame in frames], exposure_path(3, fps=2.0))
    clean = scene.render(frames[1].pose, frames[1].K, small)
    np.testing.assert_array_equal(clean.depth, frames[1].depth)
    assert frames[1].image.dtype == np.uint8
    assert frames[1].image.shape == (120, 160, 3)


def test_path_is_smooth_and_exposure_changes() -> None:
    steps = np.linalg.norm(np.diff(POSES[:, :3, 3], axis=0), axis=1) * 30
    assert steps.min() > 0.1
    assert steps.max() < 2.5  # metres per second
    np.testing.assert_allclose(np.linalg.det(POSES[:, :3, :3]), 1)
    gain = exposure_path(420)
    assert gain.max() / gain.min() > 1.8
    assert np.abs(np.diff(np.log2(gain))).max() < 0.05


def test_expose_is_gain_in_linear_light_and_noise() -> None:
    flat = np.full((200, 200, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(expose(flat, 1.0, 0.0, rng), 100, atol=1)
    expected = 255 * ((100 / 255) ** 2.2 * 0.5) ** (1 / 2.2)
    np.testing.assert_allclose(expose(flat, 0.5, 0.0, rng), expected, atol=1)
    noisy = expose(np.full_like(flat, 128), 1.0, 2.0, rng).astype(float)
    assert noisy.std() == pytest.approx(2.0, rel=0.1)
    assert noisy.mean() == pytest.approx(128, abs=0.6)
