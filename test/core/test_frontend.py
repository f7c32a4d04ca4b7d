from __future__ import annotations

import queue
import threading
import weakref
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from scfeat_core import matching
from scfeat_core.columns import to_columns
from scfeat_core.errors import CalibrationError, ConfigError, DataError, FeatureError, ImageError, StaleImageError
from scfeat_core.evaluation.method_extractor import MethodExtractor
from scfeat_core.frontend import TRACK_GAP, TURN_RADIUS, Frontend, FrontendConfig, Submitted
from scfeat_core.geometry import essential_from_pose, warp_points
from scfeat_core.inertial import exponential
from scfeat_core.types import Camera, FrameInput, FrameResult, GeometryModel, MatchKind, TrackFlag

SECOND = 1_000_000_000
SIZE = (160, 120)
K = np.array([[150, 0, 79.5], [0, 150, 59.5], [0, 0, 1.0]])
CAMERA = Camera(K, np.zeros(5), SIZE)


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
    assert set(first.timings) == {"preprocess", "network", "select", "assess", "track"}
    assert (second.sequence, second.stamp, second.camera) == (1, 2 * SECOND, "camera")
    assert set(second.timings) == {"preprocess", "network", "select", "match", "verify", "assess", "track"}
    pair = second.pair
    assert (pair.sequence0, pair.stamp0, pair.kind, pair.camera0) == (0, SECOND, MatchKind.TEMPORAL, "camera")
    assert np.array_equal(pair.keypoints0, first.features.keypoints[pair.matches.indices0])
    assert np.array_equal(pair.keypoints1, second.features.keypoints[pair.matches.indices1])
    assert all(isinstance(a, np.ndarray) for a in (pair.keypoints0, pair.matches.scores, second.features.descriptors))
    assert pair.matches.scores.min() >= 0
    moved = np.linalg.norm(pair.keypoints0 - pair.keypoints1 - [6, 0], axis=1) < 1
    assert moved.sum() > 30
    assert pair.geometry.model is GeometryModel.HOMOGRAPHY, "the wall is flat"
    assert len(pair.geometry.inliers) == len(pair.matches) and pair.geometry.inliers[moved].mean() > 0.8


def test_cameras_are_kept_apart(frontend):
    other = create_frontend()
    alone = [other.process(view(6 * i), i, "left") for i in range(3)]
    for i in range(3):
        assert_equal_results(frontend.process(view(6 * i), i, "left"), alone[i])
        right = frontend.process(view(6 * i, (96, 96), seed=1), 10 + i, "right")
        assert right.sequence == i and not right.reset_reason


