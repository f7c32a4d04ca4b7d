"""One replay from beginning to end: images, front end, files, figures, trajectory, report."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from scfeat_core import __version__
from scfeat_core.config import dump_config
from scfeat_core.errors import ConfigError, DataError, ImageError, ScfeatError, StaleImageError
from scfeat_core.evaluation.method_extractor import REIDENTIFY_COSINE, MethodExtractor
from scfeat_core.frontend import Frontend, FrontendConfig
from scfeat_core.network.weights import weights_id
from scfeat_core.replay.metrics import NEVER_BEGAN, NO_TRUTH, Metrics
from scfeat_core.replay.records import FrameRecord, Recording
from scfeat_core.replay.run_folder import RunWriter, begin_run, camera_from_json, camera_to_json, is_finished, read_run
from scfeat_core.types import Camera, FrameResult
from scfeat_ros.inputs import Masks, read_mask
from scfeat_ros.parameters import NodeParameters
from scfeat_ros.processes import signals_handled

from .job import ReplayJob
from .source import Shot, Source, read_ahead

if TYPE_CHECKING:
    from scfeat_core.odometry import Odometry, TrajectoryScores

PART = 100  # frames that are lost at most where a replay is killed
_SAMPLES, _SAMPLE = 64, 65536  # pieces of a file of a bag, and bytes in each: 4 MB, however large it is
_COMPLAINTS = 20  # different ones that are kept
_ERRORS = ("ate_m", "ate_share", "ate_frames", "rpe_m", "rpe_deg")  # figures of the trajectory that need ground truth
Summary = dict[str, Any]
Report = Callable[[str], None]
Watch = Callable[[int, int], None]  # frames that are done, and all


def run_job(job: ReplayJob, report: Report = lambda text: None, progress: bool | Watch = True) -> Summary:
    """Replay a bag, or go on where an unfinished replay was; the summary of its figures.

    report: takes lines of text. progress: True: a bar on stderr, where that is a terminal; or called with the number of
    frames that are done and that of all. SIGINT (where this is the main thread) ends the replay after the frame in
    work: files and report are of what was done, the summary has "interrupted": 1, and the same job goes on there. One
    that comes when only figures and report are left changes nothing. A second one ends it at once. Raises ScfeatError.
    """
    source = Source(job)
    _say_choices(source, report)
    interrupted = False
    inputs = _inputs(job, source)
    if not job.overwrite and is_finished(job.out, inputs):
        report(f"{job.out} holds this replay already: only figures and report are made again (--overwrite: all)")
    else:
        player = Player(job, source)  # what cannot be made leaves an earlier run alone
        writer = begin_run(job.out, inputs, job.overwrite)
        assert writer is not None
        interrupted = _replay(player, source, writer, report, progress)
    report("making figures and report" if job.report else "making figures")
    with _stoppable(report):  # they take seconds, and whoever stops there still wants them
        summary = conclude(job, source, report)
    if not summary["processed"] and not interrupted:
        first = next(iter(read_run(job.out).frames))
        raise DataError(
            f"expected images on {source.topic.name} that give results, found none among {summary['frames']} (image "
            f"{first.index}: {first.error}): see the report in {job.out}, then start anew (--overwrite)"
        )
    return {**summary, "interrupted": 1} if interrupted else summary


def finished(job: ReplayJob) -> Summary | None:
    """The summary of a job whose folder is complete and was made of the same inputs; None where there is work to do."""
    from scfeat_core.replay.metrics import read_metrics

    if job.overwrite or not (job.out / "run.json").exists():
        return None
    if job.report and not (job.out / "report.html").exists():  # the disk was full, or none was asked for
        return None
    with suppress(ScfeatError):
        if is_finished(job.out, _inputs(job, Source(job))):
            summary = _flat(read_metrics(job.out))
            whole = summary["frames"] == len(read_run(job.out).frames)
            return summary if whole and summary["processed"] else None
    return None


# -- images ------------------------------------------------------------------------------------------------------------


def _replay(player: Player, source: Source, writer: RunWriter, report: Report, progress: bool | Watch) -> bool:
    """All images that are not done yet; whether it was interrupted."""
    with _nothing_left(writer), _threads_kept():
        if writer.progress.frames:
            report(f"going on after {writer.progress.frames} frames that are done already")
            player.restore(writer.progress.state)
        with _stoppable(report) as stopped, _shown(progress, source.count) as shown:
            _play(source, player, writer, stopped, shown)
            interrupted = stopped.is_set()
            if writer.progress.frames == 0:
                raise KeyboardInterrupt if interrupted else DataError(_nothing(source))
            writer.finish(player.facts(interrupted), player.camera, source.truth, complete=not interrupted)
    for text in (*player.warnings, *source.lost.damage):
        report(f"warning: {text}")
    return interrupted


def _play(source: Source, player: Player, writer: RunWriter, stopped: threading.Event, shown: Watch) -> None:
    """The images that are left, in parts, until ``stopped`` is set."""
    count, pending = writer.progress.frames, []
    images = source.shots(skip=count)
    with read_ahead(images) if player.leaves_cores_idle else nullcontext(images) as shots:
        for shot in shots:
            pending.append(player.process(shot))
            count += 1
            shown(count, source.count)
            if len(pending) == PART:
                writer.add(pending, player.state())
                pending = []
            if stopped.is_set():
                break
    if pending:
        writer.add(pending, player.state())


@contextmanager
def _nothing_left(writer: RunWriter) -> Iterator[None]:
    """What ends before there is anything of a run leaves all as it was: no folder that looks like an unfinished one."""
    try:
        yield
    except BaseException:
        if not writer.progress.frames:
            writer.abandon()
        raise


@contextmanager
def _threads_kept() -> Iterator[None]:
    """The number of threads of torch is afterwards what it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _nothing(source: Source) -> str:
    damage = "; ".join(source.lost.damage)
    return f"expected images on {source.topic.name} in {source.job.bag}, found none: {damage or 'check start and stop'}"


