"""The lifecycle node: endpoints, hand-over to the worker, status; nothing else.

Two threads. The executor's thread runs the callbacks: they store the newest message and return. The worker's thread
decodes, runs the front end and publishes (see pipeline.py). Publishing from there is safe: rcl publishers may be used
from any thread, and endpoints are destroyed only after the worker has stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.qos import HistoryPolicy, InvalidQoSProfileException, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.signals import SignalHandlerOptions
from scfeat.msg import Features, FrontendStatus, Matches
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from scfeat_core.errors import ConfigError, ScfeatError

from .fastdds import use_profile
from .health import status_to_message
from .images import Frame
from .parameters import declare, unused_overrides
from .worker import Worker

if TYPE_CHECKING:
    from .pipeline import Pipeline

# What a camera driver offers, reliable or not, can be received so; only the newest image is of interest.
INPUT_QOS = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
OUTPUT_QOS = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=5, reliability=ReliabilityPolicy.RELIABLE)
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

    def __init__(self, **options: Any) -> None:
        """Raises ConfigError where a parameter is unknown or wrong."""
        super().__init__("scfeat", **options)
        self.settings = declare(self)
        self.finished = False
        self.failed = False
        self.hangs = False
        self._worker: Worker[Frame] = Worker(
            lambda frame: self._pipeline.process(frame), lambda frame, error: self._pipeline.failed(frame, error)
        )
        self._pipeline: Pipeline
        self._status: Any = None  # with the timer, the last that configuring creates: None until all is there
        self._timer: Any = None
        self._camera_info: CameraInfo | None = None
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    @_explained
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        from .pipeline import Pipeline  # imports torch: seconds in which the process should already end cleanly

        start = time.perf_counter()
        self._pipeline = Pipeline(self.settings, self.get_clock(), self.get_logger())
        where = f"{self._pipeline.device} in {self._pipeline.precision}"
        seconds = time.perf_counter() - start
        self.get_logger().info(f"network '{self.settings.weights}' ready on {where} after {seconds:.1f} s")
        try:
            self._create_outputs()
        except Exception:
            self._release()
            raise
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
        return super().on_deactivate(state)

    @_explained
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._release()
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

    def _end(self) -> TransitionCallbackReturn:
        if not self._stop():
            self.finished = self.hangs = True
            return TransitionCallbackReturn.ERROR
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def _create_outputs(self) -> None:
        def publisher(create: Any, kind: Any, topic: str) -> Any:
            self._outputs.append(self._endpoint(create, kind, topic, OUTPUT_QOS))
            return self._outputs[-1]

        features = publisher(self.create_lifecycle_publisher, Features, "~/features")
        matches = publisher(self.create_lifecycle_publisher, Matches, "~/matches")
        self._pipeline.connect(features, matches)
        self._status = publisher(self.create_publisher, FrontendStatus, "~/status")  # speaks while inactive, too
        # By a steady clock, so that a paused simulation or bag does not silence it.
        self._timer = self.create_timer(
            1.0 / self.settings.status_rate, self._publish_status, clock=Clock(clock_type=ClockType.STEADY_TIME)
        )

    def _subscribe(self) -> None:
        image = self.resolve_topic_name("image")
        if self.settings.image_transport == "compressed":
            self._create_input(CompressedImage, f"{image}/compressed", self._on_image)
        else:
            self._create_input(Image, image, self._on_image)
        self._create_input(CameraInfo, "camera_info", self._on_camera_info)
        self.get_logger().info("subscribed to " + ", ".join(subscription.topic_name for subscription in self._inputs))
        self.get_logger().info("publishing on " + ", ".join(publisher.topic_name for publisher in self._outputs))
        for name in unused_overrides(self):
            self.get_logger().warning(f"parameter '{name}' belongs to no endpoint: it takes the full name of the topic")

    def _create_input(self, kind: Any, topic: str, callback: Any) -> None:
        self._inputs.append(self._endpoint(self.create_subscription, kind, topic, callback, INPUT_QOS))

    def _endpoint(self, create: Any, kind: Any, topic: str, *arguments: Any) -> Any:
        """A publisher or subscription whose QoS the user may override. Raises ConfigError for a bad override."""
        overrides = QoSOverridingOptions.with_default_policies()
        try:
            return create(kind, topic, *arguments, qos_overriding_options=overrides)
        except (RuntimeError, ParameterException, InvalidQoSProfileException) as error:
            name = self.resolve_topic_name(topic)
            raise ConfigError(
                f"expected a usable QoS for {name}, found: {error}; check the parameters qos_overrides.{name}.*"
            ) from error

    def _stop(self) -> bool:
        """Take no more frames and finish the one in work; False where that one does not end."""
        while self._inputs:
            self.destroy_subscription(self._inputs.pop())
        if not self._worker.stop(STOP_PATIENCE):
            self.get_logger().fatal(f"a frame has been in work for more than {STOP_PATIENCE:g} s: the device hangs")
            return False
        if self._status is not None:
            self._pipeline.reset()
            self._publish_status()
            self._status.wait_for_all_acked(Duration(seconds=FAREWELL))
        return True

    def _release(self) -> None:
        """Undo on_configure, however far it came."""
        if self._timer is not None:
            self.destroy_timer(self._timer)
        self._timer = self._status = self._camera_info = None
        while self._outputs:
            self.destroy_lifecycle_publisher(self._outputs.pop())  # takes plain publishers, too
        if hasattr(self, "_pipeline"):
            self._pipeline.close()
            del self._pipeline

    def _on_image(self, message: Image | CompressedImage) -> None:
        self._worker.submit(self.settings.camera, Frame(message, self._camera_info, time.perf_counter()))

    def _on_camera_info(self, message: CameraInfo) -> None:
        self._camera_info = message

    def _publish_status(self) -> None:
        counts = self._worker.counts(self.settings.camera)
        health, last_error = self._pipeline.health, self._pipeline.last_error
        self._status.publish(status_to_message(self.settings.camera, counts, health, last_error))


def main(args: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM; the exit status. Arguments are those of any ROS 2 node (--ros-args ...)."""
    stop = threading.Event()
    _handle_signals(lambda *_: stop.set())
    try:
        _init(args)
        return _run(stop)
    except ScfeatError as error:
        get_logger("scfeat").fatal(str(error))
        return 1
    finally:
        _handle_signals(signal.SIG_IGN)  # launch signals twice; the second one must not hit a dying interpreter
        rclpy.try_shutdown()


def _handle_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _init(args: list[str] | None) -> None:
    use_profile()
    try:
        # Without the handlers of rclpy: they shut the context down at once, and the final status could not be sent.
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:  # what rclpy raises for arguments that rcl cannot parse
        raise ConfigError(f"expected valid ROS arguments, found {error}") from error


def _run(stop: threading.Event) -> int:
    node = FrontendNode()
    executor = SingleThreadedExecutor()
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
