"""The comparison of who learns: what it tells the trainer, and its table from run folders."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import two_policies
from trainer.config import load


def run_folder(folder: Path, gain: float) -> None:
    """What a finished run of 2 steps leaves behind: three rewards of four pictures, painted before training."""
    (folder / "rewrites").mkdir(parents=True)
    values = [[0.0, 2.0, 0.0, 2.0], [1.0, 1.0, None, 3.0], [0.0, 4.0, 0.0, 4.0]]
    (folder / "rewrites" / "before.json").write_text(json.dumps({"arms": {"none": {"values": values}}}))
    told = {f"over_none/{name}": gain for name in two_policies.WEIGHTS}
    told |= {f"over_none/{name}_sem": 0.1 for name in two_policies.WEIGHTS}
    told |= dict.fromkeys(two_policies.MONITORS, 5.0) | {f"none/{name}": 9.0 for name in two_policies.MONITORS}
    lines = [{"kind": "eval", "step": step, **told} for step in (0, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "costs.jsonl").write_text(json.dumps({"from": 0, "to": 2, "cpu_s": 12.0}) + "\n")
    (folder / "memory.jsonl").write_text(json.dumps({"peak_mb": 2048.0}) + "\n")


def test_the_total_weighs_gains_in_deviations_of_no_rewriting(tmp_path: Path) -> None:
    run_folder(tmp_path / "both", 2.0)
    row = two_policies.row(tmp_path / "both", 2)
    spread = (8 / 9) ** 0.5  # of 1, 1 and 3; what was not scored is left out
    assert row["total"] == pytest.approx(0.35 * 2 / 1 + 0.15 * 2 / spread + 0.5 * 2 / 2)
    assert row["cpu_s_step"] == 6.0 and row["peak_mb"] == 2048.0


def test_the_table_has_every_evaluation_of_every_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "both", 2.0)
    run_folder(tmp_path / "language", -1.0)
    assert two_policies.main(["--report", "--steps", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "no rewriting, painter as it is",
        "both learn, step 2",
        "language alone, step 2",
    ]
    assert len({line.count("|") for line in lines}) == 1 and "-1.00 ± 0.10" in lines[-1] and "2.0 GiB" in lines[-1]
    assert set(json.loads((tmp_path / "table.json").read_text())["rows"]) == {"both learn, step 2", "language alone, step 2"}


def test_each_mode_is_the_recipe_with_the_same_number_of_pictures() -> None:
    chosen = argparse.Namespace(steps=20, seed=3, every=10, samples=320)
    configs = [
        load("dual_grpo_small", two_policies.overrides(mode, "http://127.0.0.1:9", Path("cold"), chosen))
        for mode in two_policies.MODES
    ]
    assert {config.pictures for config in configs} == {144} and {config.seed for config in configs} == {3}
    assert [config.language.mode for config in configs] == list(two_policies.MODES)  # type: ignore[attr-defined]
    assert all(tuple(config.rewards) == tuple(two_policies.WEIGHTS) for config in configs), "row() reads values in this order"


def test_memory_is_summed_over_all_processes() -> None:
    found: dict[str, float] = {}
    held = [sys.executable, "-c", "held = bytearray(200 << 20); input()"]
    with subprocess.Popen(held, stdin=subprocess.PIPE) as child:
        with two_policies.memory([os.getpid()], found):
            for _ in range(100):
                time.sleep(0.1)
                if found.get("peak_mb", 0) > 200:
                    break
        child.communicate(b"\n")
    assert found["peak_mb"] > 200
    with pytest.raises(SystemExit):
        two_policies.main(["--only", "neither"])
