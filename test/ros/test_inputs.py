"""Who waits for whom, and what becomes of masks: without ROS, on the fields of its messages alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from scfeat_core.errors import ConfigError
from scfeat_ros.inputs import INFO_PATIENCE, PARTNER_PATIENCE, ROOM, Frame, Intake, MaskRules, Masks, groups, read_mask

MS = 1_000_000  # nanoseconds
START = 1_700_000_000_000_000_000


def message(stamp: int, **fields: Any) -> SimpleNamespace:
    """stamp: milliseconds after START."""
    seconds, nanoseconds = divmod(START + stamp * MS, 1_000_000_000)
    stamped = SimpleNamespace(stamp=SimpleNamespace(sec=seconds, nanosec=nanoseconds))
    return SimpleNamespace(header=stamped, **fields)


class Bench:
    """An intake, what came out of it, and a clock that the test sets. Stamps are milliseconds after START."""

    def __init__(self, *cameras: str, stereo: tuple[tuple[str, str], ...] = (), **rules: Any) -> None:
        self.now = 0.0
        self.passed: list[dict[str, tuple[int, int | None]]] = []  # camera -> stamp of the image, of its mask
        self.dropped: list[tuple[str, int]] = []
        self.reasons: list[str] = []
        self.infos: list[int | None] = []  # stamps, of the calibrations of what was passed
        self.intake = Intake(cameras or ("camera",), stereo, 0.005, MaskRules(**rules), self._submit, self._drop)

    def image(self, stamp: int, camera: str = "camera", calibrated: bool = False) -> None:
        self.intake.add_image(Frame(camera, message(stamp), self.now), self.now, lambda: calibrated)

    def info(self, stamp: int, camera: str = "camera") -> None:
        self.intake.add_info(camera, message(stamp), self.now)

    def mask(self, stamp: int, camera: str = "camera") -> None:
        self.intake.add_mask(camera, message(stamp), self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.intake.poll(self.now)

    def _submit(self, group: tuple[str, ...], frames: dict[str, Frame]) -> None:
        assert set(group) == set(frames)
        self.infos += [_since(frame.camera_info) for frame in frames.values()]
        self.passed.append({camera: (_since(frame), _since(frame.mask)) for camera, frame in frames.items()})

    def _drop(self, frame: Frame, why: str) -> None:
        self.dropped.append((frame.camera, _since(frame)))
        self.reasons.append(why)


def _since(thing: Any) -> Any:
    if thing is None:
        return None
    stamp = (thing.message if isinstance(thing, Frame) else thing).header.stamp
    return (stamp.sec * 1_000_000_000 + stamp.nanosec - START) // MS


def test_hold_takes_the_newest_mask_and_waits_for_none() -> None:
    bench = Bench(policy="hold")
    bench.image(0)
    bench.mask(10)
    bench.mask(20)
    bench.image(30)
    bench.image(40)
    assert bench.passed == [{"camera": (0, None)}, {"camera": (30, 20)}, {"camera": (40, 20)}]
    assert not bench.dropped


def test_exact_waits_for_its_mask_and_drops_what_has_none() -> None:
    bench = Bench(policy="exact", patience=0.5)
    for stamp in (0, 33, 66):
        bench.image(stamp)
    bench.mask(33)
    assert bench.passed == [{"camera": (33, 33)}] and bench.dropped == [("camera", 0)], "masks come in order"
    assert "found none when later ones" in bench.reasons[-1]
    bench.wait(0.4)
    assert len(bench.dropped) == 1
    bench.wait(0.2)
    assert bench.dropped == [("camera", 0), ("camera", 66)]
    assert "mask with its stamp, found none within 0.5 s" in bench.reasons[-1] and "mask_patience" in bench.reasons[-1]
    bench.mask(100)
    bench.image(100)
    assert bench.passed[-1] == {"camera": (100, 100)}, "a mask may come first"


def test_nearest_is_settled_by_a_later_mask_or_by_patience() -> None:
    bench = Bench(policy="nearest", tolerance=0.02, patience=0.5)
    bench.mask(0)
    bench.image(12)
    assert not bench.passed, "a nearer one may come"
    bench.mask(20)
    assert bench.passed == [{"camera": (12, 20)}]
    bench.image(30)
    bench.wait(0.6)
    assert bench.passed[-1] == {"camera": (30, 20)}
    bench.image(50)
    bench.wait(0.6)
    assert bench.dropped == [("camera", 50)] and "within 0.02 s" in bench.reasons[-1]


def test_rules_change_for_images_that_wait() -> None:
    bench = Bench(policy="exact")
    bench.image(0)
    bench.intake.set_rules(MaskRules("hold"))
    bench.wait(0.0)
    assert bench.passed == [{"camera": (0, None)}]


def test_a_recording_that_starts_again_forgets_its_masks() -> None:
    bench = Bench(policy="nearest", tolerance=60.0, patience=0.1)
    bench.mask(5000)
    bench.mask(100)
    bench.image(90)
    assert bench.passed == [{"camera": (90, 100)}]


def test_a_new_time_drops_what_waits_and_keeps_a_mask_that_is_held() -> None:
    held = Bench(policy="hold")
    held.mask(10)
    held.intake.restart()
    held.image(0)
    assert held.passed == [{"camera": (0, 10)}], "published once, it would not come again"
    held.intake.clear()
    held.image(20)
    assert held.passed[-1] == {"camera": (20, None)}

    exact = Bench("left", "right", stereo=(("left", "right"),), policy="exact")
    exact.mask(10, "left")
    exact.image(10, "left")  # waits for its partner
    exact.image(20, "right")  # waits for its mask
    exact.intake.restart()
    assert exact.dropped == [("right", 20), ("left", 10)] and not exact.passed
    exact.image(10, "left")
    exact.wait(0.6)
    assert exact.dropped[2:] == [("left", 10)], "a mask of the old time"


def test_what_waits_is_bounded() -> None:
    bench = Bench("left", "right", "rear", stereo=(("left", "right"),), policy="exact", patience=60.0)
    for stamp in range(3 * ROOM):
        bench.image(stamp, "rear")
        bench.mask(stamp, "left")
        bench.image(stamp, "left")
    assert sum(camera == "rear" for camera, _ in bench.dropped) == 2 * ROOM
    assert sum(camera == "left" for camera, _ in bench.dropped) == 2 * ROOM
    bench.intake.clear()
    assert len(bench.dropped) == 6 * ROOM and not bench.passed


def test_partners_come_together_whoever_is_first_and_others_do_not_wait() -> None:
    bench = Bench("left", "right", "rear", stereo=(("left", "right"),))
    bench.image(0, "left")
    bench.image(1, "rear")
    bench.image(3, "right")
    bench.image(33, "right")
    bench.image(38, "left")
    assert bench.passed == [
        {"rear": (1, None)},
        {"left": (0, None), "right": (3, None)},
        {"left": (38, None), "right": (33, None)},
    ]
    assert not bench.dropped


def test_an_image_without_a_partner_is_dropped_with_the_distance_to_the_nearest() -> None:
    bench = Bench("left", "right", stereo=(("left", "right"),))
    bench.image(0, "left")
    bench.image(12, "right")
    assert not bench.dropped
    bench.image(33, "left")
    bench.image(33, "right")
    assert bench.passed == [{"left": (33, None), "right": (33, None)}]
    assert sorted(bench.dropped) == [("left", 0), ("right", 12)]
    assert "right within 0.005 s of that of left, found the nearest is 0.0120 s away" in bench.reasons[0]
    assert "sync_tolerance" in bench.reasons[0]
    bench.image(66, "left")
    bench.wait(PARTNER_PATIENCE)
    assert bench.dropped[-1] == ("left", 66) and "none waits" in bench.reasons[-1]


def test_masks_come_before_partners() -> None:
    bench = Bench("left", "right", stereo=(("left", "right"),), policy="exact")
    for camera in ("left", "right"):
        bench.image(0, camera)
    bench.mask(0, "left")
    assert not bench.passed
    bench.mask(0, "right")
    assert bench.passed == [{"left": (0, 0), "right": (0, 0)}]


def test_a_recording_that_starts_again_drops_the_images_that_wait() -> None:
    bench = Bench("left", "right", stereo=(("left", "right"),))
    bench.image(5000, "left")
    bench.image(0, "left")
    bench.image(0, "right")
    assert bench.dropped == [("left", 5000)] and bench.passed == [{"left": (0, None), "right": (0, None)}]


def test_cameras_that_are_connected_are_one_group() -> None:
    assert groups("abcde", [("d", "b"), ("e", "d")]) == [("a",), ("b", "d", "e"), ("c",)]
    assert groups(("camera",), []) == [("camera",)]


def test_mask_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    with pytest.raises(ConfigError, match="found no file"):
        read_mask(path)
    path.write_text("not a picture")
    with pytest.raises(ConfigError, match="cannot read"):
        read_mask(path)
    cv2.imwrite(str(path), np.zeros((4, 6), np.uint8))
    with pytest.raises(ConfigError, match="all of the image"):
        read_mask(path)
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, 2:] = (0, 90, 1)
    cv2.imwrite(str(path), pixels)
    mask = read_mask(path)
    assert mask.dtype == bool and mask.tolist() == [[False, False, True, True, True, True]] * 4


def mask_message(pixels: np.ndarray, encoding: str = "mono8") -> SimpleNamespace:
    height, width = pixels.shape[:2]
    data = np.ascontiguousarray(pixels)
    step = data.nbytes // height
    fields = {"height": height, "width": width, "encoding": encoding, "step": step, "is_bigendian": 0}
    return message(0, data=data.tobytes(), **fields)


def test_masks_of_file_and_topic_are_combined_and_made_once() -> None:
    complaints: list[str] = []
    static = np.ones((4, 6), bool)
    static[0] = False
    moving = np.full((4, 6), 7, np.uint8)
    moving[:, 0] = 0
    masks = Masks(static, complaints.append)
    assert masks(None, (6, 4)) is static and masks.share == pytest.approx(1 / 4)
    topic = mask_message(moving)
    both = masks(topic, (6, 4))
    assert both is not None and (both == (static & (moving > 0))).all() and masks.share == pytest.approx(1 - 15 / 24)
    assert masks(topic, (6, 4)) is both
    alone = Masks(None, complaints.append)
    assert alone(None, (6, 4)) is None and np.isnan(alone.share)
    assert (alone(topic, (6, 4)) == (moving > 0)).all()
    assert not complaints


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        (
            mask_message(np.ones((5, 6), np.uint8)),
            "the mask on its topic to have the size of the image, 6x4, found 6x5",
        ),
        (mask_message(np.ones((4, 6, 3), np.uint8), "rgb8"), "one channel"),
        (mask_message(np.ones((4, 6), np.uint8), "mosaic"), "mosaic"),
    ],
)
def test_a_mask_that_cannot_be_used_is_left_out_with_a_complaint(topic: Any, words: str) -> None:
    complaints: list[str] = []
    masks = Masks(np.eye(4, 6) > 0, complaints.append)
    assert masks(topic, (6, 4)) is masks.static
    masks(topic, (6, 4))
    assert len(complaints) == 1, "told once for each mask"
    assert complaints[0].startswith("mask not used: ") and words in complaints[0]
    assert masks.refused == complaints[0]
    assert masks(None, (12, 8)) is None and "the mask file" in complaints[-1]
    assert masks(None, (6, 4)) is masks.static and not masks.refused, "usable again"


# -- calibrations ------------------------------------------------------------------------------------------------------


def test_first_images_wait_for_the_calibration_that_somebody_publishes() -> None:
    bench = Bench()
    bench.image(0, calibrated=True)
    bench.image(30, calibrated=True)
    assert not bench.passed
    bench.info(0)
    bench.image(60, calibrated=True)
    bench.info(90)
    bench.image(90, calibrated=True)
    assert [frames["camera"][0] for frames in bench.passed] == [0, 30, 60, 90]
    assert bench.infos == [0, 0, 0, 90]


def test_images_without_a_publisher_of_calibrations_do_not_wait() -> None:
    bench = Bench()
    bench.image(0)
    assert bench.infos == [None]
    bench.info(10)
    bench.image(30)
    assert bench.infos == [None, 10]


def test_a_publisher_of_calibrations_that_stays_silent_delays_the_first_images_only() -> None:
    bench = Bench()
    bench.image(0, calibrated=True)
    bench.wait(INFO_PATIENCE - 0.01)
    assert not bench.passed
    bench.wait(0.02)
    bench.image(600, calibrated=True)
    assert bench.infos == [None, None] and not bench.dropped


def test_images_that_wait_for_a_calibration_are_bounded_and_keep_their_order() -> None:
    bench = Bench()
    for stamp in range(ROOM + 1):
        bench.image(stamp, calibrated=True)
    assert [frames["camera"][0] for frames in bench.passed] == list(range(ROOM + 1))


def test_the_calibration_outlives_a_pause_and_not_the_configuration() -> None:
    bench = Bench()
    bench.info(0)
    bench.intake.clear()
    bench.image(10, calibrated=True)
    assert bench.infos == [0]
    bench.intake.forget_calibrations()
    bench.image(20, calibrated=True)
    assert bench.infos == [0]
    bench.intake.clear()
    assert bench.infos == [0, None]


def test_both_images_of_a_pair_have_their_calibrations_from_the_first_on() -> None:
    bench = Bench("left", "right", stereo=(("left", "right"),))
    bench.image(0, "left", calibrated=True)
    bench.image(0, "right", calibrated=True)
    bench.info(0, "left")
    assert not bench.passed
    bench.info(0, "right")
    assert bench.infos == [0, 0]
