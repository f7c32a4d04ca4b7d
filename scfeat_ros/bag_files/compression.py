"""Decompression of whole files, chunks and messages: zstd, lz4 and bz2."""

from __future__ import annotations

import bz2
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.errors import DataError

if TYPE_CHECKING:
    from .blocks import Damage

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878; no CDR message begins like this
_STEP = 1 << 12  # bytes: what comes out of a step with damage in it is lost
_ADVICE = "pip install 'scfeat-python[bags]'"


class CorruptError(Exception):
    """Compressed data, or what came out of it, is not what it says it is."""


def decompress(data: bytes | memoryview, method: str, most: int) -> bytes | memoryview:
    """method: "", "none", "zstd", "lz4", "bz2". most: bytes that may come out. Raises CorruptError for damaged data,
    where more would come out, and for another method."""
    if method in ("", "none"):
        return data
    try:
        pieces = list(_unpacked(data, method, most + 1))
    except (DataError, CorruptError):
        raise
    except Exception as error:  # each library has its own
        raise CorruptError(str(error) or type(error).__name__) from error
    if sum(map(len, pieces)) > most:
        raise CorruptError(f"more than the {most} bytes that it says come out")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def decompress_start(data: bytes | memoryview, method: str, most: int) -> bytes | memoryview:
    """As much as comes out of data without its end, at most so many bytes."""
    if method in ("", "none"):
        return data
    out = bytearray()
    try:
        for piece in _unpacked(data, method, most, _STEP):
            out += piece
    except DataError:
        raise
    except Exception:  # what came out before is good
        pass
    return bytes(out[:most])


def _unpacked(data: bytes | memoryview, method: str, most: int, step: int = 0) -> Iterator[bytes]:
    """What comes out of data, at most about ``most`` bytes. step: bytes that go in at once; 0: all.

    Raises what the libraries raise, and CorruptError for data without an end (unless it goes in by steps), or for a
    method that is not known.
    """
    make = {"zstd": lambda: _zstd().ZstdDecompressor(), "lz4": lambda: _lz4().LZ4FrameDecompressor()}
    make |= {"bz2": bz2.BZ2Decompressor}
    if method not in make:
        raise CorruptError(f"compressed with '{method}', which is not known")
    worker: Any = make[method]()
    for at in range(0, len(data), step or max(len(data), 1)):
        piece = data[at : at + (step or len(data))]
        while piece or not (worker.eof or worker.needs_input):
            if worker.eof:  # frames may follow each other
                worker = make[method]()
            out = worker.decompress(piece, most)
            most -= len(out)
            yield out
            if most <= 0:
                return
            piece = (worker.unused_data or b"") if worker.eof else b""
    if not worker.eof and not step:
        raise CorruptError("it ends in the middle")


def decompress_file(source: Path, target: Path, damage: Damage) -> None:
    """A .zstd file; up to the damage where it has one. Raises DataError where there is no room for it."""
    from .blocks import END  # which imports this module

    try:
        with source.open("rb") as packed, target.open("wb") as out:
            worker = _zstd().ZstdDecompressor()
            while data := packed.read(_STEP):
                if worker.eof:  # frames may follow each other
                    worker = _zstd().ZstdDecompressor()
                while data:
                    out.write(worker.decompress(data))
                    data = worker.unused_data if worker.eof else b""
                    worker = _zstd().ZstdDecompressor() if data else worker
            if not worker.eof:
                damage.add(f"{source.name} ends in the middle: what it was compressed from is read up to there", END)
    except OSError as error:
        raise DataError(
            f"expected to decompress {source} into {target.parent}, found: {error.strerror}; make room there, or set "
            "TMPDIR to a folder on a larger disk"
        ) from error
    except DataError:
        raise
    except Exception as error:
        damage.add(f"{source.name} is damaged: what it was compressed from is read up to there ({error})", END)


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ModuleNotFoundError as error:
        raise DataError(f"expected a module for zstd to read this bag, found none: {_ADVICE}") from error
    return zstd


def _lz4() -> Any:
    try:
        return import_module("lz4.frame")  # it has no types
    except ModuleNotFoundError as error:
        raise DataError(f"expected the module lz4 to read this bag, found it not installed: {_ADVICE}") from error
