"""The debug pictures as messages, and the layouts of viewers that show them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from scfeat_core.drawing import AGE_COLOURS, INLIER, OUTLIER, draw_frame
from scfeat_core.types import Features, FrameResult, GeometryModel, Matches, PairResult, Tracks, TwoViewGeometry

NO_FOXGLOVE = "foxglove_msgs is not installed: apt install ros-$ROS_DISTRO-foxglove-msgs"
pytest.importorskip("sensor_msgs.msg", reason="the messages of ROS are not installed: run `make setup`")

from builtin_interfaces.msg import Time  # noqa: E402
from std_msgs.msg import Header  # noqa: E402

from scfeat_ros.images import image_to_array  # noqa: E402
from scfeat_ros.pictures import Pictures, annotations_to_message, caption, foxglove_module, wants_scores  # noqa: E402

SIZE = (400, 300)
HEADER = Header(stamp=Time(sec=7, nanosec=8), frame_id="left_optical")


@pytest.fixture
def result() -> FrameResult:
    """Two matches, one of them an inlier, one track of three frames, one point without either."""
    now, before = np.float32([[100, 50], [100, 100], [300, 200]]), np.float32([[60, 50], [60, 100]])
    two = np.arange(2)
    geometry = TwoViewGeometry(GeometryModel.ESSENTIAL, np.eye(3), np.array([True, False]), 1.0)
    return FrameResult(
        camera="left",
        sequence=41,
        stamp=7_000_000_008,
        features=Features(now, np.ones(3, np.float32), np.ones((3, 1), np.float32), SIZE),
        pair=PairResult(40, 0, Matches(two, two, np.ones(2, np.float32)), before, now[:2], geometry),
        tracks=followed(now[:1], age=3),
    )


def followed(keypoints: np.ndarray, age: int) -> Tracks:
    one = np.ones(1, np.uint32)
    return Tracks(
        one, age * one, np.zeros(1, np.int64), keypoints, None, None, np.zeros(1, np.uint8), np.zeros(0, np.uint32)
    )


@pytest.fixture
def pictures(result: FrameResult) -> Pictures:
    """That have followed the result and two frames before it."""
    made = Pictures()
    for x in (20, 60):
        made.follow(replace(result, tracks=followed(np.float32([[x, 80]]), age=1)))
    made.follow(result)
    return made


def test_the_picture_is_a_bgr8_image_with_the_header_of_the_source(pictures: Pictures, result: FrameResult) -> None:
    pixels = np.full((300, 400), 100, np.uint8)
    message = pictures.image(pixels, result, HEADER, ms=12.34)
    assert message.header == HEADER
    assert (message.encoding, message.width, message.height, message.step) == ("bgr8", 400, 300, 1200)
    expected = draw_frame(
        pixels, result, tails=np.float32([[[100, 50], [60, 80], [20, 80]]]), text=caption(result, 12.34)
    )
    np.testing.assert_array_equal(image_to_array(message), expected)


def test_layers_can_change_and_a_reset_forgets_the_tails(pictures: Pictures, result: FrameResult) -> None:
    pixels = np.full((300, 400), 100, np.uint8)
    with_tails = image_to_array(pictures.image(pixels, result, HEADER))
    assert (with_tails[80, 40] != 100).any()
    pictures.layers = ("matches",)
    assert (image_to_array(pictures.image(pixels, result, HEADER))[80, 40] == 100).all()
    pictures.layers = ("tracks",)
    pictures.follow(replace(result, reset_reason="stamp went back"))
    assert (image_to_array(pictures.image(pixels, result, HEADER))[80, 40] == 100).all()


def test_frames_without_tracks_or_matches_are_drawn(result: FrameResult) -> None:
    bare, made = replace(result, tracks=None, pair=None), Pictures()
    made.follow(bare)
    assert made.image(np.zeros((300, 400, 3), np.uint8), bare, HEADER).width == 400


def test_the_caption_says_what_there_is(result: FrameResult) -> None:
    assert caption(result, 12.34) == "left #41   3 points   2 matches   1 inliers   1 tracks   12.3 ms"
    assert caption(replace(result, pair=None, tracks=None)) == "left #41   3 points"


def test_only_the_layer_of_scores_needs_them() -> None:
    assert wants_scores(("matches", "scores"))
    assert not wants_scores(("matches", "tracks", "mask"))


def test_annotations_have_the_points_in_the_pixels_of_the_viewer(pictures: Pictures, result: FrameResult) -> None:
    foxglove = pytest.importorskip("foxglove_msgs.msg", reason=NO_FOXGLOVE)
    message = pictures.annotations(foxglove, result, HEADER, ms=5.0)
    kinds = foxglove.PointsAnnotation
    assert {each.type for each in message.points} == {kinds.POINTS, kinds.LINE_LIST}
    assert all(each.timestamp == HEADER.stamp for each in [*message.points, *message.texts])
    lines = {colour_of(each): points_of(each) for each in message.points if each.type == kinds.LINE_LIST}
    # The viewer has (0, 0) at the corner of the first pixel.
    np.testing.assert_allclose(lines[INLIER], [[100.5, 50.5], [60.5, 50.5]])
    np.testing.assert_allclose(lines[OUTLIER], [[100.5, 100.5], [60.5, 100.5]])
    young = AGE_COLOURS[2]
    np.testing.assert_allclose(lines[young], [[100.5, 50.5], [60.5, 80.5], [60.5, 80.5], [20.5, 80.5]])
    assert message.texts[0].text == caption(result, 5.0)


def test_annotations_survive_the_wire(pictures: Pictures, result: FrameResult) -> None:
    foxglove = pytest.importorskip("foxglove_msgs.msg", reason=NO_FOXGLOVE)
    from rclpy.serialization import deserialize_message, serialize_message

    message = annotations_to_message(foxglove, replace(result, pair=None, tracks=None), HEADER.stamp, text="nothing")
    assert deserialize_message(serialize_message(message), foxglove.ImageAnnotations) == message


def test_the_module_of_foxglove_is_none_where_it_is_not_installed() -> None:
    module = foxglove_module()
    assert module is None or hasattr(module, "ImageAnnotations")


def colour_of(annotation: Any) -> tuple[int, ...]:
    colour = annotation.outline_color
    return tuple(round(255 * value) for value in (colour.r, colour.g, colour.b))


def points_of(annotation: Any) -> list[list[float]]:
    return [[point.x, point.y] for point in annotation.points]


def topics_and_fields(repository: Path) -> Iterator[str]:
    """All that the two layouts show: /topic, or /topic.field of a plot."""
    layout = json.loads((repository / "config" / "foxglove_layout.json").read_text())
    for panel in layout["configById"].values():
        mode = panel.get("imageMode", {})
        yield from (mode[key] for key in ("imageTopic", "calibrationTopic") if key in mode)
        yield from mode.get("annotations", {})
        yield from (path["value"] for path in panel.get("paths", ()))
        yield from (panel[key] for key in ("topicToRender",) if key in panel)
    rviz = yaml.safe_load((repository / "config" / "scfeat.rviz").read_text())
    yield from (display["Topic"]["Value"] for display in rviz["Visualization Manager"]["Displays"])


def test_the_foxglove_layout_places_each_of_its_panels_once(repository: Path) -> None:
    layout = json.loads((repository / "config" / "foxglove_layout.json").read_text())

    def leaves(tree: Any) -> list[str]:
        return [tree] if isinstance(tree, str) else leaves(tree["first"]) + leaves(tree["second"])

    assert sorted(leaves(layout["layout"])) == sorted(layout["configById"])
    kinds = {name.partition("!")[0] for name in layout["configById"]}
    assert kinds == {"Image", "Plot", "DiagnosticSummary"}


def test_the_rviz_configuration_has_what_rviz_reads(repository: Path) -> None:
    rviz = yaml.safe_load((repository / "config" / "scfeat.rviz").read_text())
    manager = rviz["Visualization Manager"]
    assert {panel["Class"] for panel in rviz["Panels"]} >= {"rviz_common/Displays"}
    assert manager["Global Options"]["Fixed Frame"]
    for display in manager["Displays"]:
        assert display["Class"] == "rviz_default_plugins/Image"
        assert display["Enabled"] is display["Value"] is True
        assert display["Topic"]["Reliability Policy"] == "Best Effort"  # fits any publisher


def test_layouts_show_topics_that_the_node_has(repository: Path, ros: Any) -> None:
    from rclpy.parameter import Parameter
    from scfeat.msg import FrontendStatus

    from scfeat_ros.node import FrontendNode

    settings = [Parameter("weights", value="random"), Parameter("debug_rate", value=5.0)]
    node = ros.add_node(FrontendNode(context=ros.context, parameter_overrides=settings))
    node.trigger_configure()
    published = {publisher.topic_name for publisher in node.publishers}
    node.trigger_cleanup()
    inputs = {"/camera/image_raw", "/camera/camera_info"}
    optional = set() if foxglove_module() else {"/scfeat/annotations"}
    shown = set(topics_and_fields(repository))
    plotted = {name.partition(".")[2] for name in shown if "." in name}
    assert {name.partition(".")[0] for name in shown} <= published | inputs | optional
    assert {"/scfeat/debug_image", "/scfeat/annotations", "/diagnostics"} <= shown
    assert plotted <= set(FrontendStatus.get_fields_and_field_types())


def test_pictures_are_legible_after_jpeg(pictures: Pictures, result: FrameResult) -> None:
    """As viewers over a network show them: lines must not drown in artefacts."""
    picture = image_to_array(pictures.image(np.full((300, 400), 255, np.uint8), result, HEADER))
    decoded = cv2.imdecode(
        cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR
    )
    green, red = decoded[100, 100, 1].astype(int), decoded[100, 100, 2].astype(int)
    assert red > green + 60  # the outlier
