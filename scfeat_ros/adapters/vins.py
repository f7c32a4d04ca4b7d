"""Tracks for the estimators of VINS-Fusion and VINS-Mono: takes the place of their feature tracker.

Both read ``sensor_msgs/PointCloud`` on /feature_tracker/feature: a point is an undistorted normalised ray (z = 1), and
what else is known of it lies in the channels. Ids are float32 there, so they must stay below 2^24.

The window of VINS holds the observations of a feature without their frames: it takes them for consecutive. Whatever
was not in the message before must therefore come with a new id, be it new or found again after a gap.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from geometry_msgs.msg import Point32
from rclpy.node import Node
from rclpy.qos_overriding_options import QoSOverridingOptions
from scfeat.msg import Matches as MatchesMessage
from scfeat.msg import Tracks as TracksMessage
from sensor_msgs.msg import ChannelFloat32, PointCloud
from std_msgs.msg import Bool, Header

from scfeat_core.errors import ConfigError, DataError
from scfeat_core.types import PairResult, Tracks

from ..messages import matches_from_message, nanoseconds, tracks_from_message
from .joining import Join
from .process import RELIABLE, parameter, run

ID_LIMIT = 1 << 24  # float32 holds all whole numbers up to here
FUSION_CHANNELS = ("id", "camera_id", "u", "v", "vx", "vy", "gx", "gy", "gz")
MONO_CHANNELS = ("id", "u", "v", "vx", "vy")
TOPIC = "/feature_tracker/feature"
RESTART_TOPICS = {"fusion": "/vins_restart", "mono": "/feature_tracker/restart"}
# VINS keeps 1000 features in its window of 11 frames and does not look further: 11 x 150 / 2 observations fit.
MAX_TRACKS, MOST_TRACKS = 150, 350
LEFT, RIGHT = 0, 1


@dataclass(frozen=True, eq=False)
class View:
    """What one camera sees of the features; parallel arrays of S.

    camera: 0, or 1 for the right one. ids: (S,) int64, below ID_LIMIT. rays: (S, 2) float32, normalised, undistorted.
    pixels: (S, 2) float32. velocities: (S, 2) float32, of the rays, per second.
    """

    camera: int
    ids: np.ndarray
    rays: np.ndarray
    pixels: np.ndarray
    velocities: np.ndarray


class WireIds:
    """Ids for the wire: a track keeps its own while it is in every message, and no two in one message share one."""

    def __init__(self, limit: int = ID_LIMIT) -> None:
        """limit: ids are below it, and begin at 0 again when all have been used."""
        self._limit = limit
        self._next = 0
        self.reset()

    def reset(self) -> None:
        """All tracks get new ids; those that were given out do not come back before all others were."""
        self._tracks = np.empty(0, np.uint32)
        self._ids = np.empty(0, np.int64)

    def assign(self, tracks: np.ndarray) -> np.ndarray:
        """The ids (S,) int64 of the tracks (S,) uint32 of one message, each once."""
        ids = np.full(len(tracks), -1, np.int64)
        _, here, before = np.intersect1d(tracks, self._tracks, assume_unique=True, return_indices=True)
        ids[here] = self._ids[before]
        new = ids < 0
        ids[new] = self._take(int(new.sum()), self._ids[before])
        self._tracks, self._ids = tracks.copy(), ids
        return ids

    def _take(self, count: int, living: np.ndarray) -> np.ndarray:
        candidates = (self._next + np.arange(count + len(living))) % self._limit
        taken = candidates[~np.isin(candidates, living)][:count]
        if count:
            self._next = int(taken[-1] + 1) % self._limit
        return taken


def choose(tracks: Tracks, max_tracks: int, min_age: int) -> np.ndarray:
    """Indices (S,) int64 of the tracks that VINS gets: with a finite ray, old enough, and the oldest of these.

    Empty without calibration. The oldest, since they are the ones that VINS has in its window already.
    """
    if tracks.rays is None:
        return np.empty(0, np.int64)
    usable = np.flatnonzero(np.isfinite(tracks.rays).all(axis=1) & (tracks.ages >= min_age))
    oldest = np.argsort(-tracks.ages[usable].astype(np.int64), kind="stable")[:max_tracks]
    return np.sort(usable[oldest])


def view(tracks: Tracks, chosen: np.ndarray, ids: np.ndarray, camera: int = LEFT) -> View:
    """The chosen (S,) tracks of a calibrated camera with their ids (S,); velocities that are not known are 0."""
    assert tracks.rays is not None, "choose() takes nothing of a camera without rays"
    known = np.zeros_like(tracks.rays) if tracks.velocities is None else tracks.velocities
    velocities = np.where(np.isfinite(known), known, 0)[chosen]
    return View(camera, ids, tracks.rays[chosen], tracks.keypoints[chosen], velocities)


def right_view(left: View, tracks: Tracks, pair: PairResult) -> View:
    """What the right camera sees of the features of the left one.

    tracks: of the right camera. pair: stereo matches; pixels repeat those of the tracks bit by bit, which joins them.
    """
    none = np.empty(0, np.int64)
    verified = np.ones(len(pair.keypoints0), bool) if pair.geometry is None else pair.geometry.inliers
    in_left, matched0 = _join(left.pixels, pair.keypoints0[verified])
    in_right, matched1 = _join(tracks.keypoints, pair.keypoints1[verified][matched0])
    usable = none if tracks.rays is None else np.flatnonzero(np.isfinite(tracks.rays[in_right]).all(axis=1))
    if len(usable) == 0:
        return View(RIGHT, none, *np.empty((3, 0, 2), np.float32))
    return view(tracks, in_right[usable], left.ids[in_left[matched1[usable]]], RIGHT)


def fusion_cloud(header: Header, views: Sequence[View]) -> PointCloud:
    """For VINS-Fusion; views: of the left camera and, where there is one, of the right, in this order.

    It reads channels 6 to 8, a true position for debugging, wherever there are more than 5: hence all nine.
    """
    columns = [
        np.concatenate([view.ids for view in views]),
        np.concatenate([np.full(len(view.ids), view.camera) for view in views]),
        *_columns(views),
    ]
    columns += [np.zeros(len(columns[0]))] * 3
    return _cloud(header, views, FUSION_CHANNELS, columns)


def mono_cloud(header: Header, views: Sequence[View], num_of_cam: int = 1) -> PointCloud:
    """For VINS-Mono, in the frame "world" as from its own tracker. num_of_cam: the constant it was compiled with."""
    world = Header(stamp=header.stamp, frame_id="world")
    ids = np.concatenate([view.ids * num_of_cam + view.camera for view in views])
    return _cloud(world, views, MONO_CHANNELS, [ids, *_columns(views)])


def _join(points0: np.ndarray, points1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of equal rows of two (N, 2) float32."""
    keys = (np.ascontiguousarray(points, np.float32).view(np.int64).ravel() for points in (points0, points1))
    return np.intersect1d(*keys, return_indices=True)[1:]


