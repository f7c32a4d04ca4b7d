from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scfeat_core.drawing import (
    AGE_COLOURS,
    INLIER,
    KEYPOINT,
    LOOSE,
    OUTLIER,
    OUTLINE,
    UNVERIFIED,
    Tails,
    age_classes,
    draw_frame,
    draw_keypoints,
    draw_matches,
)
from scfeat_core.types import Features, FrameResult, GeometryModel, Matches, PairResult, Tracks, TwoViewGeometry


def test_keypoints_are_drawn_where_they_are_and_on_a_copy() -> None:
    image = np.zeros((40, 60), np.uint8)
    drawn = draw_keypoints(image, np.float32([[20, 10]]))
    assert drawn.shape == (40, 60, 3)
    assert not image.any()
    assert tuple(drawn[10, 20]) == KEYPOINT
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert max(abs(rows - 10).max(), abs(columns - 20).max()) <= 3
    assert max(abs(rows.mean() - 10), abs(columns.mean() - 20)) < 0.5


def test_matches_join_the_two_points_in_the_colour_of_their_kind() -> None:
    left = np.zeros((40, 60, 3), np.uint8)
    right = np.zeros((50, 30, 1), np.uint8)
    points0 = np.float32([[10, 5], [10, 25]])
    points1 = np.float32([[20, 5], [20, 25]])
    drawn = draw_matches(left, right, points0, points1, np.array([True, False]))
    assert drawn.shape == (50, 90, 3)
    np.testing.assert_allclose(drawn[5, 45], INLIER, rtol=0.15)  # halfway between (10, 5) and (60 + 20, 5)
    np.testing.assert_allclose(drawn[25, 45], OUTLIER, rtol=0.15)
    assert not drawn[5, 85].any()


def test_no_matches_give_the_two_images() -> None:
    image = np.full((8, 8), 7, np.uint8)
    drawn = draw_matches(image, image, np.empty((0, 2), np.float32), np.empty((0, 2), np.float32))
    assert drawn.shape == (8, 16, 3)
    assert (drawn == 7).all()


def features(keypoints: list[tuple[float, float]], size: tuple[int, int]) -> Features:
    xy = np.float32(keypoints).reshape(-1, 2)
    return Features(xy, np.ones(len(xy), np.float32), np.ones((len(xy), 1), np.float32), size)


def pair(keypoints0: list[tuple[float, float]], keypoints1: np.ndarray, inliers: list[bool] | None) -> PairResult:
    count = len(keypoints0)
    geometry = None
    if inliers is not None:
        geometry = TwoViewGeometry(GeometryModel.FUNDAMENTAL, np.eye(3), np.array(inliers, bool), 1.0)
    indices = np.arange(count)
    matches = Matches(indices, indices, np.ones(count, np.float32))
    return PairResult(0, 0, matches, np.float32(keypoints0).reshape(-1, 2), keypoints1[:count], geometry)


def tracks(ids: list[int], keypoints: list[tuple[float, float]], ages: list[int] | None = None) -> Tracks:
    count = len(ids)
    return Tracks(
        ids=np.uint32(ids),
        ages=np.uint32(ages or [1] * count),
        indices=np.arange(count),
        keypoints=np.float32(keypoints).reshape(-1, 2),
        rays=None,
        velocities=None,
        flags=np.zeros(count, np.uint8),
        lost_ids=np.zeros(0, np.uint32),
    )


def frame(keypoints: list[tuple[float, float]], size: tuple[int, int] = (400, 300), **parts: object) -> FrameResult:
    return replace(FrameResult("camera", 0, 0, features(keypoints, size), None), **parts)


