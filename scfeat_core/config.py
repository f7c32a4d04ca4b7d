"""Configuration: a mapping (YAML, ROS parameters, keyword arguments) becomes a frozen dataclass, or a clear error.

Strict on purpose: an unknown key, a wrong type or a value out of range is a :class:`ConfigError` that names the key by
its full path and says what would be accepted. Ranges are part of the annotation, so that other layers can read them::

    @dataclass(frozen=True)
    class OptimiserConfig:
        learning_rate: Annotated[float, Range(above=0.0)] = 1e-3
        schedule: Literal["constant", "cosine"] = "cosine"

    load_config(OptimiserConfig, {"learning_rate": 3e-4}, where="train.yaml")
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Range:
    """Limits of a number, for use in ``Annotated``. ``above`` and ``below`` exclude their value."""

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def contains(self, value: float) -> bool:
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = ((">=", self.minimum), (">", self.above), ("<=", self.maximum), ("<", self.below))
        return " and ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)


def load_config(cls: type[Config], mapping: Mapping[str, Any] | None, where: str = "configuration") -> Config:
    """Make a ``cls`` (a dataclass) from a mapping; keys that are absent keep their defaults.

    Understands bool, int, float, str, Path, Any, Optional and unions, Literal, enums (by value or by name), list,
    tuple, dict with str keys, nested dataclasses, and ``Annotated[number, Range(...)]``. A bool is not a number, an int
    is a valid float, a float is not a valid int. where: what a message calls the source, such as a file name.
    Raises ConfigError.
    """
    return _load_dataclass(cls, {} if mapping is None else mapping, where, "")


def read_config(cls: type[Config], path: str | Path) -> Config:
    """:func:`load_config` of a YAML file."""
    return load_config(cls, read_mapping(path), where=str(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """What a YAML file says, unchecked but for being a mapping; an empty file is an empty one. Raises ConfigError."""
    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a readable configuration file at {path}, found: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected valid YAML, found: {reason}") from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {_found(mapping)}")
    return mapping


def parse_value(text: str) -> Any:
    """The value of a KEY=VALUE setting, read as YAML. Raises ConfigError."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(
            f"expected a value in YAML, found '{text}' ({reason}); quote text with special signs"
        ) from error


def check_config(config: Any, where: str | None = None) -> None:
    """Check a dataclass that was constructed directly (call it in ``__post_init__``). Raises ConfigError."""
    where = type(config).__name__ if where is None else where
    for name, hint in type_hints(type(config)).items():
        _convert(getattr(config, name), hint, where, name)


def dump_config(config: Any) -> Any:
    """Plain dicts, lists, strings and numbers (for YAML or JSON); :func:`load_config` of it gives an equal object."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: dump_config(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: dump_config(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [dump_config(value) for value in config]
    if isinstance(config, enum.Enum):
        return config.value
    return str(config) if isinstance(config, Path) else config


def type_hints(cls: type) -> dict[str, Any]:
    """Annotations of the init fields of a dataclass, with ``Annotated`` kept."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _load_dataclass(cls: Any, mapping: Any, where: str, path: str) -> Any:
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{_place(where, path)}: expected a mapping of settings, found {_found(mapping)}")
    hints = type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise ConfigError(_unknown_key(key, list(hints), where, path))
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in mapping and (field.default, field.default_factory) == required:
            place = _place(where, _join(path, field.name))
            raise ConfigError(f"{place}: this setting has no default and must be given")
    values = {key: _convert(value, hints[key], where, _join(path, key)) for key, value in mapping.items()}
    return cls(**values)


def _unknown_key(key: Any, valid: list[str], where: str, path: str) -> str:
    nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"valid keys: {', '.join(valid)}"
    return f"{_place(where, path)}: unknown key '{key}'; {hint}"


