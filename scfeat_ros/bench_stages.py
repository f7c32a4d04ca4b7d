"""What the node does with results after the front end, for ``scfeat bench``: messages, their bytes, publication."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import rclpy
from rclpy.context import Context
from rclpy.node import Node
from rclpy.serialization import serialize_message
from rclpy.signals import SignalHandlerOptions
from scfeat.msg import Features, Matches, Tracks
from std_msgs.msg import Header

from scfeat_core.errors import ScfeatError
from scfeat_core.types import FrameResult

from .domain import free_domain, own_graph
from .endpoints import RELIABLE, qos
from .messages import features_to_message, matches_to_message, tracks_to_message
from .processes import Child

TOPICS: Mapping[Any, str] = {Features: "features", Matches: "matches", Tracks: "tracks"}
DEPTH = 5  # of the node's publishers
DISCOVERY = 30.0  # seconds for the subscriber to start and to be found, on a busy machine


def to_messages(results: Sequence[FrameResult]) -> list[Any]:
    """All that the node publishes of frames that somebody listens to: features (float16), matches, tracks."""
    header = Header(frame_id="camera_optical_frame")
    messages: list[Any] = []
    for result in results:
        messages.append(features_to_message(result, header))
        if result.pair is not None:
            messages.append(matches_to_message(result.pair, result, header, header.frame_id))
        if result.tracks is not None:
            messages.append(tracks_to_message(result, header, "bench"))
    return messages


def serialise(messages: Sequence[Any]) -> int:
    """Their bytes on the wire, made and counted."""
    return sum(len(serialize_message(message)) for message in messages)


@contextmanager
def publication() -> Iterator[Callable[[Sequence[Any]], None]]:
    """What publishes messages as the node does, to a subscriber in another process, on a graph of their own on this
    machine. Raises ScfeatError where that does not come about.
    """
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        variables = own_graph(stack.enter_context(free_domain()), logs)
        stack.enter_context(_environment(variables))
        command = [sys.executable, "-m", "scfeat_ros.bench_stages"]
        path = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": path}
        subscriber = stack.enter_context(Child("subscriber", command, logs / "subscriber.log", environment))
        node = stack.enter_context(_node("scfeat_bench"))
        publishers = {kind: node.create_publisher(kind, name, qos(DEPTH, RELIABLE)) for kind, name in TOPICS.items()}
        _wait_for(subscriber, lambda: all(each.get_subscription_count() for each in publishers.values()))

        def publish(messages: Sequence[Any]) -> None:
            for message in messages:
                publishers[type(message)].publish(message)

        yield publish


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Of this process, as rcl and the middleware read it while they start."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _node(name: str) -> Iterator[Node]:
    """In a context of its own, which leaves signals alone."""
    context = Context()
    try:
        rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
        node = Node(name, context=context, enable_rosout=False, start_parameter_services=False)
    except RuntimeError as error:  # what rclpy raises where the middleware does not start
        raise ScfeatError(f"the middleware does not start: {' '.join(str(error).split())}") from error
    try:
        yield node
    finally:
        node.destroy_node()
        context.try_shutdown()


def _wait_for(subscriber: Child, found: Callable[[], bool]) -> None:
    end = time.monotonic() + DISCOVERY
    while not found():
        subscriber.check_alive()
        if time.monotonic() > end:
            raise ScfeatError(f"a subscriber on this machine was not found within {DISCOVERY:g} s")
        time.sleep(0.02)


def listen() -> None:
    """Take everything, as bytes: what a subscriber makes of it costs the publisher nothing."""
    with _node("scfeat_bench_subscriber") as node:
        executor = rclpy.executors.SingleThreadedExecutor(context=node.context)
        executor.add_node(node)
        for kind, name in TOPICS.items():
            node.create_subscription(kind, name, lambda data: None, qos(DEPTH, RELIABLE), raw=True)
        with suppress(KeyboardInterrupt):
            while True:
                executor.spin_once(timeout_sec=0.1)  # Python sees a signal only between two waits


if __name__ == "__main__":
    listen()
