"""scfeat as contenders: its stages one by one, and the whole way from a JPEG to serialised messages."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from scfeat_core.bench.counting import cost_of, counted_cost, is_random, network_weights
from scfeat_core.bench.floors import NetworkCost, Work
from scfeat_core.bench.images import decode, encode, walk
from scfeat_core.bench.settings import Case, Variant
from scfeat_core.bench.timing import Contender, Task
from scfeat_core.errors import DeviceError, ScfeatError
from scfeat_core.extraction import Extractor, resolve_device
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.preprocessing import NetworkInput, stack_images
from scfeat_core.types import Features, FrameInput, FrameResult

# In the order in which an image goes through them; the last two are made of the others.
STAGES: Mapping[str, str] = {
    "decode": "JPEG to RGB",
    "upload": "to the device, as the normalised float image that the network takes",
    "network": "score map and descriptor map",
    "select": "non-maximum suppression, the best of them, sub-pixel positions",
    "describe": "descriptors sampled at the keypoints, normalised",
    "download": "features from the device",
    "assess": "brightness and sharpness of the image",
    "match": "mutual nearest neighbours, to the frame before",
    "verify": "two-view geometry, robustly",
    "track": "identities of the points, lost ones recognised again",
    "message": "ROS messages of features, matches and tracks",
    "serialise": "their bytes",
    "publish": "the same and handed to the middleware, with a subscriber in another process",
    "extract": "image to features on the host: upload to download",
    "total": "JPEG to serialised messages, or to tracks where there is no ROS",
}
_FROM_FRONTEND = ("assess", "match", "verify", "track")
_FRAME_NS = 33_333_333
_ENOUGH_MEMORY = 0.8  # of what is free

Item = TypeVar("Item")
ToMessages = Callable[[Sequence[FrameResult]], list[Any]]
Serialise = Callable[[Sequence[Any]], int]
Publish = Callable[[Sequence[Any]], None]


@dataclass(frozen=True)
class Ros:
    """What scfeat_ros does with results, where rclpy is there. publish: to a subscriber; None where there is none.
    publication: makes one.
    """

    to_messages: ToMessages
    serialise: Serialise
    publication: Callable[[], AbstractContextManager[Publish]]
    publish: Publish | None = None


def find_ros() -> tuple[Ros | None, str]:
    """None, and why, where rclpy or the messages of scfeat are not installed."""
    try:
        module = import_module("scfeat_ros.bench_stages")  # by name, as the core knows nothing of ROS
    except ImportError as error:
        return None, str(error).splitlines()[0]
    return Ros(module.to_messages, module.serialise, module.publication), ""


@contextmanager
def listened_ros() -> Iterator[tuple[Ros | None, str]]:
    """:func:`find_ros` with somebody who listens; what is missing, and why."""
    ros, missing = find_ros()
    if ros is None:
        yield None, f"messages are not measured: {missing}"
        return
    with ExitStack() as stack:
        missing = ""
        try:
            ros = replace(ros, publish=stack.enter_context(ros.publication()))
        except ScfeatError as error:
            missing = f"publication is not measured: {error}"
        yield ros, missing


def create_contender(
    variant: Variant, case: Case, images: Sequence[np.ndarray], levels: int = 1, ros: Ros | None = None
) -> Contender:
    """All stages of one way to run the network. Raises ScfeatError, DeviceError where memory does not suffice."""
    stages = create_stages(variant, case, images, levels)
    extractor = stages.extractor
    whole = _Whole(extractor, case, images, ros)
    facts = {
        "weights": variant.weights,
        "random_weights": is_random(variant.weights),
        "device": str(extractor.device),
        "levels": levels,
        "network_bytes": stages.peak_bytes,
    }

    def found() -> dict[str, Any]:
        return {"points": whole.points, **_told(extractor)}

    tasks = [*stages.tasks(), Task("total", whole.run)]
    if ros is not None and ros.publish is not None:
        tasks.append(Task("publish", whole.publish))
    return Contender(str(variant), "scfeat", tasks, facts, found)


def extraction_contender(variant: Variant, case: Case, images: Sequence[np.ndarray]) -> Contender:
    """``extract`` alone, with its parts ``network`` and ``select`` from one pass over one image. Raises as
    :func:`create_contender` does."""
    check_memory(variant, case, resolve_device(variant.device))
    extractor, turns = _extractor(variant, case, 1, synchronise=True), walk(len(images))

    def extract() -> dict[str, float]:
        extractor(images[next(turns)])
        return {stage: extractor.timings[stage] for stage in ("network", "select")}

    return Contender(str(variant), "scfeat", [Task("extract", extract)], found=lambda: _told(extractor))


def _told(extractor: Extractor) -> dict[str, Any]:
    """What is known of an engine only after it has run."""
    return {"precision": extractor.precision, "engine": extractor.engine, "note": extractor.engine_note}


def create_stages(variant: Variant, case: Case, images: Sequence[np.ndarray], levels: int = 1) -> Stages:
    """Raises as :func:`create_contender` does."""
    check_memory(variant, case, resolve_device(variant.device))
    return Stages(_extractor(variant, case, levels), variant, case, images)


def _extractor(variant: Variant, case: Case, levels: int, **options: Any) -> Extractor:
    options |= {"precision": variant.precision, "levels": levels, "engine": variant.engine}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the weights are random is said in the report
        return Extractor(network_weights(variant.weights), variant.device, case.budget, **options)


# -- memory ------------------------------------------------------------------------------------------------------------


def check_memory(variant: Variant, case: Case, device: torch.device) -> None:
    """Raise DeviceError now where the tensors of the network cannot be held, instead of being killed later."""
    needed, free = cost_of(variant, case).peak_bytes, free_memory(device)
    if free is not None and needed > _ENOUGH_MEMORY * free:
        raise DeviceError(
            f"{case.batch} image(s) of {case.size_text} need about {1e-9 * needed:.1f} GB for '{variant.weights}', and "
            f"{device} has {1e-9 * free:.1f} GB free; take smaller images or fewer at once"
        )


def free_memory(device: torch.device) -> float | None:
    """Bytes; None where nothing says it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


