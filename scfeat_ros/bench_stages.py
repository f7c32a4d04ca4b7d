"""What the node does with results after the front end, for ``scfeat bench``: messages, and their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rclpy.serialization import serialize_message
from std_msgs.msg import Header

from scfeat_core.types import FrameResult

from .messages import features_to_message, matches_to_message, tracks_to_message


def to_messages(results: Sequence[FrameResult]) -> list[Any]:
    """All that the node publishes of frames that somebody listens to: features (float16), matches, tracks."""
    header = Header(frame_id="camera_optical_frame")
    messages: list[Any] = []
    for result in results:
        messages.append(features_to_message(result, header))
        if result.pair is not None:
            messages.append(matches_to_message(result.pair, result, header, header.frame_id))
        if result.tracks is not None:
            messages.append(tracks_to_message(result, header, "bench"))
    return messages


def serialise(messages: Sequence[Any]) -> int:
    """Their bytes on the wire, made and counted."""
    return sum(len(serialize_message(message)) for message in messages)
