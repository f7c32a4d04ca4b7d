from __future__ import annotations

import threading
import time

import cv2
import numpy as np
import pytest

from scfeat_core.errors import CalibrationError, ConfigError
from scfeat_core.inertial import GyroBuffer, exponential

MS = 1_000_000


def rodrigues(vector) -> np.ndarray:
    return cv2.Rodrigues(np.asarray(vector, np.float64))[0]


def filled(rate, stamps, **options) -> GyroBuffer:
    """A buffer with the samples of ``rate(seconds)``."""
    buffer = GyroBuffer(**options)
    for stamp in stamps:
        assert buffer.add(int(stamp), rate(1e-9 * stamp))
    return buffer


def test_exponential_map_agrees_with_opencv_also_near_zero_and_pi():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 3)) * np.logspace(-12, 0.5, 40)[:, None]
    vectors[0] = 0
    vectors[1] *= np.pi / np.linalg.norm(vectors[1])
    for vector, matrix in zip(vectors, exponential(vectors), strict=True):
        np.testing.assert_allclose(matrix, rodrigues(vector), atol=1e-13)


@pytest.mark.parametrize("rate", [(0, 0, 1.5), (0.4, -0.7, 0.2), (0, 0, 0)])
@pytest.mark.parametrize(("start", "end"), [(0, 100), (13, 61), (12.3, 12.9), (50, 50)])
def test_a_constant_rate_turns_the_rays_back_by_its_angle(rate, start, end):
    buffer = filled(lambda t: rate, np.arange(0, 101, 5) * MS)
    turn = buffer.rotation(int(start * MS), int(end * MS))
    np.testing.assert_allclose(turn, rodrigues(np.array(rate) * 1e-3 * (end - start)).T, atol=1e-12)


def test_a_camera_that_turns_left_sees_the_world_move_right():
    """REP 103: z up; a positive rate about the camera's y axis (down) turns the view to the right."""
    buffer = filled(lambda t: (0, 1.0, 0), np.arange(0, 101, 5) * MS)
    ahead = buffer.rotation(0, 100 * MS) @ [0, 0, 1]
    assert ahead[0] == pytest.approx(-np.sin(0.1)), "what was ahead is now on the left"


def test_the_axes_of_the_sensor_become_those_of_the_camera():
    # x forward, y left, z up (REP 103) to x right, y down, z forward (REP 103, suffix _optical)
    extrinsic = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])
    buffer = filled(lambda t: (0, 0, 0.8), np.arange(0, 101, 5) * MS)
    turn = buffer.rotation(0, 100 * MS, extrinsic)
    np.testing.assert_allclose(turn, rodrigues([0, -0.08, 0]).T, atol=1e-12)
    assert (turn @ [0, 0, 1])[0] > 0.07, "it turns left, what was ahead is now on the right"


def test_a_rate_that_changes_about_one_axis_is_integrated():
    buffer = filled(lambda t: (0.5 * np.sin(20 * t), 0, 0), np.arange(0, 1001, 2) * MS)
    for start, end in ((0, 1000), (101, 347), (500, 533)):
        angle = 0.5 / 20 * (np.cos(20e-3 * start) - np.cos(20e-3 * end))
        np.testing.assert_allclose(buffer.rotation(start * MS, end * MS), rodrigues([angle, 0, 0]).T, atol=2e-5)


def test_rates_about_changing_axes_follow_the_true_orientation():
    """Coning: R(t) = Rz(a t) Rx(b) has the body rate a Rx(b)' z, plus a spin about the body's z axis."""
    spin, cone, tilt = 3.0, 2.0, 0.3

    def orientation(t: float) -> np.ndarray:
        return rodrigues([0, 0, cone * t]) @ rodrigues([tilt, 0, 0]) @ rodrigues([0, 0, spin * t])

    def rate(t: float) -> np.ndarray:
        return rodrigues([0, 0, spin * t]).T @ rodrigues([tilt, 0, 0]).T @ [0, 0, cone] + [0, 0, spin]

    buffer = filled(rate, np.arange(0, 401, 5) * MS)
    found = buffer.rotation(103 * MS, 391 * MS)
    expected = orientation(0.391).T @ orientation(0.103)
    assert np.degrees(np.linalg.norm(cv2.Rodrigues(found @ expected.T)[0])) < 0.01
    halves = buffer.rotation(250 * MS, 391 * MS) @ buffer.rotation(103 * MS, 250 * MS)
    np.testing.assert_allclose(found, halves, atol=1e-4)


