"""What happens to one image in the worker's thread: decode, process, publish, and say how it went."""

from __future__ import annotations

import time
import traceback
import warnings
from typing import Any

from rclpy.clock import Clock
from rclpy.publisher import Publisher
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from scfeat_core.errors import CalibrationError, ImageError, ScfeatError, StaleImageError
from scfeat_core.frontend import Frontend
from scfeat_core.types import Camera, FrameResult

from .health import FrameHealth, Repeats, frame_health
from .images import Frame, compressed_to_array, image_to_array
from .messages import camera_from_message, features_to_message, matches_to_message, nanoseconds
from .parameters import NodeParameters


class Pipeline:
    """The front end between an image message and the publishers of one camera.

    ``process`` and ``failed`` belong to the worker's thread. ``health`` and ``last_error`` may be read from any thread:
    each is replaced as a whole.
    """

    def __init__(self, settings: NodeParameters, clock: Clock, logger: Any) -> None:
        """Load the network and warm it up. Raises ScfeatError where weights or device are not as asked for."""
        self.health: FrameHealth | None = None
        self.last_error = ""
        self._settings = settings
        self._clock = clock
        self._logger = logger
        self._repeats = Repeats()
        self._tracebacks: set[str] = set()
        self._frontend = self._load()
        self.device = str(self._frontend.extractor.device)
        self.precision = self._frontend.extractor.precision
        self.reset()

    def connect(self, features: Publisher, matches: Publisher) -> None:
        """Where the results go."""
        self._features = features
        self._matches = matches

    def reset(self) -> None:
        """The next frame has no predecessor, and its calibration is read anew."""
        self._frontend.reset(self._settings.camera)
        self._previous_frame_id = ""
        self._calibrated: tuple[CameraInfo, tuple[int, int]] | None = None  # what the calibration was made of
        self._calibration: Camera | None = None

    def close(self) -> None:
        """Give the memory on the device back; nothing can be processed after that."""
        self._frontend.close()

    def process(self, frame: Frame) -> None:
        """Decode, run the front end, publish. Raises ImageError where the image cannot be used or comes too late."""
        started = time.perf_counter()
        image = self._decode(frame.message)
        decoded = time.perf_counter()
        result = self._run(frame, image)
        finished = time.perf_counter()
        self._publish(result, frame.message.header)
        published = time.perf_counter()
        self.health = frame_health(
            frame.message.header,
            result,
            ms_queue=1e3 * (started - frame.arrived),
            ms_decode=1e3 * (decoded - started),
            ms_publish=1e3 * (published - finished),
            ms_total=1e3 * (published - frame.arrived),
            age_ms=1e-6 * (self._clock.now().nanoseconds - result.stamp),
            device=self.device,
            precision=self.precision,
        )

    def failed(self, frame: Frame, error: Exception) -> str:
        """Log why a frame was dropped; the reason to count it under."""
        text = f"frame dropped: {error if isinstance(error, ScfeatError) else repr(error)}"
        if isinstance(error, StaleImageError):
            self._complain(text, kind="stale")  # by another time with each image
            return "stale"
        self._complain(text)
        if not isinstance(error, ScfeatError):
            self._show_traceback(error)
        return "decode" if isinstance(error, ImageError) else "error"

    def _load(self) -> Frontend:
        """With what it warns about, such as an untrained network, in the log of the node."""
        with warnings.catch_warnings(record=True) as caught:
            frontend = Frontend(self._settings.frontend_config())
            frontend.warm_up()
        for warning in caught:
            self._logger.warning(str(warning.message))
        return frontend

    def _decode(self, message: Image | CompressedImage) -> Any:
        return image_to_array(message) if isinstance(message, Image) else compressed_to_array(message)

    def _run(self, frame: Frame, image: Any) -> FrameResult:
        height, width = image.shape[:2]
        result = self._frontend.process(
            image,
            nanoseconds(frame.message.header.stamp),
            camera=self._settings.camera,
            calibration=self._calibrate(frame.camera_info, (width, height)),
            match=self._matches.get_subscription_count() > 0,  # nobody listens: not worth the time
        )
        if result.reset_reason:
            self._logger.warning(f"camera '{result.camera}' starts anew: {result.reset_reason}")
        return result

    def _calibrate(self, message: CameraInfo | None, image_size: tuple[int, int]) -> Camera | None:
        """The calibration; None, with a complaint, where it cannot be used: the image can be, all the same."""
        if message is None:
            return None
        if self._calibrated is not None and message is self._calibrated[0] and image_size == self._calibrated[1]:
            return self._calibration
        self._calibrated = message, image_size
        try:
            self._calibration = camera_from_message(message, image_size, self._settings.rectified)
        except CalibrationError as error:
            self._calibration = None
            self._complain(f"camera_info not used: {error}")
        return self._calibration

    def _publish(self, result: FrameResult, header: Any) -> None:
        if self._features.get_subscription_count() > 0:
            settings = self._settings
            self._features.publish(features_to_message(result, header, settings.descriptor_type, settings.rectified))
        if result.pair is not None and self._matches.get_subscription_count() > 0:
            self._matches.publish(matches_to_message(result, header, self._previous_frame_id))
        self._previous_frame_id = header.frame_id

    def _complain(self, text: str, kind: str | None = None) -> None:
        self.last_error = text
        line = self._repeats.line(text, kind)
        if line is not None:
            self._logger.warning(line)

    def _show_traceback(self, error: Exception) -> None:
        """Once for each kind: the place where it was raised."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} {place.filename}:{place.lineno}"
        if kind not in self._tracebacks:
            self._tracebacks.add(kind)
            self._logger.error("".join(traceback.format_exception(error)).rstrip())
