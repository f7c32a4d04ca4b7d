"""Photographs in memory, as the source of warps: single pictures and the images of posed scenes alike."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from scfeat_core.config import read_config
from scfeat_core.errors import DataError

IMAGE_SUFFIXES = {".webp", ".jpg", ".jpeg", ".png", ".ppm"}
PYRAMID_LEVELS = 3
HELD_BACK_EVERY = 20  # photographs, where no split is given


@dataclass(frozen=True)
class ValidationSplit:
    """What training must never see: scene folders and single photographs, by name."""

    scenes: tuple[str, ...] = ()
    singles: tuple[str, ...] = ()


def read_split(path: Path | None) -> ValidationSplit | None:
    return None if path is None else read_config(ValidationSplit, path)


def find_photos(folder: Path, split: ValidationSplit | None, *, held_back: bool = False) -> list[Path]:
    """Image files below ``folder`` in a fixed order, without the validation split (or only it, if ``held_back``).

    Where no split is given, every 20th is held back. Raises DataError where there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    photos = [path for i, path in enumerate(found) if _is_held_back(path.relative_to(folder), i, split) == held_back]
    if not photos:
        kind = "held-back photographs" if held_back else "photographs"
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(
            f"expected {kind} ({suffixes}) below {folder}, found none among {len(found)} images; check data.split"
        )
    return photos


def _is_held_back(path: Path, index: int, split: ValidationSplit | None) -> bool:
    if split is None:
        return index % HELD_BACK_EVERY == 0
    return path.name in split.singles or not set(split.scenes).isdisjoint(path.parts)


def read_rgb(path: Path, *, upright: bool = True) -> np.ndarray:
    """(H, W, 3) uint8 RGB. upright: turned as the file asks for; a calibration belongs to the pixels as stored.

    Raises DataError where there is no file, or none that OpenCV reads as a whole.
    """
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        code = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"expected an image, found no file at {path}; check the path") from None
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    if is_cut_jpeg(code):
        raise _unreadable(path, "a JPEG without its end")
    try:
        image = cv2.imdecode(np.frombuffer(code, np.uint8), flags) if code else None
    except cv2.error as error:  # of images beyond its limits
        raise _unreadable(path, f"one that OpenCV refuses: {' '.join(str(error).split())}") from error
    if image is None:
        raise _unreadable(path, "a file that OpenCV cannot decode: it is damaged, or of an unknown format")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _unreadable(path: Path, found: str) -> DataError:
    return DataError(f"expected an image at {path}, found {found}; remove or replace it")


def is_cut_jpeg(code: bytes) -> bool:
    """Whether these are the bytes of a JPEG without its end, which OpenCV would fill with gray and call an image.

    The end-of-image marker is looked for behind the header: thumbnails in there have one of their own.
    """
    if not code.startswith(b"\xff\xd8"):
        return False
    at = 2
    while code[at : at + 1] == b"\xff" and code[at : at + 2] != b"\xff\xda":  # segments before the start of scan
        at += 2 + int.from_bytes(code[at + 2 : at + 4], "big") if code[at + 1 : at + 2] != b"\xff" else 1
    return code.find(b"\xff\xd9", at) < 0


def read_photo(path: Path, max_edge: int) -> list[np.ndarray]:
    """Pyramid of one photograph, (H, W, 3) uint8 RGB a level, each half the size of the one before (area filter).

    Raises DataError where the file cannot be decoded.
    """
    image = read_rgb(path)
    scale = max_edge / max(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return pyramid(image)


def pyramid(image: np.ndarray) -> list[np.ndarray]:
    """The image (H, W, 3) and ``PYRAMID_LEVELS`` - 1 smaller ones, each half the size of the one before."""
    levels = [image]
    for _ in range(PYRAMID_LEVELS - 1):
        h, w = (n // 2 for n in levels[-1].shape[:2])
        levels.append(cv2.resize(levels[-1][: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA))
    return levels


def matching_split(folder: Path, split: ValidationSplit | None) -> ValidationSplit | None:
    """The split, or None where it names nothing below ``folder``: it was made for other photographs."""
    try:
        find_photos(folder, split, held_back=True)
    except DataError:
        return None
    return split


def load_photos(paths: Sequence[Path], max_edge: int) -> tuple[list[list[np.ndarray]], list[str]]:
    """Pyramids of all readable photographs, and one message for each that is not. Raises DataError if none is."""

    def load(path: Path) -> list[np.ndarray] | str:
        try:
            return read_photo(path, max_edge)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        loaded = list(pool.map(load, paths))
    photos = [entry for entry in loaded if not isinstance(entry, str)]
    problems = [entry for entry in loaded if isinstance(entry, str)]
    if not photos:
        raise DataError(f"none of the {len(paths)} photographs could be read; the first: {problems[0]}")
    return photos, problems
