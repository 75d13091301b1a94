"""Recipes load, overrides land, mistakes are told with the nearest right word."""

from pathlib import Path

import pytest
import yaml

from trainer.__main__ import train
from trainer.config import ConfigError, dump, load, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(str(tmp_path / "again.yaml")) == config


def test_overrides() -> None:
    config = load("world", ["steps=3", "rewards.detector.url=http://h:1", "optim.lr=1e-4", "eval.monitors=null"])
    assert (config.steps, config.rewards["detector"].url, config.optim.lr) == (3, "http://h:1", 1e-4)
    assert config.eval.monitors is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stepz=3", "steps"),
        ("optim.lrr=1", "optim.lr"),
        ("rewards.detector.urll=x", "url"),
        ("group.size=2", "group.size"),
        ("steps", "key=value"),
        ("sampling.window_last=99", "never trained"),
        ("rewards.detector.weight=-1", "greater than or equal"),
    ],
)
def test_mistakes(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load("world", [override])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'world'"):
        load("wrold")


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(yaml.safe_dump([1]))
    with pytest.raises(ConfigError, match="mapping"):
        load(str(tmp_path / "list.yaml"))


def test_the_learning_rate_falls_along_a_cosine() -> None:
    optim = load("world", ["optim.lr=1.0", "optim.final_lr=0.2", "optim.lr_steps=40"]).optim
    assert [round(optim.lr_at(step), 3) for step in (0, 20, 40, 90)] == [1.0, 0.6, 0.2, 0.2]
    assert load("world", ["optim.lr=0.5", "optim.final_lr=1.0", "optim.lr_steps=null"]).optim.lr_at(7) == 0.5
    with pytest.raises(ConfigError, match="lr_steps"):
        load("world", ["optim.final_lr=0.5", "optim.lr_steps=null"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--help"],
            ("--resume", "sampling.micro_batch=auto", "checkpoint_best=heldout:NAME", "alarm.action=rollback", "Exit status"),
        ),
        (["export", "--help"], ("--format comfyui", "load_lora_weights", "--step 20")),
    ],
)
def test_help_teaches(arguments: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train(arguments)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(words in shown for words in said)


def test_changes_may_stand_before_and_after_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["group.prompts=1", "sampling.micro_batch=4", "sampling.steps=7", "eval.monitors=null"]
    assert train(["world", "seed=3", *small, "--dry-run", "steps=7"]) == 0
    shown = capsys.readouterr().out
    assert "seed: 3" in shown and "steps: 7" in shown
