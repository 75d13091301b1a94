"""docs/wire.md holds what it says: its commands run against a real service, its answer passes the schema."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.process import running
from shared.errors import VerismError
from shared.schema import Problem, ScoreAnswer, ScoreItem, ScoreRequest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "wire.md").read_text()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running("examples/serve/minimal.yaml", stderr=subprocess.DEVNULL) as url:
        yield url.removeprefix("http://")


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_run(address: str, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    said = []
    for block in blocks("bash"):
        command = block.replace("localhost:8000", address)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
        said.append(json.loads(done.stdout))
    form, plain = (ScoreAnswer.model_validate(answer) for answer in said[:2])
    assert form.items[0].scores["jpeg_size"].value == plain.items[0].scores["jpeg_size"].value is not None
    assert Problem.model_validate(said[2]).type == "urn:verism:unsupported-media-type" and len(said) == 3


@pytest.mark.e2e
def test_the_python_runs(address: str) -> None:
    (block,) = blocks("python")
    code = block.replace("localhost:8000", address)
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[[ True  True]] {}")


def test_the_answer_passes_the_schema() -> None:
    (block,) = blocks("json")
    answer = ScoreAnswer.model_validate_json(block)
    assert [item.scores["detector"].status for item in answer.items] == ["ok", "error"]


def test_the_tables_hold_every_field_and_every_error() -> None:
    fields = set(re.findall(r"^\| `(?:items\[\]\.)?(\w+)`", TEXT, re.M))
    assert fields >= {*ScoreRequest.model_fields, *ScoreItem.model_fields}
    named = {(int(status), kind) for status, kind in re.findall(r"^\| (\d+) \| `([\w-]+)`", TEXT, re.M)}
    tree = {(error.status, error.kind) for error in VerismError.__subclasses__() if error.__module__ == "shared.errors"}
    assert named == tree
