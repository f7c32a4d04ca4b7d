"""Many bags: each is replayed in a process of its own, here or on a Ray cluster. If one dies, the others go on."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from scfeat_core.commands.common import count_from
from scfeat_core.errors import DataError, ScfeatError

from ..processes import Child
from .child import RunJob, execute, hand_over, progress_of, result_of
from .outcomes import Run, bag_name, warn

AUTO = "auto"  # --ray without an address: RAY_ADDRESS, or a Ray of this machine
_MOST_THREADS = 8  # of a replay on a cluster
_PERIOD = 0.1  # seconds between two looks at the children
_PATIENCE = 600.0  # seconds for those that were interrupted to write what they have
# Of torch, numpy, and OpenCV: together the workers have as many threads as there are cores.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--workers and --ray."""
    group = parser.add_argument_group("many bags")
    group.add_argument(
        "--workers",
        type=count_from(1),
        metavar="N",
        help="bags at the same time, each in a process of its own, with its share of the cores (1)",
    )
    group.add_argument(
        "--ray",
        nargs="?",
        const=AUTO,
        metavar="ADDRESS",
        help="on a Ray cluster (ADDRESS, or RAY_ADDRESS, or a Ray of this machine); bags and DIR must be on a file "
        "system that all machines see under the same path",
    )


def output_folders(bags: Sequence[Path], out: Path) -> list[Path]:
    """A folder of its own below ``out`` for each bag, named after it, with as much of its path as tells it from others.

    Raises DataError where a bag is given twice.
    """
    paths = [bag.resolve() for bag in bags]
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"expected each bag once, found {', '.join(twice)} more often: give it once")
    depths = [1] * len(paths)
    while True:
        names = [_name(path, depth) for path, depth in zip(paths, depths, strict=True)]
        counts = Counter(names)
        deeper = [
            depth + (counts[name] > 1 and depth < len(path.parts) - 1)
            for path, name, depth in zip(paths, names, depths, strict=True)
        ]
        if deeper == depths:
            return [out / name for name in _numbered(names)]
        depths = deeper


def _name(path: Path, depth: int) -> str:
    return "_".join([*path.parts[1:-1], bag_name(path)][-depth:])


def _numbered(names: Sequence[str]) -> Iterator[str]:
    """What is still the same gets a number."""
    taken: set[str] = set()
    for name in names:
        number, unique = 2, name
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.add(unique)
        yield unique


# -- all of them -------------------------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Any],
    workers: int = 1,
    ray: str | None = None,
    run: RunJob | None = None,
    finished: Callable[[Any], Mapping[str, Any] | None] | None = None,
    progress: bool = True,
    report: Callable[[str], None] = warn,
) -> list[Run]:
    """Run the jobs, ``workers`` at a time, and return what came of each, in their order.

    jobs: with ``bag`` and ``out``, the folder that each has for itself; pickled. ray: address of a cluster, or AUTO;
    None: processes of this machine, which share its cores. run: what is done with a job; None: a replay. finished: the
    summary of a job that need not be done again; None: where run is None, too, that of a complete replay. report: takes
    a line when a job ends.

    What a job writes to stdout and stderr is in ``<out>.log``. A job that fails, or whose process dies, is an error of
    its run. SIGINT and SIGTERM end all of them, in order; what they had done is in their runs, and those of others say
    that they did not start. Raises DataError where two jobs have one folder, ScfeatError where Ray is not there.
    """
    names = _names(jobs)
    if finished is None:
        finished = _finished_replay() if run is None else lambda job: None
    todo: list[_Task] = []
    done: dict[str, Run] = {}
    for name, job in zip(names, jobs, strict=True):
        summary = finished(job)
        if summary is None:
            todo.append(_Task(name, job))
        else:
            done[name] = Run(name, summary, reused=True, folder=job.out, bag=job.bag)
    with _Progress(len(jobs), len(done), progress, report) as shown:
        backend = _Processes(workers, run) if ray is None else _Ray(workers, run, ray)
        with backend:
            done.update(_run_all(todo, backend, workers, shown))
    return [done[name] for name in names]


def _finished_replay() -> Callable[[Any], Mapping[str, Any] | None]:
    from .run import finished  # not before there is something to run: it brings torch

    return finished


def _names(jobs: Sequence[Any]) -> list[str]:
    names = [job.out.name for job in jobs]
    if len(set(names)) < len(names):
        raise DataError(f"expected a folder of its own for each bag, found {', '.join(sorted(names))}; give others")
    return names


@dataclass(eq=False)
class _Task:
    name: str
    job: Any
    since: float = field(default_factory=time.monotonic)

    def run(self, summary: Mapping[str, Any] | None, error: str = "", interrupted: bool = False) -> Run:
        if interrupted and summary is None:
            error = error or "stopped before there were figures"
        seconds = time.monotonic() - self.since
        return Run(self.name, summary, error, seconds, interrupted, folder=self.job.out, bag=self.job.bag)


