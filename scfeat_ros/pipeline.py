"""What happens to images in the worker's thread: decode, process, publish, and say how it went."""

from __future__ import annotations

import time
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from rclpy.clock import Clock
from sensor_msgs.msg import Image

from scfeat_core.errors import ImageError, ScfeatError, StaleImageError
from scfeat_core.frontend import Frontend
from scfeat_core.inertial import GyroBuffer
from scfeat_core.types import FrameInput, FrameResult

from .calibration import Calibrations
from .health import FrameHealth, Repeats, frame_health
from .images import compressed_to_array, image_to_array
from .inputs import Frame, Masks, read_mask
from .messages import features_to_message, matches_to_message, tracks_to_message
from .parameters import NodeParameters
from .pictures import Pictures, foxglove_module, wants_scores

# Nanoseconds: how far an image may be ahead of the clock. Simulators send the image before the time that it is of.
AHEAD = 100_000_000
Item = TypeVar("Item")
Result = TypeVar("Result")


class Unwanted(Exception):
    """Nobody subscribes to anything that the image would have to be processed for."""


@dataclass(frozen=True)
class Wants:
    """What of one frame is asked for.

    listened: names of topics that have subscribers. draw: the debug image is due. stereo: of those topics, that of the
    matches to the left camera. partner: the matches of another camera to this one are asked for.
    """

    listened: frozenset[str] = frozenset()
    layers: tuple[str, ...] = ()
    draw: bool = False
    stereo: bool = False
    partner: bool = False
    assess: bool = False

    @property
    def anything(self) -> bool:
        """Whether the network has to run."""
        return self.stereo or self.partner or bool(self.listened)

    @property
    def match(self) -> bool:
        return "matches" in self.listened or (self.draw and "matches" in self.layers)

    @property
    def track(self) -> bool:
        """Tails need the tracks of all frames, not only of those that are drawn."""
        return "tracks" in self.listened or (self.pictures and "tracks" in self.layers)

    @property
    def pictures(self) -> bool:
        return bool(self.listened & {"debug_image", "annotations"})


class Channel:
    """One camera in the worker's thread: its publishers, and what it remembers from frame to frame.

    publishers: name of the topic -> publisher. complain(text, kind): logs, and keeps the text as ``last_error``.
    ``health``, ``last_error`` and ``newest`` (stamp of the newest processed frame, None before the first and after a
    reset) may be read from any thread: each is replaced as a whole.
    """

    def __init__(self, name: str, mask: np.ndarray | None, complain: Callable[[str, str | None], None]) -> None:
        self.name = name
        self.publishers: Mapping[str, Any] = {}
        self.health: FrameHealth | None = None
        self.last_error = ""
        self.newest: int | None = None
        self.pictures = Pictures(())
        self.masks = Masks(mask, lambda text: self.complain(text))
        self.calibrations = Calibrations(lambda text: self.complain(text))
        self._log = complain
        self._drawn = 0.0  # time.perf_counter(), when the debug image was published
        self.reset()

    def reset(self) -> None:
        """The next frame has no predecessor, and its calibration is read anew."""
        self.newest = None
        self.frame_id = ""  # of the newest processed frame
        self.calibrations.reset()
        self.pictures.reset()

    def wants(self, settings: NodeParameters, assess: bool) -> Wants:
        """What the subscribers of this camera ask for now."""
        listened = frozenset(name for name, endpoint in self.publishers.items() if endpoint.get_subscription_count())
        if settings.debug_rate == 0:
            listened -= {"debug_image", "annotations"}
        drawable = listened & {"debug_image", "annotations"} and settings.debug_rate > 0
        due = bool(drawable) and time.perf_counter() - self._drawn >= 1 / settings.debug_rate
        stereo = "stereo_matches" in listened
        return Wants(listened - {"stereo_matches"}, settings.debug_layers, due, stereo, assess=assess)

    def drawn(self) -> None:
        """The pictures have just been published."""
        self._drawn = time.perf_counter()

    @property
    def ignored(self) -> tuple[str, ...]:
        """Why the calibration or the mask of the newest frame, which were there, were not used."""
        return tuple(text for text in (self.calibrations.refused, self.masks.refused) if text)

    def complain(self, text: str, kind: str | None = None) -> None:
        self.last_error = text
        self._log(text, kind)


@dataclass(frozen=True, eq=False)
class _Job:
    """A frame on its way through the stages. mask: of ``given``. started, decoded: time.perf_counter()."""

    frame: Frame
    wants: Wants
    given: FrameInput
    started: float
    decoded: float

    @property
    def header(self) -> Any:
        return self.frame.message.header


