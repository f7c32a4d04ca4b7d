"""Features in files: ``.npz``, one an image, as D2-Net's evaluation reads them, and one hloc-style HDF5 file of many.

Keypoints are in pixels of the stored image with (0, 0) the **centre** of the top-left pixel, in both formats. hloc has
the same convention in its feature files and adds the 0.5 of COLMAP itself when it imports them, so nothing is added
here. What is written to COLMAP by other means must be moved by (0.5, 0.5).

``.npz``: keypoints (N, 2) float32, scores (N,) float32, best first, descriptors (N, D) unit rows, image_size (width,
height), descriptor_space.

HDF5: one group an image, called by its name (with ``/`` it is nested), with keypoints (N, 2) float32, scores (N,),
descriptors (D, N), **transposed**, and image_size (width, height). Attributes: ``keypoints.uncertainty``, as hloc has
it: one pixel of the image that the network saw, in pixels of the stored image; ``descriptor_space`` of the group.
Descriptors are absent where there are none (D = 0), and stay uint8 where they are binary.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import DataError, ScfeatError
from scfeat_core.types import Features

_NPZ_MEMBERS = {"keypoints.npy", "scores.npy", "descriptors.npy"}


@contextlib.contextmanager
def replaced(path: Path, option: str = "", place: str = "folder") -> Iterator[Path]:
    """The name of a file to write, which takes the place of ``path`` at once, when it is complete, or not at all.

    A link stays one, to the new file; who may read a file stays, too. Three things are written to where they are, as
    nothing can take their place: what is no file; what a process has open, such as /dev/stdout, after what is in it;
    and files that are mounted, or in folders that cannot be written (where a disk fills up, these are left half).
    option: of the command, which chooses the place: a "folder" or a "file". Raises ScfeatError where it cannot be
    written.
    """
    with writing(path, option, place):
        target = _resolved(path)
        if _is_stream(target):
            yield target
            return
        scratch = _new_scratch(target)
        try:
            yield scratch
            _put(scratch, target)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()


_DESCRIPTOR = re.compile(r"/proc/(\d+)/(?:task/\d+/)?fd/(\d+)")  # what /dev/stdout and /dev/fd/1 lead to
_MOST_LINKS = 40  # as Linux has it
_STAYS = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV)  # it can only be written in place


def _resolved(path: Path) -> Path:
    """As os.path.realpath, but for what a process has open: its file is no way to it, other than the descriptor."""
    for _ in range(_MOST_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if _DESCRIPTOR.fullmatch(str(path)) or not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return path


def _is_stream(target: Path) -> bool:
    if _DESCRIPTOR.fullmatch(str(target)):
        return False
    with contextlib.suppress(OSError):
        return not (stat.S_ISREG(mode := target.stat().st_mode) or stat.S_ISDIR(mode))
    return False


def _new_scratch(target: Path) -> Path:
    """Beside the target, or where that cannot be and the target is there, in the folder for such files. Only for its
    owner where others may not read the target."""
    name = f".{target.name}.{uuid.uuid4().hex}.tmp"  # machines that share the folder do not collide
    if _DESCRIPTOR.fullmatch(str(target)):
        return _made(Path(tempfile.gettempdir(), name))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file():
        return target.with_name(name)
    try:
        return _made(target.with_name(name))
    except OSError as error:
        if error.errno not in _STAYS:
            raise
        return _made(Path(tempfile.gettempdir(), name))


def _made(scratch: Path) -> Path:
    os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return scratch


def _put(scratch: Path, target: Path) -> None:
    if _DESCRIPTOR.fullmatch(str(target)):
        _copy(scratch, _opened(target))
        return
    try:
        if target.is_file():
            _keep_access(scratch, target.stat())
        scratch.replace(target)
    except OSError as error:
        if error.errno not in _STAYS or not target.is_file():
            raise
        _copy(scratch, os.open(target, os.O_WRONLY | os.O_TRUNC))


def _keep_access(scratch: Path, found: os.stat_result) -> None:
    for owner, group in ((found.st_uid, -1), (-1, found.st_gid)):
        with contextlib.suppress(OSError):  # only root gives files away
            os.chown(scratch, owner, group)
    scratch.chmod(stat.S_IMODE(found.st_mode))


def _opened(target: Path) -> int:
    """A descriptor of what a process has open, which writes after what was written."""
    found = _DESCRIPTOR.fullmatch(str(target))
    assert found is not None
    if found[1] != str(Path("/proc/self").readlink()):
        return os.open(target, os.O_WRONLY | os.O_APPEND)
    for printed in (sys.stdout, sys.stderr):
        if printed is not None and not printed.closed:
            printed.flush()
    return os.dup(int(found[2]))


def _copy(scratch: Path, descriptor: int) -> None:
    with os.fdopen(descriptor, "wb") as file, scratch.open("rb") as source:
        shutil.copyfileobj(source, file)


@contextlib.contextmanager
def writing(path: Path, option: str = "", place: str = "folder") -> Iterator[None]:
    """Raises ScfeatError where what is written in the block to ``path`` cannot be. option, place: as for
    :func:`replaced`."""
    try:
        yield
    except OSError as error:
        other = f"another {place} ({option})" if option else f"another {place}"
        raise ScfeatError(
            f"expected to write {path}, found: {error.strerror or error}; free space, or choose {other}"
        ) from error


# -- npz ---------------------------------------------------------------------------------------------------------------


def write_npz(path: Path, features: Features, half: bool = False) -> None:
    """half: descriptors as float16. Raises ScfeatError."""
    features = features.numpy()
    with replaced(path) as scratch, scratch.open("wb") as file:
        np.savez(
            file,
            keypoints=features.keypoints.astype(np.float32, copy=False),
            scores=features.scores.astype(np.float32, copy=False),
            descriptors=_stored_descriptors(features, half),
            image_size=np.array(features.image_size),
            descriptor_space=np.array(features.descriptor_space),
        )


def read_npz(path: Path) -> Features:
    """Features of a file of ours or of D2-Net's layout: keypoints (N, 2 or more), descriptors (N, D), scores if any.

    Without scores all are 0; without a size, image_size is (0, 0). Raises DataError.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            keypoints = np.asarray(stored["keypoints"], np.float32)[:, :2]
            descriptors = np.asarray(stored["descriptors"], np.float32)
            scores = (
                np.asarray(stored["scores"], np.float32).ravel() if "scores" in stored else np.zeros(len(keypoints))
            )
            size = tuple(int(x) for x in stored["image_size"]) if "image_size" in stored else (0, 0)
            space = str(stored["descriptor_space"]) if "descriptor_space" in stored else ""
    except FileNotFoundError as error:
        raise DataError(f"expected features at {path}, found no file; check the folder and the postfix") from error
    except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected an .npz file with keypoints and descriptors, found {error!r}") from error
    shapes = (keypoints.shape, scores.shape, descriptors.shape)
    if descriptors.ndim != 2 or shapes[:2] != ((len(descriptors), 2), (len(descriptors),)):
        raise DataError(f"{path}: expected keypoints (N, 2), scores (N,) and descriptors (N, D), found {shapes}")
    return Features(keypoints, scores, descriptors, (size[0], size[-1]), space)


