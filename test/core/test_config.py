from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from scfeat_core.config import Range, check_config, dump_config, load_config, read_config
from scfeat_core.errors import ConfigError, ScfeatError


class Mode(enum.Enum):
    FAST = "fast"
    CAREFUL = "careful"


@dataclass(frozen=True)
class Inner:
    learning_rate: Annotated[float, Range(above=0.0, maximum=1.0)] = 1e-3
    sizes: tuple[int, ...] = (32, 64)


@dataclass(frozen=True)
class Outer:
    name: str
    steps: Annotated[int, Range(minimum=1)] = 10
    shuffle: bool = True
    schedule: Literal["constant", "cosine"] = "cosine"
    mode: Mode = Mode.FAST
    limit: Annotated[int, Range(minimum=0)] | None = None
    output: Path | None = None
    crop: tuple[int, int] = (192, 192)
    weights: dict[str, float] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    stages: list[Inner] = field(default_factory=list)
    anything: Any = None


def test_defaults_and_conversions():
    config = load_config(
        Outer,
        {
            "name": "a",
            "mode": "careful",
            "output": "runs/a",
            "crop": [128, 96],
            "weights": {"peaky": 1},
            "inner": {"learning_rate": 1, "sizes": [8]},
            "stages": [{"learning_rate": 0.5}, {}],
        },
    )
    assert config.steps == 10 and config.shuffle is True and config.limit is None
    assert config.mode is Mode.CAREFUL
    assert config.output == Path("runs/a")
    assert config.crop == (128, 96)
    assert config.weights == {"peaky": 1.0}
    assert config.inner == Inner(1.0, (8,)) and isinstance(config.inner.learning_rate, float)
    assert config.stages == [Inner(0.5), Inner()]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "a", "shufle": True}, r"file\.yaml: unknown key 'shufle'; did you mean 'shuffle'\?"),
        ({"name": "a", "inner": {"learning_rat": 1.0}}, r"file\.yaml: inner: unknown key.*'learning_rate'"),
        ({"name": "a", "zzzzzz": 1}, r"valid keys: name, steps"),
        ({}, r"name: .*must be given"),
        ({"name": 3}, r"name: expected str, found 3 \(int\)"),
        ({"name": "a", "steps": True}, r"steps: expected int, found True \(bool\)"),
        ({"name": "a", "steps": 2.0}, r"steps: expected int, found 2\.0 \(float\)"),
        ({"name": "a", "steps": 0}, r"steps: expected a value >= 1, found 0"),
        ({"name": "a", "shuffle": 1}, r"shuffle: expected bool, found 1"),
        ({"name": "a", "schedule": "cosin"}, r"schedule: expected one of 'constant', 'cosine', found 'cosin'"),
        ({"name": "a", "mode": "slow"}, r"mode: expected one of 'fast', 'careful'"),
        ({"name": "a", "limit": -1}, r"limit: expected a value >= 0, found -1"),
        ({"name": "a", "limit": "x"}, r"limit: expected int >= 0 or null, found 'x'"),
        ({"name": "a", "crop": [1, 2, 3]}, r"crop: expected a list of 2"),
        ({"name": "a", "crop": [1, "b"]}, r"crop\[1\]: expected int"),
        ({"name": "a", "crop": 5}, r"crop: expected a list"),
        ({"name": "a", "weights": {"peaky": "high"}}, r"weights\.peaky: expected float"),
        ({"name": "a", "inner": [1]}, r"inner: expected a mapping of settings"),
        ({"name": "a", "inner": {"learning_rate": "1e-4"}}, r"inner\.learning_rate: .*0\.0001.*YAML"),
        ({"name": "a", "inner": {"learning_rate": 0.0}}, r"expected a value > 0 and <= 1, found 0\.0"),
        ({"name": "a", "inner": {"learning_rate": float("nan")}}, r"finite"),
        ({"name": "a", "stages": [{}, {"sizes": 3}]}, r"stages\[1\]\.sizes"),
        ([1], r"expected a mapping"),
    ],
)
def test_errors_name_the_key_and_the_remedy(mapping, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Outer, mapping, where="file.yaml")
    assert str(caught.value).startswith("file.yaml")
    assert isinstance(caught.value, ScfeatError) and isinstance(caught.value, ValueError)


def test_dump_and_load_round_trip():
    config = Outer("a", mode=Mode.CAREFUL, output=Path("x"), stages=[Inner(0.25, (1, 2))], limit=3)
    assert load_config(Outer, dump_config(config)) == config


def test_check_config_guards_direct_construction():
    check_config(Outer("a"))
    with pytest.raises(ConfigError, match=r"Outer: steps: expected a value >= 1"):
        check_config(Outer("a", steps=0))
    with pytest.raises(ConfigError, match=r"shuffle: expected bool"):
        check_config(Outer("a", shuffle="yes"))


def test_read_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nsteps: 3\n")
    assert read_config(Outer, path) == Outer("a", steps=3)
    path.write_text("name: [")
    with pytest.raises(ConfigError, match="valid YAML"):
        read_config(Outer, path)
    with pytest.raises(ConfigError, match="absent.yaml"):
        read_config(Outer, tmp_path / "absent.yaml")
    path.write_text("")
    with pytest.raises(ConfigError, match="name"):
        read_config(Outer, path)
