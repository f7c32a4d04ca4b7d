"""``scfeat replay --live``: a bag into the live ROS graph, and what a robot would see of the node there.

The bag is played by a process of its own (player.py), as it was recorded: serialized messages, their stamps, their QoS,
and /clock. The node is one of our own in a domain of its own, or one that is running already. This process listens:
it records all that the node publishes, and takes the times at which it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_core.feature_files import writing
from scfeat_core.report import text_table
from scfeat_ros.bags import Bag, open_bag
from scfeat_ros.domain import free_domain, own_graph
from scfeat_ros.fastdds import use_profile, version_of
from scfeat_ros.player import QOS, WHOLE, Window, recorded_events
from scfeat_ros.processes import Child, signals_handled

from .live_plan import OUTPUTS, LiveOptions, Plan, graph_plan, own_plan
from .live_report import FILES, CameraRun, LiveRun, figures_of, summary_of, warnings_of, write_files
from .outcomes import Run, conclude
from .recorder import NAME, Recorder

if TYPE_CHECKING:
    from scfeat_ros.monitor import Heard, Listener

    from .job import ReplayJob

OWN_NODE = "/scfeat"
START_PATIENCE = 180.0  # seconds until a node of our own has loaded its network, on a busy machine
STILL_PATIENCE = 240.0  # seconds without a sign of life of the player; bags may hold pauses
DRAIN_PATIENCE = 30.0  # seconds for the node to finish what it has when the player has ended
HASTE = 3.0  # the same after Ctrl-C
STEADY = 0.7  # seconds for which nothing new is discovered of a node before all of it is taken to be known
NAMING = 5.0  # seconds for the diagnostics of a running node to say which camera has which topic
END_PATIENCE = 10.0  # seconds for the player to end in order
LAST = 0.3  # seconds in which what was published last arrives
_RENAME = "stop one of them, or give it another"

Report = Callable[[str], None]


# -- on the command line -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--live and what belongs to it."""
    group = parser.add_argument_group(
        "live (needs ROS)",
        "the bag is played into the ROS graph for the node, in real time; what comes back is recorded and measured",
    )
    group.add_argument("--live", action="store_true", help="play the bag for the live node; --topic A,B: two cameras")
    group.add_argument("--rate", type=float, default=1.0, metavar="X", help="speed, such as 0.5 to 4 (%(default)g)")
    group.add_argument(
        "--node", default="", metavar="NAME", help="a running node, as /scfeat (one is started in a domain of its own)"
    )
    group.add_argument(
        "--clock", type=float, default=100.0, metavar="HZ", help="how often /clock is published, 0: never (%(default)g)"
    )
    group.add_argument(
        "--qos", choices=QOS, default=QOS[0], help="of the topics: as the bag says, or all reliable (%(default)s)"
    )
    group.add_argument("--imu", default="", metavar="T", help="sensor_msgs/Imu topic of the bag (sets use_imu)")
    group.add_argument("--mask", default="", metavar="T", help="mask topic of the bag; of several cameras A,B")
    group.add_argument(
        "--play-as",
        action="append",
        default=[],
        type=_renamed,
        metavar="T=NAME",
        help="play a topic of the bag under another name; may be repeated",
    )
    group.add_argument(
        "--outputs",
        type=_outputs,
        default=OUTPUTS,
        metavar="A,B",
        help=f"what is listened to, of {','.join(OUTPUTS)} (all): the node computes only what somebody listens to",
    )
    group.add_argument(
        "--patience",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds after which a node that says nothing is given up (%(default)g)",
    )


def _renamed(text: str) -> tuple[str, str]:
    name, _, other = text.partition("=")
    name = name.removesuffix(":")
    if not (name and other):
        raise argparse.ArgumentTypeError(f"expected TOPIC=NAME, found '{text}'")
    return name, other


