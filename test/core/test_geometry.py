from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scfeat_core import geometry
from scfeat_core.errors import CalibrationError
from scfeat_core.types import Camera


def rotation_y(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


K = np.array([[600, 0, 319.5], [0, 600, 239.5], [0, 0, 1.0]])


def test_warp_points_agrees_with_opencv_and_between_kinds():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 640, (50, 2))
    matrix = np.array([[1.1, 0.1, -5], [-0.05, 0.9, 12], [1e-4, -2e-4, 1]])
    expected = cv2.perspectiveTransform(points[:, None], matrix)[:, 0]
    np.testing.assert_allclose(geometry.warp_points(points, matrix), expected, rtol=1e-12)
    batch = torch.from_numpy(points).expand(2, -1, -1)
    matrices = torch.from_numpy(np.stack([matrix, np.eye(3)]))
    warped = geometry.warp_points(batch, matrices)
    np.testing.assert_allclose(warped[0], expected, rtol=1e-12)
    np.testing.assert_allclose(warped[1], points, rtol=1e-12)
    back = geometry.warp_points(geometry.warp_points(points, matrix), np.linalg.inv(matrix))
    np.testing.assert_allclose(back, points, atol=1e-9)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_scale_points_round_trip_and_centres(kind):
    size, scale = (640, 480), (0.5, 0.25)
    corners = kind(np.array([[-0.5, -0.5], [639.5, 479.5]]))  # outer edges of the image, not pixel centres
    scaled = geometry.scale_points(corners, scale)
    np.testing.assert_allclose(scaled, [[-0.5, -0.5], [size[0] * scale[0] - 0.5, size[1] * scale[1] - 0.5]])
    points = kind(np.random.default_rng(1).uniform(0, 400, (20, 2)))
    back = geometry.scale_points(geometry.scale_points(points, scale), 1 / np.asarray(scale))
    np.testing.assert_allclose(back, points, atol=1e-12)
    np.testing.assert_allclose(
        geometry.warp_points(points, geometry.scale_matrix(scale)), geometry.scale_points(points, scale), atol=1e-12
    )


def test_scale_points_is_what_a_resize_does():
    """The centre of a blob moves where scale_points says, for OpenCV's and for torch's resize."""
    y, x = np.mgrid[:96, :128].astype(np.float32)
    blob = np.exp(-((x - 70.3) ** 2 + (y - 41.7) ** 2) / (2 * 6.0**2))
    expected = geometry.scale_points(np.array([70.3, 41.7]), (0.5, 0.25))
    small_cv = cv2.resize(blob, (64, 24), interpolation=cv2.INTER_AREA)
    small_torch = F.interpolate(torch.from_numpy(blob)[None, None], size=(24, 64), mode="bilinear", antialias=True)
    for small in (small_cv, small_torch[0, 0].numpy()):
        v, u = np.mgrid[:24, :64]
        centroid = np.array([(small * u).sum(), (small * v).sum()]) / small.sum()
        np.testing.assert_allclose(centroid, expected, atol=2e-3)


def test_fundamental_from_pose_of_the_specification():
    """Geometry check of acceptance test 9."""
    matrix = geometry.fundamental_from_pose(K, K, rotation_y(10), np.array([1, 0.1, 0.2]))
    expected = [
        [8.104498e-06, 9.334389e-05, -5.252298e-02],
        [-1.729708e-04, 0, 0.3213161],
        [6.641485e-02, -0.3098550, 1],
    ]
    np.testing.assert_allclose(matrix / matrix[2, 2], expected, rtol=1e-6, atol=1e-15)
    assert np.linalg.norm(matrix) == pytest.approx(1)


def test_fundamental_matches_projections_and_is_batched():
    rng = np.random.default_rng(2)
    world = rng.uniform([-2, -2, 4], [2, 2, 9], (40, 3))
    rotation, translation = rotation_y(-20), np.array([0.4, -0.1, 0.3])
    moved = world @ rotation.T + translation
    pixels0 = (world @ K.T)[:, :2] / world[:, 2:]
    pixels1 = (moved @ K.T)[:, :2] / moved[:, 2:]
    matrix = geometry.fundamental_from_pose(K, K, rotation, translation)
    assert geometry.epipolar_distance(pixels0, pixels1, matrix).max() < 1e-9
    assert geometry.epipolar_distance(pixels1, pixels0, matrix.T).max() < 1e-9
    shifted = pixels1 + 3 * geometry.epipolar_lines(pixels0, matrix)[:, :2] / np.linalg.norm(
        geometry.epipolar_lines(pixels0, matrix)[:, :2], axis=1, keepdims=True
    )
    np.testing.assert_allclose(geometry.epipolar_distance(pixels0, shifted, matrix), 3, atol=1e-8)
    two = geometry.fundamental_from_pose(
        torch.tensor(K), torch.tensor(K), torch.tensor(rotation).expand(2, 3, 3), torch.tensor(translation).expand(2, 3)
    )
    np.testing.assert_allclose(two[1], matrix, atol=1e-14)


