"""Rows of frozen dataclasses as columns: plain arrays that ``.npz`` files hold, without pickles.

A column is called by the path of its field, ``pair.matches.scores``. Numbers, enumerations and fixed tuples of numbers
have one entry a row. Arrays and texts of all rows lie one after the other, along their first axis; ``NAME#rows`` says
how much of it each row has. What may be None has ``NAME?``, which rows have it, and columns of those that do. So the
columns of consecutive rows are those of their parts, one after the other.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch

from scfeat_core.errors import DataError

Columns = dict[str, np.ndarray]
Row = TypeVar("Row")
_SCALARS: dict[type, Any] = {int: np.int64, float: np.float64, bool: np.bool_}


def to_columns(kind: type[Row], rows: Sequence[Row], skip: Sequence[str] = ()) -> Columns:
    """The columns of rows of a dataclass. skip: fields that are left out. Tensors become numpy arrays."""
    columns: Columns = {}
    _record("", kind, skip).write(rows, columns)
    return columns


class Table(Sequence[Row], Generic[Row]):
    """The rows of columns, made when they are asked for, with arrays of their own.

    skip: fields that are not in the columns and keep their defaults. Raises DataError where columns are missing or do
    not fit together.
    """

    def __init__(self, kind: type[Row], columns: Mapping[str, np.ndarray], skip: Sequence[str] = ()) -> None:
        self._reader = _record("", kind, skip)
        try:
            self._reader.open(columns)
        except KeyError as error:
            raise DataError(f"expected the column {error} of a {kind.__name__}, found none") from error
        lengths = {len(columns[name]) for name in self._reader.by_row()}
        if len(lengths) != 1:
            raise DataError(f"expected columns of equal length of a {kind.__name__}, found {sorted(lengths)}")
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._reader.read(position)


# -- kinds of fields ---------------------------------------------------------------------------------------------------


class _Scalar:
    """Numbers and enumerations, and tuples of as many numbers in each row."""

    def __init__(self, name: str, kind: Any, dtype: Any, count: int = 0) -> None:
        self._name, self._kind, self._dtype, self._count = name, kind, dtype, count

    def write(self, values: Sequence[Any], columns: Columns) -> None:
        shape = (-1, self._count) if self._count else (-1,)
        columns[self._name] = np.array(values, self._dtype).reshape(shape)

    def open(self, columns: Mapping[str, np.ndarray]) -> None:
        self._column = columns[self._name]

    def by_row(self) -> list[str]:
        return [self._name]

    def read(self, row: int) -> Any:
        return self._kind(self._column[row].tolist())


class _Rows:
    """What has any number of rows itself: arrays, and texts as their bytes."""

    def __init__(self, name: str, text: bool = False) -> None:
        self._name, self._text = name, text

    def write(self, values: Sequence[Any], columns: Columns) -> None:
        arrays = [np.frombuffer(value.encode(), np.uint8) if self._text else _numpy(value) for value in values]
        columns[f"{self._name}#rows"] = np.array([len(array) for array in arrays], np.int64)
        if arrays:
            columns[self._name] = np.concatenate(arrays)

    def open(self, columns: Mapping[str, np.ndarray]) -> None:
        self._ends = np.cumsum(columns[f"{self._name}#rows"])
        if len(self._ends):
            self._values = columns[self._name]
            if len(self._values) != self._ends[-1]:
                raise DataError(
                    f"expected {self._ends[-1]} rows in the column {self._name}, found {len(self._values)}: the file "
                    "is damaged"
                )

    def by_row(self) -> list[str]:
        return [f"{self._name}#rows"]

    def read(self, row: int) -> Any:
        values = np.array(self._values[self._ends[row - 1] if row else 0 : self._ends[row]])
        return bytes(values).decode() if self._text else values


class _Optional:
    """What may be None."""

    def __init__(self, name: str, inner: _Field) -> None:
        self._name, self._inner = name, inner

    def write(self, values: Sequence[Any], columns: Columns) -> None:
        columns[f"{self._name}?"] = np.array([value is not None for value in values], bool)
        self._inner.write([value for value in values if value is not None], columns)

    def open(self, columns: Mapping[str, np.ndarray]) -> None:
        self._given = columns[f"{self._name}?"]
        self._places = np.cumsum(self._given) - 1
        self._inner.open(columns)

    def by_row(self) -> list[str]:
        return [f"{self._name}?"]

    def read(self, row: int) -> Any:
        return self._inner.read(int(self._places[row])) if self._given[row] else None


class _Record:
    """A dataclass: its fields."""

    def __init__(self, kind: Any, fields: Mapping[str, _Field]) -> None:
        self._kind, self._fields = kind, fields

    def write(self, values: Sequence[Any], columns: Columns) -> None:
        for name, field in self._fields.items():
            field.write([getattr(value, name) for value in values], columns)

    def open(self, columns: Mapping[str, np.ndarray]) -> None:
        for field in self._fields.values():
            field.open(columns)

    def by_row(self) -> list[str]:
        return [name for field in self._fields.values() for name in field.by_row()]

    def read(self, row: int) -> Any:
        return self._kind(**{name: field.read(row) for name, field in self._fields.items()})


_Field = _Scalar | _Rows | _Optional | _Record


def _record(prefix: str, kind: Any, skip: Sequence[str] = ()) -> _Record:
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in skip]
    return _Record(kind, {name: _field(prefix + name, hints[name]) for name in names})


def _field(name: str, hint: Any) -> _Field:
    arguments = get_args(hint)
    if type(None) in arguments:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _Optional(name, _field(name, inner))
    if hint is Any or (isinstance(hint, type) and issubclass(hint, (np.ndarray, torch.Tensor))):
        return _Rows(name)
    if hint is str:
        return _Rows(name, text=True)
    if dataclasses.is_dataclass(hint):
        return _record(f"{name}.", hint)
    if get_origin(hint) is tuple:
        return _Scalar(name, tuple, _SCALARS[arguments[0]], len(arguments))
    if issubclass(hint, enum.IntEnum):
        return _Scalar(name, hint, np.int64)
    return _Scalar(name, hint, _SCALARS[hint])


def _numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
