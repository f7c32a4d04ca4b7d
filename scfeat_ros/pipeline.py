"""What happens to images in the worker's threads: one decodes and processes, the other publishes and takes notes."""

from __future__ import annotations

import threading
import time
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
from rclpy.clock import Clock
from sensor_msgs.msg import Image

from scfeat_core.errors import ImageError, ScfeatError, StaleImageError
from scfeat_core.frontend import Frontend, FrontendConfig, Submitted
from scfeat_core.inertial import GyroBuffer
from scfeat_core.types import FrameInput, FrameResult, PairResult

from .calibration import Calibrations
from .health import FrameHealth, Repeats, frame_health
from .images import compressed_to_array, image_to_array
from .inputs import Frame, Masks, read_mask
from .messages import features_to_message, matches_to_message, tracks_to_message
from .parameters import NodeParameters
from .pictures import Pictures, foxglove_module, wants_scores

# Nanoseconds: how far an image may be ahead of the clock. Simulators send the image before the time that it is of.
AHEAD = 100_000_000
# The camera does not wait for an engine.
create_frontend = partial(Frontend, build_engines="beside")
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
    """One camera in the worker's threads: its publishers, and what it remembers from frame to frame.

    publishers: name of the topic -> publisher. complain(text, kind): logs, and keeps the text as ``last_error``.
    assess_health: what makes ``health`` when it is asked for, twice a second and not for each frame. ``health``,
    ``last_error`` and ``newest`` (stamp of the newest processed frame, None before the first and after a reset) may be
    read from any thread: each is replaced as a whole. Masks, calibrations and ``newest`` belong to the thread that
    takes the results of the front end, pictures and ``frame_id`` to the one that publishes.
    """

    def __init__(self, name: str, mask: np.ndarray | None, complain: Callable[[str, str | None], None]) -> None:
        self.name = name
        self.publishers: Mapping[str, Any] = {}
        self.assess_health: Callable[[], FrameHealth | None] = lambda: None
        self.last_error = ""
        self.newest: int | None = None
        self.pictures = Pictures(())
        self.masks = Masks(mask, lambda text: self.complain(text))
        self.calibrations = Calibrations(lambda text: self.complain(text))
        self._log = complain
        self._drawn = 0.0  # time.perf_counter(), when the debug image was last due
        self.reset()

    def reset(self) -> None:
        """The next frame has no predecessor, and its calibration is read anew."""
        self.newest = None
        self.frame_id = ""  # of the newest published frame
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

    def will_draw(self) -> None:
        """Pictures of the frame in work will be published: the next ones are due one period from now."""
        self._drawn = time.perf_counter()

    @property
    def health(self) -> FrameHealth | None:
        """Of the newest published frame; None before the first one."""
        return self.assess_health()

    @property
    def ignored(self) -> tuple[str, ...]:
        """Why the calibration or the mask of the newest frame, which were there, were not used."""
        return tuple(text for text in (self.calibrations.refused, self.masks.refused) if text)

    def complain(self, text: str, kind: str | None = None) -> None:
        self.last_error = text
        self._log(text, kind)


@dataclass(frozen=True, eq=False)
class _Job:
    """A frame on its way through the stages. mask: of ``given``. started, decoded: time.perf_counter().

    masked, ignored: of the channel, for the health of this frame.
    """

    frame: Frame
    wants: Wants
    given: FrameInput
    started: float
    decoded: float
    masked: float
    ignored: tuple[str, ...]

    @property
    def header(self) -> Any:
        return self.frame.message.header


@dataclass(frozen=True, eq=False)
class _Found:
    """What there is to publish of one frame. stereo: its matches to the left camera, where somebody wants them."""

    job: _Job
    result: FrameResult
    stereo: tuple[PairResult, str] | None = None  # with the optical frame of the left camera


@dataclass(frozen=True, eq=False)
class _Work:
    """Frames on their way from one thread to the other. submitted: to the front end, and not taken from it so far.

    errors: what went wrong, by camera; it grows on the way.
    """

    jobs: Mapping[str, _Job]
    submitted: Submitted | None
    errors: dict[str, Exception]
    found: Mapping[str, _Found] = field(default_factory=dict)


