"""Rows as columns: what comes back is what went in, and parts add up to the whole."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch

from scfeat_core.columns import Table, to_columns
from scfeat_core.errors import DataError


class Kind(IntEnum):
    FIRST = 1
    SECOND = 2


@dataclass(frozen=True, eq=False)
class Inner:
    values: np.ndarray
    anything: Any
    maybe: np.ndarray | None
    kind: Kind


@dataclass(frozen=True, eq=False)
class Outer:
    number: int
    ratio: float
    flag: bool
    text: str
    size: tuple[int, int]
    tensor: torch.Tensor
    inner: Inner | None
    skipped: str = "default"


def inner(rows: int, maybe: int | None) -> Inner:
    values = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    return Inner(values, np.full(rows, rows, np.int64), None if maybe is None else np.eye(maybe), Kind(1 + rows % 2))


ROWS = [
    Outer(2**62, 0.1, True, "", (3, 4), torch.ones(2, 3), None, "lost"),
    Outer(-1, np.inf, False, "zwölf ✓", (-5, 6), torch.zeros(0, 3), inner(3, None)),
    Outer(0, 1 / 3, True, "x", (0, 0), torch.full((1, 3), 7.0), inner(0, 3)),
    Outer(1, 2.0, False, "", (1, 1), torch.ones(4, 3), None),
    Outer(2, 2.0, False, "last", (1, 1), torch.ones(1, 3), inner(2, 3)),
]


def assert_same(one: Any, other: Any) -> None:
    for field in fields(one):
        if field.name == "skipped":
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, (np.ndarray, torch.Tensor)):
            a, b = np.asarray(a), np.asarray(b)
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), field.name
        elif isinstance(a, Inner):
            assert_same(a, b)
        else:
            assert a == b and type(a) is type(b), field.name


def test_rows_come_back_as_they_were() -> None:
    table = Table(Outer, to_columns(Outer, ROWS, skip=["skipped"]), skip=["skipped"])
    assert len(table) == len(ROWS)
    for row, read in zip(ROWS, table, strict=True):
        assert_same(row, read)
    assert table[0].skipped == "default"
    assert_same(table[-1], ROWS[-1])
    assert [row.number for row in table[1:3]] == [-1, 0]
    with pytest.raises(IndexError, match="row 5 of 5"):
        table[5]


@pytest.mark.parametrize("cut", range(len(ROWS) + 1))
def test_columns_of_parts_add_up(cut: int) -> None:
    whole = to_columns(Outer, ROWS)
    parts = [to_columns(Outer, part) for part in (ROWS[:cut], ROWS[cut:])]
    for name, column in whole.items():
        joined = np.concatenate([part[name] for part in parts if name in part])
        assert joined.dtype == column.dtype and joined.tobytes() == column.tobytes(), name


def test_no_rows_make_an_empty_table() -> None:
    assert list(Table(Outer, to_columns(Outer, []))) == []


def test_a_row_does_not_hold_on_to_the_columns() -> None:
    columns = to_columns(Outer, ROWS)
    values = Table(Outer, columns)[1].inner.values
    values[:] = -1
    assert columns["inner.values"].min() == 0


def test_columns_that_do_not_fit_are_refused() -> None:
    columns = to_columns(Outer, ROWS)
    with pytest.raises(DataError, match="the column 'inner.kind' of a Outer, found none"):
        Table(Outer, {name: values for name, values in columns.items() if name != "inner.kind"})
    with pytest.raises(DataError, match="9 rows in the column inner.values|rows in the column tensor, found 7"):
        Table(Outer, columns | {"tensor": columns["tensor"][:-1]})
    with pytest.raises(DataError, match=r"equal length of a Outer, found \[4, 5\]"):
        Table(Outer, columns | {"ratio": columns["ratio"][1:]})
