"""Where the ground truth of a replay comes from, and whether its clock is that of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scfeat_core.errors import DataError
from scfeat_core.replay.records import GroundTruth
from scfeat_ros.bags import Bag, Topic, header_stamp
from scfeat_ros.ground_truth import POSE_TYPES, pose_topics, read_ground_truth, truth_from_topic
from scfeat_ros.intrinsics import read_body_camera

from .job import NO_TRUTH, ReplayJob

_FILE = "groundtruth.txt"  # looked for beside the bag
_NAMES = ("ground_truth", "groundtruth")  # of topics
_FROM_ZERO = 86_400_000_000_000  # nanoseconds: a clock that says less counts from the beginning of a recording
_LEAST = 0.1  # share of the images that must be within the time of the poses
_NEAR = 10_000_000  # nanoseconds: the pose of an image may be that much older or newer
_SLACK, _ALIKE = 1_000_000_000, 0.1  # nanoseconds, or share, by which poses may last longer or shorter than the images


@dataclass(frozen=True, eq=False)
class FoundTruth:
    """truth: None where there is none, or none that fits. problem: why one that was found is left out."""

    truth: GroundTruth | None = None
    problem: str = ""


def find_truth(job: ReplayJob, bag: Bag, images: Topic, warn: Callable[[str], None]) -> FoundTruth:
    """The poses that a job names; without a name, those of a file beside the bag or of a topic that is called so, the
    first of them that is of the time of the images.

    Poses that count from 0, as data sets have them, are moved so that the first is that of the first image, and
    ``warn`` is told; the beginning of the images must not be missing, and the poses must last as long as they do, or
    longer where the end of these is missing. Raises DataError where what is named cannot be read, or is of another
    recording; what is only found there is left out then, and ``warn`` is told why.
    """
    if job.ground_truth == NO_TRUTH:
        return FoundTruth()
    truth, problems = _first_fitting(job, bag, images, warn)
    if problems and job.ground_truth is not None:
        raise problems[0]
    problems += [] if truth is not None else list(_lost(bag))
    reasons = [str(problem).replace(f"{job.bag.parent}/", "") for problem in problems]
    for reason in reasons:
        warn(f"ground truth left out: {reason}")
    return FoundTruth(truth, " ".join(reasons) if truth is None else "")


def _first_fitting(
    job: ReplayJob, bag: Bag, images: Topic, warn: Callable[[str], None]
) -> tuple[GroundTruth | None, list[DataError]]:
    """None where there is none, or none that fits; and why those that are left out are."""
    body = _body_camera(job)
    found: list[GroundTruth] = []
    problems: list[DataError] = []
    for name in _names(job, bag):
        try:
            found.append(_read(name, bag, body, warn))
        except DataError as error:
            problems.append(error)
    first = next(_stamps(bag, images), None) if found else None
    for truth in sorted(found, key=lambda truth: _is_of_another_clock(truth, first)):
        try:
            return _fitting(truth, first, job, bag, images, warn), problems
        except DataError as error:
            problems.append(error)
    return None, problems


def _is_of_another_clock(truth: GroundTruth, first: int | None) -> bool:
    """Whether one of poses and images counts from 0, and the other does not. first: stamp of the first image."""
    return first is not None and bool((truth.stamps[0] < _FROM_ZERO) != (first < _FROM_ZERO))


def _fitting(
    truth: GroundTruth, first: int | None, job: ReplayJob, bag: Bag, images: Topic, warn: Callable[[str], None]
) -> GroundTruth:
    """The poses by the clock of the images. Raises DataError where they are those of another recording."""
    if first is None:
        return truth
    if _is_of_another_clock(truth, first):
        moved = _moved(truth, bag, images)
        warn(
            f"ground truth of {truth.source} has another clock than the images ({1e-9 * truth.stamps[0]:.1f} s and "
            f"{1e-9 * first:.1f} s): its first pose is taken to be that of the first image"
        )
        return moved
    _check_overlap(truth, job, bag, images)
    return truth


def _moved(truth: GroundTruth, bag: Bag, images: Topic) -> GroundTruth:
    """With the first pose at the first image. Raises DataError where that cannot be where it belongs."""
    stamps = list(_stamps(bag, images))
    if bag.lacks_beginning(images):
        raise DataError(
            f"expected images from the beginning of the recording on, as {truth.source} has another clock than they "
            "have, and its first pose would be taken to be that of the first of them, found their beginning missing "
            "or damaged. Give poses with the stamps of the images (--ground-truth FILE or TOPIC), or none "
            "(--ground-truth none)"
        )
    lasts, expected = int(truth.stamps[-1] - truth.stamps[0]), max(stamps) - min(stamps)
    slack = max(_SLACK, _ALIKE * expected)
    if expected - lasts > slack or (lasts - expected > slack and not bag.lacks_end):
        raise DataError(
            f"expected ground truth that lasts as long as the images, {1e-9 * expected:.1f} s, as it has another clock "
            f"than they have, found {1e-9 * lasts:.1f} s in {truth.source}: is it that of another recording? {_ADVICE}"
        )
    return replace(truth, stamps=truth.stamps - truth.stamps[0] + min(stamps))


def _check_overlap(truth: GroundTruth, job: ReplayJob, bag: Bag, images: Topic) -> None:
    """Raises DataError where hardly any image is of the time of the poses. Reads on only until it is known."""
    begin, end = int(truth.stamps[0]) - _NEAR, int(truth.stamps[-1]) + _NEAR
    enough = _LEAST * min(images.count, job.frames or images.count)
    count = inside = 0
    low = high = None
    for stamp in _stamps(bag, images, job):
        count, inside = count + 1, inside + (begin <= stamp <= end)
        low, high = min(stamp, low or stamp), max(stamp, high or stamp)
        if inside >= enough:
            return
    if low is None or high is None or inside >= _LEAST * count:
        return
    raise DataError(
        f"expected ground truth of the time of the images, {1e-9 * low:.3f} to {1e-9 * high:.3f} s, found "
        f"{truth.source} from {1e-9 * truth.stamps[0]:.3f} to {1e-9 * truth.stamps[-1]:.3f} s, and in that time "
        f"{inside} of {count} images: is it that of another recording? {_ADVICE}"
    )


_ADVICE = "Give that of this one (--ground-truth FILE or TOPIC), or none (--ground-truth none)"


def _stamps(bag: Bag, images: Topic, job: ReplayJob | None = None) -> Iterator[int]:
    """Of the images, or those that a job wants, whose header can be read, nanoseconds."""
    window: tuple[int, float] | None = None
    given = 0
    for message in bag.messages([images]):
        if job is not None:
            window = window or job.window(message.log_time)
            if message.log_time < window[0]:
                continue
            if message.log_time >= window[1] or given == (job.frames or -1):
                return
            given += 1
        with suppress(DataError):
            yield header_stamp(message.data)


def _lost(bag: Bag) -> Iterator[DataError]:
    """Of the topics that would have been found, and of which nothing can be read."""
    for topic in bag.lost_topics:
        if topic.type in POSE_TYPES and _is_named_so(topic):
            yield DataError(
                f"expected {topic.count} messages on {topic.name}, as metadata.yaml says, found none that can be read"
            )


def _is_named_so(topic: Topic) -> bool:
    return any(word in topic.name.lower() for word in _NAMES)


def _names(job: ReplayJob, bag: Bag) -> list[str]:
    if job.ground_truth is not None:
        return [job.ground_truth]
    beside = (job.bag if job.bag.is_dir() else job.bag.parent) / _FILE
    named = [topic.name for topic in pose_topics(bag) if _is_named_so(topic)]
    return [*([str(beside)] if beside.is_file() else []), *named[:1]]


def _read(name: str, bag: Bag, body: np.ndarray | None, warn: Callable[[str], None]) -> GroundTruth:
    if not Path(name).exists() and any(topic.name == name for topic in bag.topics):
        return truth_from_topic(bag, name, body, warn)
    return read_ground_truth(name, T_body_camera=body)


def _body_camera(job: ReplayJob) -> np.ndarray | None:
    if not job.truth_of_body:
        return None
    found = None if job.intrinsics is None else read_body_camera(job.intrinsics)
    if found is None:
        raise DataError(
            "expected a file of intrinsics that says where the camera is on the body (T_cam_imu of Kalibr, T_BS of "
            "EuRoC) for ground truth of the body, found none: give one with --intrinsics"
        )
    return found
