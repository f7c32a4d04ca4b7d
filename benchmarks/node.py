"""What the node adds to the network: stage by stage, with the middleware and without it.

    python benchmarks/node.py                                     # 1 ms instead of a network, 1024 points
    python benchmarks/node.py --rates 30,400,1000 --topics features
    python benchmarks/node.py --weights lite --rates 10           # the real network

Three ways, each in a process of its own, so that what they load and remember is theirs alone:

inside  the intake, the worker and the pipeline of the node, without ROS around them: images are handed over as the
        subscription's callback does, messages are built and thrown away
graph   the real node on a graph of its own; a camera in another process publishes, and subscribes to the topics
bare    an empty node with the same executor that only takes the same images: what the middleware and rclpy cost
        whoever listens

Instead of a network, --network-ms are slept, as on a GPU that works alone, and --points points of a moving scene come
out, so that matches, verification and tracks are the real ones (--canned: they are made up, too, and what is left is
the node itself). Times are milliseconds, medians and 95th percentiles:

transport  from the camera's call of publish to the callback: middleware, executor, conversion to a Python object
queue      from the callback to the inference thread, and from there to the one that publishes
decode     the message as pixels, its calibration and mask
front end  preprocess, network, select, match, verify, track
publish    all of the publication: of that
build      results to messages
write      the calls of publish: serialisation and the write into the middleware
total      from the callback to the end of the last publish
overhead   total without the network (the network alone: see benchmarks of the extractor)
node       total without the whole front end: what the node itself adds

CPU is the processor time of the process for each processed frame, and of each of its threads; unlike the rest it means
the same on a busy machine. "others" are those of the middleware and of torch.
Rates are of the camera, images a second; 0 is as fast as the receiver takes them (inside only: with graph and bare it
is as fast as the camera can). Where several values are given, all combinations are run, in turn, --rounds times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scfeat_core.errors import ScfeatError
from scfeat_ros.domain import free_domain, own_graph
from scfeat_ros.processes import Child, handle_signals

PATIENCE = 120.0  # seconds for torch and the discovery on a busy machine
WARM_UP = 1.5  # seconds
FRONT_END = ("preprocess", "network", "select", "assess", "match", "verify", "track")
STAGES = ("transport", "queue", "decode", *FRONT_END, "publish", "build", "write", "total", "overhead", "node")
TOPICS = ("features", "matches", "tracks")
CHANNELS = {"mono8": 1, "rgb8": 3}


@dataclass(frozen=True)
class Case:
    """One process that is measured. rate: images a second of each camera. topics: of TOPICS, joined by '+'."""

    way: str
    encoding: str
    rate: float
    topics: str
    executor: str
    cameras: int

    @property
    def names(self) -> tuple[str, ...]:
        return ("camera",) if self.cameras == 1 else tuple(f"camera{i}" for i in range(self.cameras))


@dataclass
class Record:
    """What a process writes down.

    frames: milliseconds by stage. seconds: of the measured time. cpu: processor time in it, seconds, by thread. taken:
    images that arrived. memory: resident_memory() in the end.
    """

    frames: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    taken: int = 0
    memory: dict[str, float] = field(default_factory=dict)


def thread_times() -> dict[str, float]:
    """Processor time of the threads of this process, seconds: those of Python by name, "others", and "all"."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    spent = {"all": time.process_time(), "others": 0.0}
    for folder in Path("/proc/self/task").iterdir():
        name = names.get(int(folder.name), "others")
        spent[name] = spent.get(name, 0.0) + 1e-9 * int((folder / "schedstat").read_text().split()[0])
    return spent


def resident_memory() -> dict[str, float]:
    """MB of this process: all of it, what no file is behind, what it shares with others, and the most it ever was."""
    names = {"VmRSS": "rss", "RssAnon": "anonymous", "RssShmem": "shared", "VmHWM": "peak"}
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    values = {words[0].rstrip(":"): words[1] for words in lines if len(words) > 1}
    return {name: round(float(values[key]) * 1024 / 1e6, 1) for key, name in names.items()}


# ------------------------------------------------------------------------------------------------ instead of a network


