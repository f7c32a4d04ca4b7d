"""One table of parameters: its file, its descriptors, the configuration of the front end, and what is refused.

The second half sets parameters on a live node, through the services that ``ros2 param`` calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from scfeat_core.errors import ConfigError
from scfeat_ros.parameters import (
    GROUPS,
    NodeParameters,
    load_parameters,
    parameters_markdown,
    parameters_yaml,
    read_parameters,
    rows,
)


def test_the_file_is_what_the_table_says(repository: Path) -> None:
    path = repository / "config" / "frontend.yaml"
    command = 'python -c "from scfeat_ros.parameters import parameters_yaml as y; print(y(), end=str())" > ' + str(path)
    assert path.read_text() == parameters_yaml(), f"the table has changed; write the file again: {command}"


def test_the_file_holds_every_default_in_its_type() -> None:
    loaded = yaml.safe_load(parameters_yaml())["/**"]["ros__parameters"]
    table = {row.name: row for row in rows()}
    assert list(loaded) == list(table) == [field.name for field in dataclasses.fields(NodeParameters)]
    for name, value in loaded.items():
        items = value if table[name].many else [value]
        assert items and {type(item) for item in items} == {table[name].type}, name
        assert table[name].from_ros(value) == table[name].default, name
    assert load_parameters(loaded) == NodeParameters()


def test_every_row_is_documented_and_every_number_limited() -> None:
    for row in rows():
        assert row.doc and row.doc[0] != " " and not row.doc.endswith("."), row.name
        assert row.type in (bool, int, float, str), row.name
        assert row.type in (bool, str) or row.limits is not None, row.name


def test_the_markdown_table_has_a_line_for_each_parameter() -> None:
    lines = parameters_markdown().splitlines()
    assert len(lines) == 2 + len(list(rows())) + len(GROUPS)
    assert all(line.count("|") == 7 for line in lines)


def test_the_readme_has_the_table(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    _, _, rest = text.partition("<!-- parameters: written by scfeat_ros.parameters.parameters_markdown -->\n")
    table, end, _ = rest.partition("<!-- end of parameters -->")
    assert end and table == parameters_markdown(), "the table has changed; put parameters_markdown() into README.md"


def test_titles_stand_where_the_table_has_these_parameters() -> None:
    begins = {row.group: row.name for row in reversed(list(rows()))}
    assert {name: title for title, name in begins.items()} == GROUPS


def test_what_the_front_end_cannot_change_is_read_only() -> None:
    dynamic = {row.name for row in rows() if row.dynamic}
    assert dynamic >= {
        "max_keypoints",
        "budgets",
        "score_threshold",
        "grid",
        "mask_policy",
        "debug_rate",
        "status_rate",
    }
    assert not dynamic & {
        "weights",
        "device",
        "precision",
        "engine",
        "cameras",
        "stereo",
        "image_transport",
        "autostart",
    }


def test_the_front_end_takes_all_of_its_settings_from_the_table() -> None:
    from scfeat_core.frontend import FrontendConfig

    assert NodeParameters().frontend_config() == FrontendConfig(), "the defaults differ"
    changed = NodeParameters(max_keypoints=17, verify=False, cameras=("a", "b"), budgets=(0, 9)).frontend_config()
    assert (changed.max_keypoints, changed.verify, changed.budgets) == (17, False, {"b": 9})
    table = {row.name: row for row in rows()}
    for field in dataclasses.fields(FrontendConfig):
        assert table[field.name].dynamic == (field.name not in ("weights", "device", "precision", "engine")), field.name


def test_the_front_end_accepts_what_the_table_accepts() -> None:
    for row in rows():
        if row.limits is None or row.many or row.name in ("sync_tolerance", "mask_tolerance", "mask_patience"):
            continue
        for value in (row.limits.minimum, row.limits.maximum):
            if value is not None:
                NodeParameters(**{row.name: row.type(value)}).frontend_config()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"max_keypoint": 100}, ["unknown key 'max_keypoint'", "did you mean 'max_keypoints'"]),
        ({"wieghts": "lite"}, ["'wieghts'", "'weights'"]),
        ({"max_keypoints": 0}, ["max_keypoints", ">= 1", "found 0"]),
        ({"max_keypoints": 100.5}, ["max_keypoints", "int", "100.5"]),
        ({"status_rate": 0.0}, ["status_rate", ">= 0.01"]),
        ({"descriptor_type": "double"}, ["descriptor_type", "'float16'", "'double'"]),
        ({"verify": "yes"}, ["verify", "bool", "'yes'"]),
        ({"image_transport": "theora"}, ["image_transport", "'compressed'", "'theora'"]),
        ({"camera": "left"}, ["unknown key 'camera'", "'cameras'"]),
        ({"cameras": "left"}, ["cameras", "a list of str", "'left'"]),
        ({"debug_layers": ["tracks", "arrows"]}, ["debug_layers[1]", "'scores'", "'arrows'"]),
        ({"budgets": [-1]}, ["budgets[0]", ">= 0", "-1"]),
        ({"budgets": [False]}, ["budgets[0]", "int", "False"]),
        ({"imu_rotation": [2.0] * 9}, ["imu_rotation[0]", "<= 1", "2.0"]),
    ],
)
def test_a_wrong_override_is_named_with_what_would_be_right(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_parameters(overrides, "parameters of /scfeat")
    for word in ["parameters of /scfeat", *words]:
        assert word in str(error.value)


PAIR = {"cameras": ("left", "right")}
TURNED = (0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
MIRRORED = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cameras": ()}, ["cameras", "at least one"]),
        ({"cameras": ("left", "left")}, ["cameras", "none twice", "['left', 'left']"]),
        *(({"cameras": (name,)}, ["cameras", "topic", repr(name)]) for name in ("1st", "a/b", "a b", "", "a__b", "_a")),
        ({**PAIR, "stereo": ("left:rigth",)}, ["stereo", "['left', 'right']", "'left:rigth'"]),
        ({**PAIR, "stereo": ("left:left",)}, ["stereo", "different", "'left:left'"]),
        ({**PAIR, "stereo": ("left",)}, ["stereo", "'left:right'", "'left'"]),
        ({**PAIR, "stereo": ("left:right", "right:left")}, ["stereo", "each pair once", "'right:left'"]),
        ({**PAIR, "stereo": ("left:right:left",)}, ["stereo", "'left:right:left'"]),
        ({**PAIR, "budgets": (100,)}, ["budgets", "each of the 2 cameras", "found 1"]),
        ({"budgets": (100, 200)}, ["budgets", "each of the 1 cameras", "found 2"]),
        ({**PAIR, "mask_files": ("a.png",)}, ["mask_files", "each of the 2 cameras", "found 1"]),
        ({"imu_rotation": (1.0, 0.0, 0.0)}, ["imu_rotation", "9 numbers", "found 3"]),
        ({"imu_rotation": TURNED * 2}, ["imu_rotation", "9 numbers", "found 18"]),
        ({"imu_rotation": MIRRORED}, ["imu_rotation", "determinant 1", "sign"]),
        ({"imu_rotation": (0.0,) * 9}, ["imu_rotation", "length 1"]),
        ({**PAIR, "imu_rotation": TURNED + MIRRORED}, ["imu_rotation", "determinant 1"]),
    ],
)
def test_values_that_do_not_fit_together_are_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        NodeParameters(**values)
    for word in words:
        assert word in str(error.value)


def test_what_belongs_to_a_camera_is_found_by_its_name() -> None:
    given = {"stereo": ("left:right",), "budgets": (0, 300), "mask_files": ("", "hood.png"), "imu_rotation": TURNED}
    values = NodeParameters(cameras=("left", "right"), **given)  # type: ignore[arg-type]
    assert values.stereo_pairs == (("left", "right"),)
    assert values.camera_budgets == {"right": 300} and values.camera_masks == {"right": "hood.png"}
    turned = np.reshape(TURNED, (3, 3))
    assert all(np.array_equal(values.imu_rotations[name], turned) for name in ("left", "right"))
    both = dataclasses.replace(values, imu_rotation=(*TURNED, *np.eye(3).ravel().tolist()))
    assert np.array_equal(both.imu_rotations["left"], turned) and np.array_equal(both.imu_rotations["right"], np.eye(3))
    rounded = tuple(np.round(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0], 4).ravel().tolist())
    signed = np.reshape(rounded, (3, 3)) * np.sign(np.linalg.det(np.reshape(rounded, (3, 3))))
    assert np.array_equal(NodeParameters(imu_rotation=tuple(signed.ravel())).imu_rotations["camera"], signed)


@pytest.mark.parametrize("nothing", [None, [], [""], ["", ""]])
def test_an_empty_list_of_names_comes_in_several_ways(nothing: Any) -> None:
    values = load_parameters({"cameras": ["left", "right"], "stereo": nothing, "mask_files": nothing})
    assert values.stereo == () and values.mask_files == () and values.camera_masks == {}


def test_a_whole_number_is_good_where_a_fraction_is_expected() -> None:
    values = load_parameters({"status_rate": 5, "verification_threshold": 2})
    assert (values.status_rate, values.verification_threshold) == (5.0, 2.0)


def test_overrides_of_ros_itself_are_none_of_ours() -> None:
    foreign = {"use_sim_time": True, "qos_overrides./image.subscription.reliability": "reliable"}
    assert load_parameters(foreign) == NodeParameters()
    for misspelt in ("use_sim_timer", "start_type_description_services", "qos_override./image.depth"):
        with pytest.raises(ConfigError, match=f"unknown key '{misspelt}'"):
            load_parameters({misspelt: True})


def test_descriptors_carry_type_limits_and_meaning() -> None:
    pytest.importorskip("rcl_interfaces", reason="ROS is not installed: run `make setup`")
    from scfeat_ros.parameters import descriptor

    for row in rows():
        described = descriptor(row)
        assert described.name == row.name and described.description == row.doc
        assert described.read_only == (not row.dynamic)
        has_range = row.limits is not None and not row.many
        assert bool(described.integer_range or described.floating_point_range) == has_range
        assert (row.accepts in described.additional_constraints) and bool(row.accepts) == bool(
            row.limits or row.choices
        )
    table = {row.name: descriptor(row) for row in rows()}
    assert table["max_keypoints"].integer_range[0].from_value == 1
    assert table["verification_threshold"].floating_point_range[0].to_value == 100.0
    assert "compressed" in table["image_transport"].additional_constraints
    assert table["debug_layers"].additional_constraints == "each one of matches, tracks, mask, scores"
    assert table["budgets"].additional_constraints == "each >= 0 and <= 65536"


# -- on a live node ----------------------------------------------------------------------------------------------------


NOT_SET, BOOL_ARRAY, STRING_ARRAY = 0, 6, 9  # of rcl_interfaces/ParameterType


class Watched:
    """A node with the parameters, and a client of its services in another node."""

    def __init__(self, ros: Any, *arguments: str) -> None:
        from scfeat_ros.parameters import declare, watch

        self.node = ros.create_node(
            "scfeat", cli_args=["--ros-args", *arguments], allow_undeclared_parameters=True, use_global_arguments=False
        )
        self.declared = declare(self.node)
        self.changes: list[NodeParameters] = []
        self.refuse: ConfigError | None = None
        watch(self.node, self._changed)
        self._ros = ros
        self._rqt = ros.create_node("rqt")
        self._clients: dict[str, Any] = {}

    def _changed(self, values: NodeParameters) -> None:
        if self.refuse:
            raise self.refuse
        self.changes.append(values)

    def call(self, kind: Any, name: str, request: Any) -> Any:
        from rcl_interfaces.srv import ListParameters

        if name not in self._clients:
            self._clients[name] = self._rqt.create_client(kind, f"/scfeat/{name}")
            known = self._rqt.create_client(ListParameters, "/scfeat/list_parameters")
            self._ros.call(known, ListParameters.Request(), again=True)
            self._rqt.destroy_client(known)
        return self._ros.call(self._clients[name], request)

    def set(self, **values: Any) -> Any:
        """All at once, as ``set_parameters_atomically`` does."""
        from rcl_interfaces.srv import SetParametersAtomically

        return self.call(
            SetParametersAtomically,
            "set_parameters_atomically",
            SetParametersAtomically.Request(parameters=_messages(values)),
        ).result

    def get(self, *names: str) -> list[Any]:
        return [self.node.get_parameter(name).value for name in names]


def _messages(values: dict[str, Any]) -> list[Any]:
    from rclpy.parameter import Parameter

    # An empty list has no type of its own: (type, value).
    return [
        Parameter(name, Parameter.Type(value[0]), value[1]).to_parameter_msg()
        if isinstance(value, tuple)
        else Parameter(name, value=value).to_parameter_msg()
        for name, value in values.items()
    ]


@pytest.fixture
def watched(ros: Any) -> Callable[..., Watched]:
    return lambda *arguments: Watched(ros, *arguments)


def test_the_parameter_file_gives_the_node_its_defaults(watched: Any, repository: Path) -> None:
    from rclpy.parameter import Parameter

    node = watched("--params-file", str(repository / "config" / "frontend.yaml"))
    assert node.declared == NodeParameters()
    types = {"bool": "BOOL", "int": "INTEGER", "double": "DOUBLE", "string": "STRING"}
    for row in rows():
        expected = types[row.type_name.removesuffix("[]")] + ("_ARRAY" if row.many else "")
        assert node.node.get_parameter(row.name).type_ == Parameter.Type[expected], row.name


def test_lists_of_a_parameter_file_reach_the_node(watched: Any, tmp_path: Path) -> None:
    path = tmp_path / "robot.yaml"
    path.write_text(
        "/**:\n  ros__parameters:\n    cameras: [left, right]\n    stereo: ['left:right']\n    budgets: [512, 0]\n"
        "    mask_files: []\n    debug_layers: []\n    status_rate: 5\n"
        "    imu_rotation: [0, 0, 1, -1, 0, 0, 0, -1, 0]\n"
    )
    node = watched("--params-file", str(path), "-p", "grid:=4")
    expected = {"stereo": ("left:right",), "budgets": (512, 0), "debug_layers": (), "imu_rotation": TURNED}
    assert node.declared == NodeParameters(cameras=("left", "right"), status_rate=5.0, grid=4, **expected)
    assert node.get("mask_files", "budgets", "status_rate") == [[""], [512, 0], 5.0]


def test_what_may_change_changes_at_once_and_as_a_whole(watched: Any) -> None:
    node = watched()
    answer = node.set(max_keypoints=300, grid=4, debug_layers=["scores"], score_threshold=0.25, budgets=[200])
    assert answer.successful, answer.reason
    expected = {
        "max_keypoints": 300,
        "grid": 4,
        "debug_layers": ("scores",),
        "score_threshold": 0.25,
        "budgets": (200,),
    }
    assert node.changes == [NodeParameters(**expected)]
    assert node.get("max_keypoints", "grid") == [300, 4]
    assert node.set(verify=False).successful
    assert node.changes[1:] == [NodeParameters(**expected, verify=False)]


def test_whole_numbers_and_empty_lists_are_taken_as_ros2_param_sends_them(watched: Any) -> None:
    node = watched("-p", "budgets:=[100]")
    assert node.set(status_rate=5, clahe=2).successful
    assert node.changes.pop() == NodeParameters(budgets=(100,), status_rate=5.0, clahe=2.0)
    assert node.set(status_rate=2.0, clahe=0.0).successful and node.changes.pop() == NodeParameters(budgets=(100,))
    # ros2 param takes [] for a list of bool.
    assert node.set(budgets=(BOOL_ARRAY, []), debug_layers=(STRING_ARRAY, [])).successful
    assert node.changes == [NodeParameters(debug_layers=())]
    assert node.set(budgets=[0], debug_layers=[""], grid=2).successful
    assert node.changes[1:] == [NodeParameters(debug_layers=(), grid=2)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"grid": 4, "max_keypoints": 0}, ["max_keypoints", "out of range", "0"]),
        ({"grid": 4, "status_rate": 0.0}, ["status_rate", "out of range", "0.0"]),
        ({"grid": 4, "score_threshold": float("nan")}, ["score_threshold", "nan"]),
        ({"grid": 4, "mask_policy": "newest"}, ["mask_policy", "'nearest'", "'newest'"]),
        ({"grid": 4, "debug_layers": ["tracks", "arrows"]}, ["debug_layers[1]", "'arrows'"]),
        ({"grid": 4, "budgets": [100, 200]}, ["budgets", "each of the 1 cameras", "found 2"]),
        ({"grid": 4, "max_keypoint": 100}, ["unknown key 'max_keypoint'", "did you mean 'max_keypoints'"]),
        ({"grid": 4, "device": "cuda"}, ["read-only", "device"]),
        ({"grid": 4, "cameras": ["left"]}, ["read-only", "cameras"]),
        ({"grid": 4, "status_rate": "5"}, ["status_rate", "expected float", "'5'"]),
        ({"grid": 4, "max_keypoints": 100.0}, ["max_keypoints", "expected int", "100.0"]),
        ({"grid": 4, "budgets": (NOT_SET, None)}, ["budgets", "cannot be deleted"]),
    ],
)
def test_one_wrong_value_leaves_all_as_they_are(watched: Any, values: dict[str, Any], words: list[str]) -> None:
    node = watched()
    answer = node.set(**values)
    assert not answer.successful and node.changes == []
    for word in words:
        assert word in answer.reason
    assert node.get("grid", "status_rate", "device", "budgets") == [0, 2.0, "cpu", [0]]
    assert not node.node.has_parameter("max_keypoint")
    assert node.set(grid=1).successful, "the node goes on"


def test_single_ones_are_answered_one_by_one(watched: Any) -> None:
    from rcl_interfaces.srv import DescribeParameters, SetParameters

    node = watched()
    values = {"grid": 3, "max_keypoints": -1, "weigths": "r50", "status_rate": 10.0}
    request = SetParameters.Request(parameters=_messages(values))
    results = node.call(SetParameters, "set_parameters", request).results
    assert [result.successful for result in results] == [True, False, False, True]
    assert "'weights'" in results[2].reason
    assert node.changes == [NodeParameters(grid=3), NodeParameters(grid=3, status_rate=10.0)]
    request = DescribeParameters.Request(names=["grid", "device"])
    grid, device = node.call(DescribeParameters, "describe_parameters", request).descriptors
    assert not grid.read_only and grid.integer_range[0].to_value == 64 and device.read_only


def test_what_cannot_be_done_is_refused_with_its_reason(watched: Any) -> None:
    node = watched()
    node.refuse = ConfigError("expected a free device, found a busy one")
    answer = node.set(grid=4)
    assert not answer.successful and "found a busy one" in answer.reason and node.get("grid") == [0]


def test_parameters_of_ros_itself_pass(watched: Any) -> None:
    node = watched()
    assert node.set(use_sim_time=True).successful and node.changes == []
    node.node.declare_parameter("qos_overrides./image.subscription.depth", 5)
    assert node.set(use_sim_time=False, grid=2).successful and node.changes == [NodeParameters(grid=2)]


# -- the file, without ROS ---------------------------------------------------------------------------------------------


def test_the_shipped_file_is_read_as_the_defaults(repository: Path) -> None:
    assert load_parameters(read_parameters(repository / "config" / "frontend.yaml")) == NodeParameters()


def test_sections_of_the_node_and_wildcards_count_and_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "robot.yaml"
    file.write_text(
        """\
