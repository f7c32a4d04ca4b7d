"""The one pipeline: an image in, features, matches to the previous image of the same camera, and tracks out.

The node, the replay of bags and the tests all call :meth:`Frontend.process` or :meth:`Frontend.process_batch`. What a
camera leaves behind between two images is its previous frame, its tracks and the count of its frames, nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import numpy as np
import torch

from scfeat_core import matching, stereo
from scfeat_core.columns import Columns, Table, to_columns
from scfeat_core.config import Range, check_config, load_config
from scfeat_core.engines import BuildEngines, EngineName
from scfeat_core.errors import CalibrationError, ConfigError, FeatureError, StaleImageError
from scfeat_core.extraction import Extractor, PaddedFeatures, Points, Precision
from scfeat_core.geometry import check_camera, undistort_points
from scfeat_core.inertial import check_rotation
from scfeat_core.quality import assess, has_contrast, reduce
from scfeat_core.tracking import Links, Motion, TrackManager, TracksState, View, predict, turn
from scfeat_core.transfer import Download
from scfeat_core.two_view import MINIMUM_MATCHES, ModelChoice, verify
from scfeat_core.types import (
    Array,
    Camera,
    Features,
    FrameInput,
    FrameResult,
    GeometryModel,
    Matches,
    MatchKind,
    PairResult,
    Tracks,
    TwoViewGeometry,
)

# Nanoseconds: images that overtake each other are closer together, clocks that are set and recordings that start again
# go further back.
LATE = 1_000_000_000
# Nanoseconds between two processed frames of a camera after which tracks do not go on: nobody asked for them meanwhile,
# or the images stayed away. Matches are made all the same, and say themselves how far apart their frames are.
TRACK_GAP = 5_000_000_000

# Of the longer side of the image: the search radius where none is set but the rotation of the camera is known. Wide, as
# the parallax of what is near stays unknown.
TURN_RADIUS = 0.1

_FIXED = ("weights", "device", "precision", "engine")
# Of the matches that a model does not fit by construction, this share must agree with it, or no track goes on by them.
# Unrelated photographs: 0.01 to 0.06. Four recorded cameras: 0.6 and more at the rate that they were recorded at, 0.33
# and more on every fifth frame, 0.2 and more on every tenth where most of the view stayed.
_BELIEVED = 0.15
_SAMPLES = {GeometryModel[model.upper()]: count - 1 for model, count in MINIMUM_MATCHES.items()}
_ENOUGH = 0.2  # of the features must be matched and verified, or the window is taken to be at the wrong place


@dataclass(frozen=True)
class FrontendConfig:
    """What the front end does; the names and defaults of the node's parameters.

    budgets: keypoints of cameras that have a number of their own, by name; max_keypoints is that of all others.
    min_cosine: drop matches whose descriptors have a lower cosine similarity; 0 drops only what is less alike than
    unrelated vectors are. verify: fit a two-view model to the matches and mark the inliers. geometry: which one; "auto"
    is the homography where the scene is planar or the camera only turned, else the essential matrix with a
    calibration and the fundamental matrix without. verification_threshold: pixels.
    search_radius: pixels around the predicted position within which a point is looked for, and everywhere where that
    finds too little; 0: everywhere at once, or, where the rotation of the camera is known, within a tenth of the longer
    side of the image (TURN_RADIUS). Descriptors that tell points apart need no window (benchmarks/tracking.py),
    textures that repeat do. max_track_gap: frames that a lost track waits for a point like it to appear, 0 for none.
    reidentify_cosine: least cosine similarity that brings it back. stereo_gate: pixels that a stereo match may be off
    its epipolar line. levels: of the image pyramid; one, unlike for single images, as hardly anything is seen from much
    farther in the next frame, and time matters.
    The others are those of ``Extractor``. weights, device, precision and engine stay what they are, see
    ``Frontend.update``.
    """

    weights: str = "lite"
    device: str = "cpu"
    precision: Precision = "float32"
    engine: EngineName = "eager"
    max_keypoints: Annotated[int, Range(minimum=1)] = 1024
    score_threshold: Annotated[float, Range(minimum=0.0)] = 0.0
    nms_radius: Annotated[int, Range(minimum=0, maximum=64)] = 2
    border: Annotated[int, Range(minimum=0)] = 4
    budgets: dict[str, Annotated[int, Range(minimum=1)]] = field(default_factory=dict)
    grid: Annotated[int, Range(minimum=0, maximum=64)] = 0
    clahe: Annotated[float, Range(minimum=0.0, maximum=100.0)] = 0.0
    levels: Annotated[int, Range(minimum=1, maximum=8)] = 1
    min_cosine: Annotated[float, Range(minimum=-1.0, maximum=1.0)] = 0.0
    verify: bool = True
    geometry: ModelChoice = "auto"
    verification_threshold: Annotated[float, Range(above=0.0)] = 1.0
    search_radius: Annotated[float, Range(minimum=0.0)] = 0.0
    max_track_gap: Annotated[int, Range(minimum=0, maximum=1000)] = 10
    reidentify_cosine: Annotated[float, Range(minimum=-1.0, maximum=1.0)] = 0.8
    stereo_gate: Annotated[float, Range(above=0.0)] = 2.0

    def __post_init__(self) -> None:
        check_config(self, "front end")

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], where: str = "front end") -> FrontendConfig:
        """Raises ConfigError that names an unknown key and the nearest valid one."""
        return load_config(cls, mapping, where)


@dataclass(frozen=True, eq=False)
class _Frame:
    """The last frame of a camera. on_device: features as torch tensors, for matching; features: as numpy arrays.

    rays: (N, 2) of the keypoints, undistorted, where somebody needs them. motion: how points came here. ahead: what was
    submitted to the device of it, None for nothing. matched: what was submitted of the frame before, and the matches
    with that.
    """

    sequence: int
    stamp: int
    on_device: Features
    features: Features
    calibration: Camera | None
    rays: np.ndarray | None
    motion: Motion | None = None
    ahead: Points | None = None
    matched: tuple[Points, Matches] | None = None


@dataclass(frozen=True, eq=False)
class _Ahead:
    """An image on a device, with nothing waited for. padded: of it alone.

    before: the points of the frame before, if it was matched with those. download: of the points of all of its batch,
    among which it has this place, and of the partners of those that were matched: its own are the array ``partners``,
    and the one after that their similarities.
    """

    padded: PaddedFeatures
    before: Points | None
    download: Download
    place: int
    partners: int

    def arrive(self) -> tuple[Features, Features, tuple[Points, Matches] | None]:
        """The features on the device and on the host, and the matches with ``before``; waits for the download."""
        arrays = self.download.arrays()
        points = Points(*(array[self.place : self.place + 1] for array in arrays[:3]))
        counts = [int((points.scores > -np.inf).sum())]
        (on_device,), (on_host,) = (self.padded.split(each, counts) for each in (self.padded.points, points))
        if self.before is None:
            return on_device, on_host.numpy(), None
        partners, similarity = arrays[self.partners : self.partners + 2]
        indices0 = np.flatnonzero(partners >= 0)
        matches = Matches(indices0, partners[indices0].astype(np.int64), similarity[indices0])
        return on_device, on_host.numpy(), (self.before, matches)


@dataclass(frozen=True, eq=False)
class _Extracted:
    """features: on the device, or on their way. timings: the share of this image."""

    features: Features | _Ahead
    timings: dict[str, float]

    def arrive(self) -> tuple[Features, Features, tuple[Points, Matches] | None]:
        """See :meth:`_Ahead.arrive`."""
        if isinstance(self.features, _Ahead):
            return self.features.arrive()
        return self.features, self.features.numpy(), None


@dataclass(frozen=True, eq=False)
class Submitted:
    """Frames on their way between :meth:`Frontend.submit` and :meth:`Frontend.result`.

    found: parallel to the inputs, what the network made of each, or why there is nothing.
    """

    inputs: tuple[FrameInput, ...]
    found: tuple[_Extracted | Exception, ...]


@dataclass(frozen=True, eq=False)
class _Correspondence:
    """Matches, the matched points, and what verified them."""

    matches: Matches
    keypoints0: np.ndarray
    keypoints1: np.ndarray
    geometry: TwoViewGeometry | None

    @property
    def trusted(self) -> np.ndarray:
        """(M,) bool: the inliers, none where so few could agree by chance; all, where nothing verified them."""
        if self.geometry is None:
            return np.ones(len(self.matches), bool)
        return self.geometry.inliers if self._believed(self.geometry) else np.zeros(len(self.matches), bool)

    @staticmethod
    def _believed(geometry: TwoViewGeometry) -> bool:
        if geometry.model is GeometryModel.NONE:
            return False
        sample = _SAMPLES[geometry.model]
        return geometry.num_inliers - sample >= _BELIEVED * (len(geometry.inliers) - sample)

    @property
    def verified(self) -> int:
        return len(self.matches) if self.geometry is None else self.geometry.num_inliers


@dataclass(frozen=True, eq=False)
class _CameraState:
    """All that a camera leaves behind, for :meth:`Frontend.snapshot`; the previous frame without its tensors."""

    camera: str
    count: int
    sequence: int
    stamp: int
    features: Features | None
    calibration: Camera | None
    rays: np.ndarray | None
    motion: Motion | None
    tracks: TracksState | None


class FeatureExtractor(Protocol):
    """What the front end needs of an :class:`Extractor`; another one takes its place with other features.

    Descriptors have unit rows, and the higher their dot product, the more alike they are. timings: milliseconds of the
    last call by stage: preprocess, network, select.
    """

    device: torch.device
    timings: dict[str, float]

    @property
    def descriptor_space(self) -> str: ...

    @property
    def precision(self) -> str: ...

    @property
    def engine(self) -> str: ...

    @property
    def engine_note(self) -> str: ...

    @property
    def engine_making(self) -> str: ...

    def update(self, **options: Any) -> None: ...

    def extract_batch(
        self,
        images: Sequence[Array],
        masks: Sequence[Array | None] | None = None,
        max_keypoints: Sequence[int] | None = None,
        *,
        score_maps: bool | Sequence[bool] = False,
        to_numpy: bool = True,
    ) -> list[Features]: ...


class Frontend:
    """Features, matches, two-view geometry and tracks of image streams, any number of cameras.

    To be used by one thread at a time, whichever it is, but for :meth:`submit`. extractor: what finds the features
    instead of the network; the weights, device and precision of the configuration are not used then. build_engines:
    see ``Extractor``. Raises WeightsError, DeviceError, ConfigError.
    """

    def __init__(
        self,
        config: FrontendConfig | None = None,
        extractor: FeatureExtractor | None = None,
        *,
        build_engines: BuildEngines = "now",
    ) -> None:
        self.config = config = FrontendConfig() if config is None else config
        self.extractor: FeatureExtractor = extractor or Extractor(
            config.weights,
            config.device,
            precision=config.precision,
            engine=config.engine,
            build_engines=build_engines,
            **_extraction_options(config),
        )
        self._previous: dict[str, _Frame] = {}
        self._tracks: dict[str, TrackManager] = {}
        self._counts: dict[str, int] = {}
        self._on_their_way: list[Submitted] = []  # one thread appends, another one removes
        # On a device everything is submitted at once, matches with the frame submitted before included, and comes back
        # in one download. What is only known with the results, windows and stereo pairs, is matched in a stream of its
        # own, or it would wait for the network of the next frame.
        self._ahead = isinstance(self.extractor, Extractor) and self.extractor.device.type == "cuda"
        self._submitted: dict[str, Points] = {}
        self._stream = (
            torch.cuda.Stream(self.extractor.device, priority=-1) if self.extractor.device.type == "cuda" else None
        )

    def warm_up(self, size: tuple[int, int] = (640, 480), batch: int = 1) -> None:
        """Run the network once on ``batch`` images of (width, height), so that the first frame does not pay for it."""
        if isinstance(self.extractor, Extractor):
            self.extractor.warm_up(size, batch)
        else:
            self.extractor.extract_batch([np.full((size[1], size[0]), 127, np.uint8)] * batch)

    def update(self, config: FrontendConfig) -> None:
        """Go on with other settings from the next frame; tracks go on, too.

        Raises ConfigError, with everything left as it was, where weights, device, precision or engine
        differ.
        """
        fixed = [name for name in _FIXED if getattr(config, name) != getattr(self.config, name)]
        if fixed:
            raise ConfigError(
                f"{' and '.join(fixed)} cannot change while the front end runs: expected "
                f"{', '.join(repr(getattr(self.config, name)) for name in fixed)}, found "
                f"{', '.join(repr(getattr(config, name)) for name in fixed)}; make a new front end"
            )
        self.extractor.update(**_extraction_options(config))
        self.config = config

    def reset(self, camera: str | None = None) -> None:
        """Forget the previous frame of a camera, or of all. The next one has no predecessor; its number goes on.

        Tracks end, and the next frame that has tracks says so.
        """
        for name in list(self._previous) if camera is None else [camera]:
            self._previous.pop(name, None)
            self._submitted.pop(name, None)

    def snapshot(self) -> Columns:
        """All that later frames depend on, as plain arrays (columns.py): what :meth:`restore` takes."""
        cameras = sorted({*self._previous, *self._tracks, *self._counts})
        return to_columns(_CameraState, [self._state(camera) for camera in cameras])

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from where a front end of the same configuration was at its :meth:`snapshot`: results are the same.

        Raises DataError for what is no such state, and FeatureError where the descriptors are of another space; both
        leave everything as it was.
        """
        states: list[_CameraState] = list(Table(_CameraState, state))
        spaces = {each.features.descriptor_space for each in states if each.features is not None}
        if spaces - {self.extractor.descriptor_space}:
            raise FeatureError(
                f"expected the state of a front end with descriptors of '{self.extractor.descriptor_space}', found one "
                f"of {', '.join(sorted(spaces))}: go on with the same weights"
            )
        device = self.extractor.device
        self._submitted.clear()  # of frames that are not the predecessors any more
        self._counts = {each.camera: each.count for each in states}
        self._previous = {each.camera: frame for each in states if (frame := _restored(each, device)) is not None}
        self._tracks = {each.camera: TrackManager(each.tracks) for each in states if each.tracks is not None}

    def _state(self, camera: str) -> _CameraState:
        count, frame, tracks = self._counts.get(camera, 0), self._previous.get(camera), self._tracks.get(camera)
        state = None if tracks is None else tracks.state()
        if frame is None:
            return _CameraState(camera, count, -1, 0, None, None, None, None, state)
        features = replace(frame.features, score_map=None)
        kept = (features, frame.calibration, frame.rays, frame.motion, state)
        return _CameraState(camera, count, frame.sequence, frame.stamp, *kept)

    def close(self) -> None:
        """Give the memory on the device back, to other processes, too. Nothing can be processed after that."""
        device = self.extractor.device
        self._previous.clear()
        self._tracks.clear()
        self._submitted.clear()
        if isinstance(self.extractor, Extractor):
            self.extractor.close()
        del self.extractor
        gc.collect()  # what is in a cycle would keep its tensors
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def process(
        self,
        image: Array,
        stamp: int,
        camera: str = "camera",
        calibration: Camera | None = None,
        mask: Array | None = None,
        *,
        rotation: np.ndarray | None = None,
        match: bool = True,
        track: bool = True,
        assess: bool = True,
        score_map: bool = False,
    ) -> FrameResult:
        """Process the next image of a camera.

        image, mask: as :class:`Extractor` takes them; an image without any contrast has no features. stamp:
        nanoseconds. calibration: with it, matches are verified by the essential matrix of undistorted rays; without, by
        the fundamental matrix of pixels, which is only right for images without much distortion. rotation: (3, 3),
        takes rays of the camera at its previous processed frame to rays at this one, from a gyroscope; with a
        calibration it predicts where points are. match, track, assess: False spares the work where nobody asks for
        matches, tracks or the quality of the image; tracks need matches, and the result has them then, too. Tracks end
        with a frame for which they were not asked for, and where more than five seconds (TRACK_GAP) are between two
        frames; the next frame that has tracks says so. score_map: True keeps that of the detector in the features.

        Stamps must increase. One that equals the previous one, or lies less than a second (LATE) before it, is that of
        an image which was sent twice or came too late. One that lies further back says that a clock was set or that a
        recording starts again: it resets the camera, as another image size does; ``reset_reason`` then says why.

        Raises StaleImageError for a late image, ImageError for one that cannot be used, and CalibrationError for the
        calibration of another image size, one that cannot be used, or a rotation that is none; all leave the camera as
        it was.
        """
        given = FrameInput(image, stamp, camera, calibration, mask, rotation, match, track, assess, score_map=score_map)
        (result,) = self.process_batch([given])
        if isinstance(result, Exception):
            raise result
        return result

    def process_batch(self, inputs: Sequence[FrameInput]) -> list[FrameResult | Exception]:
        """Process the next images of several cameras; the same as one after the other, see :meth:`process`.

        The network runs once for all images of one size and kind. An image that cannot be used has the error in its
        place, and the others go on: a ScfeatError, or whatever else went wrong with it.
        """
        return self.result(self.submit(inputs))

    def submit(self, inputs: Sequence[FrameInput]) -> Submitted:
        """The first half of :meth:`process_batch`: the network, of which a device need not be done on return.

        Writes nothing that a camera remembers, so one thread may submit the next frames while another one takes the
        :meth:`result` of those before. Each is taken once, in the order of the submits; update, reset, snapshot,
        restore and close only while none is on its way, and match_stereo in the thread that takes the results. An image
        that is late for one on its way goes to the network with the others, whose last digits may then differ.
        """
        found: dict[int, _Extracted | Exception] = {}
        for index, given in enumerate(inputs):
            if (refusal := self._refusal(given)) is not None:
                found[index] = refusal
        for group in _alike(inputs, [index for index in range(len(inputs)) if index not in found]):
            found.update(zip(group, self._extract([inputs[index] for index in group]), strict=True))
        submitted = Submitted(tuple(inputs), tuple(found[index] for index in range(len(inputs))))
        self._on_their_way.append(submitted)
        return submitted

    def result(self, submitted: Submitted) -> list[FrameResult | Exception]:
        """The second half of :meth:`process_batch`: matches, geometry and tracks, once the network is done."""
        try:
            with self._own_stream():
                return [self._attempt(*each) for each in zip(submitted.inputs, submitted.found, strict=True)]
        finally:
            self._on_their_way.remove(submitted)

    def match_stereo(self, left: FrameResult, right: FrameResult) -> PairResult:
        """Match two frames of two cameras that were taken at the same time, view 0 the left one.

        They must be the newest frames of their cameras. Where both were given with R and P of a calibrated rig,
        neighbours are looked for along the epipolar lines, within ``stereo_gate``, and in front of the cameras; all
        matches are then consistent with it, and the geometry is that of the rig. Otherwise they are matched all over
        the image and verified as those of two frames of one camera are.

        Raises FeatureError for other frames and CalibrationError where R and P are those of no horizontal rig.
        """
        frame0, frame1 = self._frame_of(left), self._frame_of(right)
        cameras = _both(frame0.calibration, frame1.calibration)
        with self._own_stream():
            if cameras is not None and all(camera.R is not None and camera.P is not None for camera in cameras):
                found = self._match_rig(frame0, frame1, cameras)
            else:
                found = self._verified(frame0, frame1, self._matches(frame0, frame1, None), {})
        return _pair(found, frame0, left.camera, MatchKind.STEREO)

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    # -- one frame -----------------------------------------------------------------------------------------------------

    def _refusal(self, given: FrameInput) -> Exception | None:
        """Why the network need not run for this image."""
        try:
            if not self._is_on_its_way(given.camera):  # or its predecessor is not known yet
                self._check_order(given.camera, given.stamp)
            if given.calibration is not None:
                check_camera(given.calibration)
            if given.rotation is not None:
                check_rotation(given.rotation, "rotation")
        except Exception as error:  # here and below: one camera must not take the others with it
            return error
        return None

    def _is_on_its_way(self, camera: str) -> bool:
        return any(given.camera == camera for submitted in tuple(self._on_their_way) for given in submitted.inputs)

    def _check_order(self, camera: str, stamp: int) -> None:
        previous = self._previous.get(camera)
        if previous is None or not 0 <= (back := previous.stamp - stamp) < LATE:
            return
        found = f"one {1e-9 * back:.3f} s older" if back else f"the same stamp again ({1e-9 * stamp:.3f} s)"
        raise StaleImageError(
            f"expected an image newer than the previous one of camera '{camera}', found {found}: images overtake each "
            "other or come twice, two publishers share the topic, or the driver sets no stamps"
        )

    def _extract(self, group: list[FrameInput]) -> list[_Extracted | Exception]:
        """Features of images of one size; one by one where that fails for all at once, to tell which one it is."""
        batch = (
            [given.image for given in group],
            [given.mask for given in group] if any(given.mask is not None for given in group) else None,
            [self.config.budgets.get(given.camera, self.config.max_keypoints) for given in group],
        )
        score_maps = [given.score_map for given in group]
        found: Sequence[Features | _Ahead]
        try:
            if self._ahead and isinstance(self.extractor, Extractor):
                found = self._match_ahead(group, self.extractor.extract_padded(*batch, score_maps=score_maps))
            else:
                found = self.extractor.extract_batch(*batch, score_maps=score_maps, to_numpy=False)
        except Exception as error:
            return [error] if len(group) == 1 else [self._extract([given])[0] for given in group]
        timings = {stage: time_ms / len(group) for stage, time_ms in self.extractor.timings.items()}
        return [_Extracted(features, dict(timings)) for features in found]

    @torch.inference_mode()
    def _match_ahead(self, group: list[FrameInput], padded: PaddedFeatures) -> list[_Ahead]:
        """Match each image with the one of its camera that was submitted before, and begin the download of it all."""
        tensors: list[torch.Tensor] = list(padded.points)
        matched: list[tuple[PaddedFeatures, Points | None, int]] = []
        for given, own in zip(group, padded.of_each(), strict=True):
            before = self._submitted.get(given.camera) if self._matches_all_over(given) else None
            matched.append((own, before, len(tensors)))
            if before is not None:
                tensors += _match_padded(before, own.points, self.config.min_cosine)
            self._submitted[given.camera] = own.points
        download = Download(tensors)
        return [_Ahead(own, before, download, place, at) for place, (own, before, at) in enumerate(matched)]

    def _matches_all_over(self, given: FrameInput) -> bool:
        """Whether this can be matched before the motion of the frame before is known."""
        return (given.match or given.track) and self.config.search_radius == 0 and given.rotation is None

    def _attempt(self, given: FrameInput, extracted: _Extracted | Exception) -> FrameResult | Exception:
        if isinstance(extracted, Exception):
            return extracted
        try:
            self._check_order(given.camera, given.stamp)  # again: its predecessor was on its way, or in the same batch
            return self._follow(given, extracted)
        except Exception as error:
            return error

    def _follow(self, given: FrameInput, extracted: _Extracted) -> FrameResult:
        """Everything that comes after the network. What it leaves behind is written at the end, all or nothing."""
        timings = extracted.timings
        with _timed(timings, "select"):
            gray = reduce(given.image)
            on_device, features, matched = extracted.arrive()
            ahead = extracted.features.padded.points if isinstance(extracted.features, _Ahead) else None
            if not has_contrast(gray):
                on_device, features, ahead, matched = _no_features(on_device), _no_features(features), None, None
        _check_size(given.calibration, features.image_size)
        quality = None
        if given.assess:
            with _timed(timings, "assess"):
                quality = assess(gray)
        previous, reset_reason = self._predecessor(given.camera, given.stamp, features)
        sequence = self._counts.get(given.camera, 0)
        with _timed(timings, "select"):
            frame = replace(_frame(sequence, given, on_device, features), ahead=ahead, matched=matched)
        found = None
        if previous is not None and (given.match or given.track):
            found, frame = self._match(previous, frame, given.rotation, timings)
        tracks = self._track(given, previous, frame, found, timings)
        self._previous[given.camera] = frame
        self._counts[given.camera] = sequence + 1
        pair = None if found is None or previous is None else _pair(found, previous, given.camera)
        return FrameResult(given.camera, sequence, given.stamp, features, pair, timings, reset_reason, tracks, quality)

    def _predecessor(self, camera: str, stamp: int, features: Features) -> tuple[_Frame | None, str]:
        """The previous frame, or none and the reason for a reset."""
        previous = self._previous.get(camera)
        if previous is None:
            return None, ""
        if stamp < previous.stamp:
            back = 1e-9 * (previous.stamp - stamp)
            return None, f"stamp went back by {back:.3f} s: a clock was set, or a recording starts again"
        old, new = previous.features.image_size, features.image_size
        if old != new:
            return None, f"image size changed from {old[0]}x{old[1]} to {new[0]}x{new[1]}"
        return previous, ""

    # -- matching ------------------------------------------------------------------------------------------------------

    def _match(
        self, previous: _Frame, frame: _Frame, rotation: np.ndarray | None, timings: dict[str, float]
    ) -> tuple[_Correspondence, _Frame]:
        """Correspondences to the previous frame, and the frame with the motion that they say.

        First around where points are expected; all over the image where that finds too little to be right.
        """
        with _timed(timings, "match"):
            turned = _turned(previous, frame, rotation)
            gate = self._window(previous, frame, turned)
            matches = self._matches(previous, frame, gate)
        found = self._verified(previous, frame, matches, timings)
        if gate is not None and found.verified < _ENOUGH * min(len(previous.features), len(frame.features)):
            with _timed(timings, "match"):
                matches = self._matches(previous, frame, None)
            everywhere = self._verified(previous, frame, matches, timings)
            found = everywhere if everywhere.verified > found.verified else found
        return found, replace(frame, motion=_motion(found, turned, 1e-9 * (frame.stamp - previous.stamp)))

    def _window(self, previous: _Frame, frame: _Frame, turned: np.ndarray | None) -> matching.Gate | None:
        """Where to look for the points of the previous frame; None: everywhere.

        The radius grows with the time since, where frames were dropped: the prediction is for as much longer.
        """
        radius = self.config.search_radius
        if radius == 0 and turned is not None:
            radius = TURN_RADIUS * max(frame.features.image_size)
        if radius == 0:
            return None
        seconds = 1e-9 * (frame.stamp - previous.stamp)
        expected = predict(previous.features.keypoints, previous.motion, seconds, turned)
        if expected is None:
            return None
        longer = 1.0 if previous.motion is None else max(1.0, seconds / previous.motion.seconds)
        positions = frame.on_device.keypoints
        return matching.window(torch.from_numpy(expected).to(positions.device), positions, longer * radius)

    def _matches(self, frame0: _Frame, frame1: _Frame, gate: matching.Gate | None) -> Matches:
        if gate is None and frame1.matched is not None and frame1.matched[0] is frame0.ahead:
            return frame1.matched[1]
        return matching.match(frame0.on_device, frame1.on_device, min_cosine=self.config.min_cosine, gate=gate).numpy()

    def _verified(self, frame0: _Frame, frame1: _Frame, matches: Matches, timings: dict[str, float]) -> _Correspondence:
        keypoints0 = frame0.features.keypoints[matches.indices0]
        keypoints1 = frame1.features.keypoints[matches.indices1]
        if not self.config.verify:
            return _Correspondence(matches, keypoints0, keypoints1, None)
        cameras = _both(frame0.calibration, frame1.calibration)
        needs_rays = self.config.geometry == "essential"
        with _timed(timings, "verify"):
            geometry = verify(
                keypoints0,
                keypoints1,
                threshold=self.config.verification_threshold,
                model="fundamental" if needs_rays and cameras is None else self.config.geometry,
                cameras=cameras,
                rays=None if cameras is None else _matched_rays(frame0, frame1, matches),
            )
        return _Correspondence(matches, keypoints0, keypoints1, geometry)

    def _match_rig(self, frame0: _Frame, frame1: _Frame, cameras: tuple[Camera, Camera]) -> _Correspondence:
        matches = stereo.match_stereo(
            frame0.on_device,
            frame1.on_device,
            *cameras,
            gate=self.config.stereo_gate,
            min_cosine=self.config.min_cosine,
        ).numpy()
        geometry = TwoViewGeometry(
            GeometryModel.ESSENTIAL,
            stereo.essential_matrix(*cameras),
            np.ones(len(matches), bool),
            self.config.stereo_gate,
        )
        keypoints0 = frame0.features.keypoints[matches.indices0]
        keypoints1 = frame1.features.keypoints[matches.indices1]
        return _Correspondence(matches, keypoints0, keypoints1, geometry)

    def _frame_of(self, result: FrameResult) -> _Frame:
        frame = self._previous.get(result.camera)
        if frame is None or frame.sequence != result.sequence:
            found = "none since a reset" if frame is None else f"number {frame.sequence}"
            raise FeatureError(
                f"expected frame {result.sequence} of camera '{result.camera}' to be its newest for stereo matching, "
                f"found {found}: match a pair before its next frames are processed"
            )
        return frame

    # -- tracks --------------------------------------------------------------------------------------------------------

    def _track(
        self,
        given: FrameInput,
        previous: _Frame | None,
        frame: _Frame,
        found: _Correspondence | None,
        timings: dict[str, float],
    ) -> Tracks | None:
        manager = self._tracks.get(given.camera)
        apart = previous is None or not given.track or frame.stamp - previous.stamp > TRACK_GAP
        if apart and manager is not None:
            manager.reset()
        if not given.track:
            return None
        manager = self._tracks.setdefault(given.camera, TrackManager())
        with _timed(timings, "track"):
            return manager.update(
                View(frame.sequence, frame.stamp, frame.features, _beside(frame), frame.rays),
                None if found is None or previous is None else _links(found, previous.sequence),
                max_gap=self.config.max_track_gap,
                min_cosine=self.config.reidentify_cosine,
            )