def sine_map() -> torch.Tensor:
    """The map of acceptance test 4, 8x30x40."""
    c, y, x = np.mgrid[:8, :30, :40]
    return F.normalize(torch.from_numpy(np.sin(0.8 * c + 0.31 * y + 0.17 * x)).float()[None], dim=1)


def test_line_ends_and_line_search_of_the_specification():
    """Acceptance test 5: end points of epipolar lines, and the best of 100 samples along each."""
    size = (160, 120)
    fundamental = torch.tensor([[0, 2e-5, -1e-3], [-1e-5, 0, -1], [2e-3, 1, 0]], dtype=torch.float64)
    points = torch.tensor([[33, 41], [100, 20]], dtype=torch.float64)
    ends, valid = geometry.line_endpoints(geometry.epipolar_lines(points, fundamental), size)
    assert valid.all()
    expected = [[[-1, -0.310043], [1, -0.310524]], [[-1, -0.660843], [1, -0.662445]]]
    np.testing.assert_allclose(geometry.normalise_points(ends, size), expected, atol=1e-6)

    maps = sine_map()
    query = maps[0, :, 10, 12]
    samples = geometry.points_between(ends.float(), 100)  # (2, 100, 2)
    values = geometry.sample_map(maps, samples.reshape(1, -1, 2), alignment="legacy").reshape(2, 100, 8)
    best = samples[torch.arange(2), (60 * values @ query).argmax(-1)]
    expected = [[-0.373737, -0.310193], [0.131313, -0.661749]]
    np.testing.assert_allclose(geometry.normalise_points(best, size), expected, atol=2e-6)


def test_window_soft_argmax_of_the_specification():
    """Acceptance test 4, as a check of legacy sampling with zero padding."""
    size, radius = (160, 120), 0.1
    x, y = torch.linspace(-radius, radius, 4), torch.linspace(-radius, radius, 3)
    offsets = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 2)
    places = torch.tensor([-0.4, -0.3]) + offsets
    maps = sine_map()
    pixels = geometry.denormalise_points(places, size)
    values = geometry.sample_map(maps * 60, pixels, alignment="legacy", padding="zeros")[0]
    p = (values @ maps[0, :, 10, 12]).softmax(-1)
    np.testing.assert_allclose(p @ places[0], [-0.398717, -0.282269], atol=1e-6)
    assert p.max().item() == pytest.approx(0.468954, abs=1e-5)


