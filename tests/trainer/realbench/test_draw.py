"""Painting: the same noise for the same prompt whoever paints, nothing painted twice, and what a run folder in the making says."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.trainer.run.service import recipe
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


def settled(folder: Path, **more: Any) -> Path:
    """A folder to paint into."""
    draw.settle(folder, {"form": "short", "seed": 42, "weights": "w", **more}, None)
    return folder


def checkpoint_of(run: Path, step: int, weights: str) -> None:
    folder = run / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").write_text(json.dumps({"step": step, "blake3": weights}))


def test_what_is_there_is_not_painted_again_and_seeds_belong_to_prompts(tmp_path: Path) -> None:
    first = Counting(most=4)
    settled(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        draw.paint(first, PROMPTS, "short", 42, tmp_path, lambda n: None)
    second = Counting()
    draw.paint(second, PROMPTS[::-1], "short", 42, tmp_path, lambda n: None)
    assert len(first.asked) == 4 and len(second.asked) == 2
    seeds = dict(first.asked + second.asked)
    assert len(set(seeds.values())) == 6 and seeds["a bag"] == draw.seed_of(42, "p-0") != draw.seed_of(43, "p-0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["about.json", *(f"p-{i}.png" for i in range(6))]


def test_a_prompt_that_was_changed_is_painted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of a text file are known by their number: another line there is another prompt."""
    settled(tmp_path)
    draw.paint(Counting(), PROMPTS, "short", 42, tmp_path, lambda n: None)
    others = [*PROMPTS[:2], BenchPrompt("p-2", "a red sneaker"), *PROMPTS[3:]]
    assert [p.id for p in draw.unpainted(tmp_path, others)] == ["p-2"] and capsys.readouterr().err == ""
    again = Counting()
    draw.paint(again, others, "short", 42, tmp_path, lambda n: None)
    assert [text for text, _ in again.asked] == ["a red sneaker"] and not draw.unpainted(tmp_path, others)
    assert "of another prompt or by other weights: 1 pictures" in capsys.readouterr().err
    (tmp_path / "p-3.png").write_bytes(b"no picture")
    (tmp_path / "p-4.png").write_bytes(Path("docs/images/watching.png").read_bytes())
    assert [p.id for p in draw.unpainted(tmp_path, others)] == ["p-3", "p-4"], "what this bench has not painted"


def test_a_diffusers_model_paints_the_same_alone_and_among_others(tmp_path: Path) -> None:
    one = Contestant(model="world/policy")
    settled(tmp_path)
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


def test_other_weights_paint_everything_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, lora, out = tmp_path / "model", tmp_path / "lora.safetensors", tmp_path / "out"
    (model / "vae").mkdir(parents=True)
    (model / "model_index.json").write_text('{"_class_name": "X"}')
    for file in (model / "vae" / "a.safetensors", lora):
        file.write_bytes(b"first")
    one = Contestant(model=str(model), lora=lora)

    def left() -> int:
        draw.settle(out, draw.about(one, WORLD, "short", 42), None)
        before = len(draw.unpainted(out, PROMPTS))
        draw.paint(Counting(), PROMPTS, "short", 42, out, lambda n: None)
        return before

    assert [left(), left()] == [6, 0] and capsys.readouterr().err == ""
    for file in (lora, model / "vae" / "a.safetensors"):
        file.write_bytes(b"other")
        assert [left(), left()] == [6, 0] and "the weights are others" in capsys.readouterr().err
    (model / "vae" / "README.md").write_text("no weights")
    assert left() == 0


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(commit: str) -> None:
        (tmp_path / commit).mkdir()
        (tmp_path / commit / "model_index.json").write_text("{}")
        for place in ("huggingface_hub.hf_hub_download", "trainer.policies.kit.hf_hub_download"):
            monkeypatch.setattr(place, lambda *args, **more: str(tmp_path / commit / "model_index.json"))

    weights = []
    for commit in ("abc", "def"):
        answer(commit)
        weights.append([draw.about(Contestant(model="someone/model"), WORLD, "short", 42)["weights"] for _ in range(2)])
    assert weights[0][0] == weights[0][1] != weights[1][0] == weights[1][1]


