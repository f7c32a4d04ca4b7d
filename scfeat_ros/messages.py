"""The results of the front end to messages and back.

Arrays cross as ``array.array`` filled from numpy memory: one memcpy, where a list costs a Python object per number.
The way back gives views of the message's memory. Headers are passed on as they are, never rebuilt. Whoever only
receives messages need not have torch.
"""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
from builtin_interfaces.msg import Time
from scfeat.msg import Features as FeaturesMessage
from scfeat.msg import Matches as MatchesMessage
from scfeat.msg import Tracks as TracksMessage
from scfeat.msg import TwoViewGeometry as GeometryMessage
from std_msgs.msg import Header

from scfeat_core.errors import ConfigError, DataError
from scfeat_core.types import (
    Features,
    FrameResult,
    GeometryModel,
    Matches,
    MatchKind,
    PairResult,
    Tracks,
    TwoViewGeometry,
)

DESCRIPTOR_TYPES = {
    "float32": FeaturesMessage.FLOAT32,
    "float16": FeaturesMessage.FLOAT16,
    "int8": FeaturesMessage.INT8,
}
Member = TypeVar("Member", bound=IntEnum)
_SERIAL = 32_000  # values, fewer than torch gives to more than one thread (at::internal::GRAIN_SIZE)
_WIRE_DTYPES: dict[int, np.dtype[Any]] = {
    FeaturesMessage.FLOAT32: np.dtype("<f4"),
    FeaturesMessage.FLOAT16: np.dtype("<f2"),
    FeaturesMessage.INT8: np.dtype("i1"),
}


def features_to_message(
    result: FrameResult, header: Header, descriptor_type: str = "float16", rectified: bool = False
) -> FeaturesMessage:
    """The features of a frame. header: of its image. descriptor_type: float32, float16, int8, or none (not sent).

    With tracks in the result, ``track_ids`` says which keypoint belongs to which; without, it stays empty.
    """
    features = result.features.numpy()
    message = FeaturesMessage(header=header, camera=result.camera, sequence=result.sequence, rectified=rectified)
    message.image_width, message.image_height = features.image_size
    message.keypoints = _pack("f", features.keypoints, np.float32)
    message.scores = _pack("f", features.scores, np.float32)
    if result.tracks is not None:
        message.track_ids = _pack("I", _track_ids(result.tracks, len(features)), np.uint32)
    message.descriptor_scale = 1.0
    if descriptor_type != "none":
        _set_descriptors(message, features, descriptor_type)
    return message


def features_from_message(message: FeaturesMessage) -> Features:
    """Views of the message where its type is float32; descriptors (N, D) float32, (N, 0) where they were not sent.

    Scores are 0 where they were not sent. Raises DataError where the arrays do not fit together.
    """
    count = len(message.keypoints) // 2
    _check_lengths("coordinates", 2 * count, message.keypoints)
    _check_lengths("scores or none", count, *filter(len, (message.scores,)))
    return Features(
        keypoints=_points(message.keypoints),
        scores=_unpack(message.scores, np.float32) if len(message.scores) else np.zeros(count, np.float32),
        descriptors=_descriptors(message, count),
        image_size=(message.image_width, message.image_height),
        descriptor_space=message.descriptor_space,
    )


def matches_to_message(pair: PairResult, result: FrameResult, header: Header, frame_id0: str) -> MatchesMessage:
    """Matches to the previous frame of the same camera or to that of another camera, and their geometry.

    pair: its view 1 is the frame of ``result``, whose image has this header. frame_id0: optical frame of view 0.
    """
    message = MatchesMessage(header=header, stamp0=stamp_from_nanoseconds(pair.stamp0), frame_id0=frame_id0)
    message.kind = int(pair.kind)
    message.camera0, message.camera1 = pair.camera0 or result.camera, result.camera
    message.sequence0, message.sequence1 = pair.sequence0, result.sequence
    message.indices0 = _pack("I", pair.matches.indices0, np.uint32)
    message.indices1 = _pack("I", pair.matches.indices1, np.uint32)
    message.keypoints0 = _pack("f", pair.keypoints0, np.float32)
    message.keypoints1 = _pack("f", pair.keypoints1, np.float32)
    message.scores = _pack("f", pair.matches.scores, np.float32)
    if pair.geometry is not None:
        message.inliers = _pack("B", pair.geometry.inliers, np.uint8)
        message.geometry = geometry_to_message(pair.geometry)
    return message