def test_nothing_is_said_where_the_samples_do_not_know():
    buffer = GyroBuffer(max_gap=0.02)
    assert buffer.rotation(0, MS) is None
    for stamp in [*range(0, 101, 5), *range(130, 201, 5)]:
        buffer.add(stamp * MS, (0, 0, 1))
    assert buffer.rotation(50 * MS, 100 * MS) is not None
    assert buffer.rotation(50 * MS, 101 * MS) is None, "a gap"
    assert buffer.rotation(90 * MS, 150 * MS) is None
    assert buffer.rotation(150 * MS, 140 * MS) is None
    np.testing.assert_allclose(buffer.rotation(150 * MS, 220 * MS), rodrigues([0, 0, 0.07]).T, atol=1e-12)
    assert buffer.rotation(150 * MS, 221 * MS) is None, "the samples have ended"
    assert buffer.rotation(-21 * MS, 50 * MS) is None, "they had not begun"
    assert buffer.rotation(300 * MS, 310 * MS) is None
    assert buffer.rotation(-100 * MS, -90 * MS) is None


def test_samples_that_are_of_no_use_are_counted():
    buffer = GyroBuffer()
    assert buffer.add(10 * MS, (0, 0, 1))
    for stamp, rate in ((15, (0, np.nan, 1)), (10, (0, 0, 1)), (9, (0, 0, 1)), (16, (np.inf, 0, 0))):
        assert not buffer.add(stamp * MS, rate)
    assert (len(buffer), buffer.rejected) == (1, 4)
    with pytest.raises(CalibrationError, match=r"\(3,\) in rad/s, found an array of shape \(4,\)"):
        buffer.add(20 * MS, np.zeros(4))


def test_a_clock_that_jumps_back_clears_the_buffer():
    buffer = filled(lambda t: (0, 0, 1), np.arange(5000, 5101, 5) * MS)
    assert buffer.add(4100 * MS, (0, 0, 2))
    assert len(buffer) == 1 and buffer.rejected == 0
    assert buffer.rotation(5000 * MS, 5050 * MS) is None
    assert buffer.add(4105 * MS, (0, 0, 2))
    np.testing.assert_allclose(buffer.rotation(4100 * MS, 4105 * MS), rodrigues([0, 0, 0.01]).T, atol=1e-12)
    buffer.clear()
    assert len(buffer) == 0 and buffer.rotation(4100 * MS, 4105 * MS) is None


def test_memory_is_bounded_and_the_newest_stay():
    buffer = filled(lambda t: (0, 0, t), np.arange(0, 1000, 5) * MS, capacity=16)
    assert len(buffer) == 16
    angle = (0.990**2 - 0.930**2) / 2
    np.testing.assert_allclose(buffer.rotation(930 * MS, 990 * MS), rodrigues([0, 0, angle]).T, atol=1e-12)
    assert buffer.rotation(500 * MS, 550 * MS) is None


def test_one_thread_adds_while_another_asks():
    buffer = GyroBuffer(capacity=64)
    wrong: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            count = newest[0]
            turn = buffer.rotation((count - 20) * MS, (count - 10) * MS)
            if turn is not None:
                wrong.append(np.abs(turn - rodrigues([0, 0, 0.01]).T).max())

    newest = [0]
    thread = threading.Thread(target=ask)
    thread.start()
    for stamp in range(3000):
        buffer.add(stamp * MS, (0, 0, 1))
        newest[0] = stamp
    deadline = time.monotonic() + 20
    while not wrong and time.monotonic() < deadline:
        time.sleep(0.001)
    done.set()
    thread.join()
    assert wrong and max(wrong) < 1e-12


@pytest.mark.parametrize("matrix", [np.eye(2), 2 * np.eye(3), np.diag([1, 1, -1]), np.full((3, 3), np.nan)])
def test_what_is_not_a_rotation_is_refused(matrix):
    with pytest.raises(CalibrationError, match="rotation_camera_imu: expected a rotation"):
        GyroBuffer().rotation(0, 1, matrix)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="room for 2 samples"):
        GyroBuffer(capacity=1)
