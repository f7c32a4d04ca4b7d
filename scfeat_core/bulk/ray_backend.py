"""The same pipeline on a Ray cluster: Ray Data hands blocks of file names to actors, each with a network of its own.

Only names and outcomes travel. The actors read the images and write the features themselves, so both must be on a file
system that all machines see under the same path. A block that is lost with its machine is done again by Ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.bulk.images import ImageFile
from scfeat_core.bulk.outputs import Output
from scfeat_core.bulk.pipeline import Outcome, Settings, extract_images
from scfeat_core.errors import DeviceError, ScfeatError

BLOCK_IMAGES = 256  # handed to an actor at once
_BLOCKS_EACH = 4  # for every actor, so that none idles at the end
_DECODERS = 2  # threads of an actor


def extract_with_ray(
    files: Sequence[ImageFile], settings: Settings, output: Output, workers: int
) -> Generator[Outcome, None, None]:
    """Outcomes as blocks are done, in any order; see :func:`scfeat_core.bulk.pipeline.extract_images`.

    workers: actors, with a CPU each, and with a GPU each where ``settings.device`` names one, or is auto and there are
    some. A Ray that is connected is used, else RAY_ADDRESS, else one is started on this machine for the time of the
    call. Raises ScfeatError where Ray is not installed, DeviceError where a GPU is wanted and there is none.
    """
    ray = require_ray()
    if not files:
        return
    with connected(ray, workers):
        device = _device(settings.device, ray.cluster_resources().get("GPU", 0) > 0)
        block = max(1, min(BLOCK_IMAGES, math.ceil(len(files) / (workers * _BLOCKS_EACH))))
        blocks = math.ceil(len(files) / block)
        rows = [{"name": file.name, "path": str(Path(file.path).absolute())} for file in files]
        names = ray.data.from_items(rows, override_num_blocks=blocks)
        done = names.map_batches(
            _Actor,
            fn_constructor_args=(_travelling(settings, device), _absolute(output)),
            batch_size=block,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
        )
        yield from _outcomes(ray, done)


def _outcomes(ray: Any, rows: Any) -> Iterator[Outcome]:
    try:
        for row in rows.iter_rows():
            yield Outcome(str(row["name"]), int(row["keypoints"]), str(row["error"]))
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        reason = next((line for line in reversed(lines) if "Error: " in line), lines[-1])  # of ours, not Ray's advice
        raise ScfeatError(
            f"expected the actors of Ray to go on, found: {reason}; what is complete is kept, run the command again"
        ) from error


def _device(wanted: str, gpus: bool) -> str:
    """Of an actor, which sees its own GPU only."""
    if wanted.startswith("cuda") and not gpus:
        raise DeviceError(f"device '{wanted}' was asked for, but the Ray cluster has no GPU; use --device cpu")
    return "cuda" if gpus and wanted != "cpu" else "cpu"


def _travelling(settings: Settings, device: str) -> Settings:
    weights = Path(settings.weights)
    return replace(
        settings,
        device=device,
        decoders=_DECODERS,
        weights=str(weights.absolute()) if weights.suffix else settings.weights,
    )


def _absolute(output: Any) -> Any:
    """An actor may have another working folder."""
    paths = {field.name: getattr(output, field.name) for field in fields(output)}
    return replace(output, **{name: path.absolute() for name, path in paths.items() if isinstance(path, Path)})


class _Actor:
    """Runs in a process of Ray's."""

    def __init__(self, settings: Settings, output: Output) -> None:
        self._settings = settings
        self._output = output
        self._extractor = settings.create()

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pairs = zip(block["name"], block["path"], strict=True)
        files = [ImageFile(str(name), str(path)) for name, path in pairs]
        outcomes = list(extract_images(files, self._settings, self._extractor, self._output))
        return {
            "name": np.array([outcome.name for outcome in outcomes], object),
            "keypoints": np.array([outcome.keypoints for outcome in outcomes], np.int64),
            "error": np.array([outcome.error for outcome in outcomes], object),
        }


def require_ray() -> Any:
    """The module ray, with ray.data. Raises ScfeatError with the fix where it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ScfeatError("--ray needs Ray Data, which is not installed: pip install 'scfeat-python[ray]'") from error
    return ray


@contextlib.contextmanager
def connected(ray: Any, workers: int, address: str | None = None) -> Iterator[None]:
    """A Ray that is connected, else that at ``address``, else at RAY_ADDRESS, else one of this machine for the time.

    Raises ScfeatError where there is none at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    place = {"address": address} if address else {"num_cpus": max(workers, os.cpu_count() or 1)}
    # Its own bar and, without a terminal, a block of lines every few seconds would bury ours.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False, **place)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ScfeatError(f"expected a Ray cluster at {address or 'this machine'}, found: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