class Scene:
    """Points in front of a camera that moves sideways: their pixels in each frame, and descriptors that tell them
    apart."""

    def __init__(self, points: int, dim: int, size: tuple[int, int]) -> None:
        random = np.random.default_rng(0)
        self.size = size
        self._start = random.uniform(0, size, (points, 2))
        self._step = np.stack([-random.uniform(0.5, 3.0, points), np.zeros(points)], axis=1)
        descriptors = random.normal(size=(points, dim)).astype(np.float32)
        self.descriptors = descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)
        self.scores = np.sort(random.random(points).astype(np.float32))[::-1].copy()

    def keypoints(self, frame: int) -> np.ndarray:
        return np.mod(self._start + frame * self._step, self.size).astype(np.float32)


def dummy_extractor(milliseconds: float, scene: Scene) -> Any:
    """A ``scfeat_core.frontend.FeatureExtractor`` that only takes its time."""
    import torch

    from scfeat_core.types import Features

    class Dummy:
        device = torch.device("cpu")
        precision, descriptor_space, engine = "float32", "scfeat:dummy", "none"
        engine_note = engine_making = ""

        def __init__(self) -> None:
            self.timings: dict[str, float] = {}
            self._frame = 0
            self._fixed = (torch.from_numpy(scene.scores), torch.from_numpy(scene.descriptors))

        def update(self, **options: Any) -> None:
            pass

        def extract_batch(self, images: Sequence[Any], *arguments: Any, **options: Any) -> list[Features]:
            start = time.perf_counter()
            time.sleep(1e-3 * milliseconds)
            self.timings = {"network": 1e3 * (time.perf_counter() - start)}
            self._frame += 1
            keypoints = torch.from_numpy(scene.keypoints(self._frame))
            space = self.descriptor_space
            return [Features(keypoints, *self._fixed, scene.size, space) for _ in images]

    return Dummy()


def canned_frontend(config: Any, extractor: Any) -> Any:
    """A front end whose results are made up once: all points matched, verified, tracked, and calibrated."""
    from dataclasses import replace

    from scfeat_core.frontend import Frontend
    from scfeat_core.types import FrameResult, GeometryModel, Matches, PairResult, Tracks, TwoViewGeometry

    class Canned(Frontend):
        _made: Any = None

        def process_batch(self, inputs: Sequence[Any]) -> list[Any]:
            features = [each.numpy() for each in self.extractor.extract_batch(inputs)]
            made = self._made = self._made or self._make(features[0])
            return [
                replace(
                    made, camera=given.camera, stamp=given.stamp, features=own, timings=dict(self.extractor.timings)
                )
                for given, own in zip(inputs, features, strict=True)
            ]

        def submit(self, inputs: Sequence[Any]) -> Any:
            return self.process_batch(inputs)

        def result(self, submitted: Any) -> list[Any]:
            return submitted

        @staticmethod
        def _make(features: Any) -> FrameResult:
            count, points = len(features), features.keypoints
            order, flags = np.arange(count), np.zeros(count, np.uint8)
            ids = np.arange(1, count + 1, dtype=np.uint32)
            geometry = TwoViewGeometry(GeometryModel.ESSENTIAL, np.eye(3), np.ones(count, bool), 1.0)
            pair = PairResult(0, 0, Matches(order, order, features.scores), points, points, geometry)
            tracks = Tracks(ids, ids, order, points, points, points, flags, ids[:10])
            return FrameResult("camera", 1, 0, features, pair, {}, "", tracks)

    return Canned(config, extractor)


def make_frontend(args: argparse.Namespace) -> Callable[[Any], Any]:
    """What the node makes its front end with."""
    from scfeat_core.frontend import Frontend

    if args.weights:
        return Frontend
    make = canned_frontend if args.canned else Frontend
    scene = Scene(args.points, args.dim, args.size)
    return lambda config: make(config, dummy_extractor(args.network_ms, scene))


# ------------------------------------------------------------------------------------------------------- what is noted


