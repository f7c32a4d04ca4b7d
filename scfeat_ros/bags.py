"""rosbag2 in and out, without ROS: sqlite3 and mcap, plain or compressed, through the ``rosbags`` library.

Messages stay what was recorded, serialized CDR: the player forwards them as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from scfeat_core.errors import DataError

from .cut_mcap import CutMcap, complete_size

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
IMAGE_TYPES = (IMAGE, COMPRESSED_IMAGE)
STORAGES = ("mcap", "sqlite3")


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
    """One recorded message. log_time: nanoseconds, when it was recorded. data: serialized (CDR)."""

    topic: str
    log_time: int
    data: bytes


def header_stamp(data: bytes) -> int:
    """The header stamp, nanoseconds, of a serialized message that starts with a std_msgs/Header."""
    if len(data) < 12:
        raise DataError(f"expected a serialized message with a header, found {len(data)} bytes: the bag is damaged")
    order = "<" if data[1] & 1 else ">"
    seconds, nanoseconds = struct.unpack_from(f"{order}iI", data, 4)
    return seconds * 1_000_000_000 + nanoseconds


class Bag:
    """A bag that is open for reading; a context manager. Make one with :func:`open_bag`.

    damage: what is missing of it, in words; empty where nothing is known to be.
    """

    def __init__(self, path: Path, reader: Any) -> None:
        self.path = path
        self.damage = ""
        self._reader = reader
        self._close = ExitStack()

    def __enter__(self) -> Bag:
        try:
            self._close.enter_context(self._reader)
        except Exception as error:  # the library lets through what its storage back ends raise
            self._enter_cut(error)
        return self

    def _enter_cut(self, error: Exception) -> None:
        """Open what is left of an .mcap without its end. Raises DataError where it is something else."""
        file = _only_file(self.path, ".mcap")
        size = None if file is None else complete_size(file)
        if file is None or size is None:
            raise _unreadable(self.path, error) from error
        self._reader = _rosbags().Reader(CutMcap(file, size))
        try:
            self._close.enter_context(self._reader)
        except Exception as second:
            raise _unreadable(self.path, second) from second
        self.damage = f"{file} ends in the middle of a record: only what comes before is there ({size} bytes)"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    @property
    def topics(self) -> list[Topic]:
        """All topics, by name."""
        counts: dict[tuple[str, str], int] = {}
        for connection in self._reader.connections:
            key = (connection.topic, connection.msgtype)
            counts[key] = counts.get(key, 0) + connection.msgcount
        return [Topic(name, kind, count) for (name, kind), count in sorted(counts.items())]

    @property
    def image_topics(self) -> list[Topic]:
        """Topics of sensor_msgs/Image and CompressedImage that have messages, most messages first."""
        found = [topic for topic in self.topics if topic.type in IMAGE_TYPES and topic.count > 0]
        return sorted(found, key=lambda topic: (-topic.count, topic.name))

    def choose_image_topic(self, name: str | None = None) -> tuple[Topic, str]:
        """The image topic to use, and a line that says why; the one with most messages where no name is given.

        A name may be that of the image without ``/compressed``. Raises DataError, with the topics that there are.
        """
        images = self.image_topics
        if name is not None:
            chosen = [topic for topic in images if name in (topic.name, topic.image_name)]
            if not chosen:
                raise DataError(f"{self._no_images(name)}; {self._listing()}")
            return chosen[0], f"{chosen[0].name} as asked for"
        if not images:
            raise DataError(f"{self._no_images(None)}; {self._listing()}")
        if len(images) == 1:
            return images[0], f"{images[0].name}, the only image topic"
        others = ", ".join(f"{topic.name} ({topic.count})" for topic in images[1:])
        return images[0], f"{images[0].name} ({images[0].count} messages); there are also {others}: choose with --topic"

    def camera_info_topic(self, image: Topic) -> Topic | None:
        """The sensor_msgs/CameraInfo beside an image topic, or the only one in the bag."""
        infos = [topic for topic in self.topics if topic.type == CAMERA_INFO and topic.count > 0]
        beside = image.image_name.rpartition("/")[0] + "/camera_info"
        named = [topic for topic in infos if topic.name == beside]
        return (named or (infos if len(infos) == 1 else [None]))[0]

    def messages(self, topics: Iterable[Topic]) -> Iterator[BagMessage]:
        """Messages of these topics in the order in which they were recorded.

        Raises DataError where the bag is damaged, after everything before the damage.
        """
        wanted = {(topic.name, topic.type) for topic in topics}
        connections = [c for c in self._reader.connections if (c.topic, c.msgtype) in wanted]
        if not connections:
            return
        count = 0
        try:
            for connection, log_time, data in self._reader.messages(connections=connections):
                yield BagMessage(connection.topic, log_time, data)
                count += 1
        except Exception as error:
            raise _unreadable(self.path, error, f" after {count} messages") from error

    def deserialize(self, message: BagMessage) -> Any:
        """An object with the fields of the message, as :mod:`scfeat_ros.images` takes them; arrays are numpy views of
        ``message.data``. Raises DataError where the message is damaged."""
        kind = next(topic.type for topic in self.topics if topic.name == message.topic)
        try:
            return _typestore().deserialize_cdr(message.data, kind)
        except Exception as error:
            raise DataError(f"expected a {kind} on {message.topic} in {self.path}, found {error}") from error

    def _no_images(self, name: str | None) -> str:
        wanted = f"an image topic '{name}'" if name else "a topic of sensor_msgs/Image or sensor_msgs/CompressedImage"
        return f"expected {wanted} in {self.path}, found none"

    def _listing(self) -> str:
        topics = self.topics
        if not topics:
            return "the bag is empty: record again, and check that the topics were published"
        return "the bag holds " + ", ".join(f"{t.name} [{t.type}] {t.count}" for t in topics)


def open_bag(path: str | Path) -> Bag:
    """A rosbag2 folder, or one of its files (.mcap, .db3), to be entered with ``with``.

    An .mcap without its end is read up to there, and ``damage`` says so. Raises DataError where nothing is there, where
    it is no rosbag2, or where it is damaged otherwise (on entering).
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"expected a rosbag2 folder at {path}, found nothing there: check the path")
    reader = _rosbags().Reader
    try:
        return Bag(path, reader(_storage(path)))
    except DataError:
        raise
    except Exception as error:
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


def _storage(path: Path) -> Path:
    """What the library is to open: the folder, or the only storage file of a folder that lost its metadata."""
    if path.is_file():
        if path.suffix == ".bag":
            raise DataError(
                f"expected a rosbag2, found the ROS 1 bag {path}: convert it with "
                f"'rosbags-convert --src {path} --dst {path.with_suffix('')}'"
            )
        if path.suffix not in (".mcap", ".db3"):
            raise DataError(f"expected a rosbag2 folder, or a .mcap or .db3 file of one, found {path}")
        return path
    if (path / "metadata.yaml").exists():
        return path
    file = _only_file(path, ".mcap", ".db3")
    if file is not None:
        return file
    found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "an empty folder"
    raise DataError(
        f"expected a rosbag2 folder with metadata.yaml at {path}, found {found}: give the folder that 'ros2 bag "
        "record' made, or rebuild its metadata with 'ros2 bag reindex'"
    )


def _only_file(path: Path, *suffixes: str) -> Path | None:
    """The file itself, or the only one with such a suffix in a folder."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in suffixes]
    return files[0] if len(files) == 1 and files[0].suffix in suffixes else None


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


def _typestore() -> Any:
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_HUMBLE)