class Player:
    """What of the node is between an image and its results, without ROS.

    camera: the calibration of the first calibrated image. warnings: what was not as it should be, each once.
    """

    def __init__(self, job: ReplayJob, source: Source) -> None:
        parameters, self._name = job.parameters, job.camera_name
        self._config = frontend_config(job)
        self._frontend = Frontend(self._config, _extractor(job.method, self._config))
        self._source = source
        mask = parameters.camera_masks.get(self._name)
        self._masks = Masks(None if mask is None else read_mask(mask), self._complain)
        self._calibrate = source.calibrations(self._complain)
        self._gyro_rotation = parameters.imu_rotations[self._name]
        self._newest: int | None = None  # stamp of the newest processed frame
        self.camera: Camera | None = None
        self.warnings: list[str] = []

    @property
    def leaves_cores_idle(self) -> bool:
        """Whether images can be decoded meanwhile. A network on the CPU has all cores: another thread takes from it
        what it gains, and slows down what runs before the network (KITTI, 2 cores: 0.5 to 1.9 ms)."""
        return self._frontend.extractor.device.type != "cpu"

    def process(self, shot: Shot) -> FrameRecord:
        """What there is to say about one image. Only errors that are those of all images are raised."""
        started = time.perf_counter()
        timings = {"read": shot.read_ms, "decode": shot.decode_ms}
        if shot.pixels is None:
            return FrameRecord(shot.index, shot.stamp, "decode", shot.error, timings=timings)
        calibration = self._calibrate(shot)
        try:
            result = self._process(shot, calibration)
        except ConfigError:  # no image will do better
            raise
        except Exception as error:  # as in the node: one image must not end all
            text = str(error) if isinstance(error, ScfeatError) else repr(error)
            return FrameRecord(shot.index, shot.stamp, _reason(error), text, timings=timings)
        self._newest = shot.stamp
        self.camera = calibration if self.camera is None else self.camera
        record = _record(shot, result)
        other = 1e3 * (time.perf_counter() - started) - sum(result.timings.values())
        return replace(record, timings={**timings, **result.timings, "other": other})

    def facts(self, interrupted: bool) -> dict[str, Any]:
        """What came out, for the record of the run."""
        lost, extractor = self._source.lost, self._frontend.extractor
        if extractor.engine_note:
            self._complain(f"engine {extractor.engine}: {extractor.engine_note}")
        cameras = [name for name, count in lost.frame_ids.items() if count > 1]  # what came once may be damage
        if len(cameras) > 1:
            self._complain(
                f"images of {len(cameras)} cameras come on {self._source.topic.name} (frame_id "
                f"{', '.join(cameras[:8])}): their matches mean nothing, record a topic for each"
            )
        return {
            "descriptor_space": extractor.descriptor_space,
            "engine": extractor.engine,
            "engine_note": extractor.engine_note,
            "camera": self._source.calibration if self.camera is not None else "",
            "frame_ids": list(lost.frame_ids),
            "threads": torch.get_num_threads(),
            "damage": lost.damage,
            "lost": lost.counts if lost.damage else {"messages": 0, "bytes": 0},
            "warnings": [*self._source.warnings, *self.warnings],
            "interrupted": interrupted,
        }

    def state(self) -> dict[str, np.ndarray]:
        """All that later images depend on, as plain arrays."""
        own = {
            "newest": self._newest,
            "camera": None if self.camera is None else camera_to_json(self.camera),
            "warnings": self.warnings,
            "threads": torch.get_num_threads(),
        }
        return {**self._frontend.snapshot(), "replay": np.frombuffer(json.dumps(own).encode(), np.uint8)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state that :meth:`state` gave, with as many threads: sums depend on how they are shared out.

        Raises DataError where it is something else.
        """
        try:
            own = json.loads(bytes(state["replay"]))
            self._newest, self.warnings = own["newest"], own["warnings"]
            self.camera = camera_from_json(own["camera"])
            torch.set_num_threads(own["threads"])
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"expected the state of a replay, found {error!r}: start anew (--overwrite)") from error
        self._frontend.restore({name: values for name, values in state.items() if name != "replay"})

    def _process(self, shot: Shot, calibration: Camera | None) -> FrameResult:
        assert shot.pixels is not None
        size = (shot.pixels.shape[1], shot.pixels.shape[0])
        return self._frontend.process(
            shot.pixels,
            shot.stamp,
            self._name,
            calibration,
            self._masks(None, size),
            rotation=self._rotation(shot.stamp),
        )

    def _rotation(self, stamp: int) -> np.ndarray | None:
        gyro = self._source.gyro
        if gyro is None or self._newest is None or len(gyro) == 0:
            return None
        return gyro.rotation(self._newest, stamp, self._gyro_rotation)

    def _complain(self, text: str) -> None:
        if text not in self.warnings and len(self.warnings) < _COMPLAINTS:
            self.warnings.append(text)


def _record(shot: Shot, result: FrameResult) -> FrameRecord:
    return FrameRecord(
        index=shot.index,
        stamp=shot.stamp,
        sequence=result.sequence,
        image_size=result.features.image_size,
        keypoints=result.features.keypoints,
        scores=result.features.scores,
        pair=result.pair,
        tracks=result.tracks,
        quality=result.quality,
        reset_reason=result.reset_reason,
    )


def _reason(error: Exception) -> str:
    """As the node counts it."""
    if isinstance(error, StaleImageError):
        return "stale"
    return "decode" if isinstance(error, ImageError) else "error"


# -- settings ----------------------------------------------------------------------------------------------------------


def frontend_config(job: ReplayJob) -> FrontendConfig:
    """That of the node; another method has its own reidentify_cosine where that of the network is left as it is."""
    config: FrontendConfig = job.parameters.frontend_config()
    own = REIDENTIFY_COSINE.get(job.method)
    if own is None or config.reidentify_cosine != NodeParameters.reidentify_cosine:
        return config
    return replace(config, reidentify_cosine=own)


def _extractor(method: str, config: FrontendConfig) -> MethodExtractor | None:
    if method == "scfeat":
        return None
    return MethodExtractor(method, config.max_keypoints, border=config.border, clahe=config.clahe)


def _inputs(job: ReplayJob, source: Source) -> dict[str, Any]:
    """What decides what comes out. Names of files without their folders: equal runs are equal wherever they lie; what
    is in them counts, too, as they are edited."""
    settings = dump_config(frontend_config(job))
    mask = job.parameters.camera_masks.get(job.camera_name, "")
    settings["weights"] = Path(settings["weights"]).name
    if job.method != "scfeat":
        settings = {
            key: value for key, value in settings.items() if key not in ("weights", "device", "precision", "engine")
        }
    return {
        "bag": job.bag.absolute().name,
        "bytes": _bytes(job.bag),
        "topic": source.topic.name,
        "messages": source.topic.count,
        "method": job.method,
        "weights": weights_id(job.parameters.weights) if job.method == "scfeat" else "",
        "settings": settings,
        "calibration": Path(source.calibration).name if job.intrinsics else source.calibration,
        "rectified": job.parameters.rectified,
        "mask": "" if not mask else Path(mask).name,
        "use_imu": job.parameters.use_imu,
        "truth": "" if source.truth is None else source.truth.source,
        "depth": "" if source.depth_topic is None else source.depth_topic.name,
        "contents": _contents(source, mask),
        "camera_name": job.camera_name,
        "imu_rotation": job.parameters.imu_rotations[job.camera_name].tolist() if job.parameters.use_imu else None,
        "window": {"frames": job.frames, "start": job.start, "stop": job.stop},
        "versions": _versions(),
    }


def _contents(source: Source, mask: str) -> dict[str, str]:
    """Short hashes of what files hold, empty where there is none; what cannot be read is told by its reader."""
    found = {"bag": _samples(source.job.bag), "calibration": b"", "mask": b"", "truth": b""}
    for name, file in (("calibration", source.calibration_file), ("mask", mask)):
        with suppress(OSError):
            found[name] = Path(file).read_bytes() if file else b""
    if source.truth is not None:
        found["truth"] = source.truth.stamps.tobytes() + source.truth.poses.tobytes()
    return {name: hashlib.sha256(content).hexdigest()[:16] if content else "" for name, content in found.items()}


def _versions() -> dict[str, str]:
    return {"scfeat": __version__, "torch": torch.__version__, "opencv": cv2.__version__, "numpy": np.__version__}


def _files(bag: Path) -> list[Path]:
    if bag.is_file():
        return [bag]
    return sorted(file for file in bag.iterdir() if file.suffix in (".mcap", ".db3", ".zstd"))


def _bytes(bag: Path) -> int:
    return sum(file.stat().st_size for file in _files(bag))


def _samples(bag: Path) -> bytes:
    """Hashes of pieces of its files, evenly spread, by which a recording is told from others of its name and size: all
    of them would take longer than to find that there is nothing to do."""
    found = hashlib.sha256()
    for path in _files(bag):
        with suppress(OSError), path.open("rb") as file:
            for start in np.linspace(0, max(0, path.stat().st_size - _SAMPLE), _SAMPLES).astype(np.int64).tolist():
                file.seek(start)
                found.update(file.read(_SAMPLE))
    return found.digest()


def _say_choices(source: Source, report: Report) -> None:
    report(f"images: {source.choice}")
    report(f"calibration: {source.calibration or 'none: no rays, no trajectory; give one with --intrinsics'}")
    absent = "left out" if source.truth_problem else "none: give one with --ground-truth"
    report(f"ground truth: {source.truth.source if source.truth else absent}")
    if source.depth_topic is not None:
        report(f"depth: {source.depth_topic.name}")
    for warning in source.warnings:
        report(f"warning: {warning}")


# -- figures -----------------------------------------------------------------------------------------------------------


def conclude(job: ReplayJob, source: Source, report: Report) -> Summary:
    """Figures, trajectory and report of the folder of a job, from its files."""
    from scfeat_core.odometry.trajectory import write_tum
    from scfeat_core.replay.metrics import summarise, write_metrics

    recording = read_run(job.out)
    odometry, scores, missing = _trajectory(recording, source.truth_problem, report)
    if odometry is not None:
        write_tum(job.out / "trajectory.txt", odometry)
    with source.depths(lambda text: report(f"warning: {text}")) as depth_at:
        metrics = summarise(recording, odometry, scores, missing, depth_at)
    write_metrics(job.out, metrics)
    if job.report:
        from scfeat_core.replay.report import write_report

        report(f"report: {write_report(job.out, recording, metrics, odometry, scores, source.pictures)}")
    else:
        (job.out / "report.html").unlink(missing_ok=True)  # one of before would show other figures
    return _flat(metrics)


def _flat(metrics: Metrics) -> Summary:
    """The summary; under "missing" why figures have no value, but for those that nobody gave ground truth for, and
    under "above" what some of them are greater than."""
    why = {name: reason for name, reason in metrics.missing.items() if reason != NO_TRUTH}
    return {**metrics.summary, "missing": why, "above": metrics.above}


def _trajectory(
    recording: Recording, problem: str, report: Report
) -> tuple[Odometry | None, TrajectoryScores | None, dict[str, str]]:
    """The path of the camera, and how good it is; None where it cannot be told. Also why, by figure.

    problem: what is wrong with the ground truth.
    """
    from scfeat_core.odometry.estimation import estimate
    from scfeat_core.odometry.trajectory import evaluate

    if recording.camera is None:
        return None, None, dict.fromkeys(("lost", "initialisations", *_ERRORS), "there is no calibration")
    odometry = scores = None
    missing = dict.fromkeys(_ERRORS, problem or NO_TRUTH)
    try:
        odometry = estimate(recording.frames, recording.camera)
        if recording.truth is not None:
            scores = evaluate(odometry, recording.truth)
            missing = dict.fromkeys(_ERRORS[3:], scores.rpe_missing)
    except ScfeatError as error:
        report(f"warning: {'no trajectory' if odometry is None else 'no errors of the trajectory'}: {error}")
        never = odometry is not None and odometry.initialisations == 0
        missing = dict.fromkeys(_ERRORS, NEVER_BEGAN if never else str(error))
    return odometry, scores, missing


# -- the terminal ------------------------------------------------------------------------------------------------------


@contextmanager
def _stoppable(report: Report) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, and ``report`` is told; the second SIGINT raises
    KeyboardInterrupt, as ever."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        report("interrupted: waiting for what has been done to be written; once more ends that, too")

    with signals_handled(stop):
        yield stopped


@contextmanager
def _shown(progress: bool | Watch, total: int) -> Iterator[Watch]:
    """A bar with frames/s and the time that is left, where there is a terminal and tqdm."""
    if callable(progress):
        yield progress
        return
    bar: Any = None
    if progress and sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, unit="frame", dynamic_ncols=True, smoothing=0.1)
    if bar is None:
        yield lambda done, count: None
        return

    def show(done: int, count: int) -> None:
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        bar.close()