# -- the stages one by one ---------------------------------------------------------------------------------------------


class Stages:
    """Each stage on what the one before has made of the first images.

    points: keypoints of those, all together. peak_bytes: of all tensors that the network holds at once, at most, where
    it runs layer by layer; counted, not measured.
    """

    def __init__(self, extractor: Extractor, variant: Variant, case: Case, images: Sequence[np.ndarray]) -> None:
        self.extractor, self._variant, self._case = extractor, variant, case
        self._images = _batch(images, 0, case.batch)
        self._turns = walk(len(images))
        self._all = images
        with torch.inference_mode():
            self._given = self._upload()
            self._maps = self._network()
            self._keypoints = self._select()
        self._features = extractor.extract_batch(self._images, to_numpy=False)
        self.points = sum(len(features) for features in self._features)

    @property
    def peak_bytes(self) -> float:
        return max(cost.peak_bytes for cost in self._costs())

    def tasks(self) -> Iterator[Task]:
        calls = {
            "upload": self._upload,
            "network": self._network,
            "select": self._select,
            "describe": self._describe,
            "download": self._download,
            "extract": self._extract,
        }
        works = self._works()
        for stage, call in calls.items():
            yield self._task(stage, call, works.get(stage))

    def point_tasks(self, budget: int) -> Iterator[Task]:
        """Selection and description with another budget."""
        found = self._select(budget)
        yield self._task("select", lambda: self._select(budget))
        yield self._task("describe", lambda: self._describe(found))

    def _task(self, stage: str, call: Callable[[], object], work: Work | None = None) -> Task:
        device = self.extractor.device
        on_host = device.type != "cuda" or stage in ("download", "extract")
        return Task(stage, _quietly(call), None if on_host else device, {} if work is None else {stage: work})

    @torch.inference_mode()
    def _upload(self) -> list[NetworkInput]:
        return self.extractor._pyramid(stack_images(self._images), None)

    @torch.inference_mode()
    def _network(self) -> list[tuple[Tensor, Tensor]]:
        return [self.extractor._run_network(level.image) for level in self._given]

    @torch.inference_mode()
    def _select(self, budget: int | None = None) -> list[Any]:
        budget = self._case.budget if budget is None else budget
        pairs = zip(self._given, self._maps, strict=True)
        return [self.extractor._select(maps[0], level, budget) for level, maps in pairs]

    @torch.inference_mode()
    def _describe(self, keypoints: list[Any] | None = None) -> list[Any]:
        pairs = zip(self._maps, self._keypoints if keypoints is None else keypoints, strict=True)
        return [self.extractor._describe(maps[1], found.xy) for maps, found in pairs]

    def _download(self) -> list[Features]:
        return [features.numpy() for features in self._features]

    def _extract(self) -> list[Features]:
        return self.extractor.extract_batch(_batch(self._all, next(self._turns), self._case.batch))

    def _works(self) -> dict[str, Work]:
        """The least that the stages have to do."""
        batch, on_gpu = self._case.batch, self.extractor.device.type == "cuda"
        pixels = [level.image[:, 0].numel() for level in self._given]
        points = self.points
        row = 4 * self.extractor.descriptor_dim
        network = sum((cost.work for cost in self._costs()), Work())
        raw = 3 * self._case.size[0] * self._case.size[1] * batch
        upload = Work(0, raw, "to_device") if on_gpu else Work(0, raw + 12 * sum(pixels))
        download = Work(0, points * (row + 12), "from_device") if on_gpu else Work()
        return {
            "upload": upload,
            "network": network,
            "select": Work(0, 4 * sum(pixels)),  # each score is read once
            "describe": Work(7 * points * row / 4, 5 * points * row),  # four neighbours, one result
            "download": download,
        }

    def _costs(self) -> list[NetworkCost]:
        """Of each level."""
        weights, precision = self._variant.weights, self.extractor.precision
        return [counted_cost(weights, tuple(level.image.shape), precision) for level in self._given]