def test_line_endpoints_special_cases():
    lines = torch.tensor(
        [
            [1.0, 0.0, -5.0],  # upright at x = 5
            [0.0, 1.0, -3.0],  # level at y = 3
            [0.0, 1.0, 0.0],  # along the upper border
            [1.0, 1.0, 0.0],  # touches only the corner (0, 0)
            [7.0, -19.0, 0.0],  # from corner to corner: three or four border hits
            [1.0, 0.0, 40.0],  # outside
            [0.0, 0.0, 1.0],  # not a line
        ]
    )
    ends, valid = geometry.line_endpoints(lines, (20, 8))
    assert valid.tolist() == [True, True, True, False, True, False, False]
    assert ends.isfinite().all()
    np.testing.assert_allclose(ends[0].sort(0).values, [[5, 0], [5, 7]], atol=1e-5)
    np.testing.assert_allclose(ends[1], [[0, 3], [19, 3]], atol=1e-5)
    np.testing.assert_allclose(ends[2], [[0, 0], [19, 0]], atol=1e-5)
    np.testing.assert_allclose(ends[4], [[0, 0], [19, 7]], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sample_map_exact_reads_coordinates_back(dtype):
    """A map that holds 4 f: sampling at pixel x gives x, also between cells; beyond the last cell it is clamped."""
    h, w = 12, 17
    v, u = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    maps = 4 * torch.stack((u, v))[None].to(dtype)
    points = torch.tensor([[[0.0, 0.0], [3.0, 2.5], [30.5, 21.25], [64, 44], [67, 47]]])
    samples = geometry.sample_map(maps, points)
    expected = points.clamp(max=torch.tensor([64.0, 44.0]))
    np.testing.assert_allclose(samples.float(), expected, atol=1e-4)
    assert samples.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", [(1, 64, 30, 40), (3, 5, 1, 7), (2, 8, 9, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_whose_channels_lie_side_by_side_give_the_same_samples(shape, dtype):
    """Also beyond the border, where the point is none, and for no points at all."""
    generator = torch.Generator().manual_seed(0)
    batch, _, h, w = shape
    maps = torch.rand(shape, generator=generator).to(dtype)
    points = torch.rand(batch, 200, 2, generator=generator) * torch.tensor([4.4 * w, 4.4 * h]) - 3
    points[0, :4] = torch.tensor([[torch.nan, 3], [torch.inf, 3], [3, -torch.inf], [4.0 * (w - 1), 4.0 * (h - 1)]])
    rows = maps.to(memory_format=torch.channels_last)
    for given in (points, points[:, :0]):
        found = geometry._sample_rows(rows, given / 4)
        expected = F.grid_sample(
            maps.double(),
            (given.double() * torch.tensor([2 / (4 * max(w - 1, 1)), 2 / (4 * max(h - 1, 1))]) - 1)[:, None],
            padding_mode="border",
            align_corners=True,
        )[:, :, 0].transpose(1, 2)
        assert found.is_contiguous() and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(geometry.sample_map(rows, given), found, rtol=0, atol=2e-5)
        torch.testing.assert_close(geometry.sample_map(maps.contiguous(), given), found, rtol=0, atol=2e-5)


def test_sample_map_is_differentiable_in_map_and_points():
    maps = torch.rand(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(2, 5, 2, dtype=torch.float64) * 18 + 1.3).requires_grad_()
    for alignment in ("exact", "legacy"):
        assert torch.autograd.gradcheck(
            lambda m, p, a=alignment: geometry.sample_map(m, p, alignment=a), (maps, points)
        )


CAMERAS = [
    Camera(K, np.array([-0.28, 0.07, 1e-4, -2e-4, 0.0]), (640, 480)),
    Camera(K, np.array([0.5, -2.0, 1e-4, 2e-4, 1.2, 0.4, -1.8, 1.1]), (640, 480), "rational_polynomial"),
    Camera(K, np.array([-0.02, 0.01, -0.005, 0.001]), (640, 480), "equidistant"),
    Camera(K, np.zeros(0), (640, 480), ""),
    Camera(K * np.array([[1.1], [1], [1]]), np.zeros(5), (640, 480), "plumb_bob"),
    Camera(K, np.array([-0.28, 0.07, 1e-4, -2e-4]), (640, 480), "plumb_bob"),
    Camera(K, np.array([0.5, -2.0, 1e-4, 2e-4, 1.2, 0.4, -1.8, 1.1, 2e-3, -1e-3, 1e-3, 2e-3]), (640, 480), "rational"),
    Camera(
        K,
        np.array([-0.2, 0.05, 1e-4, 2e-4, 0, 0.1, 0, 0, 2e-3, -1e-3, 1e-3, 2e-3, 0.02, -0.03]),
        (640, 480),
        "rational_polynomial",
    ),
    Camera(K, np.array([-0.02, 0.01, -0.005, 0.001, 0.0]), (640, 480), "Kannala-Brandt4"),
    Camera(K, np.array([-0.28, 0.07, 1e-4, -2e-4]), (640, 480), "radial-tangential"),
]
FISHEYE = ("equidistant", "Kannala-Brandt4")


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: f"{camera.distortion_model or 'none'}-{camera.D.size}")
def test_undistort_points_inverts_the_projection(camera):
    rng = np.random.default_rng(3)
    rays = rng.uniform(-0.45, 0.45, (200, 2))
    world = np.column_stack([rays, np.ones(len(rays))])[:, None]
    fisheye = camera.distortion_model in FISHEYE
    project = cv2.fisheye.projectPoints if fisheye else cv2.projectPoints
    pixels, _ = project(world, np.zeros(3), np.zeros(3), camera.K, camera.D[:4] if fisheye else camera.D)
    np.testing.assert_allclose(geometry.undistort_points(pixels[:, 0], camera), rays, atol=1e-6)
    assert geometry.undistort_points(np.zeros((0, 2), np.float32), camera).shape == (0, 2)
    np.testing.assert_allclose(geometry.project_rays(rays, camera), pixels[:, 0], atol=1e-9)
    assert geometry.project_rays(np.zeros((0, 2), np.float32), camera).shape == (0, 2)
    assert not np.isfinite(geometry.project_rays(np.array([[np.nan, 0.1], [np.inf, 0.2]]), camera)).all(1).any()


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        (Camera(np.zeros((3, 3)), np.zeros(5), (640, 480)), "focal lengths"),
        (Camera(K * np.nan, np.zeros(5), (640, 480)), "finite 3x3 K"),
        (Camera(np.diag([500.0, 500, 0]), np.zeros(5), (640, 480)), r"last row \[0, 0, 1\], found"),
        (Camera(K, np.array([np.inf]), (640, 480)), "distortion coefficients"),
        (Camera(K, np.zeros(5), (640, 480), "thin_prism"), "'thin_prism' with 5 coefficients"),
        (Camera(K, np.zeros(3), (640, 480)), "'plumb_bob' with 3"),
        (Camera(K, np.array([0.1, 0, 0, 0, 0.1]), (640, 480), "equidistant"), "'equidistant' with 5"),
        (Camera(K, np.zeros(5), (640, 480), R=np.zeros((3, 3))), "R to be a 3x3 rotation, found"),
        (Camera(K, np.zeros(5), (640, 480), R=np.diag([1, 1, np.nan])), "R to be a 3x3 rotation"),
        (Camera(K, np.zeros(5), (640, 480), R=np.diag([1.0, 1, -1])), "R to be a 3x3 rotation"),
        (Camera(K, np.zeros(5), (640, 480), P=np.zeros((3, 4))), "3x4 P with positive focal lengths"),
        (Camera(K, np.zeros(5), (640, 480), P=np.eye(3)), "3x4 P with positive focal lengths"),
    ],
)
def test_unusable_cameras_are_refused(camera, message):
    with pytest.raises(CalibrationError, match=message):
        geometry.undistort_points(np.zeros((1, 2)), camera)


