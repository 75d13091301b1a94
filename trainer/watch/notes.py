"""What a run says in its terminal besides its numbers, kept in the run folder: a line of notes.jsonl each, so that the page has it too."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def kept(folder: Path, tell: Callable[[Line], None]) -> Callable[[Line], None]:
    """`tell`, and each note into the file; a disk that is full keeps none, and stops nothing."""

    def both(line: Line) -> None:
        if line.get("kind") == "note":
            with contextlib.suppress(OSError), (folder / "notes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 1), "step": line["step"], "text": line["text"]}) + "\n")
        tell(line)

    return both
