"""``scfeat bag-from-images``: images, stamps, calibration, ground truth and IMU of a data set to a rosbag2."""

from __future__ import annotations

import argparse
import contextlib
import heapq
import shutil
import sqlite3
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, ImageError, ScfeatError
from scfeat_core.replay.records import GroundTruth
from scfeat_core.replay.tum import quaternions
from scfeat_core.report import encode
from scfeat_core.types import Camera

from .bags import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, STORAGES, BagMessage, write_bag
from .image_folders import LAYOUTS, ImageSequence, ImageStream, Options, Picture, inertial, read_folder
from .images import compressed_to_array

EXIT_INCOMPLETE = 1  # some images are not in the bag, the others are
IMU = "sensor_msgs/msg/Imu"
POSE = "geometry_msgs/msg/PoseStamped"
TRUTH_TOPIC, IMU_TOPIC = "/ground_truth/pose", "/imu0"
TRUTH_FRAME = "map"  # REP 105: fixed, and without jumps of its own
IMU_FRAME = "imu0"
COMPRESSIONS = ("none", "message", "file", "storage")
_NAMED_AT_MOST = 5
_MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_ENCODINGS = {(2, "uint8"): "mono8", (2, "uint16"): "mono16", (3, "uint8"): "rgb8", (3, "uint16"): "rgb16"}

EPILOG = """\
Layouts, told apart by what is in DIR:
  tum     rgb.txt, depth.txt (with --depth), groundtruth.txt; calibration: camera_info.yaml, or TUM's for freiburg1 to 3
  euroc   mav0/cam0/data.csv, data/, sensor.yaml; imu0; state_groundtruth_estimate0, brought to cam0 by T_BS
  kitti   image_0 ... image_3, times.txt, calib.txt, ../../poses/XX.txt; or the folder of sequences, with --sequence
  folder  image files, in the order of their names (img9 before img10), with --fps or --stamps

Topics: /cam0/image_raw/compressed, /cam0/camera_info (tum: /camera/rgb/...), /ground_truth/pose (of the first camera,
in frame map), /imu0. PNG and JPEG files are carried as they are; others are stored as PNG, without loss. Headers and
times of recording are the stamps of the files, to the nanosecond. Depth maps are 32FC1, metres (REP 118).

Exit status: 0 a bag with an image for each stamp, 1 a bag without those images that are missing, damaged or of another
size (which ones is said), 2 no bag.

examples:
  scfeat bag-from-images rgbd_dataset_freiburg1_xyz --out fr1_xyz
  scfeat bag-from-images MH_01_easy --out mh01 --cameras cam0 --storage sqlite3
  scfeat bag-from-images kitti/dataset --sequence 07 --out kitti07 --compression file
  scfeat bag-from-images photos --fps 10 --intrinsics camchain.yaml --out photos_bag"""


# -- command -----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="of one sequence")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="BAG", help="folder to make")
    parser.add_argument("--layout", choices=LAYOUTS, help="(what is in DIR)")
    parser.add_argument("--cameras", metavar="NAMES", default="", help="only these, e.g. cam0 or cam0,cam1 (all)")
    parser.add_argument("--sequence", metavar="XX", help="of kitti, where DIR has several")
    parser.add_argument("--fps", type=_positive, metavar="HZ", help="of a plain folder: images a second, from 0 s on")
    parser.add_argument(
        "--stamps", type=Path, metavar="FILE", help="of a plain folder: a stamp a line, or stamp and name"
    )
    parser.add_argument("--intrinsics", type=Path, metavar="FILE", help="of Kalibr, ROS, COLMAP, EuRoC or KITTI")
    parser.add_argument("--ground-truth", type=Path, metavar="FILE", help="of TUM, EuRoC or KITTI")
    parser.add_argument("--depth", action="store_true", help="the depth maps of tum, too")
    bag = parser.add_argument_group("bag")
    bag.add_argument("--raw", action="store_true", help="decoded, as sensor_msgs/Image")
    bag.add_argument("--storage", choices=STORAGES, default="mcap", help="(%(default)s)")
    bag.add_argument(
        "--compression",
        choices=COMPRESSIONS,
        default="none",
        help="by zstd; storage: the chunks of an mcap (%(default)s)",
    )
    bag.add_argument("--no-progress", action="store_true", help="no progress bar (none without a terminal)")