def _extraction_options(config: FrontendConfig) -> dict[str, Any]:
    names = ("max_keypoints", "score_threshold", "nms_radius", "border", "grid", "clahe", "levels")
    return {name: getattr(config, name) for name in names}


def _alike(inputs: Sequence[FrameInput], indices: list[int]) -> list[list[int]]:
    """The indices, in groups of images that one tensor can hold."""
    groups: dict[Any, list[int]] = {}
    for index in indices:
        image = inputs[index].image
        kind = (type(image), getattr(image, "shape", None), getattr(image, "dtype", None))
        groups.setdefault(kind, []).append(index)
    return list(groups.values())


def _frame(sequence: int, given: FrameInput, on_device: Features, features: Features) -> _Frame:
    rays = None
    if given.calibration is not None and (given.track or given.match):
        rays = undistort_points(features.keypoints, given.calibration)
    kept = replace(on_device, score_map=None)
    return _Frame(sequence, given.stamp, kept, features, given.calibration, rays)


def _restored(state: _CameraState, device: torch.device) -> _Frame | None:
    """The previous frame of a camera, with its tensors on the device again."""
    features = state.features
    if features is None:
        return None
    names = ("keypoints", "scores", "descriptors")
    tensors: dict[str, Any] = {name: torch.from_numpy(getattr(features, name)).to(device) for name in names}
    on_device = replace(features, **tensors)
    return _Frame(state.sequence, state.stamp, on_device, features, state.calibration, state.rays, state.motion)


