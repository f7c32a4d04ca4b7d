"""Sequences of images in folders, as the data sets of the field lay them out: which images, when, and by which camera.

TUM RGB-D (Sturm et al., 2012): rgb.txt, and depth.txt, groundtruth.txt where they are there. EuRoC and what else is in
the ASL format (Burri et al., 2016): mav0/cam0/data.csv, data/, sensor.yaml, imu0, state_groundtruth_estimate0. KITTI
odometry (Geiger et al., 2012): sequences/XX/image_0, times.txt, calib.txt, poses/XX.txt. And a plain folder of images.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from scfeat_core.bulk.images import SUFFIXES
from scfeat_core.errors import DataError
from scfeat_core.replay.records import GroundTruth
from scfeat_core.types import Camera

from .ground_truth import nanoseconds_of, read_ground_truth
from .intrinsics import read_body_camera, read_intrinsics

LAYOUTS = ("tum", "euroc", "kitti", "folder")
TUM_DEPTH = 5000.0  # units of a TUM depth map in a metre
_TUM_CAMERAS = {  # fx, fy, cx, cy and radtan coefficients that TUM publishes for its three sensors
    "freiburg1": (517.306408, 516.469215, 318.643040, 255.313989, 0.262383, -0.953104, -0.005358, 0.002628, 1.163314),
    "freiburg2": (520.908620, 521.007327, 325.141442, 249.701764, 0.231222, -0.784899, -0.003257, -0.000105, 0.917205),
    "freiburg3": (535.4, 539.2, 320.1, 247.6, 0.0, 0.0, 0.0, 0.0, 0.0),
}
_FASTEST, _SLOWEST = 1e-4, 3600.0  # seconds between two images
_LAST_STAMP = 2**31 * 1_000_000_000  # what builtin_interfaces/Time holds


class Picture(NamedTuple):
    """stamp: nanoseconds."""

    stamp: int
    path: Path


@dataclass(frozen=True)
class ImageStream:
    """The images of one camera. name: what it is called, and where its topics are. pictures: by ascending stamps.

    frame_id: optical frame (REP 103). camera: None where it is not calibrated. depth: units of a metre where these are
    depth maps, else 0.
    """

    name: str
    frame_id: str
    pictures: Sequence[Picture]
    camera: Camera | None = None
    depth: float = 0.0


@dataclass(frozen=True)
class ImageSequence:
    """What a folder holds. imu: the data.csv of an inertial sensor. notes: what the user should know."""

    layout: str
    streams: tuple[ImageStream, ...]
    truth: GroundTruth | None = None
    imu: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """What the user says of a folder, and it cannot.

    layout: one of LAYOUTS, None: by what is there. cameras: names of those that are wanted, empty: all. sequence: of
    KITTI. fps or stamps: of a plain folder, images a second or a file of stamps. With fps the first one
    is at 0. intrinsics, ground_truth: files in place of those of the folder. depth: with the depth maps of TUM.
    """

    layout: str | None = None
    cameras: tuple[str, ...] = ()
    sequence: str | None = None
    fps: float | None = None
    stamps: Path | None = None
    intrinsics: Path | None = None
    ground_truth: Path | None = None
    depth: bool = False


def read_folder(folder: Path, options: Options | None = None) -> ImageSequence:
    """What is in a folder; images are listed, not read, but for the size of the first one of a camera.

    Raises DataError where its layout is not known, a list of images or stamps is damaged, or there are no images;
    CalibrationError for intrinsics that make no sense.
    """
    options = options or Options()
    if not folder.is_dir():
        raise DataError(f"expected a folder with images at {folder}, found {_what(folder)}; check the path")
    layout = options.layout or _layout(folder)
    if options.fps is not None and options.stamps is not None:
        raise DataError("expected --fps or --stamps, found both: give one")
    if layout != "folder" and (options.fps is not None or options.stamps is not None):
        raise DataError(f"expected stamps from the files of a {layout} folder, found --fps or --stamps: leave it out")
    return _READERS[layout](folder, options)


def _what(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _layout(folder: Path) -> str:
    if (folder / "mav0").is_dir() or any(folder.glob("cam*/data.csv")):
        return "euroc"
    if (folder / "sequences").is_dir() or any(folder.glob("image_?")):
        return "kitti"
    if (folder / "rgb.txt").is_file():
        return "tum"
    if _images_in(folder):
        return "folder"
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder"
    raise DataError(
        f"expected rgb.txt (TUM), mav0 (EuRoC), sequences or image_0 (KITTI), or image files in {folder}, found "
        f"{found}: give the folder of one sequence"
    )


# -- TUM RGB-D ---------------------------------------------------------------------------------------------------------


def _tum(folder: Path, options: Options) -> ImageSequence:
    notes: list[str] = []
    pictures = _listed(folder / "rgb.txt", folder, 9, notes)
    frame = "camera_rgb_optical_frame"
    camera, source = _tum_camera(folder, pictures, options)
    streams = [ImageStream("camera/rgb", frame, pictures, camera)]
    notes.append(f"calibration: {source}")
    if options.depth:
        depth = _listed(folder / "depth.txt", folder, 9, notes)
        streams.append(ImageStream("camera/depth_registered", frame, depth, camera, TUM_DEPTH))
    truth = _truth(options.ground_truth or folder / "groundtruth.txt", options.ground_truth is not None)
    return ImageSequence("tum", _chosen(streams, options.cameras), truth, notes=tuple(notes))


def _tum_camera(folder: Path, pictures: Sequence[Picture], options: Options) -> tuple[Camera | None, str]:
    beside = folder / "camera_info.yaml"
    file = options.intrinsics or (beside if beside.is_file() else None)
    if file is not None:
        return read_intrinsics(file, _size(pictures)), file.name
    known = next((name for name in _TUM_CAMERAS if name in folder.resolve().name), None)
    if known is None or _size(pictures) != (640, 480):
        return None, "none (--intrinsics FILE)"
    fx, fy, cx, cy, *distortion = _TUM_CAMERAS[known]
    return Camera(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), np.array(distortion), (640, 480)), f"{known} of TUM"


# -- EuRoC -------------------------------------------------------------------------------------------------------------


def _euroc(folder: Path, options: Options) -> ImageSequence:
    root = folder / "mav0" if (folder / "mav0").is_dir() else folder
    notes: list[str] = []
    folders = sorted(path.parent for path in root.glob("cam*/data.csv"))
    if not folders:
        raise DataError(f"expected cam0/data.csv in {root}, found none: give the folder that holds mav0")
    wanted = _chosen([ImageStream(path.name, "", ()) for path in folders], options.cameras)
    streams = tuple(_euroc_stream(root / stream.name, len(wanted) > 1, options, notes) for stream in wanted)
    truth = _euroc_truth(root, root / wanted[0].name / "sensor.yaml", options, notes)
    imu = root / "imu0" / "data.csv"
    return ImageSequence("euroc", streams, truth, imu if imu.is_file() else None, tuple(notes))


def _euroc_stream(folder: Path, several: bool, options: Options, notes: list[str]) -> ImageStream:
    pictures = _listed(folder / "data.csv", folder / "data", 0, notes)
    camera = None
    if options.intrinsics is not None:
        camera = read_intrinsics(options.intrinsics, _size(pictures), folder.name if several else None)
    elif (folder / "sensor.yaml").is_file():
        camera = read_intrinsics(folder / "sensor.yaml")
    else:
        notes.append(f"calibration of {folder.name}: none (--intrinsics FILE)")
    return ImageStream(folder.name, f"{folder.name}_optical_frame", pictures, camera)


def _euroc_truth(root: Path, sensor: Path, options: Options, notes: list[str]) -> GroundTruth | None:
    """Poses of the first camera: those of the file are of the body."""
    path = options.ground_truth or root / "state_groundtruth_estimate0" / "data.csv"
    if not path.is_file() and options.ground_truth is None:
        return None
    if path.suffix != ".csv":  # of TUM, say: of the camera
        return read_ground_truth(path)
    body_camera = _body_camera(sensor, options.intrinsics)
    if body_camera is not None:
        return read_ground_truth(path, "euroc", T_body_camera=body_camera)
    missing = f"ground truth: left out, as {sensor} has no T_BS, and the poses are of the body"
    if options.ground_truth is not None:
        raise DataError(f"{missing}: add it, or give poses of the camera as TUM writes them")
    notes.append(missing)
    return None


def _body_camera(*files: Path | None) -> np.ndarray | None:
    found = (read_body_camera(file) for file in files if file is not None and file.is_file())
    return next((matrix for matrix in found if matrix is not None), None)


# -- KITTI odometry ----------------------------------------------------------------------------------------------------


def _kitti(folder: Path, options: Options) -> ImageSequence:
    root = _kitti_sequence(folder, options.sequence)
    stamps = _stamps_of(root / "times.txt", 9)
    _check_ascending([stamp for stamp, _ in stamps], root / "times.txt")
    folders = sorted(path for path in root.glob("image_?") if path.is_dir())
    if not folders:
        raise DataError(f"expected image_0 in {root}, found no folder of images: download the images of the sequence")
    wanted = _chosen([ImageStream(f"cam{path.name[-1]}", "", ()) for path in folders], options.cameras)
    streams = tuple(_kitti_stream(root, stream.name, [stamp for stamp, _ in stamps], options) for stream in wanted)
    poses = options.ground_truth or root.parent.parent / "poses" / f"{root.resolve().name}.txt"
    truth = _truth(poses, options.ground_truth is not None, root / "times.txt")
    notes = () if streams[0].camera is not None else ("calibration: none (--intrinsics FILE)",)
    return ImageSequence("kitti", streams, truth, notes=notes)


def _kitti_sequence(folder: Path, name: str | None) -> Path:
    if not (folder / "sequences").is_dir():
        return folder
    found = sorted(path.name for path in (folder / "sequences").iterdir() if path.is_dir())
    chosen = [each for each in found if name in (None, each)]
    if len(chosen) != 1:
        wanted = "one sequence" if name is None else f"sequence {name}"
        raise DataError(
            f"expected {wanted} in {folder / 'sequences'}, found {', '.join(found) or 'none'}: choose with --sequence"
        )
    return folder / "sequences" / chosen[0]


def _kitti_stream(root: Path, name: str, stamps: Sequence[int], options: Options) -> ImageStream:
    """Rectified; the projections of all cameras are relative to the first one, whose frame they therefore share."""
    number = name.removeprefix("cam")
    folder = root / f"image_{number}"
    beyond = len(_images_in(folder)) - len(stamps)
    if beyond > 0:
        raise DataError(f"expected a time in {root / 'times.txt'} for each image of {folder}, found {beyond} too few")
    suffix = next((path.suffix for path in _images_in(folder)), ".png")
    pictures = [Picture(stamp, folder / f"{index:06d}{suffix}") for index, stamp in enumerate(stamps)]
    calibration = options.intrinsics or root / "calib.txt"
    camera = None
    if options.intrinsics is not None or calibration.is_file():
        kitti = calibration.name == "calib.txt"
        camera = read_intrinsics(calibration, _size(pictures), f"P{number}" if kitti else None)
    return ImageStream(name, "cam0_optical_frame", pictures, camera)


# -- a plain folder ----------------------------------------------------------------------------------------------------


def _plain(folder: Path, options: Options) -> ImageSequence:
    notes: list[str] = []
    paths = _images_in(folder)
    if not paths:
        raise DataError(f"expected images ({', '.join(sorted(SUFFIXES))}) in {folder}, found none; check the path")
    if options.stamps is not None:
        pictures = _stamped(paths, folder, options.stamps, notes)
    elif options.fps is not None:
        rate = Decimal(str(options.fps))
        pictures = [Picture(int(i * 1_000_000_000 / rate), path) for i, path in enumerate(paths)]
    else:
        raise DataError(f"expected to know when the images of {folder} were taken: give --fps HZ, or --stamps FILE")
    camera = None if options.intrinsics is None else read_intrinsics(options.intrinsics, _size(pictures))
    if camera is None:
        notes.append("calibration: none (--intrinsics FILE)")
    stream = ImageStream("cam0", "cam0_optical_frame", pictures, camera)
    truth = None if options.ground_truth is None else read_ground_truth(options.ground_truth)
    return ImageSequence("folder", _chosen([stream], options.cameras), truth, notes=tuple(notes))


def _stamped(paths: Sequence[Path], folder: Path, file: Path, notes: list[str]) -> list[Picture]:
    """By the names in the file of stamps, or in the order of both."""
    rows = _stamps_of(file, None)
    _check_pace([stamp for stamp, _ in rows], file)
    nameless = sum(not name for _, name in rows)
    if 0 < nameless < len(rows):
        raise DataError(f"expected a name in each line of {file}, or in none, found {nameless} without one: add it")
    if not nameless:
        return _in_order([Picture(stamp, folder / name) for stamp, name in rows], file, notes)
    if len(rows) != len(paths):
        raise DataError(
            f"expected a stamp for each of the {len(paths)} images of {folder}, found {len(rows)} in {file}"
        )
    _check_ascending([stamp for stamp, _ in rows], file)
    return [Picture(stamp, path) for (stamp, _), path in zip(rows, paths, strict=True)]


# -- what they share ---------------------------------------------------------------------------------------------------


def _chosen(streams: Sequence[ImageStream], names: Iterable[str]) -> tuple[ImageStream, ...]:
    for name in names:
        if name not in [stream.name for stream in streams]:
            there = ", ".join(stream.name for stream in streams)
            raise DataError(f"expected a camera '{name}', found {there}: choose of these with --cameras")
    return tuple(stream for stream in streams if not names or stream.name in names)


def _truth(path: Path, asked_for: bool, times: Path | None = None) -> GroundTruth | None:
    return read_ground_truth(path, times=times) if asked_for or path.is_file() else None


def _images_in(folder: Path) -> list[Path]:
    """Sorted by name, numbers by their value: img9 comes before img10."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(paths, key=lambda path: _parts(path.name))