class Notes:
    """Times of the stages of each frame, noted by what stands around the functions of the pipeline; one record."""

    def __init__(self) -> None:
        self.record = Record()
        self._build = self._write = 0.0
        self._since = (time.perf_counter(), thread_times())

    def watch(self, pipeline: Any) -> None:
        """pipeline: the module. Notes what it hands to its functions."""
        for name in ("features_to_message", "matches_to_message", "tracks_to_message"):
            setattr(pipeline, name, self._timed(getattr(pipeline, name), "_build"))
        health = pipeline.Pipeline._health

        def note(own: Any, job: Any, result: Any, finished: float) -> Any:
            made = health(own, job, result, finished)
            self.frame(job, result.timings, finished)
            return made

        pipeline.Pipeline._health = note

    def around(self, publishers: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _Timed(publisher, self) for name, publisher in publishers.items()}

    def begin(self) -> None:
        """What was noted so far was the warm-up."""
        self.record = Record()
        self._since = (time.perf_counter(), thread_times())

    def end(self, taken: int) -> Record:
        self.record.seconds = time.perf_counter() - self._since[0]
        self.record.cpu = {name: spent - self._since[1].get(name, 0.0) for name, spent in thread_times().items()}
        self.record.taken = taken
        self.record.memory = resident_memory()
        return self.record

    def frame(self, job: Any, timings: Mapping[str, float], finished: float) -> None:
        """finished: when the publication began."""
        now, sent = time.perf_counter(), job.header.stamp  # CLOCK_MONOTONIC, both
        arrived = job.frame.arrived
        total = 1e3 * (now - arrived)
        front_end = {name: timings[name] for name in FRONT_END if name in timings}
        noted = {
            "transport": 1e3 * (arrived - sent.sec - 1e-9 * sent.nanosec),
            "queue": 1e3 * (job.started - arrived),
            "decode": 1e3 * (job.decoded - job.started),
            **front_end,
            "build": self._build,
            "write": self._write,
            "total": total,
            "overhead": total - front_end.get("network", 0.0),
            "publish": 1e3 * (now - finished),
            "node": total - sum(front_end.values()),
        }
        self.record.frames.append(noted)
        self._build = self._write = 0.0

    def _timed(self, run: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            made = run(*arguments, **options)
            setattr(self, name, getattr(self, name) + 1e3 * (time.perf_counter() - start))
            return made

        return timed


class _Timed:
    """A publisher whose calls are timed."""

    def __init__(self, publisher: Any, notes: Notes) -> None:
        self._publisher = publisher
        self.publish = notes._timed(publisher.publish, "_write")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publisher, name)


# ------------------------------------------------------------------------------------------------------- the processes


def pixels(case: Case, size: tuple[int, int], shift: int = 0) -> np.ndarray:
    """(H, W, C) uint8: blobs of several sizes."""
    import cv2

    width, height = size
    noise = np.random.default_rng(0).uniform(0, 255, (height, width + 64)).astype(np.float32)
    picture = cv2.GaussianBlur(noise, (0, 0), 3) * 6 + cv2.GaussianBlur(noise, (0, 0), 1)
    gray = cv2.normalize(picture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)[:, shift : shift + width]
    return np.repeat(gray[..., None], CHANNELS[case.encoding], axis=2)


def image_message(case: Case, size: tuple[int, int], shift: int = 0) -> Any:
    from sensor_msgs.msg import Image

    width, height = size
    message = Image(height=height, width=width, encoding=case.encoding, step=width * CHANNELS[case.encoding])
    message.data.frombytes(np.ascontiguousarray(pixels(case, size, shift)).data)
    return message


class Silent:
    """A publisher without a middleware, that somebody listens to or nobody."""

    def __init__(self, listened: bool) -> None:
        self._count = int(listened)

    def get_subscription_count(self) -> int:
        return self._count

    def publish(self, message: Any) -> None:
        pass


def run_inside(case: Case, args: argparse.Namespace) -> Record:
    """The way of images through the node, in one thread that stands for its executor."""
    from rclpy.clock import Clock
    from rclpy.logging import get_logger

    from scfeat_ros import pipeline as module
    from scfeat_ros.inputs import Frame, Intake, MaskRules
    from scfeat_ros.parameters import NodeParameters
    from scfeat_ros.worker import Worker

    notes = Notes()
    notes.watch(module)
    settings = NodeParameters(cameras=case.names, max_keypoints=args.points, weights=args.weights or "lite")
    pipeline = module.Pipeline(settings, Clock(), get_logger("benchmark"), make_frontend(args))
    for channel in pipeline.channels.values():
        channel.publishers = notes.around({name: Silent(name in case.topics) for name in TOPICS})
    worker: Worker[Frame] = make_worker(pipeline)
    intake = Intake(settings.cameras, (), 0.005, MaskRules(), worker.submit, lambda frame, why: None)
    sent = [0]

    def send(message: Any) -> None:
        """What FrontendNode._on_image does, for all cameras."""
        for camera in case.names:
            now = time.perf_counter()
            worker.receive(camera)
            intake.add_image(Frame(camera, message, now), now)
        sent[0] += 1

    worker.start()
    messages = [image_message(case, args.size, shift) for shift in range(8)]
    last = case.names[-1]
    idle = lambda: worker.counts(last).waiting == 0  # noqa: E731
    feed(send, messages, case.rate, 1.0, idle)
    notes.begin()
    sent[0] = 0
    feed(send, messages, case.rate, args.seconds, idle)
    record = notes.end(sent[0] * case.cameras)
    worker.stop(10.0)
    return record


