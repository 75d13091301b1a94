"""What the terminal shows: progress with what is left, and the table at the end."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Screen:
    """Progress on the error stream, a bar for each stage."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextlib.contextmanager
    def __call__(self, what: str, count: int) -> Iterator[Callable[[int], None]]:
        if count == 0:
            yield lambda done: None
            return
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(escape(what), total=count)
            yield lambda done: progress.advance(task, done)


def number(row: dict[str, Any], digits: int = 3) -> str:
    """`0.931 [0.912, 0.947]`."""
    if row.get("value") is None:
        return "-"
    said = f"{row['value']:.{digits}f}"
    return said if row.get("low") is None else f"{said} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def tables(found: dict[str, Any]) -> Iterator[Table | str]:
    """A row for each figure, a column for each contestant: names of contestants are fewer than figures."""
    names = [one["name"] for one in found["contestants"]]
    table = Table("", title=f"{found['level']:.0%} intervals, bootstrap over prompts", show_lines=True)
    table.columns[0].min_width = 16
    for name in names:
        table.add_column(escape(name), min_width=7)
    learned = {m["name"]: m["learned_by"] for m in found["measures"]}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for figure in found["figures"]:
        text = number(figure)
        if figure.get("unparsed"):
            text += f", {figure['unparsed']} unparsed"
        rows.setdefault((figure["measure"], figure["what"]), {})[figure["contestant"]] = text
    for (measure, what), cells in rows.items():
        label = f"{measure}, {what}" if measure != what else measure
        if learned.get(measure):
            label += f" (trained on by {', '.join(learned[measure])})"
        table.add_row(escape(label), *(cells.get(name, "") for name in names))
    ratings = {row["contestant"]: number(row, 0) for row in found["arena"].get("ratings", [])}
    if ratings:
        table.add_row("arena, rating", *(ratings.get(name, "") for name in names))
        rates = {row["a"]: number(row) for row in found["arena"]["rates"] if row["b"] == names[0]}
        rates |= {row["b"]: number(_turned(row)) for row in found["arena"]["rates"] if row["a"] == names[0]}
        table.add_row(f"arena, wins against {escape(names[0])}", *(rates.get(name, "") for name in names))
    yield table
    if found["arena"].get("shown_first") is not None:
        first = found["arena"]["shown_first_interval"]
        span = "" if first["low"] is None else f" [{first['low']:.0%}, {first['high']:.0%}]"
        said = f"{found['arena']['judge']} prefers what is shown first {first['value']:.0%}{span} of the time"
        yield f"arena: {said}; only consistent wins count"
    if len(names) <= 3:
        for row in found["differences"]:
            if names[0] not in (row["a"], row["b"]) or len(names) == 2:
                sure = "" if row["low"] is None else " (clear)" if row["low"] > 0 or row["high"] < 0 else " (not clear)"
                yield f"{row['measure']}: {row['b']} less {row['a']} {number(row)}{sure}"
    kinds = {one["name"]: one["kind"] for one in found["contestants"]}
    fooled = [row for row in found["telling"] if row["verdict"] == "fooled" and kinds[row["contestant"]] != "photographs"]
    if fooled:
        who = ", ".join(f"{row['measure']} by {row['contestant']}" for row in fooled)
        yield f"fooled (prefers it to photographs, or calls more than half of it real): {who}"
    yield from found["notes"]


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    """The same from the other side."""
    if row["value"] is None:
        return row
    low, high = (None, None) if row["low"] is None else (1 - row["high"], 1 - row["low"])
    return {**row, "value": 1 - row["value"], "low": low, "high": high}
