"""The life of an adapter's process: start, spin, end in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions

from scfeat_core.errors import ConfigError, ScfeatError

from ..fastdds import use_profile
from ..processes import handle_signals

# Reliable as the outputs of the front end are, and deep: an estimator wants every frame.
RELIABLE = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=50, reliability=ReliabilityPolicy.RELIABLE)


def run(name: str, make: Callable[[], Any], args: list[str] | None = None) -> int:
    """Spin the node that ``make`` returns until SIGINT or SIGTERM; the exit status, 1 after an error with a remedy."""
    stop = threading.Event()
    handle_signals(lambda *_: stop.set())
    use_profile()
    try:
        # Without the handlers of rclpy: they shut the context down under a callback that is about to publish.
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        executor = SingleThreadedExecutor()
        executor.add_node(make())
        while rclpy.ok() and not stop.is_set():
            executor.spin_once(timeout_sec=0.1)  # Python sees a signal only between two waits
    except (ScfeatError, ParameterException) as error:
        get_logger(name).fatal(str(error))
        return 1
    finally:
        handle_signals(signal.SIG_IGN)  # launch signals twice; the second one must not hit a dying interpreter
        rclpy.try_shutdown()
    return 0


def parameter(node: Any, name: str, default: Any, doc: str) -> Any:
    """Declare a read-only parameter and return its value. Raises ConfigError where it is of another type."""
    from rcl_interfaces.msg import ParameterDescriptor
    from rclpy.exceptions import InvalidParameterTypeException

    try:
        return node.declare_parameter(name, default, ParameterDescriptor(description=doc, read_only=True)).value
    except InvalidParameterTypeException as error:
        raise ConfigError(f"expected parameter '{name}' to be like {default!r} ({doc}), found: {error}") from error