def make_worker(pipeline: Any) -> Any:
    from scfeat_ros.worker import Worker

    return Worker(pipeline.process, pipeline.failed)


def feed(
    send: Callable[[Any], None], messages: Sequence[Any], rate: float, seconds: float, idle: Callable[[], bool]
) -> None:
    """Send copies of the messages, stamped now, on an absolute schedule; rate 0: each when the one before is done."""
    from copy import copy

    start = time.perf_counter()
    for number in itertools.count():
        due = start + number / rate if rate else 0.0
        while (left := due - time.perf_counter()) > 0 or (not rate and not idle()):
            time.sleep(max(left, 0.0001))
        if time.perf_counter() - start > seconds:
            return
        message = copy(messages[number % len(messages)])
        message.header = stamped(time.perf_counter_ns())
        send(message)


def stamped(nanoseconds: int) -> Any:
    from builtin_interfaces.msg import Time
    from std_msgs.msg import Header

    stamp = Time(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)
    return Header(stamp=stamp, frame_id="optical")


def run_graph(case: Case, args: argparse.Namespace) -> Record:
    """The node itself."""
    import rclpy
    from rclpy.parameter import Parameter

    from scfeat_ros import node as module
    from scfeat_ros import pipeline
    from scfeat_ros.fastdds import use_profile

    notes = Notes()
    notes.watch(pipeline)

    class Measured(module.FrontendNode):
        def _create_outputs(self) -> None:
            super()._create_outputs()
            for channel in self._pipeline.channels.values():
                channel.publishers = notes.around(channel.publishers)

        def taken(self) -> int:
            return sum(self._worker.counts(camera).received for camera in case.names)

    use_profile()
    rclpy.init()
    values = {"cameras": list(case.names), "max_keypoints": args.points, "weights": args.weights or "lite"}
    overrides = [Parameter(name, value=value) for name, value in values.items()]
    node = Measured(frontend=make_frontend(args), parameter_overrides=overrides)
    executor = make_executor(case.executor)
    executor.add_node(node)
    node.trigger_configure()
    node.trigger_activate()
    record = spin(executor, args.folder, notes, node.taken, lambda: len(notes.record.frames))
    module.shut_down(node)
    return record


