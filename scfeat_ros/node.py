"""The lifecycle node: endpoints, hand-over to the worker, status; nothing else.

Three threads. The executor's thread runs the callbacks: they store the newest message and return. Of the two of the
worker the first decodes and runs the front end, the second publishes (see pipeline.py). Publishing from there is safe:
rcl publishers may be used from any thread, and endpoints are destroyed only after the worker has stopped.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.signals import SignalHandlerOptions
from scfeat.msg import Features, FrontendStatus, Matches, Tracks
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu

from scfeat_core.errors import ConfigError, ScfeatError
from scfeat_core.memory import give_back_freed_memory, share_heap

from .diagnostics import CameraReport, NetworkReport, diagnostics_to_message, measure_memory
from .endpoints import Endpoints
from .fastdds import use_profile
from .health import CoreLog, Repeats, status_to_message
from .inputs import Frame, Intake, MaskRules, stamp_of
from .parameters import NodeParameters, declare, unused_overrides, watch
from .processes import handle_signals
from .worker import Counts, Worker

if TYPE_CHECKING:
    from scfeat_core.frontend import Frontend, FrontendConfig

    from .pipeline import Pipeline

MASK_DEPTH = 10  # masks may come in bursts, and with "exact" each of them counts
IMU_DEPTH = 200  # half a second of a fast one
TICK = 0.1  # seconds between two looks at images that wait, and at the publishers of the inputs
DIAGNOSTICS_PERIOD = 1.0  # seconds, as diagnostic aggregators expect
DIAGNOSTICS_WINDOW = 3  # reports back that rates go; over less than 3 s, one or two frames a second look like none
FAREWELL = 2.0  # seconds for the final counts to reach their subscribers, before the publisher may go
STOP_PATIENCE = 30.0  # seconds for the frame in work to finish; a large image on a busy CPU may need many


def _explained(transition: Callable[[Any, LifecycleState], Any]) -> Callable[[Any, LifecycleState], Any]:
    """Log the exceptions of a transition: rclpy swallows them."""

    @wraps(transition)
    def run(node: Any, state: LifecycleState) -> Any:
        try:
            return transition(node, state)
        except ScfeatError as error:
            node.get_logger().fatal(str(error))
            return TransitionCallbackReturn.FAILURE
        except Exception:
            node.get_logger().fatal(traceback.format_exc().rstrip())
            return TransitionCallbackReturn.ERROR

    return run


class FrontendNode(LifecycleNode):
    """configure loads the network and warms it up, activate subscribes, deactivate and cleanup undo that.

    finished: its state is final, nothing is left to do. failed: it came to that by an error. hangs: its thread cannot
    be stopped.
    """

    def __init__(self, *, frontend: Callable[[FrontendConfig], Frontend] | None = None, **options: Any) -> None:
        """frontend: what makes the front end, instead of the class of that name, whenever the node is configured.

        Raises ConfigError where a parameter is unknown or wrong.
        """
        # Undeclared ones are allowed only so that watch() can refuse them by name.
        super().__init__("scfeat", allow_undeclared_parameters=True, **options)
        self._make_frontend = frontend
        self.settings = declare(self)
        watch(self, self._change)
        self.finished = False
        self.failed = False
        self.hangs = False
        self._endpoints = Endpoints(self)
        self._worker: Worker[Frame] = Worker(
            lambda frames: self._pipeline.process(frames), lambda frame, error: self._pipeline.failed(frame, error)
        )
        self._intake = Intake(
            self.settings.cameras,
            self.settings.stereo_pairs,
            self.settings.sync_tolerance,
            self._mask_rules(),
            self._worker.submit,
            self._drop,
        )
        self._pipeline: Pipeline
        self._statuses: dict[str, Any] = {}
        self._diagnostics: Any = None
        self._own_timers: list[Any] = []  # rclpy keeps all timers of a node in _timers
        self._jumps: Any = None
        self._arrivals: dict[str, float] = {}  # when the last image of each camera came, time.perf_counter()
        self._reported: deque[tuple[float, dict[str, Counts]]] = deque(maxlen=DIAGNOSTICS_WINDOW)  # when, and with what
        self._core_log = CoreLog(self.get_logger())
        self._repeats = Repeats()  # of the executor's thread; that of the pipeline belongs to the worker's

    @_explained
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        from .pipeline import Pipeline  # imports torch: seconds in which the process should already end cleanly

        start = time.perf_counter()
        self._core_log.start()
        own = () if self._make_frontend is None else (self._make_frontend,)
        self._pipeline = Pipeline(self.settings, self.get_clock(), self.get_logger(), *own)
        pipeline = self._pipeline
        where = f"{pipeline.device} in {pipeline.precision} by {pipeline.engine}"
        seconds = time.perf_counter() - start
        self.get_logger().info(f"network '{self.settings.weights}' ready on {where} after {seconds:.1f} s")
        try:
            self._create_outputs()
        except Exception:
            self._release()
            raise
        give_back_freed_memory()  # of the warm-up and of loading
        return super().on_configure(state)

    @_explained
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._worker.start()
        try:
            self._subscribe()
        except Exception:
            self._stop()
            raise
        return super().on_activate(state)

    @_explained
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if not self._stop():
            return TransitionCallbackReturn.ERROR
        self.get_logger().info("inactive: no images are taken")
        return super().on_deactivate(state)

    @_explained
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
        self.get_logger().info("network and memory of the device given back")
        return TransitionCallbackReturn.SUCCESS

    @_explained
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.finished = True
        return self._end()

    @_explained
    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.finished = self.failed = True  # whatever prevents the return to unconfigured
        result = self._end()
        self.finished = self.failed = result != TransitionCallbackReturn.SUCCESS
        return result

    def destroy_node(self) -> None:
        """Takes it out of the graph, too: rclpy leaves that to the garbage collector, as its state machine holds it."""
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()

    def _end(self) -> TransitionCallbackReturn:
        if not self._stop():
            self.finished = self.hangs = True
            return TransitionCallbackReturn.ERROR
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def _name(self, camera: str, topic: str) -> str:
        """A topic of one of several cameras is below its name."""
        return topic if len(self.settings.cameras) == 1 else f"{camera}/{topic}"

    def _create_outputs(self) -> None:
        rights = {right for _, right in self.settings.stereo_pairs}
        kinds = {"features": Features, "matches": Matches, "tracks": Tracks, "debug_image": Image}
        from .pictures import foxglove_module  # imports torch

        if (foxglove := foxglove_module()) is not None:
            kinds["annotations"] = foxglove.ImageAnnotations
        for camera, channel in self._pipeline.channels.items():
            own = kinds | ({"stereo_matches": Matches} if camera in rights else {})
            complain = self._complaint(camera)
            channel.publishers = {
                name: self._endpoints.publish(kind, f"~/{self._name(camera, name)}", complain)
                for name, kind in own.items()
            }
            topic = f"~/{self._name(camera, 'status')}"  # speaks while inactive, too
            self._statuses[camera] = self._endpoints.publish(FrontendStatus, topic, complain, always=True)
        self._diagnostics = self._endpoints.publish(DiagnosticArray, "/diagnostics", self._warn, always=True)
        self._pipeline.assess = self._is_watched
        self._start_timers()

    def _start_timers(self) -> None:
        """By a steady clock, so that a paused simulation or bag silences nothing."""
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._stop_timers()
        for period, callback in (
            (1.0 / self.settings.status_rate, self._publish_statuses),
            (DIAGNOSTICS_PERIOD, self._publish_diagnostics),
            (TICK, self._tick),
        ):
            self._own_timers.append(self.create_timer(period, callback, clock=clock))

    def _stop_timers(self) -> None:
        while self._own_timers:
            self.destroy_timer(self._own_timers.pop())

    def _subscribe(self) -> None:
        for camera in self.settings.cameras:
            self._subscribe_camera(camera)
        if self.settings.use_imu:
            self._endpoints.subscribe(Imu, "imu", self._on_imu, self._warn, depth=IMU_DEPTH)
        backwards = JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True)
        self._jumps = self.get_clock().create_jump_callback(backwards, post_callback=self._on_jump)
        self.get_logger().info("subscribed to " + ", ".join(item.topic for item in self._endpoints.inputs))
        self.get_logger().info("publishing on " + ", ".join(item.topic_name for item in self._endpoints.outputs))
        for name in unused_overrides(self):
            self.get_logger().warning(f"parameter '{name}' belongs to no endpoint: it takes the full name of the topic")

    def _subscribe_camera(self, camera: str) -> None:
        subscribe, complain = self._endpoints.subscribe, self._complaint(camera)
        image = self._name(camera, "image")
        if self.settings.image_transport == "compressed":  # appends to the name that the topic has after remapping
            kind, image = CompressedImage, f"{self.resolve_topic_name(image)}/compressed"
        else:
            kind = Image
        subscribe(kind, image, partial(self._on_image, camera), complain)
        info, mask = self._name(camera, "camera_info"), self._name(camera, "mask")
        subscribe(CameraInfo, info, partial(self._on_info, camera), complain, latched=True)
        subscribe(Image, mask, partial(self._on_mask, camera), complain, depth=MASK_DEPTH, latched=True)

    def _stop(self) -> bool:
        """Take no more frames and finish those in work; False where these do not end."""
        if self._jumps is not None:
            self._jumps.unregister()
        self._jumps = None
        self._endpoints.close_inputs()
        self._intake.clear()
        if not self._worker.stop(STOP_PATIENCE):
            self.get_logger().fatal(f"a frame has been in work for more than {STOP_PATIENCE:g} s: the device hangs")
            return False
        if self._own_timers:  # the last that configuring creates: all is there
            self._pipeline.reset()
            self._publish_statuses()
            for publisher in self._statuses.values():
                publisher.wait_for_all_acked(Duration(seconds=FAREWELL))
        return True

    def _release(self) -> None:
        """Undo on_configure, however far it came."""
        self._stop_timers()
        self._statuses.clear()
        self._diagnostics = None
        self._intake.forget_calibrations()
        self._arrivals.clear()
        self._endpoints.close_outputs()
        if hasattr(self, "_pipeline"):
            self._pipeline.close()
            del self._pipeline
        self._core_log.stop()

    def _change(self, settings: NodeParameters) -> None:
        """Other dynamic parameters: the pipeline takes them up between two frames."""
        status_rate, self.settings = self.settings.status_rate, settings
        self._intake.set_rules(self._mask_rules())
        if hasattr(self, "_pipeline"):
            self._pipeline.change(settings)
        if self._own_timers and settings.status_rate != status_rate:
            self._start_timers()

    def _mask_rules(self) -> MaskRules:
        settings = self.settings
        return MaskRules(settings.mask_policy, settings.mask_tolerance, settings.mask_patience)

    @property
    def _released(self) -> bool:
        """Whether it is not configured. The executor of events calls what was due, though its timer is gone by then."""
        return not hasattr(self, "_pipeline") or self._diagnostics is None

    def _on_image(self, camera: str, message: Image | CompressedImage) -> None:
        if not self._endpoints.inputs:  # it was due, though its subscription is gone by now
            return
        now = time.perf_counter()
        self._arrivals[camera] = now
        self._worker.receive(camera)
        self._intake.add_image(Frame(camera, message, now), now, partial(self._is_calibrated, camera))

    def _is_calibrated(self, camera: str) -> bool:
        return self.count_publishers(self.resolve_topic_name(self._name(camera, "camera_info"))) > 0

    def _on_info(self, camera: str, message: CameraInfo) -> None:
        self._intake.add_info(camera, message, time.perf_counter())

    def _on_mask(self, camera: str, message: Image) -> None:
        self._intake.add_mask(camera, message, time.perf_counter())

    def _on_imu(self, message: Imu) -> None:
        if self._released:
            return
        gyro, rate = self._pipeline.gyro, message.angular_velocity
        assert gyro is not None  # with use_imu alone there is a subscription
        gyro.add(stamp_of(message), np.array((rate.x, rate.y, rate.z)))

    def _on_jump(self, jump: TimeJump) -> None:
        """The clock went back, or is another one: what waits is of the old time."""
        if self._released:
            return
        self._intake.restart()
        self._worker.clear("stale")
        if self._pipeline.gyro is not None:
            self._pipeline.gyro.clear()
        self._pipeline.jump(self.get_clock().now().nanoseconds)

    def _drop(self, frame: Frame, why: str) -> None:
        """An image has no partner."""
        self._worker.drop(frame.camera, "sync")
        self._complain(frame.camera, f"frame dropped: {why}", f"sync {frame.camera}")

    def _tick(self) -> None:
        self._endpoints.follow()
        self._intake.poll(time.perf_counter())

    def _is_watched(self) -> bool:
        """Whether somebody looks at the health of the node."""
        return any(publisher.get_subscription_count() for publisher in (*self._statuses.values(), self._diagnostics))

    def _publish_statuses(self) -> None:
        for camera, publisher in self._statuses.items():
            channel = self._pipeline.channels[camera]
            counts = self._worker.counts(camera)
            publisher.publish(status_to_message(camera, counts, channel.health, channel.last_error))

    def _publish_diagnostics(self) -> None:
        if self._released:
            return
        now, counts = time.perf_counter(), {camera: self._worker.counts(camera) for camera in self.settings.cameras}
        then, before = self._reported[0] if self._reported else (now, {})
        self._reported.append((now, counts))
        if not (before and self._diagnostics.get_subscription_count()):
            return
        cameras = [self._camera_report(name, counts[name], before[name], now - then) for name in counts]
        pipeline = self._pipeline
        space, memory = pipeline.descriptor_space, measure_memory(pipeline.device)
        network = NetworkReport(
            pipeline.device,
            pipeline.precision,
            self.settings.weights,
            space,
            memory,
            pipeline.engine,
            pipeline.engine_note,
            pipeline.engine_making,
        )
        stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(diagnostics_to_message(self.get_fully_qualified_name(), stamp, cameras, network))

    def _camera_report(self, camera: str, now: Counts, before: Counts, period: float) -> CameraReport:
        channel = self._pipeline.channels[camera]
        silence = time.perf_counter() - self._arrivals.get(camera, -math.inf)
        topic = self.resolve_topic_name(self._name(camera, "image"))
        active = bool(self._endpoints.inputs)
        return CameraReport(camera, topic, now, before, period, silence, active, channel.health, channel.last_error)

    def _complaint(self, camera: str) -> Callable[[str], None]:
        return lambda text: self._complain(camera, text)

    def _complain(self, camera: str, text: str, kind: str | None = None) -> None:
        if hasattr(self, "_pipeline"):
            self._pipeline.channels[camera].last_error = text
        self._warn(text, kind)

    def _warn(self, text: str, kind: str | None = None) -> None:
        line = self._repeats.line(text, kind)
        if line is not None:
            self.get_logger().warning(line)


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; the exit status. Arguments are those of any ROS 2 node (--ros-args ...)."""
    stop = threading.Event()
    handle_signals(lambda *_: stop.set())
    share_heap()  # before the threads of the middleware begin, which would have heaps of their own
    try:
        _init(args)
        return _run(stop)
    except ScfeatError as error:
        get_logger("scfeat").fatal(str(error))
        return 1
    finally:
        handle_signals(signal.SIG_IGN)  # launch signals twice; the second one must not hit a dying interpreter
        rclpy.try_shutdown()


