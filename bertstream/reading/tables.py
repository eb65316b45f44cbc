"""Tables of pandas, polars and Arrow as datasets of rows; none of the three packages is imported for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, shortened, table_columns

_AT_A_TIME = 256

_RUNS: dict[tuple[str, str], Callable[[Any, int, int], list[Any]]] = {
    ("pandas", "DataFrame"): lambda table, start, stop: [_of_pandas(table.iloc[start:stop])],
    ("polars", "DataFrame"): lambda table, start, stop: [table[start:stop].to_dict(as_series=False)],
    # As many as the table has chunks there: nothing says that they fit into one.
    ("pyarrow", "Table"): lambda table, start, stop: table.slice(start, stop - start).to_batches(),
    ("pyarrow", "RecordBatch"): lambda table, start, stop: [table.slice(start, stop - start)],
}
"""By package and class: the rows from `start` to `stop`, as record batches of Arrow or one dict of columns."""


def _of_pandas(rows: Any) -> dict[str, list[Any]]:
    # By way of rows: its columns as lists hold other values where some are missing.
    records = rows.rename(columns=str).to_dict("records")
    columns = {name: [record[name] for record in records] for name in map(str, rows.columns)}
    for position, (name, dtype) in enumerate(zip(columns, rows.dtypes, strict=True)):
        if not (isinstance(dtype, np.dtype) and dtype.kind in "biufc"):  # NaN among plain numbers is a number
            missing = rows.iloc[:, position].isna().to_numpy()  # None, NaN, NA or NaT, by dtype and version of pandas
            for row in missing.nonzero()[0]:
                columns[name][row] = None
    return columns


def is_table(value: object) -> bool:
    """Whether this is a DataFrame of pandas or polars, or a Table or RecordBatch of Arrow."""
    return _kind(value) is not None


def _kind(value: object) -> tuple[str, str] | None:
    names = ((kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__)
    return next((name for name in names if name in _RUNS), None)


class TableRows:
    """A table as a dataset of rows: dicts of Python's values, made when they are read.

    Args:
        table: something that `is_table`.
    Attributes:
        name: of the table's class.
    Raises:
        ConfigError: several columns have the same name.
    """

    def __init__(self, table: Any) -> None:
        kind = _kind(table)
        assert kind is not None
        self.name = type(table).__name__
        self._table, self._kind = table, kind
        columns = self.column_names
        if repeated := [name for name in columns if columns.count(name) > 1]:
            raise ConfigError(
                f"shards is a {self.name} with several columns named {repeated[0]!r} among {shortened(columns)}: "
                "rename them, a row has one value of each name"
            )

    @property
    def column_names(self) -> list[str]:
        """The names of the columns, as those of Hugging Face's datasets."""
        return table_columns(self._table) or []

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, position: int) -> dict[str, Any]:
        [run] = self.runs(range(position, position + 1))
        columns = run if isinstance(run, dict) else run.to_pydict()
        return {name: value for name, [value] in columns.items()}

    def some(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at these positions."""
        if self._kind[0] != "pandas":
            return [self[position] for position in positions]
        columns = _of_pandas(self._table.iloc[list(positions)])  # one by one, 300 columns took a second
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def runs(self, positions: range) -> Iterator[Any]:
        """The rows at these positions, a run at a time: record batches of Arrow, or dicts of columns."""
        for start in range(positions.start, positions.stop, _AT_A_TIME):
            yield from _RUNS[self._kind](self._table, start, min(start + _AT_A_TIME, positions.stop))