def test_wide_fisheye_rays_come_back():
    camera = Camera(np.array([[280.0, 0, 319.5], [0, 280, 239.5], [0, 0, 1]]), CAMERAS[2].D, (640, 480), "equidistant")
    angle = np.radians(np.linspace(1, 80, 40))
    rays = np.column_stack([np.tan(angle), -0.3 * np.tan(angle)])
    pixels, _ = cv2.fisheye.projectPoints(
        np.column_stack([rays, np.ones(40)])[:, None], np.zeros(3), np.zeros(3), camera.K, camera.D
    )
    np.testing.assert_allclose(geometry.undistort_points(pixels[:, 0], camera), rays, rtol=1e-6, atol=1e-9)


def test_pixels_that_a_model_cannot_see_have_no_ray():
    """Beyond the largest radius that the distortion gives, and behind 90 degrees; OpenCV answers with finite rays."""
    folding = Camera(K, np.array([-0.4, 0, 0, 0]), (2000, 2000))  # r (1 - 0.4 r^2) is never above 0.61
    pixels = np.column_stack([319.5 + 600 * np.array([0.3, 0.55, 0.7, 1.2]), np.full(4, 239.5)])
    assert np.isfinite(geometry.undistort_points(pixels, folding)).all(1).tolist() == [True, True, False, False]
    fisheye = Camera(K, np.zeros(4), (2000, 2000), "equidistant")
    pixels[:, 0] = 319.5 + 600 * np.radians([30, 80, 95, 170])
    assert np.isfinite(geometry.undistort_points(pixels, fisheye)).all(1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda camera: f"{camera.distortion_model or 'none'}-{camera.D.size}")
def test_points_that_are_not_finite_have_no_ray_and_do_no_harm(camera):
    points = np.array([[100.0, 100], [np.nan, 3], [4, np.inf], [-np.inf, np.nan], [300, 200]])
    rays = geometry.undistort_points(points, camera)
    assert np.isfinite(rays).all(1).tolist() == [True, False, False, False, True]
    np.testing.assert_array_equal(rays[[0, 4]], geometry.undistort_points(points[[0, 4]], camera))


def test_distances_of_far_points_are_exact():
    points = torch.rand(1, 100, 2, generator=torch.Generator().manual_seed(0)) * 640
    assert float(geometry.distances(points, points)[0].diagonal().max()) == 0


def test_a_camera_that_changes_after_it_was_found_usable_is_looked_at_again():
    camera = Camera(K.copy(), np.zeros(5), (640, 480), R=np.eye(3))
    for _ in range(2):
        geometry.check_camera(camera)
    camera.K[0, 0] = -1
    with pytest.raises(CalibrationError, match="positive focal lengths"):
        geometry.check_camera(camera)
    camera.K[0, 0] = 600
    camera.R[0, 0] = 2
    with pytest.raises(CalibrationError, match="expected R to be a 3x3 rotation"):
        geometry.check_camera(camera)
    given = Camera(K, np.zeros(8), (640, 480))
    geometry.check_camera(given)
    with pytest.raises(CalibrationError, match="'bent' with 8 coefficients"):
        geometry.check_camera(Camera(K, np.zeros(8), (640, 480), "bent"))
    for focal in range(1, 100):  # more than are remembered
        geometry.check_camera(Camera(np.diag([focal, focal, 1.0]), np.zeros(5), (640, 480)))
    geometry.check_camera(given)
