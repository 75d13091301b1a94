"""Runs of verism-train that paint: as their evaluations do, with their rewriter, and as a LoRA of the model that they began with."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.language import tiny
from tests.trainer.run.service import Service, recipe
from trainer import checkpoint, loop
from trainer.config import validate
from trainer.export import export_adapter
from trainer.realbench import draw
from trainer.realbench.config import Contestant, Drawing
from trainer.realbench.prompts import BenchPrompt

WORLD = Drawing(steps=4, guidance=1.0, height=28, width=28, batch=4, options={"max_sequence_length": 1})
PROMPTS = [BenchPrompt(f"p-{i}", text) for i, text in enumerate(("a bag", "a coat", "a sneaker", "a dress"))]


def train(raw: dict[str, object], folder: Path) -> Path:
    run = loop.run_of(validate(raw, "recipe"), folder)
    try:
        assert loop.train(run) == "finished"
    finally:
        run.close()
    return folder


def painted(one: Contestant, out: Path) -> dict[str, np.ndarray]:
    """Its pictures by prompt, as the bench has them painted."""
    told = draw.settle(out, draw.about(one, WORLD, "short", 42), one.step)
    painter = draw.open_painter(one, WORLD, told, "cpu")
    try:
        draw.paint(painter, PROMPTS, told["form"], 42, out, lambda n: None)
    finally:
        painter.close()
    assert not draw.unpainted(out, PROMPTS)
    return {p.id: np.asarray(Image.open(out / f"{p.id}.png").convert("RGB")).astype(int) for p in PROMPTS}


def far(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> int:
    return max(int(np.abs(one[name] - other[name]).max()) for name in one)


def test_a_run_and_its_lora_paint_the_same_and_not_as_the_base(service: Service, tmp_path: Path) -> None:
    raw = recipe(service.url, steps=2, optim={"lr": 0.05}, ema={"decay": 0.5}, tensorboard=False)
    run = train(raw, tmp_path / "run")
    assert draw.trained(run) == {"brightness": None}
    of_run = painted(Contestant(run=run, step=2), tmp_path / "of-run")
    assert all(image.shape == (28, 28, 3) for image in of_run.values())
    assert far(of_run, painted(Contestant(model="world/policy"), tmp_path / "base")) > 30
    file = export_adapter(run, tmp_path / "adapter", step=2)
    for lora in (file, file.parent):
        assert far(of_run, painted(Contestant(model="world/policy", lora=lora), tmp_path / f"by-{lora.name}")) <= 3


def test_a_runs_rewriter_writes_what_it_paints(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewrites of an evaluation, by the averaged weights of its checkpoint."""
    language = {
        "mode": "language",
        "policy": {"path": str(tiny.write(tmp_path / "lm")), "instruction": "rewrite the prompt", "lora": {"rank": 4, "alpha": 8}},
        "rewrites": 4,
        "max_new_tokens": 6,
        "optim": {"lr": 0.05},
        "ema": {"decay": 0.5},
        "penalties": {"length": {"weight": 0}, "truncated": {"use": "penalise", "weight": 0.1}},
    }
    group = {"prompts": 2, "size": 1, "allow_small": True}
    run = train(recipe(service.url, steps=2, group=group, language=language, tensorboard=False), tmp_path / "run")

    def rewrites(step: int) -> dict[str, str]:
        lines = (run / "rewrites" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return {row["prompt"]: row["rewrite"] for row in map(json.loads, lines)}

    assert rewrites(0) != rewrites(2) and 2 in checkpoint.steps(run)
    painter = draw.open_painter(Contestant(run=run), WORLD, {"step": 2}, "cpu")
    try:
        seeds = [draw.seed_of(42, name) for name in "abcd"]
        assert painter._written([*rewrites(2)], seeds) == [*rewrites(2).values()]  # type: ignore[attr-defined]
        before = painter.paint(["a bag"], seeds[:1])[0]
        monkeypatch.setattr(painter, "_written", lambda texts, seeds: ["a coat"])
        assert before.shape == (28, 28, 3) and not np.array_equal(before, painter.paint(["a bag"], seeds[:1])[0])
    finally:
        painter.close()