def _parts(name: str) -> list[str | int]:
    """Text and numbers in turn, beginning with text."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _size(pictures: Sequence[Picture]) -> tuple[int, int]:
    """(width, height) of the first picture that can be read."""
    for _, path in pictures:
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION) if path.is_file() else None
        if image is not None:
            return image.shape[1], image.shape[0]
    where = f" such as {pictures[0].path}" if pictures else ""
    raise DataError(f"expected image files{where}, found none that can be read: are they downloaded and unpacked?")


def _listed(file: Path, folder: Path, digits: int, notes: list[str]) -> list[Picture]:
    """Pictures of a list of stamps and names. digits: 9 for seconds, 0 for nanoseconds."""
    rows = _stamps_of(file, digits)
    nameless = [stamp for stamp, name in rows if not name]
    if nameless:
        raise DataError(f"expected a stamp and a name in each line of {file}, found {len(nameless)} without a name")
    return _in_order([Picture(stamp, folder / name) for stamp, name in rows], file, notes)


def _in_order(pictures: Sequence[Picture], file: Path, notes: list[str]) -> list[Picture]:
    """By their stamps, each once."""
    back = sum(b.stamp < a.stamp for a, b in itertools.pairwise(pictures))
    if back:
        notes.append(f"{file.name}: stamps go back {back} times, sorted")
    once = {picture.stamp: picture for picture in reversed(pictures)}
    if 2 * len(once) <= len(pictures):
        raise DataError(
            f"expected a stamp of its own for each image in {file}, found {len(once)} stamps for {len(pictures)} "
            "images: are they seconds where nanoseconds are expected, or rounded?"
        )
    if len(once) < len(pictures):
        notes.append(f"{file.name}: {len(pictures) - len(once)} images with the stamp of another, left out")
    return [once[stamp] for stamp in sorted(once)]


def _check_ascending(stamps: Sequence[int], file: Path) -> None:
    for index, (a, b) in enumerate(itertools.pairwise(stamps)):
        if b <= a:
            raise DataError(
                f"expected ascending stamps in {file}, found number {index + 2} not after the one before: which image "
                "they belong to is not clear; sort them, or name the images beside them"
            )


def _check_pace(stamps: Sequence[int], file: Path) -> None:
    """The unit is known by the looks of the stamps only: what makes no sense as the pace of a camera is another one."""
    seconds = 1e-9 * float(np.median(np.abs(np.diff(np.array(stamps, np.int64))))) if len(stamps) > 1 else 1.0
    if not _FASTEST <= seconds <= _SLOWEST:
        raise DataError(
            f"expected {_FASTEST:g} to {_SLOWEST:g} s between two images of {file}, found {seconds:.3g} s: check the "
            "unit; stamps are seconds, or nanoseconds where they have more than 12 digits before the point"
        )


def _stamps_of(file: Path, digits: int | None) -> list[tuple[int, str]]:
    """Nanoseconds and what stands behind, of each line. digits: 9 for seconds, 0 for nanoseconds, None: as they look.

    A stamp of more than 12 digits before its point is nanoseconds.
    """
    rows = [(_stamp(words[0], digits, place), " ".join(words[1:])) for place, words in _lines(file)]
    if not rows:
        raise DataError(f"expected stamps in {file}, found an empty file")
    return rows


def _stamp(text: str, digits: int | None, place: str) -> int:
    if digits is None:
        digits = 0 if len(text.partition(".")[0]) > 12 else 9
    stamp = nanoseconds_of(text, place, digits)
    if stamp >= _LAST_STAMP:
        raise DataError(f"expected a stamp before 2038, which ROS can hold, found '{text}' in {place}: check the unit")
    return stamp


def _lines(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The place and the words of each line that is no comment."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "a binary file" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DataError(f"expected a list of stamps at {file}, found: {reason}; check the folder") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number} of {file}", line.replace(",", " ").split()


def inertial(file: Path) -> Iterator[tuple[int, list[float]]]:
    """Nanoseconds, and angular velocity (rad/s) and acceleration (m/s^2) of x, y, z each, of a data.csv of EuRoC.

    Raises DataError, with the line.
    """
    last = -1
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            words = line.strip().split(",")
            if not line.strip() or line.startswith("#"):
                continue
            place = f"line {number} of {file}"
            stamp = _stamp(words[0], 0, place)
            try:
                values = [float(word) for word in words[1:7]]
            except ValueError:
                values = []
            if len(values) != 6 or not np.isfinite(values).all():
                raise DataError(f"expected 7 numbers, found '{line.strip()}' in {place}: mend or remove the line")
            if stamp <= last:
                raise DataError(f"expected ascending stamps, found {stamp} after {last} in {place}: sort the lines")
            last = stamp
            yield stamp, values


_READERS: Mapping[str, Callable[[Path, Options], ImageSequence]] = {
    **{"tum": _tum, "euroc": _euroc, "kitti": _kitti, "folder": _plain}
}