def test_a_run_in_the_making_keeps_the_checkpoint_that_was_begun_with(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "checkpoints").mkdir(parents=True)
    one = Contestant(run=run)

    def settle() -> dict[str, Any]:
        return draw.settle(out, draw.about(one, WORLD, "short", 42), None)

    with pytest.raises(ConfigError, match="there is none yet"):
        settle()
    checkpoint_of(run, 10, "a")
    (run / "checkpoints" / ".step_000020.building").mkdir()
    told = settle()
    assert told["step"] == 10 and "notes" not in told
    checkpoint_of(run, 20, "b")
    (run / "checkpoints" / "best.json").write_text(json.dumps({"step": 20}))
    assert draw.step_of(run, None) == 20
    later = settle()
    assert later == told | {"notes": later["notes"]} and "after step 10, with which it was begun; the one" in later["notes"][0]
    assert "after step 20: another --out" in later["notes"][0]
    with pytest.raises(ConfigError, match="no checkpoint after step 30"):
        draw.step_of(run, 30)
    with pytest.raises(ConfigError, match="painted otherwise \\(step, weights\\)"):
        draw.settle(out, draw.about(one.model_copy(update={"step": 20}), WORLD, "short", 42), 20)


def test_a_checkpoint_that_went_away_is_said(tmp_path: Path) -> None:
    """Its pictures stay; those that are missing cannot be painted by it."""
    run, out = tmp_path / "run", tmp_path / "out"
    checkpoint_of(run, 10, "a")
    told = draw.settle(out, draw.about(Contestant(run=run), WORLD, "short", 42), None)
    draw.paint(Counting(), PROMPTS[:4], "short", 42, out, lambda n: None)
    checkpoint_of(run, 20, "b")
    shutil.rmtree(run / "checkpoints" / "step_000010")
    (run / "config.yaml").write_text(Path("trainer/recipes/world.yaml").read_text())
    later = draw.settle(out, draw.about(Contestant(run=run), WORLD, "short", 42), None)
    assert later == told | {"notes": later["notes"]} and "and which is gone" in later["notes"][0]
    assert [p.id for p in draw.unpainted(out, PROMPTS)] == ["p-4", "p-5"]
    with pytest.raises(ConfigError, match="no checkpoint after step 10 any more.*remove"):
        draw.open_painter(Contestant(run=run), WORLD, later, "cpu")


@pytest.mark.parametrize("step", [10, 30])
def test_a_run_that_was_trained_again_is_painted_again(tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    checkpoint_of(run, 10, "a")
    draw.settle(out, draw.about(Contestant(run=run), WORLD, "short", 42), None)
    draw.paint(Counting(), PROMPTS, "short", 42, out, lambda n: None)
    for known in {10, step}:
        checkpoint_of(run, known, "b")
    told = draw.settle(out, draw.about(Contestant(run=run), WORLD, "short", 42), None)
    assert told["step"] == step and "notes" not in told and "the weights are others" in capsys.readouterr().err
    assert len(draw.unpainted(out, PROMPTS)) == 6


def test_a_reward_that_only_the_rewriter_learns_from_counts(tmp_path: Path) -> None:
    raw = recipe("http://localhost:1")
    rewards = {name: {"url": "http://localhost:1", "weight": weight} for name, weight in (("a", 1), ("judge", 0), ("none", 0))}
    raw |= {"rewards": rewards, "language": {"mode": "both", "rewards": {"judge": {"weight": 1}}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "versions.json").write_text(json.dumps({"rewards": {"judge": {"weights_sha256": "ab"}}}))
    assert draw.trained(tmp_path) == {"a": None, "judge": "ab"}


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
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text().replace("http://127.0.0.1:8000", "http://me:secret@elsewhere:8000"))
    assert "secret" in config.read_text() and changes(("a", "b"), (tmp_path / "a", tmp_path / "b")) == rows, (
        "URLs are no difference"
    )