def _run_all(todo: Sequence[_Task], backend: _Processes | _Ray, workers: int, shown: _Progress) -> dict[str, Run]:
    waiting = list(todo)
    done: dict[str, Run] = {}
    with _terminable():
        try:
            while waiting or backend.running:
                while waiting and len(backend.running) < workers:
                    _start(backend, waiting.pop(0), done, shown)
                _collect(backend, done, shown)
        except KeyboardInterrupt:
            shown.say("interrupted: waiting for what has been done to be written; once more ends that, too")
            _finish(backend, done, shown)
    return {task.name: Run.not_started(task.job) for task in todo} | done


def _start(backend: _Processes | _Ray, task: _Task, done: dict[str, Run], shown: _Progress) -> None:
    try:
        backend.start(task)
    except ScfeatError as error:
        done[task.name] = task.run(None, str(error))
        shown.ended(done[task.name])


def _collect(backend: _Processes | _Ray, done: dict[str, Run], shown: _Progress) -> None:
    for run in backend.ended():
        done[run.name] = run
        shown.ended(run)
    shown.show(backend.counts())


def _finish(backend: _Processes | _Ray, done: dict[str, Run], shown: _Progress) -> None:
    """Interrupt all and wait for them, but not for ever, nor over a second interruption."""
    end = time.monotonic() + _PATIENCE
    try:
        backend.interrupt()
        while backend.running and time.monotonic() < end:
            _collect(backend, done, shown)
    except KeyboardInterrupt:
        pass
    for task in backend.running:
        done[task.name] = task.run(None, "stopped before it had written what was done", True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the jobs as Ctrl-C does: this is how a job of continuous integration is cancelled."""

    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- processes of this machine -----------------------------------------------------------------------------------------


class _Processes:
    """State: the children that run."""

    def __init__(self, workers: int, run: RunJob | None) -> None:
        self._run = run
        self._environment = _environment(workers)
        self._children: dict[_Task, tuple[Child, Path]] = {}
        self._interrupted = False
        self._scratch = tempfile.TemporaryDirectory(prefix="scfeat-replay-")

    def __enter__(self) -> _Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child, _ in self._children.values():
            child.stop(patience=0.0)
        self._scratch.cleanup()

    @property
    def running(self) -> Sequence[_Task]:
        return list(self._children)

    def start(self, task: _Task) -> None:
        folder = Path(self._scratch.name, task.name)
        task.since = time.monotonic()
        command = [sys.executable, "-X", "faulthandler", "-m", "scfeat_ros.replay.child", str(folder)]
        log = task.job.out.with_name(task.name + ".log")
        try:
            folder.mkdir()
            hand_over(folder, self._run, task.job)
            log.parent.mkdir(parents=True, exist_ok=True)
            self._children[task] = Child(f"replay of {task.name}", command, log, self._environment), folder
        except OSError as error:
            raise ScfeatError(
                f"expected to start a process with its log at {log} and its job in {folder.parent}, found "
                f"{error.strerror or error}: choose another folder with --out (or TMPDIR), or fewer --workers"
            ) from error

    def ended(self) -> Iterator[Run]:
        """Each is forgotten after it was taken: an interruption in between loses none."""
        time.sleep(_PERIOD)
        for task, (child, folder) in list(self._children.items()):
            if child.exit_code is not None:
                yield self._result(task, child, folder)
                del self._children[task]

    def counts(self) -> list[tuple[int, int]]:
        return [progress_of(folder) for _, folder in self._children.values()]

    def interrupt(self) -> None:
        self._interrupted = True
        for child, _ in self._children.values():
            if child.exit_code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGINT)

    def _result(self, task: _Task, child: Child, folder: Path) -> Run:
        child.stop()
        result = result_of(folder)
        if result is not None:
            return task.run(**result)
        return task.run(None, _death(child), self._interrupted)


def _environment(workers: int) -> dict[str, str]:
    """Of a child: our modules where they are, and its share of the cores, unless the user has said how many."""
    threads = str(max(1, cores() // workers))
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**dict.fromkeys(_THREADS, threads), **os.environ, "PYTHONPATH": paths}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def _death(child: Child) -> str:
    code = child.exit_code or 0
    if code >= 0:
        ended = f"ended with exit status {code}"
    else:
        with contextlib.suppress(ValueError):
            ended = f"ended by signal {-code}"
            ended = f"ended by {signal.Signals(-code).name}"
    hint = ": the kernel does that where memory runs out; fewer --workers" if code == -signal.SIGKILL else ""
    lines = child.last_lines()
    end = f"; the last lines of {child.log}:\n{lines}" if lines else ""
    return f"expected the {child.name} to run to the end, found it {ended}{hint}{end}"


# -- Ray ---------------------------------------------------------------------------------------------------------------


class _Ray:
    """State: the tasks that the cluster has. A task has a process of its own, and is not tried again."""

    def __init__(self, workers: int, run: RunJob | None, address: str) -> None:
        from scfeat_core.bulk.ray_backend import connected, require_ray

        self._ray = require_ray()
        self._run = run
        self._workers = workers
        self._connection = connected(self._ray, workers, None if address == AUTO else address)
        self._tasks: dict[Any, _Task] = {}
        self._interrupted = False

    def __enter__(self) -> _Ray:
        self._connection.__enter__()
        resources = self._ray.cluster_resources()
        self._gpus = 1 if resources.get("GPU", 0) else 0
        threads = max(1, int(resources.get("CPU", 1)) // self._workers)
        self._threads = min(threads, _MOST_THREADS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.__exit__(kind, error, trace)

    @property
    def running(self) -> Sequence[_Task]:
        return list(self._tasks.values())

    def start(self, task: _Task) -> None:
        gpus = self._gpus if _wants_gpu(task.job) else 0
        remote = self._ray.remote(num_cpus=self._threads, num_gpus=gpus, max_calls=1, max_retries=0)(_execute)
        task.since = time.monotonic()
        self._tasks[remote.remote(self._run, task.job, str(Path.cwd()))] = task

    def ended(self) -> Iterator[Run]:
        over, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=_PERIOD * 5)
        for reference in over:
            yield self._result(reference, self._tasks[reference])
            del self._tasks[reference]

    def counts(self) -> list[tuple[int, int]]:
        """Not known of other machines."""
        return []

    def interrupt(self) -> None:
        self._interrupted = True
        for reference in self._tasks:
            self._ray.cancel(reference)  # raises KeyboardInterrupt in the task

    def _result(self, reference: Any, task: _Task) -> Run:
        try:
            return task.run(**self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            found = f"expected the replay of {task.name} to run to the end, found: {lines[0]}"
            left = _left_in(task.job.out) if self._interrupted else None
            return task.run(left, "" if self._interrupted else found, self._interrupted)


def _left_in(folder: Path) -> Mapping[str, Any] | None:
    """The figures of what a cancelled task had done, whose answer is lost."""
    from scfeat_core.replay.metrics import read_metrics

    with contextlib.suppress(ScfeatError):
        return read_metrics(folder).summary
    return None


def _execute(run: RunJob | None, job: Any, folder: str) -> dict[str, Any]:
    """On a machine of the cluster. folder: what paths of the job are relative to."""
    try:
        os.chdir(folder)
    except OSError as error:
        reason = f"expected the folder {folder} on all machines of the cluster, found: {error.strerror}"
        return {"summary": None, "error": f"{reason}; start from a shared one", "interrupted": False}
    return execute(run, job, lambda done, total: None)


def _wants_gpu(job: Any) -> bool:
    return getattr(getattr(job, "parameters", None), "device", "cpu") != "cpu"


# -- progress ----------------------------------------------------------------------------------------------------------


class _Progress:
    """A bar of frames over all bags where tqdm is installed and there is a terminal; a line where a bag has ended."""

    def __init__(self, bags: int, ended: int, wanted: bool, report: Callable[[str], None]) -> None:
        self._bags, self._ended = bags, ended
        self._wanted = wanted and sys.stderr.isatty()
        self._report = report
        self._frames = 0  # of bags that have ended
        self._known = 0  # bags that have said how many frames they have, and have ended
        self._last: list[tuple[int, int]] = []
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            self._bar = tqdm(unit="frame", dynamic_ncols=True, disable=not self._wanted, leave=False)
        if self._ended:
            self.say(f"{self._ended} of {self._bags} bags are complete already")
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        if self._wanted and self._bar is not None:
            self._bar.clear()
        self._report(text)

    def ended(self, run: Run) -> None:
        self._ended += 1
        frames = (run.summary or {}).get("frames")
        if isinstance(frames, int):
            self._frames, self._known = self._frames + frames, self._known + 1
        first = run.error.splitlines()[0] if run.error else f"{run.seconds:.1f} s"
        self.say(f"[{self._ended}/{self._bags}] {run.name}: {run.state}, {first}")

    def show(self, counts: Sequence[tuple[int, int]]) -> None:
        if self._bar is None or not self._wanted:
            return
        known = [(done, total) for done, total in counts if total > 0]
        bags = self._known + len(known)
        total = self._frames + sum(total for _, total in known)
        waiting = self._bags - self._ended - len(known)  # taken to be as long as the others
        self._bar.total = total + total * waiting // bags if bags else None
        self._bar.set_description(f"{self._ended} of {self._bags} bags", refresh=False)
        self._bar.update(self._frames + sum(done for done, _ in known) - self._bar.n)