class Pipeline:
    """The front end between image messages and publishers.

    ``process`` and ``failed`` belong to the worker's thread; ``change`` and ``jump`` may be called from any, and take
    effect between two calls of ``process``.

    Only what somebody subscribes to is computed. Without a subscriber of ``~/features``, ``~/matches``, ``~/tracks``,
    the stereo matches or the pictures, images are not even decoded, and count as "unwanted". Tracks keep their history
    only while somebody wants them (``~/tracks``, or a picture that draws them): whoever subscribes after frames that
    were processed without tracks, or more than five seconds (TRACK_GAP) after the last processed frame, sees tracks
    begin with the next image, with new ids, ages from 1, and all flagged as new; old ids do not come back.
    The first matches come with the second frame that was processed, whoever it was processed for.
    """

    def __init__(self, settings: NodeParameters, clock: Clock, logger: Any) -> None:
        """Load the network and warm it up. Raises ScfeatError where weights, device or masks are not as asked for."""
        self.assess: Callable[[], bool] = lambda: False  # whether somebody looks at the quality of images
        self._settings = self._target = settings
        self._jumps: deque[int] = deque()
        self._clock = clock
        self._logger = logger
        self.gyro = GyroBuffer() if settings.use_imu else None  # may be filled by another thread
        self._rotations = settings.imu_rotations
        self._foxglove = foxglove_module()
        self._session = uuid.uuid4().hex
        self._repeats = Repeats()
        self._tracebacks: set[str] = set()
        masks = {name: read_mask(path) for name, path in settings.camera_masks.items()}
        self.channels = {name: Channel(name, masks.get(name), self._warn) for name in settings.cameras}
        for channel in self.channels.values():
            channel.pictures.layers = settings.debug_layers
        self._frontend = self._load()
        self.device = str(self._frontend.extractor.device)
        self.precision = self._frontend.extractor.precision
        self.descriptor_space = self._frontend.extractor.descriptor_space

    def change(self, settings: NodeParameters) -> None:
        """Go on with other dynamic parameters, all at once, from the next images on."""
        self._target = settings

    def jump(self, now: int) -> None:
        """The clock went back to ``now`` (nanoseconds): cameras that are ahead of it start anew."""
        self._jumps.append(now)

    def reset(self) -> None:
        """Forget the previous frames of all cameras; only while nothing is processed."""
        self._jumps.clear()
        for channel in self.channels.values():
            self._frontend.reset(channel.name)
            channel.reset()

    def close(self) -> None:
        """Give the memory on the device back; nothing can be processed after that."""
        self._frontend.close()

    def process(self, frames: Mapping[str, Frame]) -> dict[str, Exception]:
        """Decode, run the front end, publish. frames: newest ones, by camera. Returns what went wrong, by camera."""
        self._adopt()
        started = time.perf_counter()
        errors: dict[str, Exception] = {}
        wants = self._wants(frames)
        jobs = _each(frames, lambda frame: self._prepare(frame, wants[frame.camera], started), errors)
        results = self._run(jobs, errors)
        _each({camera: jobs[camera] for camera in results}, lambda job: self._finish(job, jobs, results), errors)
        return errors

    def failed(self, frame: Frame, error: Exception) -> str:
        """Log why a frame was dropped; the reason to count it under."""
        if isinstance(error, Unwanted):
            return "unwanted"
        channel = self.channels[frame.camera]
        text = f"frame dropped: {error if isinstance(error, ScfeatError) else repr(error)}"
        if isinstance(error, StaleImageError):
            channel.complain(text, "stale")  # by another time with each image
            return "stale"
        channel.complain(text)
        if not isinstance(error, ScfeatError):
            self._show_traceback(error)
        return "decode" if isinstance(error, ImageError) else "error"

    def _load(self) -> Frontend:
        """With what it warns about, such as an untrained network, in the log of the node."""
        with warnings.catch_warnings(record=True) as caught:
            frontend = Frontend(self._settings.frontend_config())
            frontend.warm_up(batch=len(self._settings.cameras))
        for warning in caught:
            self._logger.warning(str(warning.message))
        return frontend

    def _adopt(self) -> None:
        """Between two frames: other settings, and a new time."""
        if (target := self._target) is not self._settings:
            self._settings = target
            self._frontend.update(target.frontend_config())
            for channel in self.channels.values():
                channel.pictures.layers = target.debug_layers
        while self._jumps:
            self._start_anew(self._jumps.popleft())

    def _start_anew(self, now: int) -> None:
        for channel in self.channels.values():
            if channel.newest is not None and channel.newest > now + AHEAD:
                back = 1e-9 * (channel.newest - now)
                self._frontend.reset(channel.name)
                channel.reset()
                self._tell_reset(channel, f"the clock went back to {back:.3f} s before its newest image")

    def _tell_reset(self, channel: Channel, reason: str) -> None:
        self._logger.warning(f"camera '{channel.name}' starts anew: {reason}")

    def _wants(self, frames: Iterable[str]) -> dict[str, Wants]:
        """By camera. Whoever wants stereo matches wants both images processed."""
        assess = self.assess()
        found = {camera: self.channels[camera].wants(self._settings, assess) for camera in frames}
        for left, right in self._settings.stereo_pairs:
            if left in found and right in found and found[right].stereo:
                found[left] = replace(found[left], partner=True)
        return found

    def _prepare(self, frame: Frame, wants: Wants, started: float) -> _Job:
        """Decode. Raises Unwanted, ImageError."""
        if not wants.anything:
            raise Unwanted
        channel, message = self.channels[frame.camera], frame.message
        pixels = image_to_array(message) if isinstance(message, Image) else compressed_to_array(message)
        decoded = time.perf_counter()
        size = (pixels.shape[1], pixels.shape[0])
        given = FrameInput(
            pixels,
            frame.stamp,
            frame.camera,
            channel.calibrations(frame.camera_info, size, self._settings.rectified),
            channel.masks(frame.mask, size),
            self._rotation(channel, frame.stamp),
            match=wants.match,
            track=wants.track,
            assess=wants.assess,
            score_map=wants.draw and wants_scores(wants.layers),
        )
        return _Job(frame, wants, given, started, decoded)

    def _rotation(self, channel: Channel, stamp: int) -> np.ndarray | None:
        """How the camera turned since its newest frame; None where that is not known."""
        if self.gyro is None or channel.newest is None:
            return None
        if len(self.gyro) == 0:
            channel.complain(
                "use_imu is on, and no sensor_msgs/Imu with finite angular velocities has come on 'imu': remap the "
                "topic to that of the driver, and check that its QoS fits",
                "imu",
            )
            return None
        return self.gyro.rotation(channel.newest, stamp, self._rotations[channel.name])

    def _run(self, jobs: Mapping[str, _Job], errors: dict[str, Exception]) -> dict[str, FrameResult]:
        """The front end on all of them at once."""
        results: dict[str, FrameResult] = {}
        answers = self._frontend.process_batch([job.given for job in jobs.values()]) if jobs else []
        for camera, answer in zip(jobs, answers, strict=True):
            if isinstance(answer, FrameResult):
                results[camera] = answer
            else:
                errors[camera] = answer
        return results

    def _finish(self, job: _Job, jobs: Mapping[str, _Job], results: Mapping[str, FrameResult]) -> None:
        """Publish the results of one frame, and note how it went."""
        finished = time.perf_counter()
        channel, result = self.channels[job.frame.camera], results[job.frame.camera]
        if result.reset_reason:
            self._tell_reset(channel, result.reset_reason)
        self._publish(channel, job, result)
        for left, right in self._settings.stereo_pairs:
            if right == channel.name and left in results and job.wants.stereo:
                self._publish_stereo(channel, job.header, results[left], result, jobs[left].header.frame_id)
        if job.wants.pictures:
            self._draw(channel, job, result)
        channel.newest, channel.frame_id = result.stamp, job.header.frame_id
        channel.health = self._health(channel, job, result, finished)

    def _publish(self, channel: Channel, job: _Job, result: FrameResult) -> None:
        settings, listened, header = self._settings, job.wants.listened, job.header
        if "features" in listened:
            message = features_to_message(result, header, settings.descriptor_type, settings.rectified)
            channel.publishers["features"].publish(message)
        if "matches" in listened and result.pair is not None:
            message = matches_to_message(result.pair, result, header, channel.frame_id)
            channel.publishers["matches"].publish(message)
        if "tracks" in listened and result.tracks is not None:
            channel.publishers["tracks"].publish(tracks_to_message(result, header, self._session))

    def _publish_stereo(
        self, channel: Channel, header: Any, left: FrameResult, right: FrameResult, left_frame_id: str
    ) -> None:
        try:
            pair = self._frontend.match_stereo(left, right)
        except ScfeatError as error:  # the two frames are as good without
            channel.complain(f"no stereo matches: {error}")
            return
        channel.publishers["stereo_matches"].publish(matches_to_message(pair, right, header, left_frame_id))

    def _draw(self, channel: Channel, job: _Job, result: FrameResult) -> None:
        channel.pictures.follow(result)
        if not job.wants.draw:
            return
        channel.drawn()
        ms = 1e3 * (time.perf_counter() - job.frame.arrived)
        if "debug_image" in job.wants.listened:
            picture = channel.pictures.image(job.given.image, result, job.header, job.given.mask, ms)
            channel.publishers["debug_image"].publish(picture)
        if "annotations" in job.wants.listened:
            marks = channel.pictures.annotations(self._foxglove, result, job.header, ms)
            channel.publishers["annotations"].publish(marks)

    def _health(self, channel: Channel, job: _Job, result: FrameResult, finished: float) -> FrameHealth:
        published, arrived = time.perf_counter(), job.frame.arrived
        return frame_health(
            job.header,
            result,
            ms_queue=1e3 * (job.started - arrived),
            ms_decode=1e3 * (job.decoded - job.started),
            ms_publish=1e3 * (published - finished),
            ms_total=1e3 * (published - arrived),
            age_ms=1e-6 * (self._clock.now().nanoseconds - result.stamp),
            masked=channel.masks.share,
            ignored=channel.ignored,
            device=self.device,
            precision=self.precision,
        )

    def _warn(self, text: str, kind: str | None) -> None:
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


def _each(items: Mapping[str, Item], do: Callable[[Item], Result], errors: dict[str, Exception]) -> dict[str, Result]:
    """What ``do`` makes of each; a camera for which it fails gets its exception into ``errors``, the others go on."""
    results = {}
    for camera, item in items.items():
        try:
            results[camera] = do(item)
        except Exception as error:
            errors[camera] = error
    return results
