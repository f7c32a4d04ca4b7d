"""Features for rtabmap: fills the local features of ``rtabmap_msgs/RGBDImage``.

rtabmap wants colour, depth (or the right image) and features in one message. Its own rgbd_sync or stereo_sync brings
the images together; this node adds what scfeat found in the colour (left) image of the same stamp. rtabmap takes such
features for its map and for loop closures; its odometry nodes extract their own whatever the message holds.

rtabmap_msgs is needed by the node only.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from scfeat.msg import Features as FeaturesMessage

from scfeat_core.errors import ConfigError, DataError, FeatureError
from scfeat_core.types import Features

from ..messages import features_from_message, nanoseconds
from .joining import Join
from .process import RELIABLE, run

KEYPOINT_SIZE = 8.0  # pixels, diameter: an OpenCV keypoint must have one, SCFeat is trained at a single scale
CV_TYPES = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "int32": 4, "float32": 5, "float64": 6}
_TRAILER = struct.Struct("<3i")  # rows, columns, type; rtabmap writes the byte order of the host, which is this one


def compress(matrix: np.ndarray, level: int = 0) -> bytes:
    """A matrix (rows, columns) as rtabmap packs a cv::Mat: zlib, then int32 rows, columns and OpenCV type.

    level: of zlib, 0 to 9. 0 only packs: descriptors hardly compress (1024 x 128 that were float16: 0.2 ms, against
    11 ms of level 1 for 37 % less), and an RGBDImage is megabytes anyway. Raises FeatureError for a type that OpenCV
    has not.
    """
    if matrix.ndim != 2 or matrix.dtype.name not in CV_TYPES:
        raise FeatureError(
            f"expected a matrix of {', '.join(CV_TYPES)}, found shape {matrix.shape} of {matrix.dtype.name}: cast it"
        )
    payload = zlib.compress(np.ascontiguousarray(matrix).data if matrix.size else b"", level)
    return payload + _TRAILER.pack(*matrix.shape, CV_TYPES[matrix.dtype.name])


def uncompress(data: bytes) -> np.ndarray:
    """The inverse of :func:`compress`. Raises DataError where the data is not such a matrix."""
    names = {number: name for name, number in CV_TYPES.items()}
    try:
        rows, columns, kind = _TRAILER.unpack_from(data, len(data) - _TRAILER.size)
        return np.frombuffer(zlib.decompress(data[: -_TRAILER.size]), names[kind]).reshape(rows, columns)
    except (struct.error, zlib.error, KeyError, ValueError) as error:
        raise DataError(
            f"expected zlib data and 3 int32 (rows, columns, OpenCV type), found {len(data)} bytes: {error}; check "
            "that they come from rtabmap's compression and are whole"
        ) from error


@dataclass(frozen=True, eq=False)
class LocalFeatures:
    """The fields of RGBDImage that scfeat fills. keypoints: (N, 2) float32 pixels; (0, 0) is the centre of the top-left
    pixel, as in OpenCV. scores: (N,) float32, their response. descriptors: packed (N, D) float32.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    descriptors: bytes


def local_features(features: Features) -> LocalFeatures:
    """Raises FeatureError where there are keypoints without descriptors: rtabmap would extract its own instead."""
    if len(features) and features.descriptors.shape[1] == 0:
        raise FeatureError(
            "expected features with descriptors, found them without: set descriptor_type of the front end to float16"
        )
    descriptors = np.ascontiguousarray(features.descriptors, np.float32)
    return LocalFeatures(features.keypoints, features.scores, compress(descriptors) if len(features) else b"")


def fill(image: Any, features: LocalFeatures) -> Any:
    """The rtabmap_msgs/RGBDImage with these local features in place of any that it had; changed in place."""
    from rtabmap_msgs.msg import KeyPoint, Point2f

    # One object a point is what the type asks for.
    image.key_points = [
        KeyPoint(pt=Point2f(x=x, y=y), size=KEYPOINT_SIZE, angle=-1.0, response=score, octave=0, class_id=-1)
        for (x, y), score in zip(features.keypoints.astype(float), features.scores.astype(float), strict=True)
    ]
    image.points = []  # rtabmap takes them from the depth
    image.descriptors = array("B", features.descriptors)
    return image


def colour_stamp(image: Any) -> int:
    """Nanoseconds, of the colour (left) image of an RGBDImage, whose own stamp may be that of the depth."""
    colour = image.rgb if len(image.rgb.data) else image.rgb_compressed
    return nanoseconds(colour.header.stamp)


def check_size(image: Any, features: Features) -> None:
    """Raises FeatureError where the features are those of an image of another size."""
    size = image.rgb.width, image.rgb.height
    if size not in ((0, 0), tuple(features.image_size)):  # a compressed image does not say its size
        raise FeatureError(
            f"expected features of images of {size[0]}x{size[1]}, as in the RGBDImage, found "
            f"those of {features.image_size[0]}x{features.image_size[1]}: give scfeat the colour image that rgbd_sync "
            "takes, and leave its parameter 'decimation' at 1"
        )


class RtabmapAdapter(Node):
    """Joins ``rgbd_image`` and ``scfeat/features`` by the stamp of the colour image into ``~/rgbd_image``."""

    def __init__(self, **arguments: Any) -> None:
        """Raises ConfigError where rtabmap's messages are not installed."""
        kind = _message_type()
        super().__init__("rtabmap_adapter", **arguments)
        self._join = Join(2)
        self._images = self._endpoint(self.create_publisher, kind, "~/rgbd_image")
        self._endpoint(self.create_subscription, kind, "rgbd_image", self._on_image)
        self._endpoint(self.create_subscription, FeaturesMessage, "scfeat/features", self._on_features)

    def _endpoint(self, create: Any, kind: Any, topic: str, *callback: Any) -> Any:
        overrides = QoSOverridingOptions.with_default_policies()
        endpoint = create(kind, topic, *callback, RELIABLE, qos_overriding_options=overrides)
        self.get_logger().info(f"{'subscribed to' if callback else 'publishing on'} {endpoint.topic_name}")
        return endpoint

    def _on_image(self, message: Any) -> None:
        self._send(self._join.add(0, colour_stamp(message), message))

    def _on_features(self, message: FeaturesMessage) -> None:
        self._send(self._join.add(1, nanoseconds(message.header.stamp), message))

    def _send(self, pair: tuple[Any, FeaturesMessage] | None) -> None:
        if pair is None:
            self._say_unmatched()
            return
        image, message = pair
        try:
            features = features_from_message(message)
            check_size(image, features)
            self._images.publish(fill(image, local_features(features)))
        except (FeatureError, DataError) as error:
            self.get_logger().warning(f"frame dropped: {error}", throttle_duration_sec=5.0)

    def _say_unmatched(self) -> None:
        if self._join.unmatched:
            self.get_logger().info(
                f"{self._join.unmatched} images or features so far had no partner with the stamp of the colour image: "
                "frames that scfeat dropped, or two different image topics",
                throttle_duration_sec=30.0,
            )


def _message_type() -> Any:
    try:
        from rtabmap_msgs.msg import RGBDImage
    except ImportError as error:
        raise ConfigError(
            "expected the messages of rtabmap, found no Python module rtabmap_msgs: "
            "sudo apt install ros-$ROS_DISTRO-rtabmap-msgs, and source the workspace again"
        ) from error
    return RGBDImage


def main(args: list[str] | None = None) -> int:
    """Run the adapter until SIGINT or SIGTERM; the exit status."""
    return run("rtabmap_adapter", RtabmapAdapter, args)


if __name__ == "__main__":
    sys.exit(main())
