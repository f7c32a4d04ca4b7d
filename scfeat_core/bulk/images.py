"""Image files: which there are, what they are called, and decoding them ahead of the network."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scfeat_core.data.photos import read_rgb
from scfeat_core.errors import DataError, ImageError
from scfeat_core.evaluation.datasets import hpatches_sequences

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".webp", ".bmp", ".tif", ".tiff"))
AACHEN_FOLDERS = ("db", "query", "sequences")


class ImageFile(NamedTuple):
    """name: what its features are called, with ``/`` between folders. path: str, as there may be millions."""

    name: str
    path: str


class Decoded(NamedTuple):
    """image: (H, W, 3) uint8 RGB."""

    file: ImageFile
    image: np.ndarray


class Undecoded(NamedTuple):
    file: ImageFile
    error: ImageError


# -- which -------------------------------------------------------------------------------------------------------------


def find_images(sources: Sequence[Path], outside: Path | None = None) -> list[ImageFile]:
    """Files as they are given, called by their file name; below folders, in order, by their path from there.

    outside: a folder whose content does not count, such as the one that is written to. Raises DataError where there is
    no image. A file that is not there shows when it is read.
    """
    found = [file for source in sources for file in _below(source, outside)]
    if not found:
        places = ", ".join(map(str, sources))
        raise DataError(f"expected images ({', '.join(sorted(SUFFIXES))}) in {places}, found none; check the path")
    return found


def _below(source: Path, outside: Path | None) -> Iterator[ImageFile]:
    if not source.is_dir():
        yield ImageFile(source.name, str(source))
        return
    hidden = _inner(source, outside)
    for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES):
        if path.is_file() and not (hidden is not None and path.is_relative_to(hidden)):
            yield ImageFile(path.relative_to(source).as_posix(), str(path))


def _inner(source: Path, folder: Path | None) -> Path | None:
    """``folder`` as a path that begins with ``source``, where it is below it, and not the same or above."""
    if folder is None or not folder.resolve().is_relative_to(source.resolve()) or folder.resolve() == source.resolve():
        return None
    return source / folder.resolve().relative_to(source.resolve())


def hpatches_images(root: Path) -> list[ImageFile]:
    """``<sequence>/<k>.ppm`` of the sequences that the evaluation reads."""
    return [file for folder in hpatches_sequences(root) for file in _prefixed(folder)]


def aachen_images(root: Path) -> list[ImageFile]:
    """Images below ``db``, ``query`` and ``sequences`` (where it is there) of ``images_upright``, by their path."""
    folders = [root / name for name in AACHEN_FOLDERS if (root / name).is_dir()]
    if not folders:
        raise DataError(f"expected folders {', '.join(AACHEN_FOLDERS)} in {root}, found none; give images_upright")
    return [file for folder in folders for file in _prefixed(folder)]


def _prefixed(folder: Path) -> list[ImageFile]:
    return [ImageFile(f"{folder.name}/{file.name}", file.path) for file in find_images([folder])]


# -- decoding ----------------------------------------------------------------------------------------------------------


def read_image(path: Path, turned: bool = False) -> np.ndarray:
    """The image file as (H, W, 3) uint8 RGB. turned: as its EXIF data ask for, which COLMAP does not do.

    Raises ImageError where there is none, or none that OpenCV reads as a whole.
    """
    try:
        return read_rgb(path, upright=turned)
    except DataError as error:
        raise ImageError(str(error)) from error


def decode_ahead(files: Iterable[ImageFile], workers: int, ahead: int) -> Generator[Decoded | Undecoded, None, None]:
    """The images in order, decoded by ``workers`` threads, at most ``ahead`` images before they are asked for."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        pending: deque[Future[Decoded | Undecoded]] = deque()
        remaining = iter(files)
        try:
            pending.extend(pool.submit(_decode, file) for file in itertools.islice(remaining, max(ahead, 1)))
            while pending:
                done = pending.popleft().result()
                pending.extend(pool.submit(_decode, file) for file in itertools.islice(remaining, 1))
                yield done
        finally:
            for future in pending:
                future.cancel()


def _decode(file: ImageFile) -> Decoded | Undecoded:
    try:
        return Decoded(file, read_image(Path(file.path)))
    except ImageError as error:
        return Undecoded(file, error)


def group_by_size(
    decoded: Iterable[Decoded | Undecoded], batch_size: int, waiting_at_most: int, failed: Callable[[Undecoded], None]
) -> Iterator[list[Decoded]]:
    """Batches of images of one size, full where possible; the others go to ``failed``.

    At most ``waiting_at_most`` images wait for others of their size; then the oldest size goes on as it is.
    """
    waiting: dict[tuple[int, ...], list[Decoded]] = {}
    for each in decoded:
        if isinstance(each, Undecoded):
            failed(each)
            continue
        size = each.image.shape
        waiting.setdefault(size, []).append(each)
        if len(waiting[size]) == batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= waiting_at_most:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()
