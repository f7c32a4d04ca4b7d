"""Where the ground truth of a replay comes from, and whether its clock is that of the images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from scfeat_core.errors import DataError
from scfeat_core.replay.records import GroundTruth
from scfeat_ros.bags import Bag, Topic, header_stamp
from scfeat_ros.ground_truth import pose_topics, read_ground_truth, truth_from_topic
from scfeat_ros.intrinsics import read_body_camera

from .job import NO_TRUTH, ReplayJob

_FILE = "groundtruth.txt"  # looked for beside the bag
_NAMES = ("ground_truth", "groundtruth")  # of topics
_ANOTHER_CLOCK = 3600 * 1_000_000_000  # nanoseconds between images and poses: recordings are not that far apart


def find_truth(job: ReplayJob, bag: Bag, images: Topic, warn: Callable[[str], None]) -> GroundTruth | None:
    """The poses that a job names; without a name, those of a file beside the bag or of a topic that is called so,
    whichever has the clock of the images. None where there are none.

    Poses of another clock (data sets that count from 0) are moved so that the first is that of the first image, and
    ``warn`` is told. Raises DataError where what is named cannot be read.
    """
    if job.ground_truth == NO_TRUTH:
        return None
    body = _body_camera(job)
    found = [_read(name, bag, body) for name in _names(job, bag)]
    first = _first_stamp(bag, images) if found else 0
    same_clock = [truth for truth in found if not _is_of_another_clock(truth, first)]
    if same_clock or not found:
        return same_clock[0] if same_clock else None
    truth = found[0]
    warn(
        f"ground truth of {truth.source} has another clock than the images ({1e-9 * truth.stamps[0]:.1f} s and "
        f"{1e-9 * first:.1f} s): its first pose is taken to be that of the first image"
    )
    return replace(truth, stamps=truth.stamps - truth.stamps[0] + first)


def _names(job: ReplayJob, bag: Bag) -> list[str]:
    if job.ground_truth is not None:
        return [job.ground_truth]
    beside = (job.bag if job.bag.is_dir() else job.bag.parent) / _FILE
    named = [topic.name for topic in pose_topics(bag) if any(word in topic.name.lower() for word in _NAMES)]
    return [*([str(beside)] if beside.is_file() else []), *named[:1]]


def _read(name: str, bag: Bag, body: np.ndarray | None) -> GroundTruth:
    if not Path(name).exists() and any(topic.name == name for topic in bag.topics):
        return truth_from_topic(bag, name, body)
    return read_ground_truth(name, T_body_camera=body)


def _first_stamp(bag: Bag, images: Topic) -> int:
    """Of the first image whose header can be read, nanoseconds; 0 where none can."""
    for message in bag.messages([images]):
        with suppress(DataError):
            return header_stamp(message.data)
    return 0


def _is_of_another_clock(truth: GroundTruth, first: int) -> bool:
    return bool(truth.stamps[0] - first > _ANOTHER_CLOCK or first - truth.stamps[-1] > _ANOTHER_CLOCK)


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
