"""The cache files in which D2-Net and its successors publish HPatches results: ``.npy`` files that hold a pickle.

A pickle runs code when it is read, so these are read by an unpickler that knows numpy arrays and numbers, dicts, lists,
strings and nothing else. The content is an array of three objects: a dict from thresholds (1..15) to the sum of
accuracies over the illumination pairs, the same for the viewpoint pairs, and [kind of each pair, number of features of
each image, number of matches of each pair].
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from scfeat_core.errors import DataError
from scfeat_core.evaluation.hpatches import HPatchesCounts
from scfeat_core.evaluation.metrics import MMA_THRESHOLDS
from scfeat_core.feature_files import replaced

_MAX_BYTES = 64 << 20  # the known files have some 20 KB


def write_cache(path: Path, counts: HPatchesCounts) -> None:
    """Write a cache file that the scripts of D2-Net read, too. Raises DataError where that is not possible."""
    content = np.empty(3, object)
    for index, kind in enumerate("iv"):
        content[index] = dict(zip(counts.thresholds.tolist(), counts.accuracy[kind].tolist(), strict=True))
    content[2] = [counts.kinds, counts.keypoints, counts.matches]
    with replaced(path) as scratch, scratch.open("wb") as file:
        np.save(file, content, allow_pickle=True)


def read_cache(path: Path) -> HPatchesCounts:
    """What a cache file says; nothing in the file is run. Raises DataError where it is not such a file."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"expected a cache of HPatches results at {path}, found more than {_MAX_BYTES >> 20} MB")
        with path.open("rb") as file:
            content = _read_objects(file)
    except pickle.UnpicklingError as error:
        raise DataError(f"refused to read {path}: {error}") from error
    except OSError as error:
        raise DataError(f"expected a cache of HPatches results at {path}, found: {error.strerror}") from error
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"expected a cache of HPatches results at {path}, found a damaged file: {error!r}") from error
    return _counts(path, content)


# -- unpickling --------------------------------------------------------------------------------------------------------


def _read_objects(file: BinaryIO) -> Any:
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if not dtype.hasobject or shape != (3,):
        raise ValueError(f"an array {dtype} of shape {shape}, not 3 objects")
    return _plain(_Unpickler(file, encoding="latin1").load())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"expected only numpy arrays, dicts, lists, numbers and strings, found '{module}.{name}', which could "
                "run code; get the file from its source again"
            )
        return _ADMITTED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("expected no references to objects outside of the file, found one")


class _Dtype:
    """Stands for numpy.dtype: the type of numbers and strings in an array, or of objects."""

    def __init__(self, code: str, align: object = False, copy: object = True) -> None:
        if not re.fullmatch(r"[?bBhHiIlLqQefdUSO]\d{0,3}", code):
            raise pickle.UnpicklingError(f"expected a type of numbers or strings, found {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *structure = state
        if any(part is not None for part in structure[:3]) or order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"expected a type of numbers or strings, found one of state {state!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for numpy.ndarray. Its state is checked here; that of numpy's own trusts the file."""

    def __init__(self, kind: object, shape: object, code: object) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, data = state
        if dtype.dtype.hasobject:
            values = np.empty(len(data), object)
            values[:] = data
        else:
            values = np.frombuffer(_bytes(data), dtype.dtype)
        self.value = values.reshape(shape, order="F" if columns_first else "C")


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    if dtype.dtype.hasobject:
        raise pickle.UnpicklingError("expected a number or a string, found a scalar that is an object")
    return np.frombuffer(_bytes(data), dtype.dtype, count=1)[0].item()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 stores bytes. Any other codec, such as those that inflate, is refused."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected bytes as latin1, found them as {encoding!r}")
    return text.encode("latin1")


def _bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _plain(value: Any) -> Any:
    """The content with the stand-ins replaced by what they stand for."""
    if isinstance(value, _Array):
        return [_plain(item) for item in value.value] if value.value.dtype.hasobject else value.value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


_ADMITTED: Mapping[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # only an argument of _reconstruct; nothing that could be called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}


# -- checking ----------------------------------------------------------------------------------------------------------


def _counts(path: Path, content: Any) -> HPatchesCounts:
    try:
        illumination, viewpoint, (kinds, keypoints, matches) = content
        thresholds = np.array(sorted(illumination), np.int64)
        counts = HPatchesCounts(
            thresholds=thresholds,
            accuracy={
                kind: np.array([sums[t] for t in thresholds.tolist()], np.float64)
                for kind, sums in (("i", illumination), ("v", viewpoint))
            },
            kinds=np.array(kinds, dtype=str).ravel(),
            keypoints=np.array(keypoints, np.int64).ravel(),
            matches=np.array(matches, np.int64).ravel(),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: expected [sums of illumination, sums of viewpoint, [kinds, features, matches]], found another "
            f"content: {error!r}"
        ) from error
    problem = _problem(counts)
    if problem:
        raise DataError(f"{path}: {problem}; the file is damaged, or not of this benchmark")
    return counts


def _problem(counts: HPatchesCounts) -> str:
    if counts.thresholds.tolist()[: len(MMA_THRESHOLDS)] != list(MMA_THRESHOLDS):
        return f"expected thresholds 1..10 and more, found {counts.thresholds.tolist()}"
    if not len(counts.kinds) or set(counts.kinds.tolist()) - {"i", "v"}:
        return f"expected pairs of the kinds 'i' and 'v', found {sorted(set(counts.kinds.tolist()))[:5]}"
    if len(counts.matches) != len(counts.kinds):
        return f"expected a number of matches for each of {len(counts.kinds)} pairs, found {len(counts.matches)}"
    for kind, sums in counts.accuracy.items():
        pairs = int((counts.kinds == kind).sum())
        if not np.isfinite(sums).all() or (np.diff(sums) < -1e-6).any() or sums[0] < 0 or sums[-1] > pairs + 1e-6:
            return f"expected sums that rise from 0 to at most {pairs} over the '{kind}' pairs, found {sums.tolist()}"
    return ""
