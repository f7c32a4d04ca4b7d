"""The node in this process: the topics of its endpoints, the limits of its parameters, jumps of its clock."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: run `make setup`, or source a ROS 2 installation")
pytest.importorskip("scfeat.msg", reason="the scfeat messages are not built: run `make setup`")

from live_graph import START, STEP, calibration, image_message, texture
from rclpy.clock import ClockChange, TimeJump
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from scfeat_ros.endpoints import Endpoints
from scfeat_ros.node import FrontendNode, shut_down
from scfeat_ros.parameters import Row, rows

KINDS = {"image": Image, "camera_info": CameraInfo, "mask": Image}
SWAPPED = [
    f"{first}/{name}:={second}/{name}" for first, second in (("left", "right"), ("right", "left")) for name in KINDS
]


@pytest.fixture
def remapped(ros: Any) -> Callable[..., FrontendNode]:
    """A node with these remappings, which are applied by rcl itself."""

    def make(*rules: str, **settings: Any) -> FrontendNode:
        arguments = ["--ros-args", *(word for rule in rules for word in ("-r", rule))]
        overrides = [Parameter(name, value=value) for name, value in {"weights": "random", **settings}.items()]
        return ros.add_node(
            FrontendNode(
                context=ros.context, cli_args=arguments, use_global_arguments=False, parameter_overrides=overrides
            )
        )

    return make


def subscribed(node: FrontendNode) -> dict[str, str]:
    """Name before it was remapped -> topic of the subscription itself."""
    for camera in node.settings.cameras:
        node._subscribe_camera(camera)
    assert all(item.topic == item.subscription.topic_name for item in node._endpoints.inputs)
    return {item.name: item.subscription.topic_name for item in node._endpoints.inputs}


def test_swapped_cameras_keep_image_calibration_and_mask_together(ros: Any, remapped: Callable[..., Any]) -> None:
    node = remapped(*SWAPPED, cameras=["left", "right"])
    swapped = (("left", "right"), ("right", "left"))
    assert subscribed(node) == {f"{own}/{name}": f"/{other}/{name}" for own, other in swapped for name in KINDS}


def test_compressed_images_are_remapped_once_and_keep_their_ending(ros: Any, remapped: Callable[..., Any]) -> None:
    node = remapped(*SWAPPED, cameras=["left", "right"], image_transport="compressed")
    topics = {item: topic for item, topic in subscribed(node).items() if "image" in item}
    assert sorted(topics.values()) == ["/left/image/compressed", "/right/image/compressed"]
    kinds = [item.kind for item in node._endpoints.inputs if item.topic == "/right/image/compressed"]
    assert kinds == [CompressedImage]
    assert node._endpoints.inputs[0].topic == "/right/image/compressed", "of the left camera"


def test_a_subscription_follows_the_publishers_of_its_own_topic(ros: Any, remapped: Callable[..., Any]) -> None:
    """Made again for another QoS it stays where it was, and looks at its topic alone."""
    node = remapped(*SWAPPED, cameras=["left", "right"])
    subscribed(node)
    driver = ros.create_node("driver")
    driver.create_publisher(Image, "/right/image", QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE))
    driver.create_publisher(Image, "/left/image", QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
    inputs = {item.name: item for item in node._endpoints.inputs}

    def reliable() -> bool:
        node._endpoints.follow()
        return inputs["left/image"].profile.reliability == ReliabilityPolicy.RELIABLE

    ros.spin_until(reliable, what="the QoS of the publisher")
    assert inputs["left/image"].subscription.topic_name == "/right/image"
    assert inputs["right/image"].profile.reliability == ReliabilityPolicy.BEST_EFFORT


def test_a_publisher_is_remapped_once(ros: Any) -> None:
    rules = ["--ros-args", "-r", "a:=b", "-r", "b:=a"]
    node = ros.create_node("swapper", cli_args=rules, use_global_arguments=False)
    publisher = Endpoints(node).publish(Image, "a", lambda text: None, always=True)
    assert publisher.topic_name == "/b"


# -- the whole node ----------------------------------------------------------------------------------------------------


@pytest.fixture
def active(ros: Any) -> Iterator[FrontendNode]:
    """An active node, whose callbacks run only when the test spins."""
    overrides = [Parameter("weights", value="random"), Parameter("max_keypoints", value=200)]
    node = ros.add_node(FrontendNode(context=ros.context, parameter_overrides=overrides))
    assert node.trigger_configure() == node.trigger_activate() == TransitionCallbackReturn.SUCCESS
    yield node
    shut_down(node)
    assert node.finished and not node.failed


def test_no_attribute_of_the_node_hides_one_of_rclpy(ros: Any) -> None:
    plain = ros.add_node(LifecycleNode("plain", context=ros.context))
    attributes = [
        node for node in ast.walk(ast.parse(inspect.getsource(FrontendNode))) if isinstance(node, ast.Attribute)
    ]
    targets = [
        node.attr for node in attributes if ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store)
    ]
    assert {"settings", "_worker"} <= set(targets)
    transitions = {f"on_{name}" for name in ("configure", "activate", "deactivate", "cleanup", "shutdown", "error")}
    own = {name for name in vars(FrontendNode) if not name.startswith("__")} - transitions - {"destroy_node"}
    assert not (own | set(targets)) & set(dir(plain))


def ends(row: Row) -> list[Any]:
    """The least and the greatest value that the table takes."""
    assert row.limits is not None
    lowest = row.limits.minimum if row.limits.minimum is not None else np.nextafter(row.limits.above or 0.0, np.inf)
    highest = row.limits.maximum if row.limits.maximum is not None else np.finfo(np.float64).max
    values = [row.type(lowest), row.type(highest)]
    return [[value] for value in values] if row.many else values


def test_both_ends_of_every_limit_are_survived(ros: Any, active: FrontendNode) -> None:
    """Each is set, timers run, and two images go through: nothing raises, and the old value comes back."""
    for name in ("features", "matches", "tracks", "debug_image"):
        listener = active._pipeline.channels["camera"].publishers[name]
        ros.create_node(f"listens_to_{name}").create_subscription(listener.msg_type, listener.topic_name, print, 1)
        ros.spin_until(listener.get_subscription_count)
    changing = [row for row in rows() if row.dynamic and row.limits is not None]
    assert {"status_rate", "debug_rate", "verification_threshold", "mask_patience"} <= {row.name for row in changing}
    stamps = iter(range(START, 2 * START, STEP))
    for row in changing:
        before = active.get_parameter(row.name)
        for value in ends(row):
            (answer,) = active.set_parameters([Parameter(row.name, value=value)])
            assert answer.successful, f"{row.name} = {value}: {answer.reason}"
            ros.spin_for(0.03)
            for shift in range(2):
                done = active._worker.counts("camera").processed
                active._on_info("camera", calibration())
                active._on_image("camera", image_message(texture(shift), next(stamps)))
                ros.spin_until(lambda n=done: active._worker.counts("camera").waiting == 0, what="the image")
            counts = active._worker.counts("camera")
            assert counts.processed == counts.received, f"{row.name} = {value}: {counts.dropped}"
        assert active.set_parameters([before])[0].successful
    for beyond in (1e-10, 0.0, 1e10):
        assert not active.set_parameters([Parameter("status_rate", value=beyond)])[0].successful


def test_a_jump_drops_the_image_that_waits_and_keeps_the_mask(ros: Any, active: FrontendNode) -> None:
    half = np.zeros((120, 160), np.uint8)
    half[:, 80:] = 255
    active._on_mask("camera", image_message(half, START))
    passed: list[Any] = []
    process = active._worker._process
    active._worker._process = lambda frames: passed.extend(frames.values()) or process(frames)  # type: ignore[func-returns-value]
    assert active._worker.stop(10.0)
    active._worker.start()
    with active._worker._frames_wait:  # the thread cannot take it
        active._on_image("camera", image_message(texture(), START + 10 * STEP))
        active._on_jump(TimeJump(ClockChange.ROS_TIME_NO_CHANGE, Duration(nanoseconds=-1)))
    active._on_image("camera", image_message(texture(), START))
    ros.spin_until(lambda: active._worker.counts("camera").waiting == 0)
    assert [frame.stamp for frame in passed] == [START], "an image of the old time became the newest one"
    assert passed[0].mask is not None, "the mask was published once"
    assert active._worker.counts("camera").dropped == {"stale": 1, "unwanted": 1}
