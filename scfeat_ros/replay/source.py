"""The images of a bag as the node would get them, one after the other, none left out."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from scfeat_core.errors import CalibrationError, DataError, ImageError, ScfeatError
from scfeat_core.inertial import GyroBuffer
from scfeat_core.replay.truth import DepthAt
from scfeat_core.types import Camera
from scfeat_ros.bags import Bag, BagMessage, Topic, open_bag
from scfeat_ros.calibration import Calibrations, rectified_camera
from scfeat_ros.images import compressed_to_array, image_to_array
from scfeat_ros.intrinsics import read_intrinsics

from .depths import depth_maps, find_depth
from .job import NO_CAMERA_INFO, ReplayJob
from .truths import find_truth

AHEAD = 4  # images that are decoded before they are needed: 30 MB of the largest usual ones
IMU = "sensor_msgs/msg/Imu"
_CAMERA_FILE = "camera_info.yaml"  # looked for beside the bag


@dataclass(frozen=True, eq=False)
class Shot:
    """One image message. index: in its topic, from 0. stamp: nanoseconds, of the header; where that cannot be read, of
    the recording. pixels: (H, W) or (H, W, 3) RGB; None with the reason in ``error``. info: the newest CameraInfo
    message, None without one. read_ms, decode_ms: milliseconds; the first with those of the CameraInfo before it."""

    index: int
    stamp: int
    pixels: np.ndarray | None
    info: Any
    error: str
    read_ms: float
    decode_ms: float


@dataclass(frozen=True, eq=False)
class Lost:
    """What the recording did not give, told when it has been read. damage: in words. frame_ids: of how many images
    each. counts: "messages" of the images, and "bytes"; None where nobody knows how many."""

    damage: list[str] = field(default_factory=list)
    frame_ids: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int | None] = field(default_factory=dict)


class Source:
    """What of a bag is replayed: chosen, but not read yet.

    topic, info_topic: of the images and of their CameraInfo. choice: why that topic, in words. truth: ground truth,
    None without, and then truth_problem says what is wrong with one that was found. depth_topic: of maps of the same
    view, None without. gyro: all angular velocities, where the parameters ask for them. warnings: what is strange about
    it. lost: filled while :meth:`shots` runs. Raises DataError where there are no images, or a file cannot be read.
    """

    def __init__(self, job: ReplayJob) -> None:
        self.job = job
        self.lost = Lost()
        self.warnings: list[str] = []
        with open_bag(job.bag) as bag:
            self.topic, self.choice = bag.choose_image_topic(job.topic)
            wanted = job.camera_info != NO_CAMERA_INFO
            self.info_topic = bag.camera_info_topic(self.topic, job.camera_info) if wanted else None
            found = find_truth(job, bag, self.topic, self.warnings.append)
            self.truth, self.truth_problem = found.truth, found.problem
            self.depth_topic = self._find_depth(bag)
            self.gyro = self._gyro(bag) if job.parameters.use_imu else None
            self._first_info = self._read_first_info(bag)
        self._file = _calibration_file(job, self.info_topic)

    @property
    def count(self) -> int:
        """Images to come at most; those that a start or a stop leaves out are not known before."""
        return min(self.topic.count, self.job.frames or self.topic.count)

    @property
    def calibration(self) -> str:
        """Where the calibration comes from, in words; empty without one."""
        if self._file is not None:
            return self._file.name
        return self.info_topic.name if self.info_topic is not None else ""

    @property
    def calibration_file(self) -> Path | None:
        """That which takes the place of CameraInfo, None where none does."""
        return self._file

    def calibrations(self, complain: Callable[[str], None]) -> Callable[[Shot], Camera | None]:
        """What gives each image its calibration. complain(text): told about one that cannot be used."""
        rectified = self.job.parameters.rectified
        if self._file is not None:
            stored = _FileCalibrations(
                self._file, self.topic.name, rectified, complain, self._file == self.job.intrinsics
            )
            return lambda shot: stored(_size(shot))
        read = Calibrations(complain)
        return lambda shot: read(shot.info, _size(shot), rectified)

    def shots(self, skip: int = 0, decode: Callable[[int], bool] = lambda index: True) -> Iterator[Shot]:
        """The images in the order of the recording, without the first ``skip``.

        decode(index): False leaves the pixels of that image away. Where the bag is damaged, what can be read comes, and
        ``lost`` says the rest.
        """
        info, index, given, end, read = self._first_info, -1, 0, 0.0, 0.0
        stamps: list[int] = []
        with open_bag(self.job.bag) as bag:
            for message, read_ms in self._messages(bag, stamps):
                read += read_ms
                if message.topic != self.topic.name:
                    started = time.perf_counter()
                    info = _try(bag, message) or info
                    read += 1e3 * (time.perf_counter() - started)
                    continue
                index, read_ms, read = index + 1, read, 0.0
                if index == 0:
                    begin, end = self.job.window(message.log_time)
                if message.log_time < begin:
                    continue
                if message.log_time >= end or given == (self.job.frames or -1):
                    return
                given += 1
                shot = self._shot(bag, message, index, info, read_ms, given > skip and decode(index))
                stamps.append(shot.stamp)
                if given > skip:
                    yield shot

    def pictures(self, indices: Collection[int]) -> dict[int, np.ndarray]:
        """The images of these indices, (H, W, 3) uint8 RGB; those that cannot be decoded are left out."""
        wanted, found = set(indices), {}
        for shot in self.shots(decode=wanted.__contains__):
            if shot.index in wanted:
                wanted.remove(shot.index)
                if shot.pixels is not None:
                    found[shot.index] = to_rgb8(shot.pixels)
            if not wanted:
                break
        return found

    @contextmanager
    def depths(self, warn: Callable[[str], None]) -> Iterator[DepthAt | None]:
        """Depth maps by the stamp of an image, which must not go back; None where there are none. warn(text): told
        what of them is damaged."""
        if self.depth_topic is None:
            yield None
            return
        with depth_maps(self.job.bag, self.depth_topic, warn) as depth_at:
            yield depth_at

    # -- choices -------------------------------------------------------------------------------------------------------

    def _find_depth(self, bag: Bag) -> Topic | None:
        """Only poses make something of it."""
        if self.truth is None and self.job.depth is None:
            return None
        return find_depth(bag, self.topic, self.job.depth, self.warnings.append)

    def _gyro(self, bag: Bag) -> GyroBuffer:
        """All of it at once: what an image gets must not depend on how far the reader is ahead."""
        topics = sorted((topic for topic in bag.topics if topic.type == IMU), key=lambda topic: -topic.count)
        if not topics:
            self.warnings.append("use_imu is on, and the bag has no topic of sensor_msgs/Imu: replayed without")
        found: list[tuple[int, np.ndarray]] = []  # as many as there are, whatever an index claims
        damaged = 0
        for message in bag.messages(topics[:1]):
            if (imu := _try(bag, message)) is None:
                damaged += 1
                continue
            rate = imu.angular_velocity
            found.append((_nanoseconds(imu), np.array([rate.x, rate.y, rate.z])))
        gyro = GyroBuffer(capacity=max(2, len(found)))
        for stamp, rates in found:
            gyro.add(stamp, rates)
        if damaged:
            self.warnings.append(f"{damaged} messages on {topics[0].name} are damaged: left out")
        return gyro

    def _read_first_info(self, bag: Bag) -> Any:
        """That of the first images: the node lets them wait for it."""
        if self.info_topic is None:
            return None
        return next((info for message in bag.messages([self.info_topic]) if (info := _try(bag, message))), None)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _messages(self, bag: Bag, stamps: Sequence[int]) -> Iterator[tuple[BagMessage, float]]:
        """Messages of images and CameraInfo, and the milliseconds that each took to read; what is lost is noted.

        stamps: of the images so far, nanoseconds; the caller adds to them.
        """
        messages = bag.messages(filter(None, (self.topic, self.info_topic)))
        try:
            while True:
                started = time.perf_counter()
                if (message := next(messages, None)) is None:
                    break
                yield message, 1e3 * (time.perf_counter() - started)
        except DataError as error:  # nothing further can be read
            self.lost.damage.append(str(error).replace(str(bag.path), bag.path.name))
            self.lost.counts.update(messages=None, bytes=None)
        finally:
            self._note_losses(bag, stamps)

    def _note_losses(self, bag: Bag, stamps: Sequence[int]) -> None:
        """Where nothing counts the messages that are lost, the gaps of the stamps do, unless the end is missing."""
        self.lost.damage.extend([bag.damage] if bag.damage else [])
        lost, missing = bag.lost_messages(self.topic), missing_by_stamps(stamps)
        if lost is None and missing:
            self.lost.damage.append(f"by the gaps between the stamps {missing} images are missing")
        lost = missing if lost is None and not bag.cut_off else lost
        self.lost.counts.setdefault("messages", lost)
        self.lost.counts.setdefault("bytes", bag.lost_bytes)

    def _shot(self, bag: Bag, message: BagMessage, index: int, info: Any, read_ms: float, decode: bool) -> Shot:
        started = time.perf_counter()
        stamp, pixels, error = message.log_time, None, ""
        try:
            image = bag.deserialize(message)
            stamp = _nanoseconds(image)
            self.lost.frame_ids[image.header.frame_id] += 1
            if decode:
                pixels = compressed_to_array(image) if self.topic.compressed else image_to_array(image)
        except (DataError, ImageError) as problem:
            error = str(problem).replace(str(self.job.bag), self.job.bag.name)
        return Shot(index, stamp, pixels, info, error, read_ms, 1e3 * (time.perf_counter() - started))


@contextmanager
def read_ahead(shots: Iterator[Shot], room: int = AHEAD) -> Iterator[Iterator[Shot]]:
    """The same images, read and decoded by a thread of its own while others are processed; at most ``room`` wait."""
    waiting: queue.Queue[Shot | BaseException | None] = queue.Queue(room)
    stopped = threading.Event()

    def put(item: Shot | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for shot in shots:
                put(shot)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised where the images are taken
            put(error)

    thread = threading.Thread(target=read, name="reader", daemon=True)
    thread.start()
    try:
        yield _taken(waiting)
    finally:
        stopped.set()
        thread.join()


def _taken(waiting: queue.Queue[Shot | BaseException | None]) -> Iterator[Shot]:
    while (item := waiting.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


class _FileCalibrations:
    """The calibration in a file, for images of any size. must_fit: it is an error where it cannot be used."""

    def __init__(
        self, path: Path, topic: str, rectified: bool, complain: Callable[[str], None], must_fit: bool
    ) -> None:
        self._path, self._topic, self._rectified = path, topic, rectified
        self._complain, self._must_fit = complain, must_fit
        self._known: dict[tuple[int, int], Camera | None] = {}

    def __call__(self, size: tuple[int, int]) -> Camera | None:
        if size not in self._known:
            self._known[size] = self._read(size)
        return self._known[size]

    def _read(self, size: tuple[int, int]) -> Camera | None:
        try:
            camera = read_intrinsics(self._path, size, topic=self._topic)
            return rectified_camera(camera) if self._rectified else camera
        except (CalibrationError, DataError) as error:
            if self._must_fit and not self._known:
                raise
            self._complain(f"calibration not used: {str(error).replace(str(self._path), self._path.name)}")
            return None


def missing_by_stamps(stamps: Sequence[int]) -> int:
    """How many more there would be without gaps: of about k median steps each has k - 1 in it. stamps: nanoseconds."""
    steps = np.diff(np.sort(np.array(stamps, np.int64)))
    steps = steps[steps > 0]
    return int(np.maximum(np.round(steps / np.median(steps)) - 1, 0).sum()) if len(steps) else 0


def _calibration_file(job: ReplayJob, info_topic: Topic | None) -> Path | None:
    if job.intrinsics is not None or info_topic is not None or job.camera_info == NO_CAMERA_INFO:
        return job.intrinsics
    beside = _beside(job.bag) / _CAMERA_FILE
    return beside if beside.is_file() else None


def _beside(bag: Path) -> Path:
    return bag if bag.is_dir() else bag.parent


def _size(shot: Shot) -> tuple[int, int]:
    assert shot.pixels is not None
    return shot.pixels.shape[1], shot.pixels.shape[0]


def _try(bag: Bag, message: BagMessage) -> Any:
    """The message, None where it is damaged: the one before stays."""
    try:
        return bag.deserialize(message)
    except ScfeatError:
        return None


def _nanoseconds(message: Any) -> int:
    stamp = message.header.stamp
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_rgb8(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB of (H, W) or (H, W, 3), uint8 or uint16."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB) if pixels.ndim == 2 else np.ascontiguousarray(pixels)
