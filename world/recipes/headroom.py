"""What a rewriter could gain: pictures painted from users' prompts as they are, and from rewrites that a person would try.

python -m world.recipes.headroom [FOLDER of a painter, default world/policy_looks] [pictures of each prompt, default 4]

Every picture is judged against the user's own prompt. The same noise for the same prompt in every row, so differences are paired.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.reward import Item
from services.rewards.alignment import Alignment
from services.rewards.detector import Detector
from trainer.honesty import Monitors
from world import captions
from world.recipes import exam, policy, policy_looks, rewrites
from world.recipes.progress import track

WORLD = Path(__file__).parents[1]
WEIGHTS = {"detector": 0.35, "judge": 0.15, "alignment": 0.5}  # as recipe `world` weighs logit, margin and margin
Row = Mapping[str, Any]


def ways() -> dict[str, Callable[[Row], str]]:
    """How a prompt of `rewrites.wishes` is put to the painter."""
    rng, count = random.Random(3), rewrites.counter()
    return {
        "as it is": lambda row: str(row["prompt"]),
        "its thing": lambda row: f"a photo of {row['thing']}",
        "its thing, soft": lambda row: f"a soft photo of {row['thing']}, soft light",
        "its thing, natural": lambda row: f"a natural photo of {row['thing']}, sharp texture",
        "its thing, natural before": lambda row: f"a natural photo of {row['thing']}",
        "its thing alone, natural light": lambda row: f"{row['thing']}, natural light",
        "a known name": lambda row: f"a photo of {captions.WORDINGS[row['class']][0]}",
        "a known name, natural": lambda row: f"a natural photo of {captions.WORDINGS[row['class']][0]}, sharp texture",
        "as the pairs": lambda row: rewrites.rewrite(row["prompt"], row["thing"], rng, count),
    }


def judged(images: NDArray[np.uint8], prompts: list[str]) -> dict[str, NDArray[np.float64]]:
    """Each (N,): the detector's logit, the judge's margin, the alignment's margin and cosine."""
    detector = Detector.load("detector", {"folder": WORLD / "detector"}, "cpu")
    alignment = Alignment.load("alignment", {"folder": WORLD / "alignment", "against": WORLD / "prompts" / "against.txt"}, "cpu")
    judge = exam.load("forensic_chat")
    out: dict[str, list[float]] = {"detector": [], "judge": [], "alignment": [], "cosine": []}
    for start in range(0, len(images), 64):
        items = [Item(i, p) for i, p in zip(images[start : start + 64], prompts[start : start + 64], strict=True)]
        out["detector"] += [float(score.parts["logit"]) for score in detector.score(items)]
        out["judge"] += [float(score.parts["margin"]) for score in judge.score(items)]
        scores = alignment.score(items)
        out["alignment"] += [float(score.parts["margin"]) for score in scores]
        out["cosine"] += [float(score.value) for score in scores if score.value is not None]
    return {name: np.array(values) for name, values in out.items()}


def measure(folder: Path, copies: int) -> dict[str, dict[str, Any]]:
    """For each way the means over prompts, and those of the differences to the first way with their standard errors."""
    rows = rewrites.wishes("eval", rewrites.PROMPTS["eval"], 0, rewrites.counter())
    pipe, monitors = policy.load(folder), Monitors.load(WORLD / "monitors")
    asked, classes = ([row[key] for row in rows for _ in range(copies)] for key in ("prompt", "class"))
    out, first = dict[str, dict[str, Any]](), dict[str, NDArray[np.float64]]()
    for name, way in track(list(ways().items()), folder.name):
        images = policy.sample(pipe, [way(row) for row in rows for _ in range(copies)], seed=5_000, steps=10)
        values = judged(images, asked)
        first = first or values
        values["total"] = sum(
            (weight * (values[key] - first[key].mean()) / first[key].std() for key, weight in WEIGHTS.items()),
            np.zeros(len(images)),
        )
        seen = monitors.measure(images, classes)
        out[name] = {key: round(float(seen[key]), 3) for key in ("class_hit", "distance", "heldout_cnn", "heldout_spectrum")}
        for key, value in values.items():
            gain_P = (value - first.get(key, np.zeros(1))).reshape(len(rows), copies).mean(1)
            error = float(gain_P.std(ddof=1) / len(rows) ** 0.5)
            out[name][key] = (round(float(value.mean()), 3), round(float(gain_P.mean()), 3), round(error, 3))
        out[name]["forms"] = {
            form: round(float(np.mean([values["total"][i] for i in range(len(images)) if rows[i // copies]["form"] == form])), 3)
            for form in rewrites.FRAMES["eval"]
        }
    return out


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    keys = ("total", "detector", "judge", "alignment", "cosine")
    lines = ["| painted from | " + " | ".join([*keys, "class hit", "distance"]) + " |", "| --- |" + " --- |" * (len(keys) + 2)]
    for name, row in found.items():
        cells = [f"{row[key][0]:.2f} ({row[key][1]:+.2f} +- {row[key][2]:.2f})" for key in keys]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{row['class_hit']:.2f}", f"{row['distance']:.1f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else policy_looks.FOLDER
    result = measure(place, int(sys.argv[2]) if len(sys.argv) > 2 else 4)
    print(json.dumps(result, indent=1))
    print(table(result))
