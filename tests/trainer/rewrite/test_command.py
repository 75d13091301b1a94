"""`verism-rewrite` as a person calls it, with tiny models of random weights and a service over HTTP."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer import tiny as tiny_image
from tests.trainer.language import tiny as tiny_language
from tests.trainer.rewrite.critic import Critic, serve
from trainer.config import dump, load
from trainer.policies.sd3 import SD3Policy
from trainer.rewrite.__main__ import main

BAG = "a photo of a bag"
LORA = {"rank": 2, "alpha": 4, "targets": ["attn.to_q"]}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.write(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_image.write(tmp_path_factory.mktemp("image"))


@pytest.fixture
def critic() -> Iterator[Critic]:
    with serve() as service:
        yield service


@pytest.fixture
def command(language: Path, image: Path, critic: Critic) -> list[str]:
    """What all calls have in common."""
    rewards = [f"{name}={critic.url}" for name in ("brightness", "alignment")]
    how = ["--rewriter", str(language), "--instruction", "rewrite the prompt", "--policy", str(image), "--max-new-tokens", "8"]
    sizes = ["--set", "eval.steps=4", "--set", "device=cpu", "--n", "3", "--pictures", "2", "--temperature", "3"]
    return [BAG, *how, *sizes, "--rewards", *rewards]


def test_a_table_with_the_users_own_prompt_first(command: list[str], critic: Critic, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if "your own " in line and "\u2502" in line]
    assert len(rows) == 1 and "best" in said.out and "\u00b1" in said.out and "passes:" in said.out and "Traceback" not in said.err
    assert critic.prompts == {BAG} and "brightness" in said.out and "alignment" in said.out


def test_json_and_pictures(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--json", "--save", str(tmp_path / "out")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["prompt"] == BAG and result["candidates"][0]["origin"] == "own"
    assert result["rewrite"] == result["candidates"][result["best"]]["text"]
    n = len(result["candidates"])
    assert n + sum(result["left_out"].values()) == 4 and len(list((tmp_path / "out").glob("*.png"))) == 2 * n
    grey = np.asarray(Image.open(tmp_path / "out" / "000_00.png").convert("RGB")).mean() / 255
    other = np.asarray(Image.open(tmp_path / "out" / "000_01.png").convert("RGB")).mean() / 255
    assert result["candidates"][0]["rewards"]["brightness"]["mean"] == pytest.approx((grey + other) / 2)
    assert result["forwards"]["passes"] == n * 2 * 4 and result["forwards"]["tokens"] <= 3 * 8
    assert main([*command, "--save", str(tmp_path / "out")]) == 2 and "is there already" in capsys.readouterr().err


def test_a_budget_and_pruning(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--n", "20", "--budget", "60", "--token-cost", "0.25", "--prune", "1:0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["forwards"]["spent"] <= 60 and result["forwards"]["budget"] == 60
    assert any("the budget holds" in note for note in result["notes"])
    assert any(one["dropped_after"] == 1 for one in result["candidates"]) or len(result["candidates"]) < 3
    assert main([*command, "--budget", "3"]) == 2 and "raise --budget" in " ".join(capsys.readouterr().err.split())


def test_a_critic_refines(command: list[str], critic: Critic, capsys: pytest.CaptureFixture[str]) -> None:
    critic.says = [f"a bag, {word}" for word in ("red", "blue", "small", "old", "new", "worn", "plain", "real")] * 9
    assert main([*command, f"critic={critic.url}", "--critic", "critic", "--refine", "2", "--n", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [one["origin"] for one in result["candidates"]][:2] == ["own", "refined"] and result["forwards"]["tokens"] == 0
    assert "critic" in result["candidates"][1]["rewards"]


def test_the_policy_of_a_run(command: list[str], image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = SD3Policy.load(image, lora=LORA)
    for name, parameter in policy.trainable().items():
        parameter.data += 0.5 * ("lora_B" in name)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    changes = [f"policy.path={image}", "policy.lora=" + json.dumps(LORA)]
    (run / "config.yaml").write_text(dump(load("world", changes)))
    trained = [str(run) if word == str(image) else word for word in command]
    assert main(trained) == 2 and "has given no adapter" in " ".join(capsys.readouterr().err.split())
    policy.save_adapter(run / "adapter", quiet=False)
    assert main([*trained, "--json"]) == 0
    with_adapter = json.loads(capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert [one["text"] for one in with_adapter["candidates"]] == [one["text"] for one in without["candidates"]]
    assert with_adapter["candidates"][0]["rewards"] != without["candidates"][0]["rewards"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--refine", "2"], "name it by --critic"),
        (["--critic", "alignment2"], "none of the rewards"),
        (["--budget", "-1"], "--budget is above 0"),
        (["--temperature", "-1"], "numbers from 0 on"),
        (["--prune", "9:0.5"], "in order between step 1 and step 3"),
        (["--prune", "x"], "AFTER:SHARE"),
        (["--recipe", "wrld"], "did you mean 'world'"),
        (["--set", "eval.stps=3"], "did you mean 'eval.steps'"),
        (["--rewriter", "/no/such/folder"], "no language model at"),
        (["--rewards", "brightness"], "write name=URL"),
        (["--rewards", "nonsense=URL"], "write name=URL"),
    ],
)
def test_what_cannot_be_is_said_without_a_traceback(
    command: list[str], changes: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *changes]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error


def test_an_empty_prompt_and_services_that_are_away(command: list[str], free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([" ", *command[1:]]) == 2 and "the prompt is empty" in capsys.readouterr().err
    assert main([*command[: command.index("--rewards")], "--rewards", f"alignment=http://127.0.0.1:{free_port}"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "no reward service answers" in error and "make serve" in error


def test_help_teaches_and_is_quick(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "trainer.rewrite", "--help"],
        cwd=root,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and b"make serve" in done.stdout and b"--budget counts forward passes" in done.stdout
    assert b" torch" not in done.stderr
