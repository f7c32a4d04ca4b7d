"""Where features are written to. An output knows what is complete, and gives a writer for more.

All are plain data, so that they travel to other processes and machines, which may write at the same time.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from scfeat_core.bulk.images import ImageFile
from scfeat_core.drawing import draw_keypoints
from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.feature_files import h5_names, is_complete_npz, merge_h5, require_h5py, write_h5, write_npz
from scfeat_core.report import encode, write
from scfeat_core.types import Features

PART_IMAGES = 256  # of an HDF5 part: what an interruption can cost, 130 MB at 1024 points
_LOOKERS = 8  # threads that look at existing files; file systems over a network answer slowly

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes results one by one; what is complete is kept even where the run ends in between."""

    def add(self, name: str, image: np.ndarray, features: Features, uncertainty: float) -> None: ...

    def close(self) -> None: ...


class Output(Protocol):
    """half: descriptors are float16. target: the file or folder of the features. record: the file beside them that says
    how they were made.

    place: what the features of an image are called. remove: those that are there, of the images or of all. missing:
    the images that have no complete features yet. finish: once, when all are written.
    """

    @property
    def half(self) -> bool: ...

    @property
    def target(self) -> Path: ...

    @property
    def record(self) -> Path: ...

    def place(self, name: str) -> str: ...

    def remove(self, files: Sequence[ImageFile]) -> None: ...

    def missing(self, files: Sequence[ImageFile]) -> list[ImageFile]: ...

    def writer(self) -> Writer: ...

    def finish(self) -> None: ...


# -- npz ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpzOutput:
    """One file ``<folder>/<name>.<postfix>`` an image.

    pictures: a folder for pictures of the keypoints, if any. record_name: outputs in one folder need one each.
    """

    folder: Path
    postfix: str = "npz"
    half: bool = False
    pictures: Path | None = None
    record_name: str = "extraction"

    @property
    def target(self) -> Path:
        return self.folder

    @property
    def record(self) -> Path:
        return self.folder / f"{self.record_name}.json"

    def place(self, name: str) -> str:
        return f"{name}.{self.postfix}"

    def path(self, name: str) -> Path:
        return self.folder / self.place(name)

    def remove(self, files: Sequence[ImageFile]) -> None:
        _unlink(self.path(file.name) for file in files)

    def missing(self, files: Sequence[ImageFile]) -> list[ImageFile]:
        with ThreadPoolExecutor(_LOOKERS) as pool:
            complete = pool.map(lambda file: is_complete_npz(self.path(file.name)), files)
            return [file for file, done in zip(files, complete, strict=True) if not done]

    def writer(self) -> Writer:
        return _NpzWriter(self)

    def finish(self) -> None:
        """Nothing to do: every file is complete on its own."""


@dataclass(frozen=True)
class _NpzWriter:
    output: NpzOutput

    def add(self, name: str, image: np.ndarray, features: Features, uncertainty: float) -> None:
        if self.output.pictures is not None:
            picture = encode(draw_keypoints(image, features.keypoints), ".jpg")
            write(self.output.pictures / f"{name}.jpg", picture)
        write_npz(self.output.path(name), features, self.output.half)

    def close(self) -> None:
        """Nothing is held back."""


# -- HDF5 --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class H5Output:
    """One file for all images. Until all are there, parts of it lie in ``<path>.parts``.

    An HDF5 file that is being written can be lost as a whole when the process ends, and has one writer. So each writer
    makes parts of its own, which count once they have been closed; ``finish`` puts them together and removes them.
    """

    path: Path
    half: bool = False
    part_images: int = PART_IMAGES

    @property
    def target(self) -> Path:
        return self.path

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def parts(self) -> Path:
        return self.path.with_name(f"{self.path.name}.parts")

    def place(self, name: str) -> str:
        return name

    def remove(self, files: Sequence[ImageFile]) -> None:
        """All of them: one file cannot hold features that were made in different ways."""
        _unlink([self.path, *self._complete_parts()])

    def missing(self, files: Sequence[ImageFile]) -> list[ImageFile]:
        """A part that is damaged is removed."""
        require_h5py()
        complete = set(h5_names(self.path)) if self.path.exists() else set()
        for part in self._complete_parts():
            try:
                complete.update(h5_names(part))
            except DataError as error:
                logger.warning("removed, to be made again: %s", error)
                part.unlink()
        return [file for file in files if file.name not in complete]

    def writer(self) -> Writer:
        return _H5Writer(self)

    def finish(self) -> None:
        parts = self._complete_parts()
        if parts:
            merge_h5(self.path, parts)
        _unlink([*parts, *self.parts.glob(".*.tmp")] if self.parts.is_dir() else parts)
        if self.parts.is_dir():
            self.parts.rmdir()

    def _complete_parts(self) -> list[Path]:
        return sorted(self.parts.glob("*.h5"))


@dataclass(frozen=True)
class _H5Writer:
    output: H5Output
    _held: list[tuple[str, Features, float]] = field(default_factory=list)

    def add(self, name: str, image: np.ndarray, features: Features, uncertainty: float) -> None:
        self._held.append((name, features, uncertainty))
        if len(self._held) >= self.output.part_images:
            self.close()

    def close(self) -> None:
        if self._held:
            write_h5(self.output.parts / f"{uuid.uuid4().hex}.h5", self._held, self.output.half)
            self._held.clear()


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def check_name(name: str) -> str:
    """A postfix that makes a file name beside others. Raises ScfeatError."""
    if not name or "/" in name or name.startswith("."):
        raise ScfeatError(f"expected a postfix such as 'scfeat', found '{name}'")
    return name