def run_bare(case: Case, args: argparse.Namespace) -> Record:
    """An empty node that takes the images, and measures how old they are."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image

    from scfeat_ros.fastdds import use_profile

    notes, taken = Notes(), [0]

    def on_image(message: Image) -> None:
        sent = message.header.stamp.sec + 1e-9 * message.header.stamp.nanosec
        notes.record.frames.append({"transport": 1e3 * (time.perf_counter() - sent)})
        taken[0] += 1

    use_profile()
    rclpy.init()
    node = rclpy.create_node("bare")
    for name in topics_of(case, "image"):
        node.create_subscription(Image, name, on_image, qos_profile_sensor_data)
    executor = make_executor(case.executor)
    executor.add_node(node)
    return spin(executor, args.folder, notes, lambda: taken[0], lambda: len(notes.record.frames))


def make_executor(kind: str) -> Any:
    from rclpy.executors import SingleThreadedExecutor

    if kind == "single":
        return SingleThreadedExecutor()
    if kind == "node":
        from scfeat_ros.node import make_executor as own

        return own()
    try:
        from rclpy.experimental import EventsExecutor
    except ImportError as error:
        raise ScfeatError("expected rclpy.experimental.EventsExecutor, found none: it came with Kilted") from error
    return EventsExecutor()


def topics_of(case: Case, name: str) -> list[str]:
    return [name] if case.cameras == 1 else [f"{camera}/{name}" for camera in case.names]


def spin(executor: Any, folder: Path, notes: Notes, taken: Callable[[], int], seen: Callable[[], int]) -> Record:
    """Until told to end by SIGINT. Says in the file "warm" that frames come, and measures from the file "begin" on."""
    stop = threading.Event()
    handle_signals(lambda *_: stop.set())
    while not (stop.is_set() or (folder / "begin").exists()):
        executor.spin_once(timeout_sec=0.05)
        if seen():
            (folder / "warm").touch()
    before = taken()
    notes.begin()
    while not stop.is_set():
        executor.spin_once(timeout_sec=0.05)
    return notes.end(taken() - before)


def run_camera(case: Case, args: argparse.Namespace) -> None:
    """Publishes serialized images with the time of now, and subscribes, without reading, to what the node is to do."""
    import rclpy
    from rclpy.qos import qos_profile_sensor_data
    from rclpy.serialization import serialize_message
    from scfeat.msg import Features, Matches, Tracks
    from sensor_msgs.msg import Image

    from scfeat_ros.fastdds import use_profile

    use_profile()
    rclpy.init()
    node = rclpy.create_node("camera")
    kinds = {"features": Features, "matches": Matches, "tracks": Tracks}
    for name in case.topics.split("+"):
        for topic in topics_of(case, name):
            node.create_subscription(kinds[name], f"scfeat/{topic}", lambda message: None, 5, raw=True)
    publishers = [node.create_publisher(Image, topic, qos_profile_sensor_data) for topic in topics_of(case, "image")]
    messages = [bytearray(serialize_message(image_message(case, args.size, shift))) for shift in range(8)]
    stop = threading.Event()
    handle_signals(lambda *_: stop.set())
    start = time.perf_counter()
    for number in itertools.count():
        if case.rate and (left := start + number / case.rate - time.perf_counter()) > 0:
            time.sleep(left)
        if stop.is_set():
            return
        data = messages[number % len(messages)]
        for publisher in publishers:
            struct.pack_into("<iI", data, 4, *divmod(time.perf_counter_ns(), 10**9))
            publisher.publish(bytes(data))


ROLES = {"inside": run_inside, "graph": run_graph, "bare": run_bare}


def play(role: str, case: Case, args: argparse.Namespace) -> None:
    """What a child process does; its record goes to record.json."""
    if role == "camera":
        run_camera(case, args)
        return
    record = ROLES[role](case, args)
    (args.folder / "record.json").write_text(json.dumps(asdict(record)))


# ---------------------------------------------------------------------------------------------------------- the parent


def measure(case: Case, args: argparse.Namespace) -> Record:
    """One case. Raises ScfeatError where a process of it fails."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scfeat-node-")))
        environment = {**os.environ, **own_graph(stack.enter_context(free_domain()), folder)}
        child = stack.enter_context(Child(case.way, command(case.way, case, folder), folder / "own.log", environment))
        if case.way != "inside":
            stack.enter_context(Child("camera", command("camera", case, folder), folder / "camera.log", environment))
            let_it_run(child, folder, args.seconds)
            child.stop()
        return read_record(child, folder)


def command(role: str, case: Case, folder: Path) -> list[str]:
    own = ["--role", role, "--case", json.dumps(asdict(case)), "--folder", str(folder)]
    return [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], *own]


def let_it_run(child: Child, folder: Path, seconds: float) -> None:
    """A warm-up after the first frames, and the measured time."""
    end = time.monotonic() + PATIENCE
    while not (folder / "warm").exists():
        child.check_alive()
        if time.monotonic() > end:
            raise ScfeatError(f"expected frames within {PATIENCE:g} s, found none; its log:\n{child.last_lines()}")
        time.sleep(0.05)
    time.sleep(WARM_UP)
    (folder / "begin").touch()
    time.sleep(seconds)
    child.check_alive()


