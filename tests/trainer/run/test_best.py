"""Which checkpoint is the best, and what happens when the reward is hacked: the trained reward is brightness, darkness is held out."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.run.runs import numbers, run
from tests.trainer.run.service import Service, recipe
from trainer import alarm, checkpoint
from trainer.__main__ import train
from trainer.config import AlarmConfig, ConfigError, RunConfig, validate
from trainer.metrics import read

Numbers = dict[str, Any]


def hacked(url: str, **changes: Any) -> RunConfig:
    """Brighter pictures with every step; darkness falls, which is all that is held out."""
    rewards = {"brightness": {"url": url}, "darkness": {"url": url, "weight": 0}}
    watched = {"action": "rollback", "patience": 1, "heldout_drop": 0.0}
    told = {"rewards": rewards, "optim": {"lr": 4e-3}, "kl": {"weight": 0.0}, "steps": 8, "alarm": watched, **changes}
    return validate(recipe(url, **told), "test")


@pytest.fixture(scope="module")
def whole(service: Service, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Numbers], str]:
    with contextlib.chdir(root):
        folder, seen = tmp_path_factory.mktemp("whole") / "run", list[Numbers]()
        reason = run(hacked(service.url), folder, tell=seen.append)
    return folder, seen, reason


def test_rolled_back_to_the_best_weights_at_half_the_rate_then_stopped(whole: tuple[Path, list[Numbers], str]) -> None:
    folder, seen, reason = whole
    alarms = [line for line in seen if line["kind"] == "alarm"]
    assert [line["action"] for line in alarms] == ["rollback", "rollback", "stop"] and reason.startswith("alarm")
    assert "all that is held out stands lower than at the start (darkness)" in alarms[0]["reason"]
    steps = {line["step"]: line for line in seen if line["kind"] == "step"}
    first, second = (line["step"] for line in alarms[:2])
    assert steps[first]["lr"] == 4e-3 and steps[first + 1]["lr"] == 2e-3 and steps[second + 1]["lr"] == 1e-3
    assert json.loads((folder / "done.json").read_text())["best_step"] == alarms[0]["best_step"]
    again = checkpoint.read(checkpoint.folder_of(folder, checkpoint.steps(folder)[-1]))
    assert again.meta["rollbacks"] == [first, second]


def test_the_weights_after_a_roll_back_are_those_of_the_best(service: Service, tmp_path: Path) -> None:
    def stop() -> bool:
        return any(line["kind"] == "alarm" for line in read(tmp_path / "run" / "metrics.jsonl"))

    assert run(hacked(service.url, checkpoint_keep=9), tmp_path / "run", stop=stop) == "interrupted"
    folder, line = tmp_path / "run", next(e for e in read(tmp_path / "run" / "metrics.jsonl") if e["kind"] == "alarm")
    best, now = (checkpoint.read(checkpoint.folder_of(folder, step)) for step in (line["best_step"], line["step"]))
    assert line["best_step"] < line["step"] and all(torch.equal(v, now.tensors[k]) for k, v in best.tensors.items())


def test_a_run_that_was_rolled_back_resumes_to_the_same_numbers(
    service: Service, whole: tuple[Path, list[Numbers], str], tmp_path: Path
) -> None:
    folder, stops = tmp_path / "run", 0

    class Killed(BaseException):
        pass

    for after in ("alarm", "step", "alarm"):
        seen = 0

        def tell(line: Numbers, after: str = after) -> None:
            nonlocal seen
            seen += line["kind"] == after and line["step"] > 1
            if seen:
                raise Killed

        with contextlib.suppress(Killed):
            run(hacked(service.url), folder, resume=True, tell=tell)
            stops -= 1
        stops += 1
    assert stops == 3
    assert run(hacked(service.url), folder, resume=True) == whole[2]
    assert numbers(folder) == numbers(whole[0])


def test_the_best_by_what_is_held_out_and_by_the_trained_reward(service: Service, tmp_path: Path) -> None:
    best: dict[str, list[float]] = {}
    for by, key in (("heldout:darkness", "reward/darkness/mean"), ("total", "reward/total_mean")):
        config = hacked(service.url, alarm={"action": "off"}, checkpoint_best=by, steps=4)
        folder = tmp_path / by.replace(":", "_")
        run(config, folder)
        evaluations = {e["step"]: e[key] for e in read(folder / "metrics.jsonl") if e["kind"] == "eval"}
        best[by] = [json.loads((folder / "done.json").read_text())["best_step"], max(evaluations, key=evaluations.__getitem__)]
    assert best["heldout:darkness"][0] == best["heldout:darkness"][1] != best["total"][0] == best["total"][1]


def test_what_is_not_held_out_is_refused(service: Service, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="that reward is trained on"):
        hacked(service.url, checkpoint_best="heldout:brightness")
    with pytest.raises(ConfigError, match=r"weight=0, or eval\.monitors"):
        hacked(service.url, checkpoint_best="heldout:nothing")
    with pytest.raises(ConfigError, match="checkpoint_best"):
        hacked(service.url, checkpoint_best="loss")
    monitored = {**recipe("x")["eval"], "monitors": "world/monitors"}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="heldout:cnn"):
        run(hacked(service.url, checkpoint_best="heldout:nothing", eval=monitored), tmp_path / "run")


def test_monitors_by_name() -> None:
    table = [
        {"step": n, "reward/total_mean": n, "distance": 9.0, "heldout_cnn": c, "class_hit": h, "kernel_distance": k}
        for n, c, h, k in ((0, -3.0, 0.7, 0.5), (10, -1.0, 0.6, 0.4), (20, -2.0, 0.8, 0.3))
    ]
    named = {
        name: alarm.best(table, by=f"heldout:{name}")["step"] for name in ("cnn", "heldout_cnn", "class_hit", "kernel_distance")
    }
    assert named == {"cnn": 10, "heldout_cnn": 10, "class_hit": 20, "kernel_distance": 20}
    assert alarm.best(table, by="heldout:cnn", among=[0, 20])["step"] == 20


def test_a_held_out_reward_of_which_less_is_better_counts_turned_round() -> None:
    rows: list[Any] = [
        {"step": n, "reward/total_mean": t, "reward/noise/mean": x, "reward/noise/std": 1.0} for n, t, x in ((0, 0, 5), (10, 1, 7))
    ]
    assert alarm.check(rows, AlarmConfig(patience=1), {"noise": -1.0}) is not None
    assert alarm.check(rows, AlarmConfig(patience=1), {"noise": 1.0}) is None
    assert alarm.check(rows, AlarmConfig(patience=1), {"noise": -1.0}, since=10) is None


def test_export_gives_the_best_adapter_away(whole: tuple[Path, list[Numbers], str], tmp_path: Path, capsys: Any) -> None:
    folder, out = whole[0], tmp_path / "exports" / "adapter"
    assert train(["export", str(folder), "--out", str(out)]) == 0
    own, given = (load_file(place / "pytorch_lora_weights.safetensors") for place in (folder / "adapter", out))
    assert own.keys() == given.keys() and all(torch.equal(value, given[key]) for key, value in own.items())
    assert train(["export", str(folder), "--format", "comfyui", "--out", str(tmp_path / "comfy.safetensors")]) == 0
    assert len(load_file(tmp_path / "comfy.safetensors")) == len(own)
    assert train(["export", str(folder), "--out", str(out)]) == 2 and "another --out" in capsys.readouterr().out
    assert train(["export", str(tmp_path), "--out", str(out) + "2"]) == 2 and "no run folder" in capsys.readouterr().out
    assert train(["export", str(folder), "--out", str(out) + "2", "--step", "77"]) == 2
    assert "no checkpoint after step 77" in capsys.readouterr().out