def _outputs(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if strange := [name for name in chosen if name not in OUTPUTS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(OUTPUTS)}, found '{','.join(strange)}'")
    return chosen


def run(jobs: Sequence[ReplayJob], args: argparse.Namespace) -> int:
    """The exit status of ``scfeat replay --live``: bags one after the other. Raises ConfigError for wrong options."""
    _refuse_offline_options(args)
    options = options_of(args)
    runs: list[Run] = []
    for job in jobs:
        began = time.perf_counter()
        summary: dict[str, Any] | None = None
        try:
            summary, error = run_live(job, options, print, not args.no_progress)
            interrupted = bool(summary.pop("interrupted"))
        except ScfeatError as failure:
            error, interrupted = str(failure), isinstance(failure, Interrupted)
        seconds = time.perf_counter() - began
        runs.append(Run(job.out.name, summary, error, seconds, interrupted, folder=job.out, bag=job.bag))
        if interrupted:
            break
    return conclude([*runs, *map(Run.not_started, jobs[len(runs) :])], args)


def _refuse_offline_options(args: argparse.Namespace) -> None:
    unset = {"intrinsics": None, "ground_truth": None, "method": "scfeat", "camera": ""}
    for name, value in unset.items():
        if getattr(args, name, value) != value:
            raise ConfigError(
                f"expected no --{name.replace('_', '-')} together with --live, found it: the node has the inputs that "
                "it has on a robot; leave one of the two out"
            )
    if args.ray is not None or (args.workers or 1) > 1:
        raise ConfigError("expected neither --workers nor --ray together with --live: runs would disturb each other")


def options_of(args: argparse.Namespace) -> LiveOptions:
    """Raises ConfigError for values that make no sense."""
    settings = dict(args.settings)
    settings |= {name: getattr(args, name) for name in ("weights", "device") if getattr(args, name) is not None}
    return LiveOptions(
        rate=args.rate,
        node=args.node and "/" + args.node.strip("/"),
        clock=args.clock,
        qos=args.qos,
        imu=args.imu,
        masks=tuple(filter(None, args.mask.split(","))),
        play_as=dict(args.play_as),
        outputs=args.outputs,
        patience=args.patience,
        config=args.config,
        settings=settings,
    )


# -- one bag -----------------------------------------------------------------------------------------------------------


class Stop:
    """Asked for by SIGINT or SIGTERM. Everything that waits looks at it, so that all ends in order; a second signal
    changes nothing, as ending takes seconds.
    """

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: object) -> None:
        if not self.asked:
            os.write(2, b"\ninterrupted: ending in order; what was done is reported\n")
        self.asked = True


class Interrupted(ScfeatError):
    """SIGINT or SIGTERM came before anything was played."""

    def __init__(self) -> None:
        super().__init__("stopped before anything was played")


@contextmanager
def _stoppable() -> Iterator[Stop]:
    stop = Stop()
    with signals_handled(stop.ask):
        yield stop


@dataclass
class Outcome:
    """What is known so far. player: its summary. heard, arrivals: of the listener. problems: why it ended early.
    recorded: messages. cpu: share of one core that listening and recording took.
    """

    plan: Plan = field(default_factory=Plan)
    player: Mapping[str, Any] = field(default_factory=dict)
    heard: Mapping[str, Heard] = field(default_factory=dict)
    arrivals: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    recorded: int = 0
    cpu: float = 0.0

    def run(self) -> LiveRun:
        """The same by camera: its outputs are below the same name as its status."""
        from scfeat_ros.monitor import Heard

        status = {heard.name: (topic, heard) for topic, heard in self.heard.items()}
        cameras = []
        for camera in self.plan.cameras:
            topic, heard = status.get(camera.name, ("", Heard()))
            below = topic.rpartition("/")[0] + "/"
            own = {name.removeprefix(below): came for name, came in self.arrivals.items() if name.startswith(below)}
            own = {kind: came for kind, came in own.items() if kind in OUTPUTS}
            cameras.append(CameraRun(camera.name, camera.played, self._sent(camera.topic), heard, own))
        return LiveRun(cameras, self.player, self.recorded, self.cpu)

    def _sent(self, topic: str) -> list[tuple[int, int, int]]:
        sent = zip(self.player.get("sent", ()), self.player.get("topics", ()), strict=True)
        return [(index, stamp, at) for (index, stamp, at), of in sent if of == topic]


