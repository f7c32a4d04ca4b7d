from __future__ import annotations

import numpy as np

from scfeat_core.drawing import INLIER, KEYPOINT, OUTLIER, draw_keypoints, draw_matches


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
