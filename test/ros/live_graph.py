"""A camera driver and a SLAM system in one, which talk to the node in its process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from scfeat.msg import Features, FrontendStatus, Matches, Tracks
from sensor_msgs.msg import CameraInfo, Image

from scfeat_ros.messages import stamp_from_nanoseconds

START = 1_720_000_000_123_456_789
STEP = 33_333_333  # nanoseconds between two images
WIDTH, HEIGHT = 160, 120
PATIENCE = 90.0  # seconds: on a busy machine torch alone takes ten to start; nothing waits longer than it must
DROPPED = ("busy", "stale", "decode", "sync", "no_calibration", "error", "unwanted")


def texture(shift: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W) uint8: blobs of several sizes that move to the left with ``shift``."""
    noise = np.random.default_rng(0).uniform(0, 255, (height, width + 64)).astype(np.float32)
    picture = cv2.GaussianBlur(noise, (0, 0), 2) * 4 + cv2.GaussianBlur(noise, (0, 0), 0.7)
    picture = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    return np.ascontiguousarray(picture[:, shift : shift + width])


def image_message(pixels: np.ndarray, stamp: int) -> Image:
    height, width = pixels.shape[:2]
    message = Image(height=height, width=width, encoding="mono8", step=width)
    message.header.stamp = stamp_from_nanoseconds(stamp)
    message.header.frame_id = "front_optical"
    message.data.frombytes(pixels)
    return message


def calibration(**changes: Any) -> CameraInfo:
    """Of the images of ``texture``, without distortion."""
    info = CameraInfo(width=WIDTH, height=HEIGHT, distortion_model="plumb_bob", d=[0.0] * 5)
    info.k = [120.0, 0.0, 80.0, 0.0, 120.0, 60.0, 0.0, 0.0, 1.0]
    info.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info.p = [120.0, 0.0, 80.0, 0.0, 0.0, 120.0, 60.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for name, value in changes.items():
        setattr(info, name, value)
    return info


class Client:
    """Sends the images of one camera, keeps everything that the node answers.

    camera: its name, where the node has several. image_topic, image_type: where it publishes, and what.
    """

    def __init__(self, ros: Any, camera: str = "", image_topic: str = "image", image_type: Any = Image) -> None:
        self.ros = ros
        self.node = ros.create_node(f"client_{camera}" if camera else "client")
        self.features: list[Features] = []
        self.matches: list[Matches] = []
        self.tracks: list[Tracks] = []
        self.statuses: list[FrontendStatus] = []
        below = f"{camera}/" if camera else ""
        self.outputs = f"scfeat/{below}"
        self.images = self.node.create_publisher(image_type, f"{below}{image_topic}", qos_profile_sensor_data)
        self.calibrations = self.node.create_publisher(CameraInfo, f"{below}camera_info", qos_profile_sensor_data)
        self.masks = self.node.create_publisher(Image, f"{below}mask", 10)
        self.node.create_subscription(Features, f"{self.outputs}features", self.features.append, 100)
        self.node.create_subscription(FrontendStatus, f"{self.outputs}status", self.statuses.append, 100)

    def subscribe_matches(self) -> None:
        """Returns when the node has seen it, too: it matches only for those who listen."""
        self.node.create_subscription(Matches, f"{self.outputs}matches", self.matches.append, 100)
        self._send_until(self.matches, START - 500_000_000_000, image_message)

    def subscribe_tracks(self) -> None:
        """Returns when the node has seen it, too: it tracks only for those who listen."""
        self.node.create_subscription(Tracks, f"{self.outputs}tracks", self.tracks.append, 100)
        self._send_until(self.tracks, START - 300_000_000_000, image_message)

    def connect(self, make: Callable[[np.ndarray, int], Any] = image_message) -> None:
        """Send images, stamped before START, until the first features arrive."""
        self._send_until(self.features, START - 1_000_000_000_000, make)

    def _send_until(self, answers: list[Any], stamp: int, make: Callable[[np.ndarray, int], Any]) -> None:
        """Returns when every answer to these images is in, too, and forgotten."""
        images = (make(texture(), at) for at in range(stamp, START, STEP))
        self.ros.pump(
            lambda: self.images.publish(next(images)), lambda: answers, timeout=PATIENCE, what="a first answer"
        )
        self.ask(next(images))
        self.settle(self.features[-1].header)
        for received in (self.features, self.matches, self.tracks):
            received.clear()

    def ask(self, message: Any) -> Features:
        """Send one image and wait for its features. Sent again where it was lost, which best effort may do."""

        def found() -> list[Features]:
            return [answer for answer in self.features if answer.header == message.header]

        send = lambda: self.images.publish(message)  # noqa: E731
        return self.ros.pump(send, found, period=30.0, timeout=PATIENCE, what="features")[0]

    def settle(self, header: Any) -> FrontendStatus:
        """The final status after the image with this header, which was the last one that was sent."""

        def final() -> bool:
            status = self.statuses[-1] if self.statuses else FrontendStatus()
            return status.header == header and waiting(status) == 0

        self.ros.spin_until(final, timeout=PATIENCE, what=f"a status with the final counts after {header.stamp}")
        return self.statuses[-1]

    def await_status(self, condition: Callable[[FrontendStatus], Any], what: str) -> FrontendStatus:
        """The first status from now on for which the condition holds."""
        self.ros.spin_until(lambda: self.statuses and condition(self.statuses[-1]), timeout=PATIENCE, what=what)
        return self.statuses[-1]

    def set_parameters(self, **values: Any) -> str:
        """Set parameters of the node, all at once; empty, or why they were refused."""
        service = self.node.create_client(SetParametersAtomically, "scfeat/set_parameters_atomically")
        parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        result = self.ros.call(service, SetParametersAtomically.Request(parameters=parameters), again=True).result
        self.node.destroy_client(service)
        assert result.successful == (result.reason == "")
        return result.reason


def waiting(status: FrontendStatus) -> int:
    """Images of which the status does not say yet what became of them."""
    return status.received - status.processed - sum(getattr(status, f"dropped_{reason}") for reason in DROPPED)
