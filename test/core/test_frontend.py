from __future__ import annotations

import threading
import weakref

import cv2
import numpy as np
import pytest
import torch

from scfeat_core.errors import CalibrationError, ConfigError, ImageError, StaleImageError
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.types import Camera, FrameResult, GeometryModel

SECOND = 1_000_000_000
SIZE = (160, 120)


def create_frontend(**settings) -> Frontend:
    with pytest.warns(UserWarning, match="untrained"):
        return Frontend(FrontendConfig(weights="random", max_keypoints=200, **settings))


@pytest.fixture
def frontend() -> Frontend:
    return create_frontend()


def view(shift: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """(H, W) uint8: a window on a textured wall, moved right by ``shift`` pixels."""
    rng = np.random.default_rng(seed)
    wall = sum(cv2.resize(rng.uniform(0, 1, (n, n)).astype(np.float32), (400, 400)) for n in (16, 50, 100))
    return (255 * np.clip((wall - 0.8) / 1.4, 0, 1)).astype(np.uint8)[
        50 : 50 + size[1], 50 + shift : 50 + shift + size[0]
    ]


def assert_equal_results(one: FrameResult, other: FrameResult) -> None:
    assert (one.camera, one.sequence, one.stamp) == (other.camera, other.sequence, other.stamp)
    assert np.array_equal(one.features.keypoints, other.features.keypoints)
    assert np.array_equal(one.features.descriptors, other.features.descriptors)
    assert (one.pair is None) == (other.pair is None)
    if one.pair is not None:
        assert np.array_equal(one.pair.matches.indices1, other.pair.matches.indices1)
        assert np.array_equal(one.pair.geometry.inliers, other.pair.geometry.inliers)


def test_two_frames_are_matched_and_verified(frontend):
    first = frontend.process(view(0), 1 * SECOND)
    second = frontend.process(view(6), 2 * SECOND)
    assert (first.sequence, first.stamp, first.pair, first.reset_reason) == (0, SECOND, None, "")
    assert set(first.timings) == {"preprocess", "network", "select"}
    assert (second.sequence, second.stamp, second.camera) == (1, 2 * SECOND, "camera")
    assert set(second.timings) == {"preprocess", "network", "select", "match", "verify"}
    pair = second.pair
    assert (pair.sequence0, pair.stamp0) == (0, SECOND)
    assert np.array_equal(pair.keypoints0, first.features.keypoints[pair.matches.indices0])
    assert np.array_equal(pair.keypoints1, second.features.keypoints[pair.matches.indices1])
    assert all(isinstance(a, np.ndarray) for a in (pair.keypoints0, pair.matches.scores, second.features.descriptors))
    assert pair.matches.scores.min() >= 0
    moved = np.linalg.norm(pair.keypoints0 - pair.keypoints1 - [6, 0], axis=1) < 1
    assert moved.sum() > 30
    assert pair.geometry.model is GeometryModel.FUNDAMENTAL and pair.geometry.threshold == 1.0
    assert len(pair.geometry.inliers) == len(pair.matches) and pair.geometry.inliers[moved].mean() > 0.8


def test_cameras_are_kept_apart(frontend):
    other = create_frontend()
    alone = [other.process(view(6 * i), i, "left") for i in range(3)]
    for i in range(3):
        assert_equal_results(frontend.process(view(6 * i), i, "left"), alone[i])
        right = frontend.process(view(6 * i, (96, 96), seed=1), 10 + i, "right")
        assert right.sequence == i and not right.reset_reason


def test_calibrated_frames_are_verified_on_rays(frontend):
    camera = Camera(np.array([[150, 0, 79.5], [0, 150, 59.5], [0, 0, 1.0]]), np.zeros(5), SIZE)
    frontend.process(view(0), 0, calibration=camera)
    result = frontend.process(view(6), 1, calibration=camera)
    assert result.pair.geometry.model is GeometryModel.ESSENTIAL
    uncalibrated = frontend.process(view(12), 2)
    assert uncalibrated.pair.geometry.model is GeometryModel.FUNDAMENTAL


def test_a_stamp_that_goes_back_resets_the_camera(frontend):
    for i in range(3):
        frontend.process(view(6 * i), (i + 5) * SECOND)
    looped = frontend.process(view(0), 5 * SECOND)
    assert (looped.sequence, looped.pair) == (3, None), "a number must not be given twice"
    assert "went back by 2.000 s" in looped.reset_reason
    again = frontend.process(view(6), 6 * SECOND)
    assert (again.sequence, again.pair.sequence0, again.reset_reason) == (4, 3, "")
    assert frontend.process(view(0), 5 * SECOND).reset_reason, "a second is no delay"


@pytest.mark.parametrize(("back", "words"), [(0, "the same stamp"), (1, "0.000 s older"), (SECOND - 1, "1.000 s")])
def test_a_late_image_is_refused_and_leaves_the_camera_as_it_was(frontend, back, words):
    frontend.process(view(0), 5 * SECOND)
    with pytest.raises(StaleImageError, match=f"newer than the previous one of camera 'camera'.*{words}"):
        frontend.process(view(60), 5 * SECOND - back)
    assert frontend.process(view(60), 5 * SECOND - back, "other").sequence == 0
    result = frontend.process(view(6), 5 * SECOND + 1)
    assert (result.sequence, result.pair.sequence0, result.reset_reason) == (1, 0, "")


def test_a_calibration_of_another_image_size_is_refused(frontend):
    k = np.array([[150, 0, 79.5], [0, 150, 59.5], [0, 0, 1.0]])
    frontend.process(view(0), 0, calibration=Camera(k, np.zeros(5), SIZE))
    with pytest.raises(CalibrationError, match="images of 160x120, found one for 320x240"):
        frontend.process(view(3), 1, calibration=Camera(k, np.zeros(5), (320, 240)))
    result = frontend.process(view(6), 1, calibration=Camera(k, np.zeros(5), SIZE))
    assert (result.sequence, result.pair.geometry.model) == (1, GeometryModel.ESSENTIAL)


def test_another_image_size_resets_the_camera(frontend):
    frontend.process(view(0), 0)
    result = frontend.process(view(0, (128, 96)), 1)
    assert (result.sequence, result.pair) == (1, None)
    assert result.reset_reason == "image size changed from 160x120 to 128x96"


def test_reset_of_one_camera_or_all(frontend):
    for camera in ("a", "b"):
        frontend.process(view(0), 0, camera)
    frontend.reset("a")
    frontend.reset("never seen")
    a, b = (frontend.process(view(6), 1, camera) for camera in ("a", "b"))
    assert (a.sequence, a.pair, b.sequence, b.pair.sequence0) == (1, None, 1, 0)
    frontend.reset()
    result = frontend.process(view(6), 1, "b")
    assert (result.sequence, result.pair, result.reset_reason) == (2, None, "")


def test_work_that_nobody_asks_for_is_not_done(frontend):
    frontend.process(view(0), 0)
    result = frontend.process(view(6), 1, match=False)
    assert result.pair is None and result.sequence == 1 and "match" not in result.timings
    assert frontend.process(view(12), 2).pair.sequence0 == 1
    plain = create_frontend(verify=False)
    plain.process(view(0), 0)
    result = plain.process(view(6), 1)
    assert result.pair.geometry is None and len(result.pair.matches) and "verify" not in result.timings


def test_min_cosine_drops_matches(frontend):
    frontend.process(view(0), 0)
    loose = frontend.process(view(6), 1).pair.matches.scores
    least = float(np.median(loose))
    strict = create_frontend(min_cosine=least)
    strict.process(view(0), 0)
    kept = strict.process(view(6), 1).pair.matches.scores
    np.testing.assert_array_equal(kept, loose[loose >= np.float32(least)])


def test_a_mask_and_an_empty_frame(frontend):
    mask = np.zeros(SIZE[::-1], np.uint8)
    assert len(frontend.process(view(0), 0, mask=mask).features) == 0
    result = frontend.process(view(6), 1)
    assert len(result.features) and len(result.pair.matches) == 0
    assert result.pair.geometry.model is GeometryModel.NONE and result.pair.geometry.num_inliers == 0
    mask[:60] = 1
    assert frontend.process(view(6), 2, mask=mask).features.keypoints[:, 1].max() < 60


def test_an_unusable_image_leaves_the_camera_as_it_was(frontend):
    frontend.process(view(0), 0)
    with pytest.raises(ImageError):
        frontend.process(view(0)[:20], 1)
    result = frontend.process(view(6), 2)
    assert (result.sequence, result.pair.sequence0) == (1, 0)


def test_results_do_not_depend_on_the_thread(frontend):
    other = create_frontend()
    expected = [other.process(view(6 * i), i) for i in range(2)]
    results: list[FrameResult] = []
    for i in range(2):
        worker = threading.Thread(target=lambda i=i: results.append(frontend.process(view(6 * i), i)))
        worker.start()
        worker.join()
    for one, other in zip(results, expected, strict=True):
        assert_equal_results(one, other)


def test_close_gives_the_memory_back():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.cuda.memory_reserved() if device == "cuda" else 0
    frontend = create_frontend(device=device)
    frontend.process(view(0), 0)
    weights = weakref.ref(next(frontend.extractor.model.parameters()))
    frontend.close()
    assert weights() is None
    assert device == "cpu" or torch.cuda.memory_reserved() <= before


def test_config_is_strict():
    assert FrontendConfig.from_dict({"max_keypoints": 7}).max_keypoints == 7
    with pytest.raises(ConfigError, match=r"front\.yaml: unknown key 'max_keypoint'; did you mean 'max_keypoints'"):
        FrontendConfig.from_dict({"max_keypoint": 7}, where="front.yaml")
    with pytest.raises(ConfigError, match="verification_threshold: expected a value > 0"):
        FrontendConfig(verification_threshold=0.0)
    with pytest.raises(ConfigError, match="verify: expected bool"):
        FrontendConfig(verify=1)