def run(args: argparse.Namespace) -> int:
    cameras = tuple(name for name in args.cameras.split(",") if name)
    options = Options(
        args.layout,
        cameras,
        args.sequence,
        args.fps,
        args.stamps,
        args.intrinsics,
        args.ground_truth,
        args.depth,
    )
    sequence = read_folder(args.folder, options)
    compression = None if args.compression == "none" else args.compression
    with _progress(sequence, not args.no_progress and sys.stderr.isatty()) as advance:
        tally = make_bag(sequence, args.out, args.raw, args.storage, compression, advance)
    for line in (*sequence.notes, *tally.lines()):
        print(line)
    print(f"{args.out}: {tally}")
    return EXIT_INCOMPLETE if tally.skipped else 0


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found '{text}'")
    return value


@contextlib.contextmanager
def _progress(sequence: ImageSequence, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar with images a second and the time that is left, where tqdm is installed."""
    total = sum(len(stream.pictures) for stream in sequence.streams)
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, unit="image", dynamic_ncols=True, smoothing=0.1, disable=not wanted, leave=False) as bar:
        yield lambda: _ignore(bar.update())


def _ignore(result: Any) -> None:
    pass


# -- the bag -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """State: what went into the bag, by topic, and what did not: reason -> names."""

    written: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, path: Path) -> None:
        """Count an image that is not written."""
        self.skipped.setdefault(reason, []).append(path.name)

    def lines(self) -> Iterator[str]:
        """What was skipped, and why."""
        for reason, names in self.skipped.items():
            shown = ", ".join(names[:_NAMED_AT_MOST]) + (", ..." if len(names) > _NAMED_AT_MOST else "")
            yield f"skipped {len(names)} images, {reason}: {shown}"

    def __str__(self) -> str:
        return ", ".join(f"{count} on {topic}" for topic, count in sorted(self.written.items()))


def make_bag(
    sequence: ImageSequence,
    out: Path,
    raw: bool = False,
    storage: str = "mcap",
    compression: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Tally:
    """Write the rosbag2 ``out``, all messages by their stamps. raw: images decoded. advance: called for each image.

    Images that are missing, damaged, or of another size than the calibration are counted, not written. The bag appears
    when it is complete, or not at all. Memory does not grow with the images.

    Raises DataError where there is something at ``out`` already, a camera is without any image, or the IMU's file is
    damaged; ScfeatError where the bag cannot be written.
    """
    if out.exists():
        raise DataError(f"expected no file or folder at {out}, found one: choose another name")
    if compression == "storage" and storage != "mcap":
        raise DataError(
            f"expected --storage mcap with --compression storage, found {storage}: compress by message or file"
        )
    tally = Tally()
    maker = _Maker(raw)
    with _scratch(out) as folder:
        bag = folder / out.name
        write_bag(
            bag,
            _types(sequence, maker),
            _counted(_messages(sequence, maker, tally, advance), tally),
            storage,
            compression,
        )
        for stream in sequence.streams:
            if not tally.written[maker.topic(stream)]:
                why = "; ".join(tally.lines()) or "its list is empty"
                raise DataError(f"expected images of {stream.name}, found none that can be read ({why})")
        bag.replace(out)
    return tally


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that is gone in the end."""
    folder = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True)
        yield folder
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ScfeatError(
            f"expected to write the bag {out}, found: {reason}; free space, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _types(sequence: ImageSequence, maker: _Maker) -> dict[str, str]:
    types = {}
    for stream in sequence.streams:
        types[maker.topic(stream)] = COMPRESSED_IMAGE if maker.topic(stream).endswith("/compressed") else IMAGE
        if stream.camera is not None:
            types[f"/{stream.name}/camera_info"] = CAMERA_INFO
    if sequence.truth is not None:
        types[TRUTH_TOPIC] = POSE
    if sequence.imu is not None:
        types[IMU_TOPIC] = IMU
    return types


def _counted(messages: Iterator[BagMessage], tally: Tally) -> Iterator[BagMessage]:
    for message in messages:
        tally.written[message.topic] += 1
        yield message


def _messages(
    sequence: ImageSequence, maker: _Maker, tally: Tally, advance: Callable[[], None]
) -> Iterator[BagMessage]:
    """All, by time; at the same time a pose comes first, then the IMU, then images in the order of the cameras."""
    sources = []
    if sequence.truth is not None:
        sources.append(maker.poses(sequence.truth))
    if sequence.imu is not None:
        sources.append(maker.inertial(sequence.imu))
    sources += [maker.images(stream, tally, advance) for stream in sequence.streams]
    return heapq.merge(*sources, key=lambda message: message.log_time)


class _Maker:
    """Makes messages. raw: images are decoded. State: none but the types of the messages."""

    def __init__(self, raw: bool) -> None:
        from rosbags.typesys import Stores, get_typestore

        self._raw = raw
        self._store = get_typestore(Stores.ROS2_HUMBLE)
        self._types: Mapping[str, Any] = self._store.types

    def topic(self, stream: ImageStream) -> str:
        """Of the images, as image_transport would name it."""
        if stream.depth:
            return f"/{stream.name}/image"
        return f"/{stream.name}/image_raw" + ("" if self._raw else "/compressed")

    def poses(self, truth: GroundTruth) -> Iterator[BagMessage]:
        rotations = quaternions(truth.poses[:, :3, :3])
        for stamp, pose, rotation in zip(truth.stamps.tolist(), truth.poses, rotations, strict=True):
            yield self._pose(stamp, pose[:3, 3].tolist(), rotation.tolist())

    def inertial(self, file: Path) -> Iterator[BagMessage]:
        """The orientation is not known, which REP 145 says by a covariance of -1; other covariances are not, by 0."""
        unknown, none = np.zeros(9), np.zeros(9)
        none[0] = -1.0
        vector, quaternion = self._types["geometry_msgs/msg/Vector3"], self._types["geometry_msgs/msg/Quaternion"]
        for stamp, values in inertial(file):
            rate, acceleration = vector(*values[:3]), vector(*values[3:])
            fields = (quaternion(0.0, 0.0, 0.0, 1.0), none, rate, unknown, acceleration, unknown)
            yield self._message(IMU_TOPIC, IMU, stamp, IMU_FRAME, *fields)

    def images(self, stream: ImageStream, tally: Tally, advance: Callable[[], None]) -> Iterator[BagMessage]:
        """Each image, and its CameraInfo with the same header."""
        for picture in stream.pictures:
            advance()
            message = self._image(stream, picture, tally)
            if message is not None:
                yield message
                if stream.camera is not None:
                    yield self._info(stream, stream.camera, picture.stamp)

    def _image(self, stream: ImageStream, picture: Picture, tally: Tally) -> BagMessage | None:
        """None where it is skipped, which the tally says."""
        try:
            code, pixels = _read(picture.path, stream)
        except ImageError as error:
            tally.skip(str(error), picture.path)
            return None
        if stream.depth:
            metres = np.where(pixels > 0, pixels / stream.depth, np.nan).astype(np.float32)
            return self._pixels(stream, picture.stamp, metres, "32FC1")
        if self._raw:
            return self._pixels(stream, picture.stamp, pixels, _encoding(pixels))
        return self._compressed(stream, picture.stamp, code, pixels)

    def _compressed(self, stream: ImageStream, stamp: int, code: bytes, pixels: np.ndarray) -> BagMessage:
        """The bytes of the file, where they are PNG or JPEG. format: as compressed_image_transport writes it."""
        kind = _kind(code)
        if kind is None:
            kind, code = "png", encode(pixels)
        encoding = _encoding(pixels).replace("rgb", "bgr")
        fields = (f"{encoding}; {kind} compressed {encoding}", np.frombuffer(code, np.uint8))
        return self._message(self.topic(stream), COMPRESSED_IMAGE, stamp, stream.frame_id, *fields)

    def _pixels(self, stream: ImageStream, stamp: int, pixels: np.ndarray, encoding: str) -> BagMessage:
        pixels = np.ascontiguousarray(pixels)
        height, width = pixels.shape[:2]
        fields = (
            height,
            width,
            encoding,
            int(sys.byteorder == "big"),
            pixels.strides[0],
            pixels.view(np.uint8).ravel(),
        )
        return self._message(self.topic(stream), IMAGE, stamp, stream.frame_id, *fields)

    def _info(self, stream: ImageStream, camera: Camera, stamp: int) -> BagMessage:
        """Without a stereo pair, R is the identity and P is K, as sensor_msgs/CameraInfo has it."""
        rectification = np.eye(3) if camera.R is None else camera.R
        projection = np.hstack([camera.K, np.zeros((3, 1))]) if camera.P is None else camera.P
        region = self._types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        matrices = [np.asarray(m, np.float64).ravel() for m in (camera.D, camera.K, rectification, projection)]
        fields = (camera.size[1], camera.size[0], camera.distortion_model, *matrices, 0, 0, region)
        return self._message(f"/{stream.name}/camera_info", CAMERA_INFO, stamp, stream.frame_id, *fields)

    def _pose(self, stamp: int, position: list[float], rotation: list[float]) -> BagMessage:
        point = self._types["geometry_msgs/msg/Point"](*position)
        pose = self._types["geometry_msgs/msg/Pose"](point, self._types["geometry_msgs/msg/Quaternion"](*rotation))
        return self._message(TRUTH_TOPIC, POSE, stamp, TRUTH_FRAME, pose)

    def _message(self, topic: str, kind: str, stamp: int, frame_id: str, *fields: Any) -> BagMessage:
        time = self._types["builtin_interfaces/msg/Time"](*divmod(stamp, 1_000_000_000))
        header = self._types["std_msgs/msg/Header"](time, frame_id)
        return BagMessage(topic, stamp, bytes(self._store.serialize_cdr(self._types[kind](header, *fields), kind)))


def _kind(code: bytes) -> str | None:
    return next((kind for magic, kind in _MAGIC.items() if code.startswith(magic)), None)


def _read(path: Path, stream: ImageStream) -> tuple[bytes, np.ndarray]:
    """The bytes of a file, and its pixels as a subscriber will see them: what it cannot decode is not put into a bag.

    Raises ImageError with the reason in short.
    """
    try:
        code = path.read_bytes()
        pixels = compressed_to_array(SimpleNamespace(data=code, format=""))
    except OSError as error:
        raise ImageError(
            "missing" if isinstance(error, FileNotFoundError) else f"not readable ({error.strerror})"
        ) from error
    except ImageError as error:
        raise ImageError("damaged or no picture") from error
    size = pixels.shape[1], pixels.shape[0]
    if stream.camera is not None and size != stream.camera.size:
        raise ImageError(f"{size[0]}x{size[1]}, unlike the calibration")
    if stream.depth and (pixels.ndim, pixels.dtype) != (2, np.uint16):
        raise ImageError("no depth map of 16 bits")
    return code, pixels


def _encoding(pixels: np.ndarray) -> str:
    return _ENCODINGS[pixels.ndim, pixels.dtype.name]