def _init(args: list[str] | None) -> None:
    use_profile()
    try:
        # Without the handlers of rclpy: they shut the context down at once, and the final status could not be sent.
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # what rclpy raises for arguments that rcl cannot parse
        raise ConfigError(f"expected valid ROS arguments, found {error}") from error


def _run(stop: threading.Event) -> int:
    node = FrontendNode()
    executor = make_executor()
    executor.add_node(node)
    if node.settings.autostart and not _start(node):
        return 1
    while rclpy.ok() and not (stop.is_set() or node.finished):
        try:
            executor.spin_once(timeout_sec=0.1)  # Python sees a signal only between two waits
        except RuntimeError as error:  # Humble and Jazzy raise where a transition was asked for at the wrong time
            node.get_logger().error(str(error))
    if not node.finished:
        shut_down(node)
    if node.hangs:
        os._exit(1)  # the interpreter cannot end in order while a thread hangs in a device
    executor.shutdown()
    node.destroy_node()
    return int(node.failed)


def make_executor(context: Any = None) -> Any:
    """Kilted's executor of events where there is one: the other one makes a set of all endpoints to wait for each time,
    which is half of the processor time that an image costs in the executor's thread (benchmarks/node.py).
    """
    try:
        from rclpy.experimental import EventsExecutor
    except ImportError:  # Humble, Jazzy
        return SingleThreadedExecutor(context=context)
    return EventsExecutor(context=context)


def shut_down(node: FrontendNode) -> None:
    """Finish the frame in work and send the final counts; where the state does not allow it, only say so."""
    try:
        node.trigger_shutdown()
    except RuntimeError as error:  # the state is final already, or between two states
        node.get_logger().error(f"expected to shut down in order: {error}")
        node.failed = True


def _start(node: FrontendNode) -> bool:
    success = TransitionCallbackReturn.SUCCESS
    return node.trigger_configure() == success and node.trigger_activate() == success


if __name__ == "__main__":
    sys.exit(main())