/**:
  ros__parameters: {grid: 1, max_keypoints: 10, use_sim_time: true}
/camera/driver:
  ros__parameters: {grid: 7, exposure: 3}
/front/scfeat:
  ros__parameters: {grid: 2}
front:
  scfeat:
    ros__parameters:
      border: 9
      qos_overrides: {/tf: {publisher: {depth: 5}}}
"""
    )
    found = read_parameters(file)
    assert found == {
        "grid": 2,
        "max_keypoints": 10,
        "use_sim_time": True,
        "border": 9,
        "qos_overrides./tf.publisher.depth": 5,
    }
    values = load_parameters(found)
    assert (values.grid, values.max_keypoints, values.border) == (2, 10, 9)
    assert read_parameters(file, "driver")["exposure"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grid: 2", ["found no ros__parameters", "config/frontend.yaml"]),
        ("", ["found no ros__parameters"]),
        ("/other: {ros__parameters: {grid: 2}}", ["parameters of the node 'scfeat'", "found those of /other"]),
        ("/**: {ros__parameters: [grid]}", ["expected parameters below ros__parameters", "['grid']"]),
        ("/**: [", ["expected valid YAML"]),
    ],
)
def test_what_is_no_parameter_file_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_parameters(file)
    for word in ["wrong.yaml", *words]:
        assert word in str(error.value)