def matches_from_message(message: MatchesMessage) -> PairResult:
    """What ``matches_to_message`` was given; ``geometry`` is None where nothing was verified.

    Raises DataError where the arrays differ in length, or name what this version does not know.
    """
    _check_lengths("matches", len(message.indices0), message.indices1, message.scores)
    _check_lengths("coordinates", 2 * len(message.indices0), message.keypoints0, message.keypoints1)
    _check_lengths("inliers or none", len(message.indices0), *filter(len, (message.inliers,)))
    verified = len(message.inliers) > 0 or message.geometry.model != GeometryMessage.NONE
    return PairResult(
        sequence0=message.sequence0,
        stamp0=nanoseconds(message.stamp0),
        matches=Matches(
            _unpack(message.indices0, np.uint32).astype(np.int64),
            _unpack(message.indices1, np.uint32).astype(np.int64),
            _unpack(message.scores, np.float32),
        ),
        keypoints0=_points(message.keypoints0),
        keypoints1=_points(message.keypoints1),
        geometry=geometry_from_message(message.geometry, message.inliers) if verified else None,
        kind=_member(MatchKind, message.kind),
        camera0=message.camera0,
    )


def tracks_to_message(result: FrameResult, header: Header, session: str) -> TracksMessage:
    """The tracks of a frame. header: of its image. session: another one on each start. Needs ``result.tracks``.

    Where ids begin at 1 again, ``session`` has the number of that epoch behind it.
    """
    tracks = result.tracks
    assert tracks is not None, "a frame without tracks has none to send"
    message = TracksMessage(header=header, camera=result.camera, sequence=result.sequence)
    message.session = f"{session}.{tracks.epoch}" if tracks.epoch else session
    message.ids = _pack("I", tracks.ids, np.uint32)
    message.ages = _pack("I", tracks.ages, np.uint32)
    message.keypoints = _pack("f", tracks.keypoints, np.float32)
    if tracks.rays is not None:
        message.rays = _pack("f", tracks.rays, np.float32)
    if tracks.velocities is not None:
        message.velocities = _pack("f", tracks.velocities, np.float32)
    message.flags = _pack("B", tracks.flags, np.uint8)
    message.lost_ids = _pack("I", tracks.lost_ids, np.uint32)
    return message


def tracks_from_message(message: TracksMessage) -> Tracks:
    """What ``tracks_to_message`` was given, as views of the message.

    Except for ``indices``, which are -1: they are not sent, ``Features.track_ids`` of the same stamp says the same; and
    for ``epoch``, which is part of ``session``.
    rays and velocities are None where they were not sent, and where there are no tracks at all. Raises DataError where
    the arrays differ in length.
    """
    count = len(message.ids)
    _check_lengths("tracks", count, message.ages, message.flags)
    _check_lengths("coordinates", 2 * count, message.keypoints)
    _check_lengths("coordinates or none", 2 * count, *filter(len, (message.rays, message.velocities)))
    return Tracks(
        ids=_unpack(message.ids, np.uint32),
        ages=_unpack(message.ages, np.uint32),
        indices=np.full(count, -1, np.int64),
        keypoints=_points(message.keypoints),
        rays=_points(message.rays) if len(message.rays) else None,
        velocities=_points(message.velocities) if len(message.velocities) else None,
        flags=_unpack(message.flags, np.uint8),
        lost_ids=_unpack(message.lost_ids, np.uint32),
    )


def geometry_to_message(geometry: TwoViewGeometry) -> GeometryMessage:
    return GeometryMessage(
        model=int(geometry.model),
        matrix=np.asarray(geometry.matrix, np.float64).reshape(9),
        threshold=float(geometry.threshold),
        num_inliers=geometry.num_inliers,
    )


def geometry_from_message(message: GeometryMessage, inliers: Any) -> TwoViewGeometry:
    """inliers: the field of that name of the Matches message."""
    matrix = np.array(message.matrix, np.float64).reshape(3, 3)
    mask = _unpack(inliers, np.uint8).astype(bool)
    return TwoViewGeometry(_member(GeometryModel, message.model), matrix, mask, message.threshold)


