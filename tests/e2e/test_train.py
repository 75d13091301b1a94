"""verism-train as a user runs it: a process, killed in mid-run, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.trainer.run.runs import numbers
from tests.trainer.run.service import recipe, serve
from trainer.metrics import read

pytestmark = pytest.mark.e2e


def start(root: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def steps_written(folder: Path) -> int:
    return len([line for line in read(folder / "metrics.jsonl") if line["kind"] == "step"])


def until_step(process: "subprocess.Popen[str]", folder: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while steps_written(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigkill_then_resume_gives_the_metrics_of_an_uninterrupted_run(root: Path, tmp_path: Path) -> None:
    with serve() as service:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe(service.url, steps=8)))
        arguments = [str(tmp_path / "tiny.yaml"), "--resume", "--run-dir"]
        status, output = finish(start(root, *arguments, str(tmp_path / "whole")))
        assert status == 0, output
        killed = start(root, *arguments, str(tmp_path / "killed"))
        until_step(killed, tmp_path / "killed", 3)
        killed.send_signal(signal.SIGKILL)
        assert finish(killed)[0] == -signal.SIGKILL
        assert steps_written(tmp_path / "killed") < 8
        status, output = finish(start(root, *arguments, str(tmp_path / "killed")))
        assert status == 0, output
    assert "resumed after step" in output
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


def test_ctrl_c_saves_and_says_how_to_go_on(root: Path, tmp_path: Path) -> None:
    with serve() as service:
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe(service.url, steps=500, eval={"every": 500, "samples": 4})))
        process = start(root, str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run"))
        until_step(process, tmp_path / "run", 1)
        process.send_signal(signal.SIGINT)
        status, output = finish(process)
    assert status == 130 and "--resume" in output
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    assert json.loads((newest / "meta.json").read_text())["step"] == steps_written(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wrold"], "did you mean 'world'"),
        (["world", "stepz=3"], "'steps'"),
        (["world", "rewards.detector.url=http://127.0.0.1:9"], "verism-serve"),
    ],
)
def test_mistakes_end_with_status_2_and_no_traceback(root: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    status, output = finish(start(root, *arguments, "--run-dir", str(tmp_path / "run")))
    assert status == 2 and words in output and "Traceback" not in output
