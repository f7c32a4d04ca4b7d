"""Decompression of whole files, chunks and messages: zstd, lz4 and bz2."""

from __future__ import annotations

import bz2
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from scfeat_core.errors import DataError

from .blocks import Damage

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878; no CDR message begins like this
_STEP = 1 << 12  # bytes: what comes out of a step with damage in it is lost
_ADVICE = "pip install 'scfeat-python[bags]'"


class CorruptError(Exception):
    """Compressed data, or what came out of it, is not what it says it is."""


def decompress(data: bytes | memoryview, method: str) -> bytes | memoryview:
    """method: "", "none", "zstd", "lz4", "bz2". Raises CorruptError for damaged data, and for another method."""
    if method in ("", "none"):
        return data
    try:
        if method == "zstd":
            return _zstd().decompress(data)
        if method == "lz4":
            return _lz4().decompress(data)
        if method == "bz2":
            return bz2.decompress(data)
    except DataError:
        raise
    except Exception as error:  # each library has its own
        raise CorruptError(str(error) or type(error).__name__) from error
    raise CorruptError(f"compressed with '{method}', which is not known")


def decompress_start(data: bytes | memoryview, method: str) -> bytes | memoryview:
    """As much as comes out of data without its end."""
    if method in ("", "none"):
        return data
    out = bytearray()
    try:
        if method == "zstd":
            worker: Any = _zstd().ZstdDecompressor()
        elif method == "lz4":
            worker = _lz4().LZ4FrameDecompressor()
        else:
            worker = bz2.BZ2Decompressor()
        for at in range(0, len(data), 4096):
            out += worker.decompress(bytes(data[at : at + 4096]))
    except DataError:
        raise
    except Exception:  # what came out before is good
        pass
    return bytes(out)


def decompress_file(source: Path, target: Path, damage: Damage) -> None:
    """A .zstd file; up to the damage where it has one. Raises DataError where there is no room for it."""
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
                damage.add(f"{source.name} ends in the middle: what it was compressed from is read up to there")
    except OSError as error:
        raise DataError(
            f"expected to decompress {source} into {target.parent}, found: {error.strerror}; make room there, or set "
            "TMPDIR to a folder on a larger disk"
        ) from error
    except DataError:
        raise
    except Exception as error:
        damage.add(f"{source.name} is damaged: what it was compressed from is read up to there ({error})")


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