def test_the_geometry_is_the_one_that_is_asked_for():
    for name in ("fundamental", "homography"):
        frontend = create_frontend(geometry=name)
        frontend.process(view(0), 0, calibration=CAMERA)
        geometry = frontend.process(view(6), 1, calibration=CAMERA).pair.geometry
        assert (geometry.model, geometry.threshold) == (GeometryModel[name.upper()], 1.0)
    frontend = create_frontend(geometry="essential")
    frontend.process(view(0), 0, calibration=CAMERA)
    result = frontend.process(view(6), 1, calibration=CAMERA)
    assert result.pair.geometry.model is GeometryModel.ESSENTIAL
    uncalibrated = frontend.process(view(12), 2)
    assert uncalibrated.pair.geometry.model is GeometryModel.FUNDAMENTAL, "without rays there is no essential matrix"


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
    frontend.process(view(0), 0, calibration=CAMERA)
    with pytest.raises(CalibrationError, match="images of 160x120, found one for 320x240"):
        frontend.process(view(3), 1, calibration=replace(CAMERA, size=(320, 240)))
    with pytest.raises(CalibrationError, match="positive focal lengths"):
        frontend.process(view(3), 1, calibration=replace(CAMERA, K=np.zeros((3, 3))))
    with pytest.raises(CalibrationError, match="rotation: expected a rotation"):
        frontend.process(view(3), 1, calibration=CAMERA, rotation=2 * np.eye(3))
    result = frontend.process(view(6), 1, calibration=CAMERA)
    assert (result.sequence, result.pair.sequence0, result.tracks.ages.max()) == (1, 0, 2)


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
    result = frontend.process(view(6), 1, match=False, track=False, assess=False)
    assert (result.sequence, result.pair, result.tracks, result.quality) == (1, None, None, None)
    assert set(result.timings) == {"preprocess", "network", "select"}
    tracked = frontend.process(view(12), 2, match=False)
    assert len(tracked.pair.matches) > 30 and (tracked.tracks.flags == TrackFlag.NEW).all()
    assert (frontend.process(view(13), 20, match=False).tracks.ages > 1).sum() > 30
    assert frontend.process(view(18), 30).pair.sequence0 == 3
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
    assert FrontendConfig(budgets={"left": 500}).budgets == {"left": 500}
    with pytest.raises(ConfigError, match=r"budgets\.left: expected a value >= 1"):
        FrontendConfig(budgets={"left": 0})
    with pytest.raises(ConfigError, match="geometry: expected one of 'auto'"):
        FrontendConfig(geometry="affine")
    for wrong in ({"search_radius": -1.0}, {"max_track_gap": -1}, {"reidentify_cosine": 1.1}, {"stereo_gate": 0.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected a value"):
            FrontendConfig(**wrong)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_change_between_two_frames(frontend):
    before = frontend.process(view(0), 0)
    frontend.update(replace(frontend.config, max_keypoints=50, budgets={"other": 20}, verify=False))
    after = frontend.process(view(6), 1)
    assert (len(before.features), len(after.features)) == (200, 50)
    assert after.pair.sequence0 == 0 and after.pair.geometry is None
    assert np.isin(after.tracks.ids, before.tracks.ids).sum() > 10, "tracks go on"
    assert len(frontend.process(view(0), 0, "other").features) == 20


def test_what_cannot_change_is_refused_and_changes_nothing(frontend):
    config = frontend.config
    wrong = replace(config, device="cuda", precision="bfloat16", max_keypoints=7)
    with pytest.raises(ConfigError, match="device and precision cannot change.*'cpu', 'float32', found 'cuda', 'bfl"):
        frontend.update(wrong)
    assert frontend.config is config and len(frontend.process(view(0), 0).features) == 200


# -- several cameras ---------------------------------------------------------------------------------------------------


def batch_of(step: int) -> list[FrameInput]:
    return [
        FrameInput(view(6 * step), step, "left"),
        FrameInput(view(6 * step, (96, 96), seed=1), step, "small"),
        FrameInput(view(6 * step, seed=2), step, "right", mask=np.ones(SIZE[::-1], np.uint8)),
    ]


def test_a_batch_gives_what_single_frames_give(frontend, monkeypatch):
    other = create_frontend()
    calls = []
    run = frontend.extractor._run_network
    monkeypatch.setattr(frontend.extractor, "_run_network", lambda image: calls.append(image.shape) or run(image))
    for step in range(3):
        results = frontend.process_batch(batch_of(step))
        for given, result in zip(batch_of(step), results, strict=True):
            single = other.process(given.image, given.stamp, given.camera, mask=given.mask)
            assert (result.camera, result.sequence, len(result.features)) == (given.camera, step, len(single.features))
            # Scores that are equal but for the arithmetic of batches may change places.
            apart = np.linalg.norm(result.features.keypoints[:, None] - single.features.keypoints, axis=2)
            assert apart.min(0).max() < 1e-2 and apart.min(1).max() < 1e-2
            assert (result.pair is None) == (step == 0)
            assert (result.tracks.ages.max(), result.quality) == (step + 1, single.quality)
    assert [tuple(shape) for shape in calls] == [(2, 3, 120, 160), (1, 3, 96, 96)] * 3, "one call for each size"


def test_an_input_that_fails_has_its_error_in_its_place(frontend):
    frontend.process_batch(batch_of(0))
    inputs = batch_of(1)
    inputs[0] = replace(inputs[0], stamp=0)
    inputs[2] = replace(inputs[2], mask=np.ones((3, 3), np.uint8))
    inputs.append(FrameInput(view(0), 1, "third", calibration=replace(CAMERA, size=(1, 1))))
    inputs.append(FrameInput(view(0)[:20], 1, "fourth"))
    inputs.append(FrameInput(None, 1, "fifth"))
    results = frontend.process_batch(inputs)
    kinds = [type(result) for result in results]
    assert kinds == [StaleImageError, FrameResult, ImageError, CalibrationError, ImageError, ImageError]
    assert results[1].pair.sequence0 == 0
    assert all(
        isinstance(result, FrameResult) and result.sequence == 1 + (result.camera == "small")
        for result in frontend.process_batch(batch_of(2))
    )
    assert frontend.process_batch([]) == []


def test_what_nobody_foresaw_is_the_error_of_its_image_alone(frontend):
    frontend.process_batch(batch_of(0))
    inputs = batch_of(1)
    inputs[0] = replace(inputs[0], calibration=replace(CAMERA, K=K[:, :2]))
    inputs[1] = replace(inputs[1], calibration=replace(CAMERA, size=(96, 96), D=None))
    errors = frontend.process_batch(inputs)
    assert isinstance(errors[0], CalibrationError)
    assert isinstance(errors[1], TypeError) and errors[2].pair.sequence0 == 0
    with pytest.raises(TypeError):
        frontend.process(view(6), 1, "other", calibration=replace(CAMERA, D=None))
    assert [result.sequence for result in frontend.process_batch(batch_of(2))] == [1, 1, 2]


def test_an_error_of_the_network_is_that_of_the_image_that_causes_it(frontend, monkeypatch):
    run = frontend.extractor._run_network

    def fails(images: torch.Tensor) -> object:
        if (images > 0.99).all(dim=(1, 2, 3)).any():
            raise RuntimeError("out of memory")
        return run(images)

    monkeypatch.setattr(frontend.extractor, "_run_network", fails)
    first, second = frontend.process_batch(
        [FrameInput(view(0), 0, "left"), FrameInput(np.full(SIZE[::-1], 255, np.uint8), 0, "right")]
    )
    assert first.sequence == 0 and isinstance(second, RuntimeError)


def test_a_batch_may_hold_a_camera_twice(frontend):
    inputs = [FrameInput(view(0), 0), FrameInput(view(6), 1), FrameInput(view(6), 1), FrameInput(view(12), 2)]
    _, second, again, third = frontend.process_batch(inputs)
    assert isinstance(again, StaleImageError)
    assert (second.pair.sequence0, third.pair.sequence0, third.sequence) == (0, 1, 2)


def test_submitting_ahead_gives_what_one_after_the_other_gives(frontend):
    """Two frames of each camera are on their way, in a thread of their own."""
    other = create_frontend()
    expected = [other.process_batch(batch_of(step)) for step in range(4)]
    submitted: queue.Queue[Submitted] = queue.Queue(2)
    ahead = threading.Thread(target=lambda: [submitted.put(frontend.submit(batch_of(step))) for step in range(4)])
    ahead.start()
    found = [frontend.result(submitted.get()) for _ in range(4)]
    ahead.join()
    for one, together in zip(found, expected, strict=True):
        for result, alone in zip(one, together, strict=True):
            assert_equal_results(result, alone)
            assert np.array_equal(result.tracks.ids, alone.tracks.ids)


def test_matches_that_are_made_ahead_are_the_same(monkeypatch):
    """What a GPU does, on the CPU: everything is submitted at once, with the matches to the frame submitted before.

    Also where that is not the frame before in the end, as it was late, too small, or without contrast; with windows;
    where matches were not asked for; and where nothing is found at all.
    """
    plain, ahead = create_frontend(), create_frontend()
    ahead._ahead = True
    gray = np.full(SIZE[::-1], 127, np.uint8)
    hidden = np.zeros(SIZE[::-1], np.uint8)
    inputs = [FrameInput(view(4 * i), i * SECOND // 30, "left", calibration=CAMERA) for i in range(10)]
    inputs[2] = replace(inputs[2], stamp=0)
    inputs[3] = replace(inputs[3], image=gray)
    inputs[5] = replace(inputs[5], match=False, track=False)
    inputs[6] = replace(inputs[6], rotation=exponential(np.array([[0, 0.02, 0]]))[0])
    inputs[8] = replace(inputs[8], mask=hidden)
    right = [FrameInput(view(4 * i, seed=2), i * SECOND // 30, "right", score_map=True) for i in range(10)]
    expected = [plain.process_batch(list(pair)) for pair in zip(inputs, right, strict=True)]
    made: list[int] = []
    match = matching.match
    monkeypatch.setattr(matching, "match", lambda *args, **settings: made.append(step) or match(*args, **settings))
    for step, pair in enumerate(zip(inputs, right, strict=True)):
        for result, alone in zip(ahead.process_batch(list(pair)), expected[step], strict=True):
            assert type(result) is type(alone)
            if isinstance(alone, FrameResult):
                assert_equal_results(result, alone)
                assert (result.tracks is None) == (alone.tracks is None)
                assert alone.tracks is None or np.array_equal(result.tracks.ids, alone.tracks.ids)
                assert (result.features.score_map is None) == (alone.features.score_map is None)
    # The frame without contrast, the one after it, and the one that turned.
    assert sorted(set(made)) == [3, 4, 6]


def test_nothing_that_was_submitted_outlives_a_reset_or_a_restored_state():
    """It is memory of the device, and the frame that comes next is matched with the predecessor of the state."""
    ahead = create_frontend()
    ahead._ahead = True
    for i in range(2):
        ahead.process(view(4 * i), i, "left", CAMERA)
        ahead.process(view(4 * i, seed=2), i, "right")
    state = ahead.snapshot()
    ahead.process(view(40), 2, "left", CAMERA)
    ahead.restore(state)
    assert not ahead._submitted
    plain = create_frontend()
    plain.restore(state)
    assert_equal_results(ahead.process(view(8), 2, "left", CAMERA), plain.process(view(8), 2, "left", CAMERA))
    ahead.process(view(8, seed=2), 2, "right")
    ahead.reset("left")
    assert set(ahead._submitted) == {"right"}
    ahead.reset()
    assert not ahead._submitted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_frame_waits_once_for_the_device():
    """Nothing on the way of an image waits for a GPU but for the event of the one download."""
    frontend, other = create_frontend(device="cuda"), create_frontend()
    for i in range(3):
        frontend.process(view(4 * i), i, calibration=CAMERA)
        other.process(view(4 * i), i, calibration=CAMERA)
    torch.cuda.set_sync_debug_mode("error")  # events are not counted
    try:
        result = frontend.process(view(12), 3, calibration=CAMERA)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = other.process(view(12), 3, calibration=CAMERA)
    assert abs(len(result.pair.matches) - len(expected.pair.matches)) < 0.2 * len(expected.pair.matches)
    assert (result.tracks.ages > 1).sum() > 30


def test_an_image_is_late_for_what_was_before_it_not_for_what_is_on_its_way(frontend):
    """A recording starts again while the frame that says so is on its way."""
    frontend.process(view(0), 10 * SECOND)
    stamps = [10 * SECOND - 3 * SECOND // 2, 10 * SECOND - SECOND // 2, 10 * SECOND - SECOND // 2]
    given = [frontend.submit([FrameInput(view(6 * i), stamp)]) for i, stamp in enumerate(stamps)]
    (again,), (after,), (twice,) = (frontend.result(each) for each in given)
    assert again.reset_reason and after.pair.sequence0 == again.sequence
    assert isinstance(twice, StaleImageError)
    (late,) = frontend.submit([FrameInput(view(0), stamps[1])]).found
    assert isinstance(late, StaleImageError), "the network runs for none that is known to be late"


def test_score_maps_are_kept_where_they_are_asked_for(frontend):
    with_map = frontend.process(view(0), 0, score_map=True)
    assert with_map.features.score_map.shape == SIZE[::-1]
    assert frontend.process(view(6), 1).features.score_map is None


def stereo_pair(frontend, left_camera=None, right_camera=None, disparity: int = 8):
    return frontend.process_batch(
        [
            FrameInput(view(0), 5, "left", calibration=left_camera),
            FrameInput(view(disparity), 5, "right", calibration=right_camera),
        ]
    )


def rig() -> tuple[Camera, Camera]:
    """A rectified pair, 0.1 m apart."""
    p0, p1 = np.column_stack((K, np.zeros(3))), np.column_stack((K, [-15.0, 0, 0]))
    return replace(CAMERA, R=np.eye(3), P=p0), replace(CAMERA, R=np.eye(3), P=p1)


def test_stereo_matches_of_a_calibrated_rig_are_on_its_epipolar_lines(frontend):
    left, right = stereo_pair(frontend, *rig())
    pair = frontend.match_stereo(left, right)
    assert (pair.kind, pair.camera0, pair.sequence0, pair.stamp0) == (MatchKind.STEREO, "left", 0, 5)
    assert np.array_equal(pair.keypoints0, left.features.keypoints[pair.matches.indices0])
    assert np.array_equal(pair.keypoints1, right.features.keypoints[pair.matches.indices1])
    disparity = pair.keypoints0 - pair.keypoints1
    assert len(pair.matches) > 50 and np.abs(disparity[:, 1]).max() <= 2.0 and disparity[:, 0].min() >= -2.0
    assert (np.abs(disparity - [8, 0]).max(1) < 1).mean() > 0.8
    assert pair.geometry.model is GeometryModel.ESSENTIAL and pair.geometry.inliers.all()
    np.testing.assert_allclose(pair.geometry.matrix, essential_from_pose(np.eye(3), np.array([-1.0, 0, 0])), atol=1e-12)


def test_stereo_without_a_rig_is_verified_by_its_matches(frontend):
    left, right = stereo_pair(frontend)
    pair = frontend.match_stereo(left, right)
    assert pair.kind is MatchKind.STEREO and pair.geometry.model is GeometryModel.HOMOGRAPHY
    assert 30 < pair.geometry.num_inliers < len(pair.matches)


def test_stereo_needs_the_newest_frames(frontend):
    left, right = stereo_pair(frontend, *reversed(rig()))
    with pytest.raises(CalibrationError, match="left camera first"):
        frontend.match_stereo(left, right)
    frontend.process(view(3), 6, "right")
    with pytest.raises(FeatureError, match="frame 0 of camera 'right'.*found number 1"):
        frontend.match_stereo(left, right)
    frontend.reset()
    with pytest.raises(FeatureError, match="found none since a reset"):
        frontend.match_stereo(left, right)


# -- tracks ------------------------------------------------------------------------------------------------------------


def test_tracks_follow_points_over_frames(frontend):
    """True positions are known: the view moves by 4 pixels a frame."""
    born: dict[int, tuple[int, np.ndarray]] = {}
    for step in range(8):
        tracks = frontend.process(view(4 * step), step * SECOND // 10, calibration=CAMERA).tracks
        assert (np.diff(tracks.ids.astype(int)) > 0).all() and tracks.ids.min() > 0
        new = tracks.flags == TrackFlag.NEW
        assert np.array_equal(new, [i not in born for i in tracks.ids.tolist()])
        assert (tracks.ages[new] == 1).all()
        born.update({i: (step, xy) for i, xy in zip(tracks.ids[new].tolist(), tracks.keypoints[new], strict=True)})
        if step == 0:
            assert tracks.velocities is None and len(tracks.lost_ids) == 0
    old = tracks.ages >= 7
    assert old.sum() > 30
    first = np.array([born[i][1] - [4 * (step - born[i][0]), 0] for i in tracks.ids[old].tolist()])
    assert (np.linalg.norm(tracks.keypoints[old] - first, axis=1) < 2).mean() > 0.9
    np.testing.assert_allclose(tracks.rays, (tracks.keypoints - K[:2, 2]) / 150, atol=1e-5)
    np.testing.assert_allclose(np.median(tracks.velocities[old], 0), [-40 / 150, 0], atol=0.02)
    assert not tracks.velocities[tracks.flags == TrackFlag.NEW].any()


def test_tracks_end_at_a_reset_and_their_ids_are_not_given_again(frontend):
    first = frontend.process(view(0), 10 * SECOND)
    jumped = frontend.process(view(0), 1 * SECOND)
    assert jumped.reset_reason and jumped.tracks.velocities is None
    assert set(jumped.tracks.lost_ids.tolist()) == set(first.tracks.ids.tolist())
    assert jumped.tracks.ids.min() > first.tracks.ids.max()
    frontend.reset("camera")
    assert frontend.process(view(6), 2 * SECOND, track=False).tracks is None
    after = frontend.process(view(6), 3 * SECOND)
    assert set(after.tracks.lost_ids.tolist()) == set(jumped.tracks.ids.tolist())
    assert after.tracks.ids.min() > jumped.tracks.ids.max()


@pytest.mark.parametrize("meanwhile", ["a frame without tracks", "nothing"])
def test_tracks_begin_anew_after_nobody_asked_for_them(frontend, meanwhile):
    first = frontend.process(view(0), 0)
    assert (frontend.process(view(0), TRACK_GAP).tracks.ages == 2).sum() > 30
    if meanwhile != "nothing":
        frontend.process(view(1), TRACK_GAP + 1, track=False)
    after = frontend.process(view(2), 2 * TRACK_GAP + (meanwhile == "nothing"))
    assert len(after.pair.matches) > 30
    assert (after.tracks.flags == TrackFlag.NEW).all() and (after.tracks.ages == 1).all()
    assert np.isin(first.tracks.ids, after.tracks.lost_ids).all() and after.tracks.ids.min() > first.tracks.ids.max()


def test_tracks_of_a_real_image_are_right_and_survive_a_dark_frame(shared_data):
    """A photograph that moves, turns and grows; the fourth frame is black. True positions are known."""
    photo = cv2.imread(str(shared_data / "eval" / "oxford_graf" / "1.png"), cv2.IMREAD_GRAYSCALE)
    photo = cv2.resize(photo, (400, 320), interpolation=cv2.INTER_AREA)
    frontend = Frontend(FrontendConfig(max_keypoints=300))
    born: dict[int, np.ndarray] = {}
    for step in range(7):
        matrix = cv2.getRotationMatrix2D((200, 160), 1.5 * step, 1 + 0.02 * step)
        matrix = np.vstack((matrix, [0, 0, 1]))
        matrix[:2, 2] += 5 * step - 60, -40
        image = cv2.warpPerspective(photo, matrix, (280, 240))
        tracks = frontend.process(0 * image if step == 3 else image, step * SECOND // 15).tracks
        on_photo = warp_points(tracks.keypoints.astype(float), np.linalg.inv(matrix))
        if step != 3:
            for track, point in zip(tracks.ids.tolist(), on_photo, strict=True):
                born.setdefault(track, point)
        if step in (2, 4, 6):
            old = tracks.ages >= (3, 4, 6)[step // 2 - 1]
            assert old.sum() > 100
            error = np.linalg.norm(on_photo[old] - [born[track] for track in tracks.ids[old].tolist()], axis=1)
            assert (error < 2).mean() > 0.95
        if step == 4:
            assert (tracks.flags[old] == TrackFlag.REIDENTIFIED).mean() > 0.9


def test_no_track_goes_on_from_one_photograph_to_another(shared_data):
    names = ("oxford_graf", "oxford_bikes", "churchill", "oxford_bark", "oxford_leuven")
    frontend = Frontend(FrontendConfig(max_keypoints=512))
    seen = 0
    for step, name in enumerate(names):
        photo = cv2.imread(str(shared_data / "eval" / name / "1.png"), cv2.IMREAD_GRAYSCALE)
        calibration = replace(CAMERA, K=np.array([[300, 0, 200], [0, 300, 160], [0, 0, 1.0]]), size=(400, 320))
        result = frontend.process(
            cv2.resize(photo, (400, 320), interpolation=cv2.INTER_AREA),
            step * SECOND // 15,
            calibration=calibration if step % 2 else None,
        )
        assert len(result.features) == 512 and len(result.tracks) == 512
        assert (result.tracks.ids > seen).mean() > 0.995, "at most two look like a point that was lost before the cut"
        seen = int(result.tracks.ids.max())
    again = frontend.process(cv2.resize(photo, (400, 320), interpolation=cv2.INTER_AREA), SECOND)
    assert (again.tracks.ids <= seen).mean() > 0.9


@pytest.mark.parametrize("value", [0, 127, 255])
def test_an_image_without_contrast_has_no_points(value):
    frontend = Frontend(FrontendConfig())
    for stamp in range(4):
        level = np.uint8 if stamp % 2 else np.uint16
        image = np.full((120, 160), value * (1 if level is np.uint8 else 257), level)
        image[::7, ::5] ^= 1  # a bit that flickers
        result = frontend.process(image, stamp)
        assert len(result.features) == len(result.tracks) == 0
        assert stamp == 0 or result.pair.geometry.model is GeometryModel.NONE
    dim = (view(0).astype(float) / 50).astype(np.uint8)
    assert len(frontend.process(dim, 9).features) > 100, "dark, but not without contrast"


def test_matches_that_no_model_explains_continue_no_track(frontend):
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[50:58, 70:80] = 1
    frontend.process(view(0), 0, mask=mask)
    result = frontend.process(view(1), 1, mask=mask)
    assert 0 < len(result.pair.matches) < 5 and result.pair.geometry.model is GeometryModel.NONE
    assert (result.tracks.flags == TrackFlag.NEW).all()


def test_a_window_keeps_matches_near_their_prediction():
    """With the velocity known, what is sought is near; nothing is known at first, and nothing right after a jump."""
    frontend = create_frontend(search_radius=12.0)
    moves = []
    for step, shift in enumerate((0, 25, 50, 75, 10)):
        pair = frontend.process(view(shift), step).pair
        moves.append(None if pair is None else pair.keypoints0 - pair.keypoints1)
    first, *next_ones, jump = moves[1:]
    assert (np.abs(first - [25, 0]).max(1) > 24).any()
    for move in next_ones:
        assert (np.linalg.norm(move - [25, 0], axis=1) < 1.5).sum() > 30
        assert np.abs(move - [25, 0]).max() < 24
    assert (np.linalg.norm(jump - [-65, 0], axis=1) < 1.5).sum() > 20, "found by looking everywhere"


def test_a_gyroscope_says_where_points_turn():
    """A camera that turns: with its rotation given, a window of 3 pixels finds what is 20 pixels away."""
    camera = Camera(np.array([[200, 0, 159.5], [0, 200, 119.5], [0, 0, 1.0]]), np.zeros(5), (320, 240))
    rotation = exponential(np.array([[0, np.deg2rad(6), np.deg2rad(2)]]))[0]
    homography = camera.K @ rotation @ np.linalg.inv(camera.K)
    image = view(20, camera.size)
    turned = cv2.warpPerspective(image, homography, camera.size)

    def matched(radius: float, rotation: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """How far matches are from where the turn takes them, and how far they moved, pixels."""
        frontend = create_frontend(search_radius=radius, verify=False)
        frontend.process(image, 0, calibration=camera)
        pair = frontend.process(turned, 1, calibration=camera, rotation=rotation).pair
        error = np.abs(warp_points(pair.keypoints0.astype(float), homography) - pair.keypoints1).max(1)
        return error, np.abs(pair.keypoints0 - pair.keypoints1).max(1)

    error, moved = matched(3.0, rotation)
    assert len(error) > 50 and error.max() <= 3.001 and np.median(moved) > 15
    tenth = TURN_RADIUS * 320
    without, _ = matched(0.0, None)
    error, _ = matched(0.0, rotation)
    assert error.max() <= tenth + 0.001 < without.max(), "known turns are of use without a radius, too"
    assert (error < 3).sum() > (without < 3).sum()
    wrong, _ = matched(0.0, exponential(np.array([[0, np.deg2rad(-80), 0]]))[0])
    assert (wrong < 3).sum() == (without < 3).sum(), "a prediction out of view is of none"


# -- state -------------------------------------------------------------------------------------------------------------


def columns_of(result: FrameResult) -> dict[str, bytes]:
    columns = {
        name: to_columns(type(part), [part])
        for name in ("features", "pair", "tracks")
        if (part := getattr(result, name)) is not None
    }
    return {f"{part}.{name}": values.tobytes() for part, found in columns.items() for name, values in found.items()}


def go_on(frontend: Frontend, steps: range) -> list[dict[str, bytes]]:
    """Two cameras, one of them calibrated; tracks of the first are lost and come back."""
    found = []
    for i in steps:
        seen = 3 * i if i % 4 else 300 - 3 * i
        found.append(columns_of(frontend.process(view(min(seen, 180)), i * SECOND, calibration=CAMERA)))
        found.append(columns_of(frontend.process(view(2 * i, seed=1), i * SECOND, "other")))
    return found


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_restored_state_goes_on_to_the_same_results(at: int) -> None:
    whole, first, second = (create_frontend(search_radius=20.0) for _ in range(3))
    expected = go_on(whole, range(1, 9))
    go_on(first, range(1, at))
    state = first.snapshot()
    go_on(first, range(at, 9))  # what happens later does not change it
    second.restore(state)
    assert go_on(second, range(at, 9)) == expected[2 * (at - 1) :]


def test_a_state_keeps_what_a_reset_leaves_to_be_told() -> None:
    whole, first, second = (create_frontend() for _ in range(3))
    for frontend in (whole, first):
        go_on(frontend, range(1, 3))
        frontend.reset("camera")
    second.restore(first.snapshot())
    results = [frontend.process(view(9), 5 * SECOND) for frontend in (whole, second)]
    assert len(results[0].tracks.lost_ids) > 0
    assert columns_of(results[0]) == columns_of(results[1])
    assert results[1].sequence == 2


def test_a_state_of_other_descriptors_is_refused(frontend) -> None:
    frontend.process(view(0), SECOND)
    other = Frontend(FrontendConfig(), MethodExtractor("sift"))
    with pytest.raises(FeatureError, match="descriptors of 'sift', found one of scfeat:random"):
        other.restore(frontend.snapshot())
    with pytest.raises(DataError, match="expected the column"):
        frontend.restore({"camera#rows": np.array([1])})