def is_complete_npz(path: Path) -> bool:
    """Whether there is a file of features that was written to its end (its directory, which comes last, is there)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _NPZ_MEMBERS.issubset(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _stored_descriptors(features: Features, half: bool) -> np.ndarray:
    if features.descriptors.dtype == np.uint8:  # binary
        return features.descriptors
    return features.descriptors.astype(np.float16 if half else np.float32, copy=False)


# -- HDF5 --------------------------------------------------------------------------------------------------------------


def require_h5py() -> Any:
    """The module h5py. Raises ScfeatError with the fix where it is not installed."""
    try:
        import h5py
    except ImportError as error:
        fix = "pip install 'scfeat-python[extract]', or write npz files"
        raise ScfeatError(f"HDF5 files need h5py, which is not installed: {fix}") from error
    return h5py


@contextlib.contextmanager
def new_h5(path: Path) -> Iterator[Any]:
    """An HDF5 file to fill, which then takes the place of ``path``, see :func:`replaced`. Raises ScfeatError.

    It is made in memory: where a disk fills up under HDF5, it cannot close its file, and crashes the process.
    """
    h5py = require_h5py()
    with replaced(path) as scratch:
        with h5py.File(str(scratch), "w", driver="core", backing_store=False) as stored:
            yield stored
            stored.flush()
            content = stored.id.get_file_image()
        scratch.write_bytes(content)


def write_h5(path: Path, items: Sequence[tuple[str, Features, float]], half: bool = False) -> None:
    """A new file with the features of some images: (name, features, uncertainty). Raises ScfeatError."""
    with new_h5(path) as stored:
        for name, features, uncertainty in items:
            _write_group(stored, name, features.numpy(), uncertainty, half)


def _write_group(stored: Any, name: str, features: Features, uncertainty: float, half: bool) -> None:
    group = stored.create_group(name)
    group.create_dataset("keypoints", data=features.keypoints.astype(np.float32, copy=False))
    group.create_dataset("scores", data=features.scores.astype(np.float32, copy=False))
    if features.descriptors.shape[1]:
        group.create_dataset("descriptors", data=np.ascontiguousarray(_stored_descriptors(features, half).T))
    group.create_dataset("image_size", data=np.array(features.image_size))
    group["keypoints"].attrs["uncertainty"] = uncertainty
    group.attrs["descriptor_space"] = features.descriptor_space


def read_h5(stored: Any, name: str) -> Features:
    """The features of an image in an open file. Raises DataError where it is not there, or not as we and hloc write."""
    try:
        group = stored[name]
        keypoints = np.asarray(group["keypoints"], np.float32)
        count = len(keypoints)
        scores = np.asarray(group["scores"], np.float32) if "scores" in group else np.zeros(count, np.float32)
        descriptors = np.asarray(group["descriptors"]).T if "descriptors" in group else np.zeros((count, 0), np.float32)
        width, height = (int(x) for x in group["image_size"])
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"expected the features of '{name}' in {stored.filename}, found {error}") from error
    if keypoints.shape != (count, 2) or len(scores) != count or descriptors.shape[:1] != (count,):
        shapes = (keypoints.shape, scores.shape, descriptors.T.shape)
        raise DataError(
            f"expected keypoints (N, 2), scores (N,) and descriptors (D, N) of '{name}' in {stored.filename}, found "
            f"{shapes}; extract it again"
        )
    kept = descriptors if descriptors.dtype == np.uint8 else descriptors.astype(np.float32)
    space = str(group.attrs.get("descriptor_space", ""))
    return Features(keypoints, scores, np.ascontiguousarray(kept), (width, height), space)


def h5_names(path: Path, member: str = "keypoints") -> list[str]:
    """The names of the images in a file: of the groups that have ``member``. Raises DataError where it is damaged."""
    names: list[str] = []
    with open_h5(path) as stored:
        stored.visititems(lambda name, item: names.append(name) if member in _members(item) else None)
    return names


def _members(item: Any) -> Any:
    return item if hasattr(item, "keys") else ()


def merge_h5(path: Path, parts: Sequence[Path], member: str = "keypoints") -> None:
    """Put the groups of ``parts``, in order of their names, into the file ``path``, which is new or added to.

    member: what each group has, see :func:`h5_names`.

    A name that occurs again is taken from the first file that has it. All or nothing: see :func:`replaced`. Raises
    ScfeatError where there is no room for it.
    """
    h5py = require_h5py()
    sources = [*([path] if path.exists() else []), *parts]
    with replaced(path) as scratch:
        _check_room(path, sum(source.stat().st_size for source in sources))
        with h5py.File(scratch, "w") as merged:
            for source in sources:
                _add_groups(merged, source, member)


def _add_groups(merged: Any, source: Path, member: str) -> None:
    """Those that are not there yet."""
    names = h5_names(source, member)
    with open_h5(source) as stored:
        for name in (name for name in names if name not in merged):
            stored.copy(name, merged.require_group(name.rpartition("/")[0] or "/"), name.rpartition("/")[2])


def _check_room(path: Path, size: int) -> None:
    """size: bytes. Before HDF5 finds out: see :func:`new_h5`."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise ScfeatError(
            f"expected room for {1e-6 * size:.1f} MB to write {path}, found {1e-6 * free:.1f} MB: free space, or "
            "choose another folder"
        )


def open_h5(path: Path) -> Any:
    """The file, for reading. Raises DataError."""
    try:
        return require_h5py().File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: expected a complete HDF5 file, found: {error}; remove it, extract again") from error