def is_like(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Lines are blended with what is below, and thin ones not fully covered."""
    return bool(np.abs(pixel.astype(int) - colour).max() < 60)


@pytest.mark.parametrize("brightness", [0, 128, 255])
def test_flow_is_drawn_from_the_previous_position_and_stands_out_on_any_brightness(brightness: int) -> None:
    image = np.full((300, 400), brightness, np.uint8)
    result = frame([(100, 50), (100, 100), (300, 200)])
    result = replace(result, pair=pair([(60, 50), (60, 100)], result.features.keypoints, [True, False]))
    drawn = draw_frame(image, result, ("matches",))
    assert drawn.shape == (300, 400, 3)
    assert drawn.dtype == np.uint8
    for y, colour in ((50, INLIER), (100, OUTLIER)):
        assert is_like(drawn[y, 80], colour)  # on the way
        assert (drawn[y, 100] == colour).all()  # where it is now: a disc
        assert not is_like(drawn[y, 120], colour)  # not beyond
        assert drawn[y + 1, 80].min() <= max(60, brightness // 3)  # a dark ground beside the line
    assert is_like(drawn[200, 300], LOOSE)
    assert (drawn[250, 50] == brightness).all()
    assert (image == brightness).all()


def test_matches_that_nobody_verified_have_a_colour_of_their_own() -> None:
    result = frame([(100, 50)])
    result = replace(result, pair=pair([(60, 50)], result.features.keypoints, None))
    assert (draw_frame(np.zeros((300, 400), np.uint8), result, ("matches",))[50, 100] == UNVERIFIED).all()


def test_layers_that_are_not_asked_for_are_not_drawn() -> None:
    result = frame([(100, 50)])
    result = replace(
        result,
        pair=pair([(60, 50)], result.features.keypoints, [True]),
        tracks=tracks([1], [(100, 50)]),
        features=replace(result.features, score_map=np.eye(300, 400, dtype=np.float32)),
    )
    mask = np.zeros((300, 400), bool)
    drawn = draw_frame(np.full((300, 400), 90, np.uint8), result, (), mask=mask)
    assert (drawn[:, :60] == 90).all()
    assert is_like(drawn[50, 100], LOOSE)


def test_tails_follow_each_track_over_gaps_and_forget_what_is_old() -> None:
    tails = Tails(length=3)
    tails.add(tracks([9], [(0, 0)]))  # falls out
    tails.add(tracks([7, 2], [(70, 1), (20, 1)]))
    tails.add(tracks([2], [(21, 1)]))  # 7 is not seen
    newest = tracks([7, 2, 8], [(72, 1), (22, 1), (80, 1)])
    tails.add(newest)
    assert len(tails) == 3
    lines = tails.lines(newest)
    assert lines.dtype == np.float32
    assert lines[..., 0].tolist() == [[72, 72, 70], [22, 21, 20], [80, 80, 80]]
    tails.add(tracks([], []))
    assert tails.lines(newest)[..., 0].tolist() == [[72, 72, 72], [22, 22, 21], [80, 80, 80]]
    tails.clear()
    assert tails.lines(newest).shape == (3, 1, 2)


def test_tails_are_drawn_in_the_colour_of_the_age() -> None:
    followed = tracks([1, 2], [(100, 50), (100, 100)], ages=[1, 500])
    ways = np.float32([[[100, 50], [60, 50]], [[100, 100], [60, 100]]])
    drawn = draw_frame(
        np.zeros((300, 400), np.uint8), frame([(0, 0), (9, 9)], tracks=followed), ("tracks",), tails=ways
    )
    assert (drawn[50, 100] == AGE_COLOURS[0]).all()
    assert (drawn[100, 100] == AGE_COLOURS[-1]).all()
    assert is_like(drawn[50, 80], AGE_COLOURS[0])
    assert is_like(drawn[100, 80], AGE_COLOURS[-1])


def test_colours_of_ages_go_up_with_the_age() -> None:
    classes = age_classes(np.uint32([0, 1, 2, 4, 16, 63, 64, 2**32 - 1]))
    assert (np.diff(classes) >= 0).all()
    assert classes[1] == 0
    assert classes[-2] == classes[-1] == len(AGE_COLOURS) - 1


def test_the_mask_darkens_what_it_hides_and_has_an_outline() -> None:
    mask = np.ones((300, 400), bool)
    mask[200:] = False
    drawn = draw_frame(np.full((300, 400), 200, np.uint8), frame([(0, 0)]), ("mask",), mask=mask)
    assert (drawn[100, 100] == 200).all()
    assert drawn[250, 100].max() < 100
    assert (drawn[199, 100] == OUTLINE).all()
    assert (drawn[299, 100] != OUTLINE).any()  # the edge of the image is no border of the mask


def test_high_scores_glow_whatever_the_size_of_the_map() -> None:
    scores = np.random.default_rng(0).uniform(0, 0.1, (75, 100)).astype(np.float32) ** 4  # few peaks, as of a network
    scores[40:44, 60:64] = 5.0
    result = frame([(0, 0)])
    result = replace(result, features=replace(result.features, score_map=scores))
    drawn = draw_frame(np.zeros((300, 400), np.uint8), result, ("scores",)).astype(int).sum(axis=2)
    assert drawn[168, 248] > 500
    assert np.median(drawn) < 200


def test_a_flat_score_map_is_no_error() -> None:
    result = frame([(0, 0)])
    result = replace(result, features=replace(result.features, score_map=np.zeros((30, 40), np.float32)))
    assert draw_frame(np.zeros((300, 400), np.uint8), result, ("scores",)).shape == (300, 400, 3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((300, 400), np.uint8),
        ((300, 400, 1), np.uint8),
        ((300, 400, 3), np.uint8),
        ((300, 400, 4), np.uint8),
        ((300, 400), np.uint16),
        ((300, 400, 3), np.uint16),
        ((300, 400), np.float32),
        ((300, 400, 3), np.float64),
    ],
)
def test_any_kind_of_image_becomes_a_gray_background(shape: tuple[int, ...], dtype: type) -> None:
    white = {np.uint8: 255, np.uint16: 1023, np.float32: 1, np.float64: 1}[dtype]  # 10 of the 16 bits in use
    image = np.zeros(shape, dtype)
    image[100:] = white
    drawn = draw_frame(image[:, ::-1], frame([(5, 5)]))
    assert (drawn[:99, 20:] == 0).all()
    assert (drawn[101:] == 255).all()


@pytest.mark.parametrize("size", [(32, 32), (641, 33), (320, 240), (3840, 2160), (33, 4000)])
def test_pictures_have_a_size_that_can_be_looked_at_and_points_stay_in_place(size: tuple[int, int]) -> None:
    width, height = size
    point = (width * 3 // 4, height // 4)
    result = frame([point], size, tracks=tracks([1], [point], ages=[500]))
    mask = np.ones((height, width), np.uint8)
    drawn = draw_frame(np.zeros((height, width), np.uint8), result, mask=mask)
    shown_height, shown_width = drawn.shape[:2]
    assert 320 <= max(drawn.shape) <= 1280
    assert shown_width / shown_height == pytest.approx(width / height, rel=0.1)
    rows, columns = np.nonzero((drawn == AGE_COLOURS[-1]).all(axis=2))
    assert columns.mean() == pytest.approx((point[0] + 0.5) * shown_width / width - 0.5, abs=0.8)
    assert rows.mean() == pytest.approx((point[1] + 0.5) * shown_height / height - 0.5, abs=0.8)


def test_the_text_stands_at_the_bottom_and_whatever_it_holds_is_no_error() -> None:
    image = np.full((300, 400), 255, np.uint8)
    assert (draw_frame(image, frame([(5, 5)]), text="")[200:] == 255).all()
    drawn = draw_frame(image, frame([(5, 5)]), text="left #12   1024 points   3.2 ms")
    assert (drawn[20:270, 20:] == 255).all()
    assert drawn[285:].min() < 100
    assert drawn[285:, :200].max() > 200
    for text in ("kamera_ä #1", "x" * 500):
        assert draw_frame(image, frame([(5, 5)]), text=text).shape == (300, 400, 3)


def test_a_frame_without_anything_is_the_image() -> None:
    result = frame([], tracks=tracks([], []))
    result = replace(result, pair=pair([], result.features.keypoints, []))
    assert (draw_frame(np.full((300, 400), 90, np.uint8), result, tails=Tails().lines(result.tracks)) == 90).all()
