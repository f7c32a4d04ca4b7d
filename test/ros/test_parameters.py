"""One table of parameters: its file, its descriptors, the configuration of the front end, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from scfeat_core.config import Range, type_hints
from scfeat_core.errors import ConfigError
from scfeat_ros.parameters import GROUPS, NodeParameters, load_parameters, parameters_markdown, parameters_yaml, rows


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


def test_the_front_end_takes_all_of_its_settings_from_the_table() -> None:
    from scfeat_core.frontend import FrontendConfig

    assert NodeParameters().frontend_config() == FrontendConfig(), "the defaults differ"
    changed = NodeParameters(max_keypoints=17, verify=False).frontend_config()
    assert (changed.max_keypoints, changed.verify) == (17, False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"max_keypoint": 100}, ["unknown key 'max_keypoint'", "did you mean 'max_keypoints'"]),
        ({"wieghts": "lite"}, ["'wieghts'", "'weights'"]),
        ({"max_keypoints": 0}, ["max_keypoints", ">= 1", "found 0"]),
        ({"max_keypoints": 100.5}, ["max_keypoints", "int", "100.5"]),
        ({"status_rate": 0.0}, ["status_rate", "> 0"]),
        ({"descriptor_type": "double"}, ["descriptor_type", "'float16'", "'double'"]),
        ({"verify": "yes"}, ["verify", "bool", "'yes'"]),
        ({"image_transport": "theora"}, ["image_transport", "'compressed'", "'theora'"]),
    ],
)
def test_a_wrong_override_is_named_with_what_would_be_right(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_parameters(overrides, "parameters of /scfeat")
    for word in ["parameters of /scfeat", *words]:
        assert word in str(error.value)


def test_a_whole_number_is_good_where_a_fraction_is_expected() -> None:
    values = load_parameters({"status_rate": 5, "verification_threshold": 2})
    assert (values.status_rate, values.verification_threshold) == (5.0, 2.0)


def test_overrides_of_ros_itself_are_none_of_ours() -> None:
    foreign = {"use_sim_time": True, "qos_overrides./image.subscription.reliability": "reliable"}
    assert load_parameters(foreign) == NodeParameters()


def test_descriptors_carry_type_limits_and_meaning() -> None:
    pytest.importorskip("rcl_interfaces", reason="ROS is not installed: run `make setup`")
    from scfeat_ros.parameters import descriptor

    hints = type_hints(NodeParameters)
    for row in rows():
        described = descriptor(row)
        assert described.name == row.name and described.description == row.doc
        assert described.read_only == (not row.dynamic)
        has_range = any(isinstance(extra, Range) for extra in getattr(hints[row.name], "__metadata__", ()))
        assert bool(described.integer_range or described.floating_point_range) == has_range
    table = {row.name: descriptor(row) for row in rows()}
    assert table["max_keypoints"].integer_range[0].from_value == 1
    assert table["verification_threshold"].floating_point_range[0].to_value == 100.0
    assert "compressed" in table["image_transport"].additional_constraints
