"""Writes serialized messages to an mcap rosbag2, with the definitions of the message packages that are installed.

What was recorded stays readable whatever happens: a disk that runs full ends the recording while there is still room
for its index, and the caller learns of it by ``problem``, not by an exception in the middle of a callback.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scfeat_core.errors import ScfeatError

NAME = "recording"  # of the folder, and of the file in it
LEAST = 4_000_000  # bytes that must be free to begin
RESERVE = 3_000_000  # bytes that stay free for the last chunk and the index of the recording, and for the report
_OWN = re.compile(rf"{NAME}\.mcap|metadata\.yaml(\.tmp)?")


class Recorder:
    """A rosbag2 ``recording`` in a folder; a context manager that closes it in order.

    problem: why recording ended early; empty where it did not. count: messages that were written.
    """

    def __init__(self, folder: Path) -> None:
        """An earlier recording stays until this one is opened. Raises ScfeatError where there is something else, or no
        room."""
        self.path = folder / NAME
        self.problem = ""
        self.count = 0
        self._writer: Any = None
        self._connections: dict[str, Any] = {}
        free = _free(folder) + sum(file.stat().st_size for file in _earlier(self.path))
        if free < LEAST:
            raise ScfeatError(
                f"expected at least {LEAST // 10**6} MB free in {folder} for the recording, found "
                f"{free / 1e6:.1f} MB: make room, or choose another folder with --out"
            )

    def open(self, topics: Mapping[str, str]) -> None:
        """Takes the place of an earlier recording. topics: topic -> type, e.g. scfeat/msg/Features. Raises ScfeatError
        where it cannot be written, and, with the earlier one still there, where a type is not installed.
        """
        from rosbags.rosbag2 import StoragePlugin, Writer

        store = installed_types(set(topics.values()))
        try:
            if _earlier(self.path):
                shutil.rmtree(self.path)
            writer = Writer(self.path, version=8, storage_plugin=StoragePlugin.MCAP)
            writer.open()
        except OSError as error:
            raise ScfeatError(
                f"expected to write the recording {self.path}, found {error.strerror or error}: choose another folder "
                "with --out"
            ) from error
        self._writer = writer
        self._connections = {
            topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in sorted(topics.items())
        }

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, topic: str, time: int, data: bytes) -> None:
        """time: nanoseconds since 1970. Nothing is written before it was opened, nor after a problem."""
        if self._writer is None:
            return
        if _free(self.path) < RESERVE + len(data):
            self.problem = f"the recording ended after {self.count} messages: no space left on the disk of {self.path}"
            self.close()
            return
        try:
            self._writer.write(self._connections[topic], time, data)
            self.count += 1
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write the index, so that the bag is complete; may be called again."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            self._writer = writer
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """The file stays without an index: readers go on to where it ends."""
        writer, self._writer = self._writer, None
        self.problem = (
            f"the recording ended after {self.count} messages ({error.strerror or error}): {self.path} has no index, "
            "what is in it can be read up to its end"
        )
        try:
            writer.abort()
        except OSError:  # what the file still buffered cannot be written either
            pass


def installed_types(names: set[str]) -> Any:
    """A typestore of rosbags with these messages and all that they consist of, read from the .msg files of the packages
    that are installed. names: e.g. {"scfeat/msg/Features"}. Raises ScfeatError where one is not.
    """
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    types: dict[str, Any] = {}
    wanted = sorted(names)
    while wanted:
        name = wanted.pop()
        if name not in types:
            types |= get_types_from_msg(_definition(name), name)
            wanted += _parts(types[name])
    store = get_typestore(Stores.EMPTY)
    store.register(types)
    return store


def _definition(name: str) -> str:
    from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

    package, _, message = name.partition("/msg/")
    try:
        return (Path(get_package_share_directory(package)) / "msg" / f"{message}.msg").read_text()
    except (PackageNotFoundError, OSError) as error:
        raise ScfeatError(
            f"expected the definition of {name} in the installed package {package}, found {error}: source the ROS "
            "installation that has it, or set AMENT_PREFIX_PATH"
        ) from error


def _parts(definition: Any) -> list[str]:
    """Names of the messages that are fields, or items of fields, of one. definition: (constants, fields) of rosbags."""
    from rosbags.interfaces import Nodetype

    found = []
    for _, node in definition[1]:
        while node[0] in (Nodetype.ARRAY, Nodetype.SEQUENCE):
            node = node[1][0]
        if node[0] == Nodetype.NAME:
            found.append(node[1])
    return found


def _free(folder: Path) -> int:
    """Bytes that an ordinary user may still write."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def _earlier(path: Path) -> list[Path]:
    """The folder of an earlier recording and its files; empty where there is none. Raises ScfeatError where there is
    something else."""
    if not path.exists():
        return []
    files = list(path.iterdir()) if path.is_dir() else []
    strange = [file.name for file in files if not _OWN.fullmatch(file.name)] if path.is_dir() else [path.name]
    if strange:
        raise ScfeatError(
            f"expected nothing but an earlier recording at {path}, found {', '.join(sorted(strange)[:5])}: choose "
            "another folder with --out"
        )
    return [path, *files]