def run_live(
    job: ReplayJob, options: LiveOptions, report: Report = lambda text: None, progress: bool = True
) -> tuple[dict[str, Any], str]:
    """Play, listen, write ``recording``, live.json, live.html and latency.csv into ``job.out``.

    Returns the flat summary, with "interrupted" 0 or 1, and what went wrong, empty where nothing did: where the node
    dies, the disk is full or Ctrl-C comes, the report is of what was done until then. Raises ScfeatError where playing
    could not begin, Interrupted where it was stopped before; what an earlier run left is then as it was. Takes SIGINT
    and SIGTERM over meanwhile, and so belongs to the main thread.
    """
    import tqdm  # noqa: F401  # what may be missing would be missed only after the start

    _make_folder(job.out)
    outcome = Outcome()
    with _stoppable() as stop, tempfile.TemporaryDirectory(prefix="scfeat-live-") as scratch:
        _perform(job, options, outcome, stop, Path(scratch), report, progress)
        found = outcome.run()
        warnings = warnings_of(found)
        figures = figures_of(found)
        facts = _facts(job, options, outcome, [*warnings, *outcome.problems], stop.asked)
        write_files(job.out, found, figures, facts)
        report("\n" + text_table(figures) + "\n")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        report(f"written to {job.out}: {', '.join(FILES)}, {NAME}")
        return summary_of(found) | {"interrupted": int(stop.asked)}, "; ".join(outcome.problems)


def _make_folder(folder: Path) -> None:
    """Raises ScfeatError now, not after minutes, where it cannot be made, or written to."""
    with writing(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _remove_reports(folder: Path) -> None:
    """Those of an earlier run, which would be taken for those of a run that is killed. Raises ScfeatError."""
    with writing(folder, "--out"):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)