def nanoseconds(stamp: Time) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def stamp_from_nanoseconds(value: int) -> Time:
    return Time(sec=value // 1_000_000_000, nanosec=value % 1_000_000_000)


def _pack(typecode: str, values: np.ndarray, dtype: type) -> array:
    packed = array(typecode)
    packed.frombytes(np.ascontiguousarray(values, dtype).reshape(-1).view(np.uint8).data)
    return packed


def _track_ids(tracks: Tracks, count: int) -> np.ndarray:
    """(count,) uint32, one for each keypoint, 0 where it belongs to no track."""
    ids = np.zeros(count, np.uint32)
    ids[tracks.indices] = tracks.ids
    return ids


def _check_lengths(what: str, expected: int, *arrays: Any) -> None:
    found = [len(values) for values in arrays]
    if any(length != expected for length in found):
        raise DataError(
            f"expected parallel arrays of {expected} {what}, found lengths of {found}: "
            "sender and receiver use different versions of scfeat"
        )


def _member(kind: type[Member], value: int) -> Member:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{int(member)} ({member.name})" for member in kind)
        raise DataError(
            f"expected a {kind.__name__} of {known}, found {value}: "
            "sender and receiver use different versions of scfeat"
        ) from None


def _unpack(values: Any, dtype: Any) -> np.ndarray:
    return np.frombuffer(values, dtype) if len(values) else np.empty(0, dtype)


def _points(values: Any) -> np.ndarray:
    """(N, 2) float32 view."""
    return _unpack(values, np.float32).reshape(-1, 2)


def _set_descriptors(message: FeaturesMessage, features: Features, descriptor_type: str) -> None:
    if descriptor_type not in DESCRIPTOR_TYPES:
        raise ConfigError(
            f"expected a descriptor type of {', '.join(DESCRIPTOR_TYPES)} or none; found {descriptor_type!r}"
        )
    message.descriptor_type = DESCRIPTOR_TYPES[descriptor_type]
    message.descriptor_dim = features.descriptors.shape[1]
    message.descriptor_space = features.descriptor_space
    values, message.descriptor_scale = _encode(features.descriptors, descriptor_type)
    message.descriptors = _pack("B", values.reshape(-1).view(np.uint8), np.uint8)


def _encode(descriptors: np.ndarray, descriptor_type: str) -> tuple[np.ndarray, float]:
    """(N, D) float32 as wire type, and the scale to multiply that with."""
    descriptors = np.ascontiguousarray(descriptors, np.float32)
    if descriptor_type == "float16":
        return _half(descriptors), 1.0
    if descriptor_type == "int8":
        scale = float(np.abs(descriptors).max(initial=0.0)) / 127 or 1.0
        return np.rint(descriptors * (1 / scale)).astype(np.int8), scale
    return descriptors, 1.0


def _half(values: np.ndarray) -> np.ndarray:
    """float32 to float16, of any shape.

    numpy casts to half precision one value at a time, torch with vector instructions: 0.06 against 0.8 ms for 2048 x
    128 values. In parts, as torch would wake its threads for more, which then wait for the next work in a busy loop:
    2.5 ms of processor time for what one thread does in no time.
    """
    import torch  # whoever sends features has it

    given = torch.from_numpy(values).reshape(-1)
    packed = torch.empty(given.shape, dtype=torch.half)
    for start in range(0, len(given), _SERIAL):
        packed[start : start + _SERIAL].copy_(given[start : start + _SERIAL])
    return packed.numpy().reshape(values.shape)


def _descriptors(message: FeaturesMessage, count: int) -> np.ndarray:
    """(N, D) float32, unit rows up to the precision of the wire type."""
    if message.descriptor_dim == 0 or count == 0:
        return np.empty((count, message.descriptor_dim), np.float32)
    dtype = _WIRE_DTYPES.get(message.descriptor_type)
    if dtype is None or len(message.descriptors) != count * message.descriptor_dim * dtype.itemsize:
        raise DataError(
            f"expected {count} descriptors of {message.descriptor_dim} values, found {len(message.descriptors)} bytes "
            f"of descriptor_type {message.descriptor_type}: sender and receiver use different versions of scfeat"
        )
    values = _unpack(message.descriptors, dtype).reshape(count, message.descriptor_dim)
    if message.descriptor_type == FeaturesMessage.FLOAT16:
        return values.astype(np.float32)
    return values * np.float32(message.descriptor_scale) if message.descriptor_type == FeaturesMessage.INT8 else values
