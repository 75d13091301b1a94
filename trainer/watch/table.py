"""Numbers by step in a bounded place: when it is full, two neighbours become their mean."""

import math
from collections.abc import Mapping
from typing import Any

ROWS, COLUMNS = 600, 256


class Table:
    """Columns of numbers over rising steps. `cursor` names a state of it, `since` gives what a holder of an earlier one lacks."""

    def __init__(self, boot: str, rows: int = ROWS, columns: int = COLUMNS) -> None:
        self.boot, self.rows, self.most = boot, rows // 2 * 2, columns
        self.generation = self.left_out = 0
        self.clear()

    def clear(self) -> None:
        """Empty."""
        self.at: list[int] = []
        self.columns: dict[str, list[float | None]] = {}
        self._stride, self._filled = 1, 0
        self._counts: dict[str, int] = {}
        self.generation += 1

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """A row; numbers alone are kept, and finite ones. False, and nothing done, where the step does not rise."""
        if self.at and step <= self.at[-1]:
            return False
        if not self.at or self._filled == self._stride:
            if len(self.at) == self.rows:
                self._halve()
            self.at.append(step)
            for column in self.columns.values():
                column.append(None)
            self._filled, self._counts = 0, {}
        self.at[-1] = step
        self._filled += 1
        for key, value in values.items():
            number = finite(value)
            if number is None:
                continue
            if key not in self.columns:
                if len(self.columns) >= self.most or len(key) > 120:
                    self.left_out += 1
                    continue
                self.columns[key] = [None] * len(self.at)
            count = self._counts[key] = self._counts.get(key, 0) + 1
            before = self.columns[key][-1]
            self.columns[key][-1] = number if before is None else before + (number - before) / count
        return True

    @property
    def cursor(self) -> str:
        return f"{self.boot}-{self.generation}.{len(self.at)}"

    def since(self, cursor: str = "") -> dict[str, Any]:
        """`{"cursor", "from", "at", "columns"}`: rows from `from` on, the last one known again, since it may have changed."""
        name, _, rows = cursor.rpartition(".")
        known = int(rows) if name == f"{self.boot}-{self.generation}" and rows.isdecimal() and len(rows) < 9 else 0
        begin = min(max(0, known - 1), len(self.at))
        columns = {key: [_short(v) for v in column[begin:]] for key, column in self.columns.items()}
        return {"cursor": self.cursor, "from": begin, "at": self.at[begin:], "columns": columns}

    def _halve(self) -> None:
        def both(a: float | None, b: float | None) -> float | None:
            return b if a is None else a if b is None else a + (b - a) / 2

        self.at = self.at[1::2]
        self.columns = {key: list(map(both, column[::2], column[1::2])) for key, column in self.columns.items()}
        self._stride *= 2
        self._filled = self._stride
        self.generation += 1


def finite(value: Any) -> float | None:
    """A number as a float; None for all else."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: float | None) -> float | None:
    return None if finite(value) is None else float(f"{value:.6g}")
