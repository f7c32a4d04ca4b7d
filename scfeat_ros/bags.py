"""Bags in and out, without ROS: rosbag2 of sqlite3 and mcap, plain or compressed, and ROS 1.

Messages stay what was recorded, serialized CDR: the player forwards them as they are. Those of ROS 1 are brought into
that form. Of a damaged bag everything that can be read comes out, and ``Bag.damage`` says what does not. The files are
read by :mod:`scfeat_ros.bag_files`; types and writing are those of the ``rosbags`` library.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path, PurePath
from types import ModuleType, TracebackType
from typing import Any

import yaml

from scfeat_core.errors import DataError, ScfeatError

from .bag_files.blocks import LARGEST, BagFile, Damage, Loss, Record, merged, normalised_type
from .bag_files.compression import ZSTD_MAGIC, CorruptError, decompress, decompress_file
from .bag_files.mcap import McapFile
from .bag_files.ros1 import Ros1File
from .bag_files.sqlite import SqliteFile

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
IMAGE_TYPES = (IMAGE, COMPRESSED_IMAGE)
STORAGES = ("mcap", "sqlite3")
_READERS: dict[str, type[McapFile] | type[SqliteFile] | type[Ros1File]] = {
    ".mcap": McapFile,
    ".db3": SqliteFile,
    ".bag": Ros1File,
    ".active": Ros1File,  # NAME.bag.active: the recorder was killed
}
_PACKED = ".zstd"
_DEPTH = re.compile(r"(?:^|[/_])(?:depth|disparity)", re.IGNORECASE)
_DEPTH_ENCODINGS = ("32FC1", "16UC1")  # REP 118
_LOOK = 8  # images of a topic that say whose they are, and of which kind: the first may be damaged


@dataclass(frozen=True)
class Topic:
    """A topic of a bag. type: as ROS 2 names it, e.g. sensor_msgs/msg/Image. count: messages."""

    name: str
    type: str
    count: int

    @property
    def compressed(self) -> bool:
        return self.type == COMPRESSED_IMAGE

    @property
    def image_name(self) -> str:
        """The name of the image without what the transport appends to it."""
        return self.name.removesuffix("/compressed") if self.compressed else self.name


@dataclass(frozen=True)
class BagMessage:
    """One recorded message. log_time: nanoseconds, when it was recorded. data: serialized (CDR). type: of the topic."""

    topic: str
    log_time: int
    data: bytes
    type: str = field(default="", compare=False)


def header_stamp(data: bytes) -> int:
    """The header stamp, nanoseconds, of a serialized message that starts with a std_msgs/Header."""
    if len(data) < 12:
        raise DataError(f"expected a serialized message with a header, found {len(data)} bytes: the bag is damaged")
    order = "<" if data[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", data, 4)
    return seconds * 1_000_000_000 + nanoseconds


def header_frame(data: bytes) -> str:
    """The frame_id of a serialized message that starts with a std_msgs/Header. Raises DataError where it has none."""
    order = "<" if len(data) > 1 and data[1] & 1 else ">"
    size = struct.unpack_from(f"{order}I", data, 12)[0] if len(data) >= 16 else 0
    if size == 0 or 16 + size > len(data):
        raise DataError(f"expected a serialized message with a header, found {len(data)} bytes: the bag is damaged")
    return data[16 : 15 + size].decode("utf-8", "replace")


def of_one_camera(messages: Iterable[BagMessage]) -> Iterator[BagMessage]:
    """The messages of an image topic. Raises DataError as soon as two frame_ids came twice each: one that came once, or
    cannot be read, may be damaged."""
    places: dict[str, list[int]] = {}
    for count, message in enumerate(messages):
        with suppress(DataError):
            places.setdefault(header_frame(message.data), []).append(count)
        several = [frame for frame, seen in places.items() if len(seen) > 1]
        if len(several) > 1:
            raise DataError(
                f"expected the images of one camera on {message.topic}, found frame_id '{several[0]}' and, after "
                f"{places[several[1]][0]} images, '{several[1]}': several cameras publish there; give each a topic of "
                "its own"
            )
        yield message


@dataclass(frozen=True)
class _Plan:
    """What a bag is made of. files: in the order of time. counts: messages by topic and type, as metadata.yaml has it;
    empty where there is none. damage: what is known of it before a file is opened, and what that costs."""

    files: list[Path]
    counts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    damage: tuple[tuple[str, Loss], ...] = ()


class Bag:
    """A bag that is open for reading; a context manager. Make one with :func:`open_bag`."""

    def __init__(self, path: Path, plan: _Plan) -> None:
        self.path = path
        self._plan = plan
        self._files: list[BagFile] = []
        self._damage = Damage()
        self._missing: dict[tuple[str, str], int] = {}  # messages by topic and type, where all of it was read
        self._close = ExitStack()

    def __enter__(self) -> Bag:
        for text, loss in self._plan.damage:
            self._damage.add(text, loss)
        errors = []
        for file in self._plan.files:
            damage = self._damage.of_file(first=not self._files, last=file is self._plan.files[-1])
            try:
                self._files.append(self._open(file, damage))
            except DataError as error:
                errors.append(error)
                reason = str(error).replace(f"{file.parent}/", "")
                lost = Loss(file.stat().st_size, None, at_start=True, at_end=True)
                damage.add(f"nothing of {file.name} can be read ({reason})", lost)
        if errors and not self._files:
            self._close.close()
            raise errors[0]
        return self

    def _open(self, file: Path, damage: Damage) -> BagFile:
        if file.suffix == _PACKED:
            folder = Path(self._close.enter_context(tempfile.TemporaryDirectory(prefix="scfeat-bag-")))
            decompress_file(file, folder / file.stem, damage)
            file = folder / file.stem
        try:
            opened = _READERS[file.suffix](file, damage)
        except DataError:
            raise
        except Exception as error:  # nobody can foresee every damage
            raise _unreadable(self.path, error) from error
        self._close.callback(opened.close)
        return opened

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    @property
    def damage(self) -> str:
        """What is missing of the bag, in words; empty where nothing is known to be. Complete once it was read."""
        return str(self._damage)

    @property
    def lost_bytes(self) -> int | None:
        """What is damaged of its files; None where nobody knows how much."""
        return self._damage.size

    @property
    def cut_off(self) -> bool:
        """Whether an unknown part of the recording is missing at one of its ends, where no gap shows it."""
        return self._damage.at_end or self._damage.at_start()

    @property
    def lacks_end(self) -> bool:
        """Whether an unknown rest of the recording is missing, as far as it was read."""
        return self._damage.at_end

    def lacks_beginning(self, topic: Topic) -> bool:
        """Whether the first messages on a topic may be missing, as far as it was read."""
        return self._damage.at_start(topic.name)

    def lost_messages(self, topic: Topic) -> int | None:
        """How many on a topic were recorded and cannot be read, as far as it was read; None where nobody knows.

        Once all of it was read, metadata.yaml or an index that is whole decides.
        """
        return self._missing.get((topic.name, topic.type), self._damage.messages(topic.name))

    @property
    def topics(self) -> list[Topic]:
        """All topics, by name. ``count`` is what the files say they hold, which damage may take away."""
        counts: Counter[tuple[str, str]] = Counter()
        for file in self._files:
            for number, channel in file.channels.items():
                counts[channel.topic, channel.type] += file.counts.get(number, 0)
        return [Topic(name, kind, count) for (name, kind), count in sorted(counts.items())]

    @property
    def lost_topics(self) -> list[Topic]:
        """Topics of which metadata.yaml counts messages, and no file has one."""
        held = {(topic.name, topic.type) for topic in self.topics if topic.count}
        counted = sorted(self._plan.counts.items())
        return [Topic(*topic, count) for topic, count in counted if count and topic not in held]

    @property
    def image_topics(self) -> list[Topic]:
        """Topics of sensor_msgs/Image and CompressedImage that have messages, most messages first."""
        found = [topic for topic in self.topics if topic.type in IMAGE_TYPES and topic.count > 0]
        return sorted(found, key=lambda topic: (-topic.count, topic.name))

    def choose_image_topic(self, name: str | None = None) -> tuple[Topic, str]:
        """The image topic to use, and a line that says why; where no name is given the one with most messages, and
        depth maps only where there is nothing else.

        A name may be that of the image without ``/compressed``. Raises DataError, with the topics that there are; also
        where the topic is of another type, or of two, and where its first images are of several cameras.
        """
        topic, why = self._choose(name)
        types = sorted(other.type for other in self.topics if other.name == topic.name and other.count > 0)
        if len(types) > 1:
            raise DataError(
                f"expected one type of messages on {topic.name} in {self.path}, found {' and '.join(types)}: record "
                "them on topics of their own"
            )
        for _ in of_one_camera(islice(self.messages([topic]), _LOOK)):
            pass
        return topic, why

    def frame_id(self, topic: Topic) -> str | None:
        """What most of the first messages on a topic have in their headers; None where none of these can be read."""
        frames: Counter[str] = Counter()
        with suppress(DataError):
            for message in islice(self.messages([topic]), _LOOK):
                with suppress(DataError):
                    frames[header_frame(message.data)] += 1
        return frames.most_common(1)[0][0] if frames else None

    def _choose(self, name: str | None) -> tuple[Topic, str]:
        images = self.image_topics
        if name is not None:
            chosen = [topic for topic in images if name == topic.name]
            chosen = chosen or [topic for topic in images if name == topic.image_name]
            if not chosen:
                raise DataError(f"{self._no_images(name)}; {self._listing()}")
            return chosen[0], f"{chosen[0].name} as asked for"
        if not images:
            raise DataError(f"{self._no_images(None)}; {self._listing()}")
        if len(images) == 1:
            return images[0], f"{images[0].name}, the only image topic"
        images = sorted(images, key=self._shows_depth)  # stable: the most messages first among equals
        others = ", ".join(f"{topic.name} ({topic.count})" for topic in images[1:])
        return images[0], f"{images[0].name} ({images[0].count} messages); there are also {others}: choose with --topic"

    @property
    def depth_topics(self) -> list[Topic]:
        """Of the image topics those whose encoding is that of depth maps, most messages first."""
        return [topic for topic in self.image_topics if self._has_depth_encoding(topic)]

    def _shows_depth(self, topic: Topic) -> bool:
        """By its name (REP 118 and what depth drivers use), else by the encoding of its images."""
        return bool(_DEPTH.search(topic.name)) or self._has_depth_encoding(topic)

    def _has_depth_encoding(self, topic: Topic) -> bool:
        """Of the first of its images that can be read."""
        with suppress(ScfeatError):
            for message in islice(self.messages([topic]), _LOOK):
                with suppress(ScfeatError):
                    image = self.deserialize(message)
                    return str(getattr(image, "encoding", getattr(image, "format", ""))).startswith(_DEPTH_ENCODINGS)
        return False

    def camera_info_topic(self, image: Topic, name: str | None = None) -> Topic | None:
        """The sensor_msgs/CameraInfo beside an image topic, or the only one in the bag; or the one of this name.

        None where there is none; DataError where there is none of the name that was given, or of another type.
        """
        infos = [topic for topic in self.topics if topic.type == CAMERA_INFO and topic.count > 0]
        if name is not None:
            named = [topic for topic in infos if topic.name == name]
            if not named:
                found = self._type_of(name)
                raise DataError(f"expected {CAMERA_INFO} on {name} in {self.path}, found {found}; {self._listing()}")
            return named[0]
        beside = image.image_name.rpartition("/")[0] + "/camera_info"
        named = [topic for topic in infos if topic.name == beside]
        candidates = named or (infos if len(infos) == 1 else [])
        return candidates[0] if candidates else None

    def messages(self, topics: Iterable[Topic], since: int = 0) -> Iterator[BagMessage]:
        """Messages of these topics in the order in which they were recorded, none before ``since``, nanoseconds.

        What is damaged is left out, and added to ``damage``. Raises DataError where nothing further can be read.
        """
        wanted = {(topic.name, topic.type) for topic in topics}
        found: Counter[tuple[str, str]] = Counter()
        files = [(file.start, file) for file in self._files if file.start is not None]
        for file, record in merged((start, partial(self._records, file, wanted, since)) for start, file in files):
            channel = file.channels[record.channel]
            try:
                data = _cdr(record.data, channel.type, channel.ros1)
            except CorruptError as error:
                text = f"a message on {channel.topic} at {record.time} ns is damaged ({error})"
                self._damage.add(text, Loss(len(record.data), {channel.topic: 1}))
                continue
            found[channel.topic, channel.type] += 1
            yield BagMessage(channel.topic, record.time, data, channel.type)
        if not since:
            self._compare(wanted, found)

    def _records(
        self, file: BagFile, wanted: Collection[tuple[str, str]], since: int
    ) -> Iterator[tuple[int, tuple[BagFile, Record]]]:
        """Time, file and record of the wanted topics and types."""
        numbers = {n for n, channel in file.channels.items() if (channel.topic, channel.type) in wanted}
        try:
            for record in file.messages(numbers, since) if numbers else ():
                yield record.time, (file, record)
        except DataError:
            raise
        except Exception as error:  # nobody can foresee every damage
            raise _unreadable(self.path, error) from error

    def _compare(self, wanted: Iterable[tuple[str, str]], found: Mapping[tuple[str, str], int]) -> None:
        """Say where metadata.yaml counts more than there was, and keep how many are missing, where that is known."""
        counted = {(topic.name, topic.type): topic.count for topic in self.topics}
        complete = len(self._files) == len(self._plan.files) and all(file.complete for file in self._files)
        for name, kind in sorted(wanted):
            written = self._plan.counts.get((name, kind), counted.get((name, kind), 0) if complete else None)
            if written is None:
                continue
            readable = found.get((name, kind), 0)
            self._missing[name, kind] = max(0, written - readable)
            if readable < self._plan.counts.get((name, kind), 0):
                self._damage.add(f"{readable} of {written} messages on {name} can be read")

    def deserialize(self, message: BagMessage) -> Any:
        """An object with the fields of the message, as :mod:`scfeat_ros.images` takes them; its arrays are numpy views
        of ``message.data``. Raises DataError where the message is damaged, or of a type that is not known."""
        kind = message.type or self._type_of(message.topic)
        try:
            return _typestore().deserialize_cdr(message.data, kind)
        except Exception as error:  # the library lets through whatever its reading of the bytes raises
            raise DataError(
                f"expected a {kind} on {message.topic} in {self.path}, found {len(message.data)} bytes that are none "
                f"({str(error) or type(error).__name__})"
            ) from error

    def _type_of(self, name: str) -> str:
        return next((topic.type for topic in self.topics if topic.name == name), "no such topic")

    def _no_images(self, name: str | None) -> str:
        wanted = f"an image topic '{name}'" if name else "a topic of sensor_msgs/Image or sensor_msgs/CompressedImage"
        found = self._type_of(name) if name else "no such topic"
        return f"expected {wanted} in {self.path}, found {'none' if found == 'no such topic' else found}"

    def _listing(self) -> str:
        damage = f" ({self.damage})" if self.damage else ""
        topics = self.topics
        if not topics:
            return f"the bag is empty{damage}: record again, and check that the topics were published"
        return "the bag holds " + ", ".join(f"{t.name} [{t.type}] {t.count}" for t in topics) + damage


def open_bag(path: str | Path) -> Bag:
    """A rosbag2 folder, one of its files (.mcap, .db3, or these with .zstd), or a ROS 1 .bag; to enter with ``with``.

    What is damaged, missing or cut off is left out, and ``damage`` says so. Raises DataError where nothing is there,
    where it is no bag, or (on entering) where nothing of it can be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"expected a bag at {path}, found nothing there: check the path")
    _rosbags()
    try:
        return Bag(path, _plan(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def write_bag(
    path: str | Path,
    types: Mapping[str, str],
    messages: Iterable[BagMessage],
    storage: str = "mcap",
    compression: str | None = None,
) -> None:
    """Write a rosbag2 folder. types: topic -> message type. compression: None, or what zstd is to compress: "message",
    "file", "storage" (the chunks of an mcap).

    Raises DataError where the folder exists or the storage is unknown.
    """
    path = Path(path)
    if storage not in STORAGES:
        raise DataError(f"expected a storage of {', '.join(STORAGES)}, found '{storage}'")
    if path.exists():
        raise DataError(f"expected no file or folder at {path}, found one: choose another name")
    rosbag2, typestore = _rosbags(), _typestore()
    plugin = getattr(rosbag2.StoragePlugin, storage.upper())
    writer = rosbag2.Writer(path, version=9, storage_plugin=plugin)
    if compression is not None:
        modes = rosbag2.CompressionMode
        writer.set_compression(getattr(modes, compression.upper()), rosbag2.CompressionFormat.ZSTD)
    with writer:
        connections = {
            topic: writer.add_connection(topic, kind, typestore=typestore) for topic, kind in sorted(types.items())
        }
        for message in messages:
            writer.write(connections[message.topic], message.log_time, message.data)


def _plan(path: Path) -> _Plan:
    """The files of a bag. Raises DataError where there are none."""
    if path.is_file():
        if not _is_bag_file(path):
            raise DataError(f"expected a rosbag2 folder, a .mcap or .db3 file of one, or a ROS 1 .bag, found {path}")
        return _Plan([path])
    damage: tuple[tuple[str, Loss], ...] = ()
    if (path / "metadata.yaml").exists():
        try:
            return _described(path)
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            damage = ((f"metadata.yaml is damaged, the files beside it were read without it ({reason})", Loss()),)
    files = _parts(path)
    if files:
        return _Plan(files, damage=damage)
    found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "an empty folder"
    raise DataError(
        f"expected a rosbag2 folder with metadata.yaml at {path}, found {found}: give the folder that 'ros2 bag "
        "record' made, or rebuild its metadata with 'ros2 bag reindex'"
    )


def _described(path: Path) -> _Plan:
    """As metadata.yaml says; the files that it names and that are not there are damage."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    info = yaml.load((path / "metadata.yaml").read_text(encoding="utf-8"), loader)["rosbag2_bagfile_information"]
    mode, method = str(info.get("compression_mode") or "").lower(), str(info.get("compression_format") or "")
    if mode not in ("", "none") and method != "zstd":
        raise DataError(f"expected a bag that is compressed with zstd at {path}, found '{method}': convert it")
    named = [path / PurePath(name).name for name in info["relative_file_paths"]]
    files = [file for file in named if file.is_file()]
    if named and not files:
        lost = ", ".join(file.name for file in named)
        raise DataError(f"expected the files {lost} in {path}, found none of them: copy the bag again")
    if unknown := [file.name for file in files if not _is_bag_file(file)]:
        raise DataError(f"expected .mcap or .db3 files in {path}, found {', '.join(unknown)}: convert the bag")
    topics = [(entry["topic_metadata"], int(entry["message_count"])) for entry in info["topics_with_message_count"]]
    counts = {(topic["name"], normalised_type(topic["type"])): count for topic, count in topics}
    if not named:
        raise ValueError("it names no files")
    return _Plan(files, counts, tuple(_missing(named, files)))


def _missing(named: Sequence[Path], files: Sequence[Path]) -> Iterator[tuple[str, Loss]]:
    """The damage that files are which are named, in the order of time, and not there."""
    first, last = named.index(files[0]), named.index(files[-1])
    for number, file in enumerate(named):
        if file not in files:
            yield f"{file.name} of the bag is missing", Loss(None, None, at_start=number < first, at_end=number > last)


def _parts(path: Path) -> list[Path]:
    """The only bag file of a folder, or those that were split from one recording (NAME_0, NAME_1, ...), in order."""
    files = [file for file in path.iterdir() if _is_bag_file(file)]
    if len(files) <= 1:
        return files
    numbered = [(re.fullmatch(r"(.*)_(\d+)", _stem(file)), file) for file in files]
    names = {match[1] if match else None for match, _ in numbered}
    if len(names) > 1 or None in names:
        return []
    return [file for _, file in sorted((int(match[2]), file) for match, file in numbered if match)]


def _stem(file: Path) -> str:
    return file.name.removesuffix(_PACKED).rpartition(".")[0]


def _is_bag_file(file: Path) -> bool:
    suffix = Path(file.name.removesuffix(_PACKED)).suffix
    return suffix in _READERS and (suffix != ".active" or file.name.endswith(".bag.active"))


def _cdr(data: bytes, kind: str, ros1: bool) -> bytes:
    """The message as ROS 2 serializes it. Raises CorruptError where it is damaged."""
    if data[:4] == ZSTD_MAGIC:  # compression_mode: message
        data = bytes(decompress(data, "zstd", LARGEST))
    if not ros1:
        return data
    try:
        return bytes(_typestore().ros1_to_cdr(data, kind))
    except Exception as error:  # the library lets through whatever its reading of the bytes raises
        raise CorruptError(str(error) or type(error).__name__) from error


def _unreadable(path: Path, error: Exception, where: str = "") -> DataError:
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return DataError(
        f"expected a readable rosbag2 at {path}, found it damaged or truncated{where} ({reason}): copy it again, "
        "or try 'ros2 bag reindex', 'mcap recover' (.mcap) or 'sqlite3 FILE .recover' (.db3)"
    )


def _rosbags() -> ModuleType:
    try:
        import rosbags.rosbag2
    except ModuleNotFoundError as error:
        raise DataError(
            "expected the Python module 'rosbags' to read bags, found it not installed: "
            "pip install 'scfeat-python[bags]'"
        ) from error
    return rosbags.rosbag2


@lru_cache(maxsize=1)
def _typestore() -> Any:
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_HUMBLE)
