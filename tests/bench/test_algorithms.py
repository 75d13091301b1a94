"""What `make bench-algorithms` runs and says: recipes that load, runs that go on, settings chosen by distance, tables of what is there."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from bench import algorithms, algorithms_report
from bench.algorithms import ALGORITHMS, Job
from trainer.config import load

REAL = {"heldout_cnn": 5.0, "heldout_spectrum": 6.0, "class_hit": 0.9}
URL = "http://127.0.0.1:1"
SETTINGS = [(name, setting) for name, grid in ALGORITHMS.items() for setting in grid]


def evaluation(step: int, distance: float, **more: float) -> dict[str, Any]:
    usual = {
        "reward/total": 0.1 * step,
        "reward/jpeg_size/mean": 3.0,
        "class_hit": 0.6,
        "heldout_cnn": -9.0,
        "heldout_spectrum": -8.0,
    }
    return {"kind": "eval", "step": step, "n": 64, "distance": distance, **usual, **more}


def made(out: Path, job: Job, distances: dict[int, float], **more: float) -> Path:
    """A run folder as a training leaves it."""
    folder = job.folder(out)
    folder.mkdir(parents=True)
    last = max(distances)
    told = [{"kind": "step", "step": n, "pictures/second": 38.4} for n in range(1, last + 1)]
    told += [evaluation(step, distance, **(more if step else {})) for step, distance in distances.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    cost = {"from": 0, "to": last, "wall_s": 99.0, "cpu_s": 20.0 * last, "peak_mb": 700.0, "threads": 1, "load": 1.0, "status": 0}
    (folder / "costs.jsonl").write_text(json.dumps(cost) + "\n")
    return folder


def asked(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"only": "", "tune": False, "steps": 4, "tune_steps": 2, "seeds": [0, 1], **changes})


@pytest.mark.parametrize(("name", "setting"), SETTINGS, ids=[f"{name} {setting}" for name, setting in SETTINGS])
def test_every_setting_is_a_recipe_with_as_many_pictures(name: str, setting: str) -> None:
    c = load("world", Job(name, setting, 3, 7).overrides(URL, 100, 5))
    assert c.group.prompts * c.group.size == algorithms_report.PICTURES
    assert (c.seed, c.steps, c.eval.samples, c.eval.every, c.alarm.action) == (3, 7, 100, 5, "warn")
    assert {str(reward.url) for reward in c.rewards.values()} == {URL}
    assert c.rewards.keys() <= set(algorithms.REWARDS)
    assert c.loss.use == (name if name in ("guard", "nft") else "grpo")
    if name in algorithms.HACKED:
        assert [n for n, reward in c.rewards.items() if reward.weight > 0] == ["jpeg_size"]
        assert c.gardo.gate == (name == "jpeg-gardo")


def test_jobs_come_seed_by_seed_and_grids_at_seed_0() -> None:
    order = algorithms.jobs(asked(only="grpo,nft"), Path("nowhere"))
    first = next(iter(ALGORITHMS["nft"]))
    assert [(j.algorithm, j.setting, j.seed, j.steps) for j in order] == [
        ("grpo", "recipe", 0, 4),
        ("nft", first, 0, 4),
        ("grpo", "recipe", 1, 4),
        ("nft", first, 1, 4),
    ]
    grid = algorithms.jobs(asked(tune=True), Path("nowhere"))
    assert {j.algorithm for j in grid} == {name for name, settings in ALGORITHMS.items() if len(settings) > 1}
    assert {(j.seed, j.steps) for j in grid} == {(0, 2)}
    one = list(ALGORITHMS["guard"])[1]
    for tune, steps in ((True, 2), (False, 4)):
        named = algorithms.jobs(asked(tune=tune, only=f"guard/{one}", seeds=[0]), Path("nowhere"))
        assert named == [Job("guard", one, 0, steps)]


@pytest.mark.parametrize("wrong", ["gpro", "guard/lr-9", "/", "nft,,gpro"])
def test_a_wrong_name_is_refused(wrong: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        algorithms.main(["--only", wrong, "--out", str(tmp_path)])
    assert left.value.code == 2 and "guard/" in capsys.readouterr().err


def test_the_setting_with_the_least_distance_is_kept(tmp_path: Path) -> None:
    a, b, c = list(ALGORITHMS["nft"])[:3]
    made(tmp_path, Job("nft", a, 0, 2), {0: 30.0, 2: 20.0})
    made(tmp_path, Job("nft", b, 0, 2), {0: 30.0, 2: 18.0, 4: 40.0})  # went on; chosen by what it was after the grid's steps
    made(tmp_path, Job("nft", c, 0, 2), {0: 30.0})  # not there yet
    made(tmp_path, Job("nft", c, 1, 2), {0: 30.0, 2: 1.0})  # another seed
    chosen = algorithms.choose(tmp_path, "nft", 0, 2)
    assert chosen == {"setting": b, "seed": 0, "steps": 2, "distances": {a: 20.0, b: 18.0}}
    assert algorithms.choose(tmp_path, "guard", 0, 2) is None
    (tmp_path / "best.json").write_text(json.dumps({"nft": chosen}))
    assert algorithms.best_settings(tmp_path)["nft"] == b
    assert algorithms.best_settings(tmp_path)["grpo"] == "recipe"


def test_what_is_finished_is_left_alone(tmp_path: Path) -> None:
    folder = made(tmp_path, Job("grpo", "recipe", 0, 4), {0: 30.0, 2: 20.0, 4: 15.0})
    assert algorithms.finished(folder, 4) and algorithms.finished(folder, 2) and not algorithms.finished(folder, 6)
    before = (folder / "metrics.jsonl").read_text()
    todo = [Job("grpo", "recipe", 0, 4)]
    assert algorithms.run(todo, asked(), tmp_path) == []  # starts no service either
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_run_that_cannot_start_is_told_with_what_it_cost(tmp_path: Path) -> None:
    job = Job("grpo", "recipe", 0, 1)
    assert algorithms.train(job, tmp_path, URL, 64, 1, 1) == 2
    told = json.loads((job.folder(tmp_path) / "costs.jsonl").read_text())
    assert told["status"] == 2 and told["peak_mb"] > 50 and told["cpu_s"] > 0 and (told["from"], told["to"]) == (0, 0)
    assert "127.0.0.1:1" in (job.folder(tmp_path) / "said.log").read_text()


def test_tables_take_the_last_step_that_all_have(tmp_path: Path) -> None:
    chosen = algorithms.best_settings(tmp_path)
    for seed, distance in ((0, 14.0), (1, 16.0)):
        made(tmp_path, Job("grpo", "recipe", seed, 4), {0: 30.0, 2: 18.0, 4: distance})
    made(tmp_path, Job("guard", chosen["guard"], 0, 4), {0: 30.0, 2: 22.0, 4: 24.0})
    made(tmp_path, Job("nft", chosen["nft"], 0, 4), {0: 30.0, 2: 25.0})
    runs = algorithms_report.read(tmp_path)
    ((step, groups),) = algorithms_report.compared(runs, algorithms.COMPARED, chosen, 4)
    assert step == 2 and [len(group) for group in groups.values()] == [2, 1, 1]
    rows = algorithms_report.table(step, groups, REAL)
    assert rows[2].startswith("| photographs |  | - | - | 5.0 | 6.0 | - | 0.90")
    assert rows[3].startswith("| before") and "30.0" in rows[3]
    assert "18.0 (18.0 to 18.0)" in rows[4] and "700 (700 to 700) MB" in rows[4] and "0, 1" in rows[4]
    assert "0.3 (0.3 to 0.3) min" in rows[4]  # two steps of ten seconds
    assert "25.0" in rows[6] and "20 s a step" in rows[6]
    assert "rose in 2 of 2 runs" in algorithms_report.rises(step, groups)[0]


def test_where_more_seeds_have_come_a_table_stands_too(tmp_path: Path) -> None:
    chosen = algorithms.best_settings(tmp_path)
    for name in ("grpo", "guard"):
        made(tmp_path, Job(name, chosen[name], 0, 4), {0: 30.0, 2: 18.0, 4: 14.0 if name == "grpo" else 24.0})
        made(tmp_path, Job(name, chosen[name], 1, 4), {0: 30.0, 1: 25.0, 2: 19.0})
    runs = algorithms_report.read(tmp_path)
    found = algorithms_report.compared(runs, algorithms.COMPARED, chosen, 9, ("jpeg-kl",))
    assert [(step, {name: len(group) for name, group in groups.items()}) for step, groups in found] == [
        (2, {"grpo": 2, "guard": 2}),
        (4, {"grpo": 1, "guard": 1}),
    ]
    assert "18.0 (768)" in algorithms_report.table(*found[1], REAL)[5]  # its best was before its last
    assert [step for step, _ in algorithms_report.compared(runs, algorithms.COMPARED, chosen, 3)] == [2]
    assert algorithms_report.compared(runs, algorithms.COMPARED, chosen, 0) == []
    assert algorithms_report.unfinished(found, 9).startswith("Not the whole: 4 of 9 steps, 1 of 3 seeds")
    assert algorithms_report.unfinished([(9, {"grpo": [{}] * 3})], 9) == ""


@pytest.mark.parametrize(
    ("numbers", "digits", "told"),
    [([], 1, "-"), ([None], 1, "-"), ([-1e-9], 2, "0.00"), ([1.0, None, 2.0], 1, "1.5 (1.0 to 2.0)"), ([32.5], 0, "32")],
)
def test_mean_and_range(numbers: list[float | None], digits: int, told: str) -> None:
    assert algorithms_report.spread(numbers, digits) == told


@pytest.mark.parametrize(("distance", "held"), [(20.0, "The held-out measures are better"), (60.0, "not all better")])
def test_gardo_is_judged_by_what_was_held_out(tmp_path: Path, distance: float, held: str) -> None:
    chosen = algorithms.best_settings(tmp_path)
    bad = {"heldout_cnn": -12.0, "heldout_spectrum": -11.0, "class_hit": 0.3}
    made(tmp_path, Job("jpeg-plain", "recipe-kl", 0, 2), {0: 30.0, 2: 50.0}, **bad)
    made(tmp_path, Job("jpeg-gardo", chosen["jpeg-gardo"], 0, 2), {0: 30.0, 2: distance})
    ((step, groups),) = algorithms_report.compared(algorithms_report.read(tmp_path), algorithms.PAIR, chosen, 4, algorithms.HACKED)
    text = "\n".join(algorithms_report.verdict(step, groups, REAL))
    assert held in text and ("(4 of 4" in text) == (distance < 50)
    assert "fooled" not in text and "less reward" not in text
    groups["jpeg-gardo"][0]["evaluations"][-1]["reward/jpeg_size/mean"] = 3.5
    assert "GARDO has gained less reward" in "\n".join(algorithms_report.verdict(step, groups, REAL))
    runs = [*groups["jpeg-plain"], *groups["jpeg-gardo"]]
    runs[0]["evaluations"][-1]["heldout_spectrum"] = 20.0
    assert "photographs get 6.00: above that it is fooled" in "\n".join(algorithms_report.verdict(step, groups, REAL))
    assert "not measured" in algorithms_report.verdict(step, {"jpeg-plain": []}, REAL)[0]


def test_the_section_is_put_between_its_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, out = tmp_path / "page.md", tmp_path / "runs"
    page.write_text("# Benchmarks\n\nfirst\n")
    monkeypatch.setattr(algorithms_report, "DOCUMENT", page)
    monkeypatch.setattr(algorithms_report, "PLOT", tmp_path / "plot.png")
    monkeypatch.setattr(algorithms_report, "RESULT", tmp_path / "result.json")
    said: list[str] = []
    out.mkdir()
    algorithms_report.write(out, 4, quick=False, say=said.append)
    assert "nothing has been evaluated" in said[0] and page.read_text() == "# Benchmarks\n\nfirst\n"
    made(out, Job("grpo", "recipe", 0, 4), {0: 30.0, 2: 18.0})
    for _ in range(2):
        algorithms_report.write(out, 4, quick=False, say=said.append)
    page.write_text(page.read_text() + "\nlast\n")
    algorithms_report.write(out, 4, quick=False, say=said.append)
    text = page.read_text()
    assert text.count(algorithms_report.START) == 1 and text.startswith("# Benchmarks\n\nfirst\n") and text.endswith("last\n")
    assert "After 768 pictures" in text and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "result.json").read_text())["runs"][0]["evaluations"][1]["distance"] == 18.0
    algorithms_report.write(out, 4, quick=True, say=said.append)
    assert (out / "algorithms.png").is_file() and (out / "algorithms.json").is_file()