def _batch(items: Sequence[Item], start: int, count: int) -> list[Item]:
    return list(islice(cycle(items), start, start + count))


def _quietly(call: Callable[[], object]) -> Callable[[], None]:
    """What the call returns is no part of it."""

    def run() -> None:
        call()

    return run


# -- the whole way -----------------------------------------------------------------------------------------------------


class _Whole:
    """The pipeline of the node without the graph: one camera for each image of the batch.

    points: keypoints of the last images, on average.
    """

    def __init__(self, extractor: Extractor, case: Case, images: Sequence[np.ndarray], ros: Ros | None) -> None:
        config = FrontendConfig(max_keypoints=case.budget, levels=extractor.options.levels)
        self._frontend = Frontend(config, extractor)
        self._case, self._ros = case, ros
        self._codes = [encode(image) for image in images]
        self._turns = walk(len(images))
        self._stamp = 0
        self._messages: Sequence[Any] = ()  # of the last images
        self.points: float | None = None

    def publish(self) -> None:
        """The messages of the last images, once more serialised."""
        assert self._ros is not None and self._ros.publish is not None
        self._ros.publish(self._messages)

    def run(self) -> dict[str, float]:
        """One frame of each camera. Milliseconds by stage."""
        clock = _Clock()
        codes = _batch(self._codes, next(self._turns), self._case.batch)
        images = [decode(code) for code in codes]
        clock.lap("decode")
        results = self._frontend.process_batch(self._inputs(images))
        clock.skip()
        good = [result for result in results if isinstance(result, FrameResult)]
        for result in results:
            if isinstance(result, Exception):
                raise result
        if self._ros is not None:
            self._messages = self._ros.to_messages(good)
            clock.lap("message")
            self._ros.serialise(self._messages)
            clock.lap("serialise")
        self.points = float(np.mean([len(result.features) for result in good]))
        inner = {name: sum(result.timings.get(name, np.nan) for result in good) for name in _FROM_FRONTEND}
        return {**clock.laps, **{name: value for name, value in inner.items() if np.isfinite(value)}}

    def _inputs(self, images: Sequence[np.ndarray]) -> list[FrameInput]:
        self._stamp += _FRAME_NS
        return [FrameInput(image, self._stamp, f"camera{index}") for index, image in enumerate(images)]


class _Clock:
    """laps: milliseconds since the lap before, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = 1e3 * (now - self._last)
        self._last = now

    def skip(self) -> None:
        self._last = time.perf_counter()
