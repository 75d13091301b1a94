"""Invented run folders: data of tests."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CONFIG = """\
name: {name}
description: invented
steps: 40
rewards:
  detector: {{url: "http://someone:secret@localhost:1", weight: 1.0}}
  taste: {{url: "http://localhost:2", weight: 0.0}}
"""
VERSIONS = {
    "rewards": {"detector": {"version": 3, "weights_sha256": "ab" * 32}, "taste": {"version": 1, "higher_is_better": False}}
}


def evaluation(step: int, **more: Any) -> dict[str, Any]:
    """The trained reward rises by 0.1 a step; what is held out stays where it is."""
    plain = {"kind": "eval", "step": step, "n": 100, "reward/total_mean": 0.1 * step, "reward/total_sem": 0.05, "distance": 30.0}
    taste = {"reward/taste/mean": 5.0, "reward/taste/std": 2.0, "reward/detector/mean": 0.5, "reward/detector/std": 0.1}
    return {**plain, **taste, "heldout_cnn": -4.0, "class_hit": 0.6, **more}


def step(number: int, **more: Any) -> dict[str, Any]:
    seconds = {"seconds/sample": 0.3, "seconds/wait": 0.1, "seconds/train": 0.6}
    return {"kind": "step", "step": number, "reward/total": 0.1 * number, "failed_scores": 0, "failures": {}, **seconds, **more}


def a_run(folder: Path, rows: Iterable[Mapping[str, Any]] = (), name: str = "world", grids: Iterable[int] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=name))
    (folder / "versions.json").write_text(json.dumps(VERSIONS))
    (folder / "metrics.jsonl").write_text("")
    append(folder, rows)
    for number in grids:
        a_grid(folder, number)
    return folder


def append(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def a_grid(folder: Path, number: int, colour: tuple[int, int, int] = (200, 30, 160)) -> Path:
    (folder / "grids").mkdir(exist_ok=True)
    path = folder / "grids" / f"step_{number:05d}.png"
    Image.fromarray(np.full((60, 60, 3), colour, np.uint8)).save(path)
    return path
