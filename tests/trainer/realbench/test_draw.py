"""Painting: the same noise for the same prompt whoever paints, nothing painted twice, and what a run folder in the making says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import ConfigError
from trainer.realbench import draw
from trainer.realbench.changes import changes
from trainer.realbench.config import Contestant, Drawing
from trainer.realbench.prompts import BenchPrompt, read_prompts

WORLD = Drawing(steps=2, guidance=1.0, height=28, width=28, batch=4, options={"max_sequence_length": 1})
PROMPTS = [BenchPrompt(f"p-{i}", text) for i, text in enumerate(("a bag", "a coat", "a sneaker", "a dress", "a shirt", "a boot"))]


class Counting:
    """A painter of one-coloured pictures that remembers what it was asked."""

    batch = 2

    def __init__(self, most: int = 100) -> None:
        self.asked, self.most = list[tuple[str, int]](), most

    def paint(self, texts: list[str], seeds: list[int]) -> list[np.ndarray]:
        if len(self.asked) >= self.most:
            raise KeyboardInterrupt
        self.asked += zip(texts, seeds, strict=True)
        return [np.full((16, 16, 3), seed % 256, np.uint8) for seed in seeds]

    def close(self) -> None: ...


def test_what_is_there_is_not_painted_again_and_seeds_belong_to_prompts(tmp_path: Path) -> None:
    first = Counting(most=4)
    with pytest.raises(KeyboardInterrupt):
        draw.paint(first, PROMPTS, "short", 42, tmp_path, lambda n: None)
    second = Counting()
    draw.paint(second, PROMPTS[::-1], "short", 42, tmp_path, lambda n: None)
    assert len(first.asked) == 4 and len(second.asked) == 2
    seeds = dict(first.asked + second.asked)
    assert len(set(seeds.values())) == 6 and seeds["a bag"] == draw.seed_of(42, "p-0") != draw.seed_of(43, "p-0")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"p-{i}.png" for i in range(6)]


def test_a_diffusers_model_paints_the_same_alone_and_among_others(tmp_path: Path) -> None:
    one = Contestant(model="world/policy")
    painter = draw.open_painter(one, WORLD, {}, "cpu")
    draw.paint(painter, PROMPTS, "short", 42, tmp_path, lambda n: None)
    alone = painter.paint(["a sneaker"], [draw.seed_of(42, "p-2")])[0]
    painter.close()
    kept = np.asarray(Image.open(tmp_path / "p-2.png").convert("RGB"))
    assert kept.shape == (28, 28, 3) and np.abs(kept.astype(int) - alone).max() <= 2
    with pytest.raises(ConfigError, match="no LoRA there"):
        draw.open_painter(Contestant(model="world/policy", lora=tmp_path / "none"), WORLD, {}, "cpu")


def test_pictures_of_something_else_are_not_taken(tmp_path: Path) -> None:
    one = Contestant(model="world/policy")
    told = draw.settle(tmp_path, draw.about(one, WORLD, "short", 42), None)
    assert draw.settle(tmp_path, draw.about(one, WORLD, "short", 42), None) == told
    with pytest.raises(ConfigError, match="painted otherwise \\(seed\\)"):
        draw.settle(tmp_path, draw.about(one, WORLD, "short", 43), None)


def test_a_run_in_the_making_keeps_the_checkpoint_that_was_begun_with(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    one = Contestant(run=run)
    with pytest.raises(ConfigError, match="there is none yet"):
        draw.about(one, WORLD, "short", 42)
    (run / "checkpoints" / "step_000010").mkdir()
    (run / "checkpoints" / ".step_000020.building").mkdir()
    told = draw.settle(tmp_path / "out", draw.about(one, WORLD, "short", 42), None)
    assert told["step"] == 10
    (run / "checkpoints" / "step_000020").mkdir()
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 20}))
    assert draw.step_of(run, None) == 20
    assert draw.settle(tmp_path / "out", draw.about(one, WORLD, "short", 42), None)["step"] == 10
    with pytest.raises(ConfigError, match="no checkpoint after step 30"):
        draw.step_of(run, 30)


def test_prompts_in_every_form_and_what_is_none(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a cat\n\n  a dog \n")
    assert [(p.id, p.text) for p in read_prompts(text)] == [("0001", "a cat"), ("0003", "a dog")]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"id": 7, "prompt": "a cat", "long": "a cat on a mat"}\n{"short": "a dog"}\n')
    cat, dog = read_prompts(lines)
    assert (cat.id, cat.form("long"), dog.id, dog.form("short")) == ("7", "a cat on a mat", "0002", "a dog")
    with pytest.raises(ConfigError, match="has no long form"):
        dog.form("long")
    for bad, said in (
        ('{"prompt": ""}', "write"),
        ("[1]", "write"),
        ('{"id": "../../x", "prompt": "a"}', "becomes a file's name"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "given twice"),
        ('{"prompt": "' + "a" * 9000 + '"}', "shorten it"),
        ("", "holds no prompts"),
    ):
        lines.write_text(bad)
        with pytest.raises(ConfigError, match=said):
            read_prompts(lines)


def test_the_keys_in_which_two_runs_differ(tmp_path: Path) -> None:
    for name, more in (("a", "seed: 1"), ("b", "seed: 2\nsteps: 41")):
        (tmp_path / name).mkdir()
        text = Path("trainer/recipes/world.yaml").read_text().replace("\nsteps: 30\nseed: 0", "")
        (tmp_path / name / "config.yaml").write_text(f"{text}\n{more}\n" + ("steps: 30\n" if name == "a" else ""))
    rows = changes(("a", "b"), (tmp_path / "a", tmp_path / "b"))
    assert {(r["key"], r["a"], r["b"]) for r in rows} == {("seed", "1", "2"), ("steps", "30", "41")}