def _facts(
    job: ReplayJob, options: LiveOptions, outcome: Outcome, problems: Sequence[str], interrupted: bool
) -> dict[str, Any]:
    last = next((heard.last for heard in outcome.heard.values() if heard.last is not None), None)
    return {
        "bag": job.bag.name,
        "cameras": {camera.name or "camera": camera.played for camera in outcome.plan.cameras},
        "chosen": outcome.plan.why,
        "beside": list(outcome.plan.beside.values()),
        "window": {"start": job.start, "stop": job.stop, "frames": job.frames},
        "node": options.node or f"{OWN_NODE}, started for this",
        "rate": options.rate,
        "clock_hz": options.clock,
        "qos": options.qos,
        "outputs": list(options.outputs),
        "settings": {key: str(value) for key, value in options.settings.items()},
        **{key: getattr(last, key, "") for key in ("device", "precision", "descriptor_space")},
        "interrupted": interrupted,
        "problems": list(problems),
        "versions": {name: version_of(name) or "not from PyPI" for name in ("scfeat-python", "torch", "ros-rclpy")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
    }


def _perform(
    job: ReplayJob,
    options: LiveOptions,
    outcome: Outcome,
    stop: Stop,
    scratch: Path,
    report: Report,
    progress: bool,
) -> None:
    with ExitStack() as stack:
        bag = stack.enter_context(open_bag(job.bag))
        recorder = stack.enter_context(Recorder(job.out))
        if not options.node:
            outcome.plan = own_plan(bag, job, options)
            _check_window(bag, job, outcome.plan)
        session = _begin(outcome.plan, options, recorder, stop, stack, scratch, report)
        outcome.heard, outcome.arrivals = session.listener.heard, session.listener.arrivals
        topics = session.discover()
        session.hear()
        if options.node and not stop.asked:
            outcome.plan = graph_plan(bag, job, options, session.listener)
            _check_window(bag, job, outcome.plan)
        if stop.asked:
            raise Interrupted
        recorder.open(topics)
        _remove_reports(job.out)
        report(f"playing {outcome.plan} at rate {options.rate:g}{_window_text(job)}")
        _play(job, options, outcome, session, scratch, progress)
        recorder.close()
        outcome.recorded = recorder.count
        outcome.problems += [recorder.problem] if recorder.problem else []


def _check_window(bag: Bag, job: ReplayJob, plan: Plan) -> None:
    """Raises DataError where no image is in the seconds that are asked for."""
    window, names = Window(job.start, job.stop), {camera.topic for camera in plan.cameras}
    if window != WHOLE:
        cameras = {topic: topic.name for topic in bag.topics if topic.name in names}
        next(recorded_events(bag, cameras, {}, rate=1.0, window=window))


def _window_text(job: ReplayJob) -> str:
    """In words, which seconds of the recording; empty for all of it."""
    if not job.start and job.stop is None:
        return ""
    return f", from {job.start:g} s on" + ("" if job.stop is None else f" to {job.stop:g} s")


def _begin(
    plan: Plan,
    options: LiveOptions,
    recorder: Recorder,
    stop: Stop,
    stack: ExitStack,
    scratch: Path,
    report: Report,
) -> Session:
    """A listener, and a node of our own where none is running."""
    if options.node:
        use_profile()
        domain, name, patience = None, options.node, options.patience
        report(f"looking for {name} in ROS domain {os.environ.get('ROS_DOMAIN_ID', '0')}")
    else:
        domain, name, patience = stack.enter_context(free_domain()), OWN_NODE, START_PATIENCE
        os.environ.update(own_graph(domain, scratch))  # before Fast DDS reads it, in this process, too
        report(f"starting the node in ROS domain {domain}")
    from scfeat_ros.monitor import Listener

    listener = stack.enter_context(Listener(domain, name, recorder.write))
    node = None
    if not options.node:
        command = [sys.executable, "-m", "scfeat_ros.node", *plan.words]
        node = stack.enter_context(Child("node", command, scratch / "node.log", os.environ))
    return Session(listener, name, node, options, stop, patience)


@dataclass
class Session:
    """The listener on a node. node: None where it is not ours. patience: seconds until it must be known."""

    listener: Listener
    name: str
    node: Child | None
    options: LiveOptions
    stop: Stop
    patience: float

    def wait(self) -> bool:
        """Listen for a moment. Whether to go on. Raises ScfeatError where the node has died."""
        if self.node is not None and self.node.exit_code is not None:
            raise self.node.died()
        self.listener.spin(0.1)
        return not self.stop.asked

    def discover(self) -> dict[str, str]:
        """Topic -> type, of what there is to be recorded, when all of it is known; empty where it was stopped.

        Raises ScfeatError where the node is not there, or has nothing.
        """
        from scfeat_ros.monitor import DIAGNOSTICS, STATUS

        end = time.monotonic() + self.patience
        known, since = {"": ""}, 0.0
        while self.wait():
            now, found = time.monotonic(), self.listener.published()
            if found != known:
                known, since = found, now
            elif {STATUS, DIAGNOSTICS} <= set(found.values()) and now - since > STEADY and self._namesakes() < 2:
                chosen = {t: k for t, k in found.items() if self._wanted(t) or k in (STATUS, DIAGNOSTICS)}
                self.listener.listen(chosen)
                return chosen
            if now > end:
                raise self._absent(found)
        return {}

    def _wanted(self, topic: str) -> bool:
        return topic.rpartition("/")[2] in self.options.outputs

    def _namesakes(self) -> int:
        """Nodes with its name; of two, it would be chance which one is asked."""
        return self.listener.nodes().count(self.name)

    def _absent(self, found: Mapping[str, str]) -> ScfeatError:
        nodes = self.listener.nodes()
        if self._namesakes() > 1:
            text = f"found {self._namesakes()} nodes of that name: {_RENAME}"
        elif self.name in nodes:
            text = f"found {', '.join(found) or 'nothing of that kind'}: is it configured?"
        else:
            text = f"found the nodes {', '.join(nodes) or '(none)'}: check --node, ROS_DOMAIN_ID and the network"
        log = "" if self.node is None else f"; the last lines of its log:\n{self.node.last_lines()}"
        return ScfeatError(
            f"expected the node {self.name} to publish its status within {self.patience:g} s, {text}{log}"
        )

    def hear(self) -> None:
        """Until each camera has said how it is: its counters are counted from there. Raises ScfeatError."""
        heard = self.listener.heard.values()
        end = time.monotonic() + max(self.patience, self.options.patience)
        while any(camera.first is None for camera in heard) and self.wait():
            if time.monotonic() > end:
                raise ScfeatError(f"expected a status of {self.name} within {self.patience:g} s, found none: it hangs")
        end = time.monotonic() + NAMING
        while self.options.node and len(self.listener.inputs) < len(heard) and time.monotonic() < end and self.wait():
            pass

    def check(self) -> None:
        """Raises ScfeatError where the node has been silent for too long, began anew, or is not the only one."""
        heard = self.listener.heard.values()
        silence = time.monotonic() - min((camera.at for camera in heard), default=0) / 1e9
        if silence > self.options.patience:
            log = "" if self.node is None else f"; the last lines of its log:\n{self.node.last_lines()}"
            raise ScfeatError(
                f"expected a status of {self.name} at least every {self.options.patience:g} s, found none for "
                f"{silence:.1f} s: its process hangs, or is stopped{log}"
            )
        if any(camera.restarts for camera in heard):
            raise ScfeatError(f"expected {self.name} to run all the time, found that it was restarted meanwhile")
        if (count := self._namesakes()) > 1:  # one that was not known when it began
            raise ScfeatError(f"expected one {self.name}, found {count} nodes of that name: {_RENAME}")

    @property
    def received(self) -> int:
        """Images, since it is listened to."""
        heard = self.listener.heard.values()
        return sum(camera.last.received - camera.first.received for camera in heard if camera.last and camera.first)


# -- play --------------------------------------------------------------------------------------------------------------


def _play(
    job: ReplayJob, options: LiveOptions, outcome: Outcome, session: Session, scratch: Path, progress: bool
) -> None:
    """Start the player, and listen until all is done; what goes wrong is a problem of the outcome."""
    summary = scratch / "player.json"
    command = player_command(job, options, outcome.plan, summary)
    cpu, began = time.process_time(), time.monotonic()
    with Child("player", command, scratch / "player.log", os.environ) as player:
        try:
            _follow(session, player, summary, _images(job, outcome.plan), progress)
            if session.stop.asked:
                _end(session, player)
            _drain(session)
        except ScfeatError as error:
            outcome.problems.append(str(error))
            if session.node is not None and session.node.exit_code is None:
                session.node.stop(2.0)  # it may hang
        session.node = None  # what it does from here on does not matter
        outcome.cpu = (time.process_time() - cpu) / (time.monotonic() - began)
        _end(session, player)
        if summary.exists():
            outcome.player = json.loads(summary.read_text())


def player_command(job: ReplayJob, options: LiveOptions, plan: Plan, summary: Path) -> list[str]:
    """The process that plays. summary: where it says what it did."""
    words = ["--bag", str(job.bag), "--rate", str(options.rate), "--clock", str(options.clock), "--qos", options.qos]
    words += ["--summary", str(summary), "--wait", str(options.patience), "--hold", str(DRAIN_PATIENCE)]
    words += ["--frames", str(job.frames)] if job.frames else []
    words += ["--start", str(job.start)] if job.start else []
    words += ["--stop", str(job.stop)] if job.stop is not None else []
    for camera in plan.cameras:
        words += ["--camera", f"{camera.topic}={camera.played}"]
    for topic, name in plan.beside.items():
        words += ["--beside", f"{topic}={name}"]
    return [sys.executable, "-m", "scfeat_ros.player", *words]


def _images(job: ReplayJob, plan: Plan) -> int:
    return sum(min(camera.count, job.frames or camera.count) for camera in plan.cameras)


def _follow(session: Session, player: Child, summary: Path, images: int, progress: bool) -> None:
    """Until all is played, or it is enough. Raises ScfeatError where node or player do not go on."""
    from tqdm import tqdm

    activity, since = (0, 0), time.monotonic()
    quiet = not (progress and sys.stderr.isatty())
    with tqdm(total=images, unit=" images", desc="received by the node", leave=False, disable=quiet) as bar:
        while player.exit_code is None and not summary.exists() and session.wait():
            session.check()
            bar.update(session.received - bar.n)
            if activity != (session.received, player.output_size):
                activity, since = (session.received, player.output_size), time.monotonic()
            elif time.monotonic() - since > STILL_PATIENCE:
                raise ScfeatError(
                    f"expected images all the time, found none for {STILL_PATIENCE:g} s after {session.received}; the "
                    f"last lines of the player's log:\n{player.last_lines()}"
                )
    if player.exit_code not in (None, 0):
        raise ScfeatError(player.last_line()) if player.exit_code == 1 else player.died()


def _end(session: Session, player: Child) -> None:
    """End a player that still runs, so that it says what it did, and listen meanwhile."""
    end = time.monotonic() + END_PATIENCE
    if player.exit_code is None:
        os.kill(player.pid, signal.SIGINT)
    while player.exit_code is None and time.monotonic() < end:
        session.wait()


def _drain(session: Session) -> None:
    """Until the node has finished every image that it received, and says so three times."""
    end = time.monotonic() + (HASTE if session.stop.asked else DRAIN_PATIENCE)
    heard = list(session.listener.heard.values())
    state, since = [-1], [0]
    while time.monotonic() < end:
        session.wait()
        session.check()
        found = [_finished(camera) for camera in heard]
        if found != state:
            state, since = found, [camera.news for camera in heard]
        elif -1 not in state and all(camera.news >= news + 2 for camera, news in zip(heard, since, strict=True)):
            break
    session.listener.spin(LAST)


def _finished(camera: Heard) -> int:
    """Images that were received, where nothing of them is in work; -1 otherwise."""
    from scfeat_ros.monitor import waiting

    return -1 if camera.last is None or waiting(camera.last) else camera.last.received