def _columns(views: Sequence[View]) -> list[np.ndarray]:
    pixels = np.concatenate([view.pixels for view in views])
    velocities = np.concatenate([view.velocities for view in views])
    return [pixels[:, 0], pixels[:, 1], velocities[:, 0], velocities[:, 1]]


def _cloud(header: Header, views: Sequence[View], names: Sequence[str], columns: Sequence[np.ndarray]) -> PointCloud:
    channels = [ChannelFloat32(name=name, values=_floats(column)) for name, column in zip(names, columns, strict=True)]
    rays = np.concatenate([view.rays for view in views]).astype(float)
    # A message for each point is what the type asks for: a few hundred, not thousands.
    return PointCloud(header=header, points=[Point32(x=x, y=y, z=1.0) for x, y in rays], channels=channels)


def _floats(column: np.ndarray) -> array[float]:
    values = array("f")
    values.frombytes(np.ascontiguousarray(column, np.float32).view(np.uint8).data)
    return values


@dataclass(frozen=True)
class Options:
    """flavour: fusion or mono. max_tracks, min_age: of ``choose``. max_gap: seconds. num_of_cam: of ``mono_cloud``."""

    flavour: str = "fusion"
    max_tracks: int = MAX_TRACKS
    min_age: int = 2
    max_gap: float = 1.0
    num_of_cam: int = 1

    def __post_init__(self) -> None:
        if self.flavour not in RESTART_TOPICS:
            raise ConfigError(f"expected flavour to be one of {', '.join(RESTART_TOPICS)}; found {self.flavour!r}")
        for name, low, high in (("max_tracks", 1, MOST_TRACKS), ("min_age", 1, 1000), ("num_of_cam", 1, 8)):
            if not low <= (found := getattr(self, name)) <= high:
                raise ConfigError(f"expected {name} from {low} to {high}, found {found}")
        if not self.max_gap > 0:
            raise ConfigError(f"expected max_gap above 0 seconds, found {self.max_gap}")


