"""Whole runs of the smallest recipe, for tests that look at what a run leaves behind."""

from pathlib import Path
from typing import Any

from tests.trainer.run.service import recipe
from trainer import loop
from trainer.config import RunConfig
from trainer.metrics import read


def config(url: str, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(recipe(url, **changes))


def run(config: RunConfig, folder: Path, resume: bool = False, **options: Any) -> str:
    """A whole run; why it ended."""
    made = loop.Run(config, folder, resume=resume)
    try:
        return loop.train(made, **options)
    finally:
        made.close()


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics without wall-clock times."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds", "pictures/"))} for line in read(folder / "metrics.jsonl")
    ]