def _convert(value: Any, hint: Any, where: str, path: str) -> Any:
    """The value as the annotated type, or ConfigError."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _convert_annotated(value, hint, where, path)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, where, path)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            return value
        raise _mismatch(value, hint, where, path)
    if origin in (list, tuple, dict):
        return _convert_container(value, hint, where, path)
    if dataclasses.is_dataclass(hint):
        return _load_dataclass(hint, value, where, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _convert_enum(value, hint, where, path)
    return _convert_scalar(value, hint, where, path)


def _convert_annotated(value: Any, hint: Any, where: str, path: str) -> Any:
    inner, *extras = get_args(hint)
    value = _convert(value, inner, where, path)
    for limits in (extra for extra in extras if isinstance(extra, Range)):
        if value is not None and not limits.contains(value):
            raise ConfigError(f"{_place(where, path)}: expected a value {limits}, found {value!r}")
    return value


def _convert_union(value: Any, hint: Any, where: str, path: str) -> Any:
    errors = []
    # an exact type wins, so that 1 stays an int in `float | int`
    for member in sorted(get_args(hint), key=lambda member: type(value) is not member):
        try:
            return _convert(value, member, where, path)
        except ConfigError as error:
            errors.append((member, error))
    structured = [error for member, error in errors if _explains_more(member, value)]
    raise structured[0] if len(structured) == 1 else _mismatch(value, hint, where, path)


def _explains_more(member: Any, value: Any) -> bool:
    """Whether this member of a union was plainly meant, so that its own error says more than a list of all types."""
    inner = get_args(member)[0] if get_origin(member) is Annotated else member
    if dataclasses.is_dataclass(inner):
        return isinstance(value, Mapping)
    if get_origin(inner) in (list, tuple):
        return isinstance(value, (list, tuple))
    return inner is type(value) or (inner is float and type(value) is int)


def _convert_container(value: Any, hint: Any, where: str, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _mismatch(value, hint, where, path)
        return {key: _convert(item, arguments[1], where, _join(path, key)) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        raise _mismatch(value, hint, where, path)
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise _mismatch(value, hint, where, path)
        item_hints = arguments
    else:
        item_hints = arguments[:1] * len(value)
    items = zip(value, item_hints, strict=True)
    return origin(_convert(item, inner, where, f"{path}[{index}]") for index, (item, inner) in enumerate(items))


def _convert_enum(value: Any, hint: Any, where: str, path: str) -> Any:
    if isinstance(value, hint):
        return value
    for member in hint:
        if not isinstance(value, bool) and (value == member.value or value == member.name):
            return member
    raise _mismatch(value, hint, where, path)


def _convert_scalar(value: Any, hint: Any, where: str, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{_place(where, path)}: expected a finite number, found {value!r}")
        return float(value)
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _mismatch(value, hint, where, path)


def _mismatch(value: Any, hint: Any, where: str, path: str) -> ConfigError:
    message = f"{_place(where, path)}: expected {_describe(hint)}, found {_found(value)}"
    if isinstance(value, str) and ("float" in _describe(hint) or "int" in _describe(hint)) and _is_number(value):
        message += f"; write it as a number: {float(value)!r} (YAML takes 1e-4 for text, 1.0e-4 for a number)"
    names = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
    if nearest := difflib.get_close_matches(str(value), names, n=1):
        message += f"; did you mean {nearest[0]!r}?"
    return ConfigError(message)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _describe(hint: Any) -> str:
    """A type annotation in the words of a user."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([_describe(arguments[0]), *(str(extra) for extra in arguments[1:] if isinstance(extra, Range))])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (list, tuple) and (origin is list or arguments[-1] is Ellipsis):
        return f"a list of {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: ({', '.join(_describe(argument) for argument in arguments)})"
    if origin is dict:
        return f"a mapping of names to {_describe(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a mapping of settings"
    return "a path" if hint is Path else getattr(hint, "__name__", str(hint))


def _found(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _place(where: str, path: str) -> str:
    return f"{where}: {path}" if path else where