class Feed:
    """Tracks messages of one camera, one after the other, into what VINS gets."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._ids = WireIds(ID_LIMIT // options.num_of_cam)
        self._session = ""
        self._stamp: int | None = None

    def interruption(self, message: TracksMessage) -> str:
        """Why VINS has to start anew before this message; empty where it goes on."""
        stamp, last = nanoseconds(message.header.stamp), self._stamp
        session, self._stamp, self._session = self._session, stamp, message.session
        why = ""
        if last is not None and stamp <= last:
            why = f"the stamps go back by {(last - stamp) / 1e9:.3f} s"
        elif last is not None and stamp - last > self._options.max_gap * 1e9:
            why = f"no tracks came for {(stamp - last) / 1e9:.3f} s"
        elif last is not None and message.session != session:
            why = "the front end was started again"
        if why:
            self._ids.reset()
        return why

    def cloud(
        self, message: TracksMessage, right: tuple[TracksMessage, MatchesMessage] | None = None
    ) -> PointCloud | None:
        """right: tracks of the right camera and the stereo matches. None where tracks carry no rays."""
        tracks, options = tracks_from_message(message), self._options
        if tracks.rays is None and len(tracks):
            return None
        chosen = choose(tracks, options.max_tracks, options.min_age)
        ids = self._ids.assign(tracks.ids[chosen])
        views = [view(tracks, chosen, ids)] if len(chosen) else [View(LEFT, ids, *np.empty((3, 0, 2), np.float32))]
        if right is not None:
            views.append(right_view(views[0], tracks_from_message(right[0]), matches_from_message(right[1])))
        if options.flavour == "mono":
            return mono_cloud(message.header, views, options.num_of_cam)
        return fusion_cloud(message.header, views)


class VinsAdapter(Node):
    """Subscribes to the tracks of one camera, or of two and their stereo matches, and publishes for VINS."""

    def __init__(self, **arguments: Any) -> None:
        """Raises ConfigError where a parameter is wrong."""
        super().__init__("vins_adapter", **arguments)
        options = self._options()
        cameras = [name for name in parameter(self, "cameras", [""], "left and right camera; empty: only one") if name]
        if len(cameras) not in (0, 2) or (cameras and options.flavour == "mono"):
            raise ConfigError(
                f"expected no names of cameras, or for flavour fusion two, [left, right]; found {cameras} for "
                f"{options.flavour}: for one of several cameras remap scfeat/tracks to its topic instead"
            )
        self._feed = Feed(options)
        self._rights = Join(2)  # tracks of the right camera and stereo matches, by the stamp of the right image
        self._pairs = Join(2)  # tracks of the left camera and both of the right one, by the stamp of the left image
        self._clouds = self._publisher(PointCloud, TOPIC)
        self._restarts = self._publisher(Bool, RESTART_TOPICS[options.flavour])
        self._subscribe(cameras)

    def _options(self) -> Options:
        default = Options()
        return Options(
            parameter(self, "flavour", default.flavour, "which VINS: fusion or mono"),
            parameter(self, "max_tracks", default.max_tracks, "send at most this many tracks of a frame, the oldest"),
            parameter(self, "min_age", default.min_age, "frames in which a track must have been seen"),
            parameter(self, "max_gap", default.max_gap, "seconds without tracks after which VINS starts anew"),
            parameter(self, "num_of_cam", default.num_of_cam, "the constant NUM_OF_CAM of VINS-Mono"),
        )

    def _publisher(self, kind: Any, topic: str) -> Any:
        overrides = QoSOverridingOptions.with_default_policies()
        return self.create_publisher(kind, topic, RELIABLE, qos_overriding_options=overrides)

    def _subscribe(self, cameras: Sequence[str]) -> None:
        if cameras:
            left, right = cameras
            self._input(TracksMessage, f"scfeat/{left}/tracks", self._on_left)
            self._input(TracksMessage, f"scfeat/{right}/tracks", self._on_right)
            self._input(MatchesMessage, f"scfeat/{right}/stereo_matches", self._on_stereo)
        else:
            self._input(TracksMessage, "scfeat/tracks", self._send)

    def _input(self, kind: Any, topic: str, callback: Any) -> None:
        overrides = QoSOverridingOptions.with_default_policies()
        subscription = self.create_subscription(kind, topic, callback, RELIABLE, qos_overriding_options=overrides)
        self.get_logger().info(f"subscribed to {subscription.topic_name}, publishing on {self._clouds.topic_name}")

    def _on_left(self, message: TracksMessage) -> None:
        self._send_pair(self._pairs.add(0, nanoseconds(message.header.stamp), message))

    def _on_right(self, message: TracksMessage) -> None:
        self._add_right(self._rights.add(0, nanoseconds(message.header.stamp), message))

    def _on_stereo(self, message: MatchesMessage) -> None:
        self._add_right(self._rights.add(1, nanoseconds(message.header.stamp), message))

    def _add_right(self, right: tuple[TracksMessage, MatchesMessage] | None) -> None:
        if right is not None:
            self._send_pair(self._pairs.add(1, nanoseconds(right[1].stamp0), right))

    def _send_pair(self, pair: tuple[TracksMessage, Any] | None) -> None:
        if pair is not None:
            self._send(*pair)

    def _send(self, message: TracksMessage, right: tuple[TracksMessage, MatchesMessage] | None = None) -> None:
        why = self._feed.interruption(message)
        if why:
            self.get_logger().warning(f"VINS is told to start anew: {why}")
            self._restarts.publish(Bool(data=True))
        try:
            cloud = self._feed.cloud(message, right)
        except DataError as error:
            self.get_logger().warning(f"frame dropped: {error}", throttle_duration_sec=5.0)
            return
        if cloud is None:
            self._complain(message.camera)
        else:
            self._clouds.publish(cloud)

    def _complain(self, camera: str) -> None:
        self.get_logger().warning(
            f"expected tracks with rays, found those of camera '{camera}' without: nothing is sent to VINS. The front "
            "end has no usable calibration of it: publish sensor_msgs/CameraInfo beside the image, or remap "
            "camera_info to it; last_error of its status topic says what is wrong with one that it got",
            throttle_duration_sec=5.0,
        )


def main(args: list[str] | None = None) -> int:
    """Run the adapter until SIGINT or SIGTERM; the exit status."""
    return run("vins_adapter", VinsAdapter, args)


if __name__ == "__main__":
    sys.exit(main())