def _no_features(features: Features) -> Features:
    names = ("keypoints", "scores", "descriptors")
    return replace(features, **{name: getattr(features, name)[:0] for name in names})


def _match_padded(before: Points, points: Points, min_cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Partners and similarities for each point (1, K) of ``before``."""
    (valid0,), (valid1,) = before.scores > -torch.inf, points.scores > -torch.inf
    if len(valid0) == 0 or len(valid1) == 0:
        return torch.full_like(valid0, -1, dtype=torch.int32), before.scores[0]
    return matching.match_padded(before.descriptors[0], valid0, points.descriptors[0], valid1, min_cosine=min_cosine)


def _beside(frame: _Frame) -> torch.Tensor:
    """The descriptors on the host, where few are compared at a time, and nothing is to be waited for."""
    descriptors = frame.on_device.descriptors
    return descriptors if descriptors.device.type == "cpu" else torch.from_numpy(frame.features.descriptors)


def _matched_rays(frame0: _Frame, frame1: _Frame, matches: Matches) -> tuple[np.ndarray, np.ndarray] | None:
    """(M, 2) of both frames; None where one of them has none."""
    if frame0.rays is None or frame1.rays is None:
        return None
    return frame0.rays[matches.indices0], frame1.rays[matches.indices1]


def _both(camera0: Camera | None, camera1: Camera | None) -> tuple[Camera, Camera] | None:
    return None if camera0 is None or camera1 is None else (camera0, camera1)


def _turned(previous: _Frame, frame: _Frame, rotation: np.ndarray | None) -> np.ndarray | None:
    """Where the known rotation alone takes the points of the previous frame; None where it is not known."""
    cameras = _both(previous.calibration, frame.calibration)
    if rotation is None or cameras is None:
        return None
    rays = undistort_points(previous.features.keypoints, cameras[0]) if previous.rays is None else previous.rays
    return turn(rays, rotation, cameras[1])


def _motion(found: _Correspondence, turned: np.ndarray | None, seconds: float) -> Motion:
    good = found.trusted
    indices0, indices1 = found.matches.indices0[good], found.matches.indices1[good]
    points = found.keypoints1[good]
    own_steps = None if turned is None else points - turned[indices0]
    return Motion(indices1, points, points - found.keypoints0[good], own_steps, seconds)


def _links(found: _Correspondence, sequence0: int) -> Links:
    good = found.trusted
    return Links(sequence0, found.matches.indices0[good], found.matches.indices1[good])


def _pair(found: _Correspondence, frame0: _Frame, camera0: str, kind: MatchKind = MatchKind.TEMPORAL) -> PairResult:
    return PairResult(
        frame0.sequence, frame0.stamp, found.matches, found.keypoints0, found.keypoints1, found.geometry, kind, camera0
    )


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the milliseconds to those of the stage."""
    start = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + 1e3 * (time.perf_counter() - start)


def _check_size(calibration: Camera | None, image_size: tuple[int, int]) -> None:
    if calibration is not None and tuple(calibration.size) != image_size:
        raise CalibrationError(
            f"expected the calibration of images of {image_size[0]}x{image_size[1]}, found one for "
            f"{calibration.size[0]}x{calibration.size[1]}: give that of this camera, scaled as its images are"
        )