def read_record(child: Child, folder: Path) -> Record:
    end = time.monotonic() + PATIENCE
    while child.exit_code is None and time.monotonic() < end:
        time.sleep(0.05)
    path = folder / "record.json"
    if not path.is_file():
        raise child.died()
    return Record(**json.loads(path.read_text()))


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Medians and 95th percentiles over the frames of all rounds; medians over the rounds for what is of a round."""
    frames = [frame for record in records for frame in record.frames]
    if not frames:
        raise ScfeatError("expected frames to be processed, found none: raise --seconds")
    stages = {name: [frame[name] for frame in frames if name in frame] for name in STAGES}
    found = {
        name: {"median": round(float(np.median(values)), 4), "p95": round(float(np.percentile(values, 95)), 4)}
        for name, values in stages.items()
        if values
    }
    return {
        "processed_hz": round(statistics.median(len(r.frames) / r.seconds for r in records), 1),
        "received_hz": round(statistics.median(r.taken / r.seconds for r in records), 1),
        "cpu_ms_per_frame": {
            name: round(statistics.median(1e3 * r.cpu[name] / max(len(r.frames), 1) for r in records), 3)
            for name in records[0].cpu
        },
        "frames": len(frames),
        "memory_mb": records[-1].memory,
        "ms": found,
    }


def table(case: Case, found: Mapping[str, Any]) -> str:
    head = (
        f"{case.way}, {case.cameras} x {case.encoding} at {case.rate:g} Hz, {case.topics}, {case.executor}: "
        f"{found['processed_hz']} Hz processed of {found['received_hz']}, "
        f"{found['memory_mb']['rss']:.0f} MB\n  CPU, ms a frame: "
        + ", ".join(f"{name} {value:.2f}" for name, value in found["cpu_ms_per_frame"].items())
    )
    rows = (f"  {name:10} {value['median']:9.3f} {value['p95']:9.3f}" for name, value in found["ms"].items())
    return "\n".join([head, f"  {'ms':10} {'median':>9} {'p95':>9}", *rows])


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for way, encoding, rate, topics, executor, cameras in itertools.product(
        args.ways, args.encodings, args.rates, args.topics, args.executors, args.cameras
    ):
        if way != "inside" or executor == args.executors[0]:  # it has none
            yield Case(way, encoding, float(rate), topics, executor, int(cameras))


def words(text: str) -> list[str]:
    return text.split(",")


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", type=words, default=words("inside,graph,bare"), help="(default: all three)")
    parser.add_argument("--encodings", type=words, default=["mono8"], help="of mono8, rgb8 (default: mono8)")
    parser.add_argument("--rates", type=words, default=words("30,400"), help="Hz of each camera (default: 30,400)")
    parser.add_argument(
        "--topics", type=words, default=words("features+matches+tracks"), help="that are subscribed to, joined by +"
    )
    parser.add_argument(
        "--executors", type=words, default=["node"], help="of single, events, node: the node's own choice (default)"
    )
    parser.add_argument("--cameras", type=words, default=["1"], help="how many, in one batch (default: 1)")
    parser.add_argument("--size", type=size, default=(640, 480), help="(default: 640x480)")
    parser.add_argument("--points", type=int, default=1024, help="(default: 1024)")
    parser.add_argument("--dim", type=int, default=64, help="of the descriptors (default: 64)")
    parser.add_argument("--network-ms", type=float, default=1.0, help="that the dummy takes (default: 1)")
    parser.add_argument("--canned", action="store_true", help="matches and tracks are made up, too")
    parser.add_argument("--weights", default="", help="the real network with these, instead of a dummy")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each case and round (default: 5)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: 1)")
    parser.add_argument("--output", type=Path, help="JSON (default: none)")
    for name in ("role", "case", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.role:
        args.folder = Path(args.folder)
        play(args.role, Case(**json.loads(args.case)), args)
        return 0
    handle_signals(lambda *_: sys.exit(130))  # and end the children
    records: dict[Case, list[Record]] = {case: [] for case in cases(args)}
    try:
        for _ in range(args.rounds):
            for case, own in records.items():
                own.append(measure(case, args))
        report = [{"case": asdict(case), **summary(own)} for case, own in records.items()]
    except ScfeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for case, figures in zip(records, report, strict=True):
        print(table(case, figures))
    if args.output:
        machine = {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()}
        options = {name: str(value) for name, value in vars(args).items() if value is not None}
        args.output.write_text(json.dumps({"machine": machine, "options": options, "cases": report}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
