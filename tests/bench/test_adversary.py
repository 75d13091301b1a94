"""What `make bench-adversary` runs and says: arms that differ by the detector alone, pictures out of grids, the papers' sentence by numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from bench import adversary, adversary_report
from bench.adversary import ARMS, Job, config_of, look, pairs, targets, tiles, told_apart
from services.config import ServiceConfig
from trainer.config import ConfigError, load
from trainer.metrics import grid
from world import photographs

REAL = {"heldout_cnn": 5.0, "heldout_spectrum": 6.0, "class_hit": 0.9}
URL, ADMIN = "http://127.0.0.1:1", "http://127.0.0.1:2"
ALL = [(arm, way) for arm, told in ARMS.items() for way in told.ways]


def made(
    out: Path, arm: str, way: str, distances: dict[int, float], seed: int = 0, rewards: dict[int, float] | None = None
) -> Path:
    """A run folder as a training leaves it."""
    folder, name = Job(arm, way, seed, 4).folder(out), ARMS[arm].reward
    (folder / "grids").mkdir(parents=True)
    told: list[dict[str, Any]] = []
    for step, distance in distances.items():
        trained = float(step) if rewards is None else rewards[step]
        usual = {"reward/frozen/mean": 1.0, "reward/judge/mean": -2.0, "reward/alignment/mean": 0.1, f"reward/{name}/mean": trained}
        usual |= {"heldout_cnn": -9.0, "heldout_spectrum": -8.0, "class_hit": 0.6, "distance": distance, "n": 3}
        told.append({"kind": "eval", "step": step, **usual})
        Image.fromarray(grid(photographs.load("test")[0][:3])).save(folder / "grids" / f"step_{step:05d}.png")
    for step in range(1, max(distances) + 1):
        line: dict[str, Any] = {"kind": "step", "step": step, "pictures/second": 38.4}
        if ARMS[arm].recipe is not None:
            own = f"adversary/{name}/"
            line |= {own + "refits": step, own + "kept_out": 1, own + "accuracy_before": 0.75, "seconds/refit": 2.0}
        told.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    seen = {"classes": {adversary.KIND: 0.25}, "accuracy": 0.875, "auc": 0.9, "version": 3, "reward": name}
    (folder / "looks.jsonl").write_text("".join(json.dumps({"step": step, **seen}) + "\n" for step in distances))
    return folder


@pytest.mark.parametrize(("arm", "way"), ALL)
def test_arms_are_recipe_world_but_for_what_they_are_paid_for(arm: str, way: str, tmp_path: Path) -> None:
    job, told = Job(arm, way, 3, 7), ARMS[arm]
    c = load("world", [*job.overrides(URL, ADMIN, 100, 5), "steps=7"])
    world = load("world", [*adversary.PACE, *(adversary.FASTER if told.classes else [])])
    same = ("policy", "sampling", "group", "loss", "optim", "ema", "prompts", "advantages")
    assert [getattr(c, key) for key in same] == [getattr(world, key) for key in same]
    assert (c.seed, c.steps, c.eval.samples, c.eval.grid, c.checkpoint_every, c.alarm.action) == (3, 7, 100, 100, 5, "warn")
    paid = {name: reward.weight for name, reward in c.rewards.items() if reward.weight > 0}
    assert paid == ({told.reward: 1.0} if way == "alone" else {told.reward: 0.5, "alignment": world.rewards["alignment"].weight})
    assert c.kl.weight == (0 if way == "alone" else world.kl.weight)
    assert {"judge", "frozen", "alignment"} <= c.rewards.keys() and set(c.adversary) == ({told.reward} if told.recipe else set())
    served = config_of(job, tmp_path, 9, [])
    assert ServiceConfig.model_validate(served).rewards.keys() == c.rewards.keys()
    if told.recipe is None:
        assert c.references is None and "admin" not in served and not any("fit" in one for one in served["rewards"].values())
    else:
        recipe = load(told.recipe, adversary.FASTER if told.classes else [])
        assert (c.group, c.optim) == (recipe.group, recipe.optim), "the recipe goes at the same pace"
        assert c.adversary[told.reward].schedule == recipe.adversary[told.reward].schedule and c.references is not None
        assert c.references.classes == (list(told.classes) or None)
        assert served["rewards"][told.reward]["fit"]["folder"] == str(tmp_path / "fitting")


def test_a_transfer_is_asked_for_among_neighbours(tmp_path: Path) -> None:
    told = [json.loads(line) for line in adversary.neighbours(tmp_path).read_text().splitlines()]
    assert {one["class_name"] for one in told} == set(adversary.NEIGHBOURS) and len(told) == 160
    c = load("world", [f"prompts.train={adversary.neighbours(tmp_path)}"])
    assert c.prompts.train == tmp_path / "prompts.jsonl"


def test_settings_of_a_refit_can_be_changed(tmp_path: Path) -> None:
    job, shipped = Job("realgen_v2", "alone", 0, 1), yaml.safe_load(adversary.SERVE.read_text())["rewards"]["detector"]["fit"]
    fit = config_of(job, tmp_path, 9, ["detector.ema=0.5", "dino_head.optim.lr=1.0e-5"])["rewards"]["detector"]["fit"]
    assert fit["ema"] == 0.5 != shipped["ema"] and fit["optim"] == shipped["optim"]
    with pytest.raises(ConfigError, match="dino_head"):
        config_of(job, tmp_path, 9, ["judge.ema=0.5"])
    with pytest.raises(SystemExit):
        adversary.main(["--report", "--fit", "detector.ema=0.5"])


def test_arms_by_name() -> None:
    assert pairs("") == ALL
    assert pairs("frozen/held,frozen,transfer") == [("frozen", "held"), ("frozen", "alone"), ("transfer", "alone")]
    for wrong in ("frosen", "transfer/held", "frozen,,"):
        with pytest.raises(ValueError, match="is none of frozen"):
            pairs(wrong)
    with pytest.raises(SystemExit):
        adversary.main(["--report", "--only", "nothing"])
    assert targets(30, 10) == [10, 20, 30] and targets(7, 5) == [5, 7] and targets(2, 5) == [2]


@pytest.mark.parametrize("count", [1, 5, 64, 100])
def test_pictures_come_back_out_of_a_grid(count: int, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28, 3), np.uint8)
    Image.fromarray(grid(images)).save(tmp_path / "grid.png")
    assert np.array_equal(tiles(tmp_path / "grid.png", count), images)
    with pytest.raises(ValueError, match=r"eval\.grid"):
        tiles(tmp_path / "grid.png", 10 * count + 10)


def test_how_well_sides_are_told_apart() -> None:
    real, generated = np.array([2.0, 1.0, -1.0, 3.0]), np.array([-2.0, -1.0, 0.5, -3.0])
    told = told_apart(real, generated)
    assert told == {"accuracy": 0.75, "real_right": 0.75, "generated_right": 0.75, "auc": (14 + 0.5) / 16}
    assert told_apart(real, real)["auc"] == 0.5


def test_classes_are_those_of_the_independent_classifier(tmp_path: Path) -> None:
    images, classes = photographs.load("test")
    bags = images[classes == 8][:40]
    (tmp_path / "grids").mkdir()
    Image.fromarray(grid(bags)).save(tmp_path / "grids" / "step_00000.png")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 0, "n": 40}) + "\n")
    told = look(tmp_path, 0, URL, None, None)
    assert told["classes"]["bag"] > 0.8 and sum(told["classes"].values()) == pytest.approx(1)
    assert adversary.looks(tmp_path) == {0: told}


@pytest.mark.parametrize(
    ("frozen", "refitted", "answer"),
    [
        (
            {0: 30.0, 2: 12.0, 4: 15.0},
            {0: 30.0, 2: 14.0, 4: 11.0},
            "For the frozen detector the claim holds. For RealGen V2 refits it holds.",
        ),
        (
            {0: 30.0, 2: 12.0, 4: 9.0},
            {0: 30.0, 2: 14.0, 4: 16.0},
            "its distance went on falling. For RealGen V2 refits it does not hold",
        ),
    ],
)
def test_the_sentence_is_answered_by_the_numbers(
    frozen: dict[int, float], refitted: dict[int, float], answer: str, tmp_path: Path
) -> None:
    for seed in (0, 1):
        made(tmp_path, "frozen", "alone", frozen, seed)
        made(tmp_path, "realgen_v2", "alone", refitted, seed)
    groups = adversary_report.grouped(adversary_report.read(tmp_path), "alone")
    text = "\n".join(adversary_report.verdict(4, groups))
    assert answer in text and "From step 2 to 4" in text
    closer = 2 if refitted[4] < frozen[4] else 0
    assert f"smaller distance in {closer} of 2 seeds" in text and "higher class hit in 0 of 2" in text
    assert "takes the frozen detector" in adversary_report.verdict(4, {"frozen": groups["frozen"]})[0]


def test_a_frozen_reward_that_does_not_rise_is_no_proof(tmp_path: Path) -> None:
    made(tmp_path, "frozen", "held", {0: 30.0, 2: 12.0, 4: 15.0}, rewards={0: 0.0, 2: 5.0, 4: 4.0})
    made(tmp_path, "adv_grpo", "held", {0: 30.0, 2: 12.0, 4: 11.0})
    text = adversary_report.verdict(4, adversary_report.grouped(adversary_report.read(tmp_path), "held"))
    assert "does not hold: its reward did not rise" in text[0] and "For Adv-GRPO head it holds." in text[0]


def test_the_report_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adversary.main(["--report", "--out", str(tmp_path / "none")]) == 0
    assert "nothing has been evaluated" in capsys.readouterr().out
    out = tmp_path / "runs"
    for arm, way in ALL:
        made(out, arm, way, {0: 30.0, 2: 12.0, 4: 15.0})
    made(out, "frozen", "alone", {0: 30.0, 2: 10.0}, seed=1)
    (out / "frozen/alone/seed0/config.yaml").write_text("group: {prompts: 4, size: 12}")
    told = {run["seed"]: run for run in adversary_report.read(out) if run["arm"] == "frozen" and run["way"] == "alone"}
    assert {seed: (run["pictures"], run["seconds"][1]) for seed, run in told.items()} == {0: (48, 1.25), 1: (384, 10.0)}
    (out / "frozen/alone/seed0/config.yaml").unlink()
    assert adversary.main(["--report", "--steps", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.strip() == (out / "adversary.md").read_text().strip()
    for block in said.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, "a table has as many cells in each row"
    assert "| **RealGen V2 refits** | 0 | 4.0 |" in said and "12.0 (2) | 3 | 4+1 | 10 s |" in said
    assert "| pullovers | 0 | 1536 | 0.25 |" in said and "1 of 3 seeds at step 4" in said
    assert {path.name for path in out.glob("*.png")} == {"adversary.png", "adversary-pictures.png"}
    runs = json.loads((out / "adversary.json").read_text())["runs"]
    assert len(runs) == len(ALL) + 1 and all(run["evaluations"][-1]["accuracy"] == 0.875 for run in runs)


def test_runs_that_an_earlier_checkout_measured_are_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULT", "DOCUMENT", "IMAGES"):
        monkeypatch.setattr(adversary_report, name, tmp_path / name)
    (tmp_path / "DOCUMENT").write_text("# Benchmarks\n")
    first, second = tmp_path / "first", tmp_path / "second"
    made(first, "frozen", "alone", {0: 30.0, 2: 12.0, 4: 15.0})
    made(first, "frozen", "alone", {0: 30.0, 2: 12.0, 4: 16.0}, seed=1)
    adversary_report.write(first, 4, document=True, say=lambda text: None)
    made(second, "frozen", "alone", {0: 30.0, 2: 12.0, 4: 20.0}, seed=1)
    made(second, "adv_grpo", "alone", {0: 30.0, 2: 12.0, 4: 11.0})
    adversary_report.write(second, 4, document=True, say=lambda text: None)
    runs = {run["folder"]: run for run in json.loads((tmp_path / "RESULT").read_text())["runs"]}
    assert {folder: run["evaluations"][-1]["distance"] for folder, run in runs.items()} == {
        "adv_grpo/alone/seed0": 11.0,
        "frozen/alone/seed0": 15.0,
        "frozen/alone/seed1": 20.0,
    }
    assert "17.5" in (tmp_path / "DOCUMENT").read_text(), "the mean of both seeds"
