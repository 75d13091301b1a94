"""A person's way: a service that rewrites and scores, as a process; `verism-rewrite` and curl, as processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.process import running
from tests.trainer.language import tiny

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("serve") / "c.yaml"
    rewards = {
        "realism": {"use": "realism", "parts": {"detector": {"weight": 1}}},
        "detector": {"use": "detector", "folder": "world/detector"},
        "alignment": {"use": "alignment", "folder": "world/alignment"},
    }
    rewriter = {"folder": str(folder), "max_new_tokens": 12, "instruction": "rewrite the prompt"}
    config.write_text(json.dumps({"rewards": rewards, "rewriter": rewriter}))
    with running(config) as served:
        yield served


def rewrite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer.rewrite", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=170, check=False)


def test_a_process_rewrites_and_scores(url: str) -> None:
    body = {"prompt": ["a photo of a bag", "\u6d77\u8fba\u306e\u72ac"], "n": 2, "seed": 5, "temperature": 2.0}
    if shutil.which("curl"):
        command = ["curl", "-sS", "-H", "content-type: application/json", "-d", json.dumps(body), f"{url}/rewrite"]
        said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    else:
        said = httpx.post(f"{url}/rewrite", json=body).json()
    again = httpx.post(f"{url}/rewrite", json=body).json()
    assert [item["prompt"] for item in said["items"]] == body["prompt"] and said["items"] == again["items"]
    assert httpx.get(f"{url}/v1/rewards").json()["rewards"][0]["name"] == "realism"
    assert "verism_rewrites_total" in httpx.get(f"{url}/metrics").text
    assert httpx.post(f"{url}/rewrite", content=b"{").headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("where", ["folder", "url"])
def test_rewrites_their_pictures_and_their_scores(url: str, folder: Path, where: str, tmp_path: Path) -> None:
    rewriter = [str(folder), "--max-new-tokens", "12", "--instruction", "rewrite the prompt"] if where == "folder" else [url]
    rewards = ["--rewards", f"realism={url}", f"alignment={url}"]
    sizes = ["--n", "6", "--pictures", "2", "--temperature", "4", "--budget", "400", "--prune", "3:0.5", "--set", "device=cpu"]
    done = rewrite("a photo of a bag", "--rewriter", *rewriter, *rewards, *sizes, "--save", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    own = result["candidates"][0]
    assert own["text"] == "a photo of a bag" and 0 < own["rewards"]["realism"]["mean"] < 1 and own["rewards"]["alignment"]["mean"]
    assert len(result["candidates"]) + sum(result["left_out"].values()) == 7 and len(result["candidates"]) > 2
    assert any(one["dropped_after"] == 3 for one in result["candidates"]) and result["forwards"]["spent"] <= 400
    assert result["failures"] == {} and len(list((tmp_path / "out").glob("*.png"))) >= 4


def test_services_that_are_away(folder: Path, free_port: int) -> None:
    done = rewrite("a bag", "--rewriter", str(folder), "--rewards", f"realism=http://127.0.0.1:{free_port}")
    assert done.returncode == 2 and "make serve" in done.stderr and "Traceback" not in done.stderr
