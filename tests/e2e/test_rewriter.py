"""verism-train with a rewriter as a user runs it: a process that is killed and started again, and services of the small world."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.process import running
from tests.e2e.test_train import finish, start, steps_written, until_step
from tests.trainer.language import tiny
from tests.trainer.run.runs import numbers
from tests.trainer.run.service import recipe, serve
from trainer.metrics import read

pytestmark = pytest.mark.e2e


def written(folder: Path, url: str, mode: str, **changes: Any) -> Path:
    """A recipe with a rewriter of random weights, beside it."""
    language = {
        "mode": mode,
        "policy": {"path": str(tiny.write(folder / "lm")), "instruction": "rewrite the prompt", "lora": {"rank": 4, "alpha": 8}},
        "rewrites": 4,
        "max_new_tokens": 6,
        "penalties": {"length": {"weight": 0}, "truncated": {"use": "penalise", "weight": 0.1}},
        "optim": {"lr": 1e-2},
    }
    group = {"prompts": 2, "size": 2, "allow_small": True}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(url, language=language, **{"group": group, **changes})))
    return folder / "recipe.yaml"


def test_sigkill_then_resume_gives_the_metrics_of_an_uninterrupted_run(root: Path, tmp_path: Path) -> None:
    with serve() as service:
        told = [str(written(tmp_path, service.url, "both", steps=5)), "--resume", "--run-dir"]
        status, output = finish(start(root, *told, str(tmp_path / "whole")))
        assert status == 0 and f"rewriter in {tmp_path / 'whole' / 'rewriter'}" in output, output
        killed = start(root, *told, str(tmp_path / "killed"))
        until_step(killed, tmp_path / "killed", 3)
        killed.send_signal(signal.SIGKILL)
        assert finish(killed)[0] == -signal.SIGKILL and steps_written(tmp_path / "killed") < 5
        status, output = finish(start(root, *told, str(tmp_path / "killed")))
        assert status == 0 and "resumed after step" in output, output
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_trees_are_scored_by_the_small_worlds_services(root: Path, tmp_path: Path) -> None:
    """A detector and an alignment model in a service process; rewards are rows of both, and the alignment knows the user's words."""
    detector = {"use": "detector", "folder": "world/detector", "cache_items": 0}
    alignment = {"use": "alignment", "folder": "world/alignment", "against": "world/prompts/against.txt"}
    (tmp_path / "services.json").write_text(json.dumps({"threads": 1, "rewards": {"detector": detector, "alignment": alignment}}))
    with running(tmp_path / "services.json") as url:
        rewards = {"detector": {"url": url, "part": "logit"}, "alignment": {"url": url, "part": "margin"}}
        path = written(tmp_path, url, "language", rewards=rewards, steps=2)
        status, output = finish(start(root, str(path), "--run-dir", str(tmp_path / "run")))
        assert status == 0, output
    lines = read(tmp_path / "run" / "metrics.jsonl")
    for line in (line for line in lines if line["kind"] == "step"):
        assert line["failed_scores"] == 0 and line["language/grad_norm"] > 0
        assert all(line[f"language/{name}/sem"] > 0 for name in rewards)
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert last["over_none/alignment_sem"] > 0 and last["over_untrained/total_sem"] is not None
    told = [json.loads(line) for line in (tmp_path / "run" / "rewrites" / "step_000002.jsonl").read_text().splitlines()]
    assert {*told[0]["rewards"]} == {*rewards}


def test_what_it_will_cost(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or the table breaks its lines
    path = written(tmp_path, "http://127.0.0.1:9", "both")
    status, output = finish(start(root, str(path), "--dry-run"))
    assert status == 0, output
    assert "2 prompts x 4 rewrites x 2 pictures = 16 a step" in output and "tokens a second" in output and "MISSING" in output