class Pipeline:
    """The front end between image messages and publishers.

    ``process`` belongs to the first thread of the worker, what it returns and ``failed`` to the second. ``change`` and
    ``jump`` may be called from any, and take effect between two frames.

    Only what somebody subscribes to is computed. Without a subscriber of ``~/features``, ``~/matches``, ``~/tracks``,
    the stereo matches or the pictures, images are not even decoded, and count as "unwanted". Tracks keep their history
    only while somebody wants them (``~/tracks``, or a picture that draws them): whoever subscribes after frames that
    were processed without tracks, or more than five seconds (TRACK_GAP) after the last processed frame, sees tracks
    begin with the next image, with new ids, ages from 1, and all flagged as new; old ids do not come back.
    The first matches come with the second frame that was processed, whoever it was processed for.
    """

    def __init__(
        self,
        settings: NodeParameters,
        clock: Clock,
        logger: Any,
        frontend: Callable[[FrontendConfig], Frontend] = create_frontend,
    ) -> None:
        """Load the network and warm it up. Raises ScfeatError where weights, device or masks are not as asked for.

        frontend: makes the front end, once.
        """
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
        self._complaining = threading.Lock()  # of _repeats: both threads complain
        self._finished = threading.Event()  # everything of the frames before
        self._finished.set()
        self._tracebacks: set[str] = set()
        self._told = ""  # of engine_note
        masks = {name: read_mask(path) for name, path in settings.camera_masks.items()}
        self.channels = {name: Channel(name, masks.get(name), self._warn) for name in settings.cameras}
        for channel in self.channels.values():
            channel.pictures.layers = settings.debug_layers
        self._frontend = self._load(frontend)
        self.device = str(self._frontend.extractor.device)
        # A CUDA device works on the next images while the host matches, verifies and publishes those before. On a CPU
        # both would want the same cores, so there it is only the publication. The gyroscope's turn since the newest
        # frame is known only when that is done.
        self._ahead = self._frontend.extractor.device.type == "cuda" and self.gyro is None
        self.descriptor_space = self._frontend.extractor.descriptor_space

    @property
    def precision(self) -> str:
        """What the network computes in. This and the engine may be others from the first image of a new size on."""
        return self._frontend.extractor.precision

    @property
    def engine(self) -> str:
        """What runs the network."""
        return self._frontend.extractor.engine

    @property
    def engine_note(self) -> str:
        """Why it is another engine than the one asked for; empty where it is not."""
        return self._frontend.extractor.engine_note

    @property
    def engine_making(self) -> str:
        """What is being made beside the images, and what runs meanwhile; empty where nothing is."""
        return self._frontend.extractor.engine_making

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

    def process(self, frames: Mapping[str, Frame]) -> Callable[[], dict[str, Exception]]:
        """Decode and run the front end. frames: newest ones, by camera.

        Returns what publishes the results and returns what went wrong, by camera. It is to be called once, in the order
        of the frames; in another thread the next ones may be processed meanwhile.
        """
        self._adopt()
        started = time.perf_counter()
        errors: dict[str, Exception] = {}
        wants = self._wants(frames)
        jobs = _each(frames, lambda frame: self._prepare(frame, wants[frame.camera], started), errors)
        submitted = self._frontend.submit([job.given for job in jobs.values()]) if jobs else None
        self._tell_engine()
        work = _Work(jobs, submitted, errors)
        if not self._ahead:
            work = self._take_results(work)
        self._finished = threading.Event()
        return partial(self._finish, work, self._finished)

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

    def _load(self, make: Callable[[FrontendConfig], Frontend]) -> Frontend:
        """With what it warns about, such as an untrained network, in the log of the node."""
        with warnings.catch_warnings(record=True) as caught:
            frontend = make(self._settings.frontend_config())
            frontend.warm_up(batch=len(self._settings.cameras))
        for warning in caught:
            self._logger.warning(str(warning.message))
        return frontend

    def _adopt(self) -> None:
        """Between two frames: other settings, and a new time."""
        if self._target is self._settings and not self._jumps:
            return
        self._finished.wait()  # the frames before are of the old ones
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

    def _tell_engine(self) -> None:
        """Once for each reason for another engine than the one asked for."""
        note = self.engine_note
        if note and note != self._told:
            self._told = note
            for channel in self.channels.values():
                channel.complain(note, "engine")

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
        if wants.draw:
            channel.will_draw()
        pixels = image_to_array(message) if isinstance(message, Image) else compressed_to_array(message)
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
        return _Job(frame, wants, given, started, time.perf_counter(), channel.masks.share, channel.ignored)

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

    def _take_results(self, work: _Work) -> _Work:
        """With what the front end found, or why it found nothing."""
        if work.submitted is None:
            return work
        results: dict[str, FrameResult] = {}
        for camera, answer in zip(work.jobs, self._frontend.result(work.submitted), strict=True):
            if isinstance(answer, FrameResult):
                results[camera] = answer
                self.channels[camera].newest = answer.stamp
            else:
                work.errors[camera] = answer
        jobs = {camera: work.jobs[camera] for camera in results}
        found = _each(jobs, lambda job: self._found(job, jobs, results), work.errors)
        return replace(work, submitted=None, found=found)

    def _found(self, job: _Job, jobs: Mapping[str, _Job], results: Mapping[str, FrameResult]) -> _Found:
        camera = job.frame.camera
        return _Found(job, results[camera], self._stereo(camera, jobs, results))

    def _stereo(
        self, camera: str, jobs: Mapping[str, _Job], results: Mapping[str, FrameResult]
    ) -> tuple[PairResult, str] | None:
        """The matches of this camera to the left one of its pair, where somebody wants them and both are there."""
        for left, right in self._settings.stereo_pairs:
            if right == camera and left in results and jobs[camera].wants.stereo:
                try:
                    return self._frontend.match_stereo(results[left], results[camera]), jobs[left].header.frame_id
                except ScfeatError as error:  # the two frames are as good without
                    self.channels[camera].complain(f"no stereo matches: {error}", None)
        return None

    def _finish(self, work: _Work, finished: threading.Event) -> dict[str, Exception]:
        """Publish what was found; what went wrong with these frames, by camera."""
        try:
            work = self._take_results(work)
            _each(work.found, self._publish, work.errors)
        finally:
            finished.set()
        return work.errors

    def _publish(self, found: _Found) -> None:
        started = time.perf_counter()
        job, result = found.job, found.result
        channel = self.channels[job.frame.camera]
        if result.reset_reason:
            self._tell_reset(channel, result.reset_reason)
        self._send(channel, job, result)
        if found.stereo is not None:
            pair, frame_id = found.stereo
            channel.publishers["stereo_matches"].publish(matches_to_message(pair, result, job.header, frame_id))
        if job.wants.pictures:
            self._draw(channel, job, result)
        channel.frame_id = job.header.frame_id
        channel.assess_health = self._health(job, result, started)

    def _send(self, channel: Channel, job: _Job, result: FrameResult) -> None:
        settings, listened, header = self._settings, job.wants.listened, job.header
        if "features" in listened:
            message = features_to_message(result, header, settings.descriptor_type, settings.rectified)
            channel.publishers["features"].publish(message)
        if "matches" in listened and result.pair is not None:
            message = matches_to_message(result.pair, result, header, channel.frame_id)
            channel.publishers["matches"].publish(message)
        if "tracks" in listened and result.tracks is not None:
            channel.publishers["tracks"].publish(tracks_to_message(result, header, self._session))

    def _draw(self, channel: Channel, job: _Job, result: FrameResult) -> None:
        channel.pictures.follow(result)
        if not job.wants.draw:
            return
        ms = 1e3 * (time.perf_counter() - job.frame.arrived)
        if "debug_image" in job.wants.listened:
            picture = channel.pictures.image(job.given.image, result, job.header, job.given.mask, ms)
            channel.publishers["debug_image"].publish(picture)
        if "annotations" in job.wants.listened:
            marks = channel.pictures.annotations(self._foxglove, result, job.header, ms)
            channel.publishers["annotations"].publish(marks)

    def _health(self, job: _Job, result: FrameResult, finished: float) -> Callable[[], FrameHealth]:
        """What makes it. finished: when all but the publication was, time.perf_counter()."""
        published, arrived = time.perf_counter(), job.frame.arrived
        health = partial(
            frame_health,
            job.header,
            result,
            ms_queue=1e3 * (job.started - arrived),
            ms_decode=1e3 * (job.decoded - job.started),
            ms_publish=1e3 * (published - finished),
            ms_total=1e3 * (published - arrived),
            age_ms=1e-6 * (self._clock.now().nanoseconds - result.stamp),
            masked=job.masked,
            ignored=job.ignored,
            device=self.device,
            precision=self.precision,
        )
        return cache(health)

    def _warn(self, text: str, kind: str | None) -> None:
        with self._complaining:
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
