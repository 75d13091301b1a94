"""What has been asked and answered, a line of JSON each, so that nothing is asked twice.

A line that a killed process left unfinished is dropped when the file is opened again. A row's `question` names who was asked what, with
the version of the weights: another judge, or other weights, are asked anew.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from trainer.config import ConfigError

Row = dict[str, Any]
Key = tuple[str, ...]


class Ledger:
    """Rows by their `fields`; the last of a key counts. Rows whose error may go away (`retry`) are not `settled`."""

    def __init__(self, path: Path, fields: tuple[str, ...]) -> None:
        """ConfigError for a file that is no ledger."""
        self.path, self.fields = path, fields
        self.rows: dict[Key, Row] = {}
        whole = 0
        if path.is_file():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break
                    self._read(number, line)
                    whole += len(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            value = row["value"]
            if not (value is None or isinstance(value, int | float)):
                raise ValueError("value is no number")
            self.rows[self.key(row)] = row
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{self.path}, line {number} is none of a bench's ({error}): remove that line") from error

    def key(self, row: Mapping[str, Any]) -> Key:
        return tuple(str(row[field]) for field in self.fields)

    def settled(self, *key: str) -> bool:
        """Whether there is an answer, or an error that asking again would only repeat."""
        row = self.rows.get(key)
        return row is not None and not row.get("retry", False)

    def add(self, rows: Iterable[Row]) -> None:
        """Kept, and written at once."""
        lines = []
        for row in rows:
            self.rows[self.key(row)] = row
            lines.append(json.dumps(row, ensure_ascii=True) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def digest(*parts: Any) -> str:
    """A short name of anything JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
