"""What `language:` may say in a recipe, and what is told to who says something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.run.service import recipe
from trainer.config import ConfigError, RunConfig, dump, load, validate
from trainer.language.config import LanguageRunConfig


def made(language: dict[str, Any], **changes: Any) -> LanguageRunConfig:
    config = validate(recipe("http://h:1", **{"group": {"prompts": 2, "size": 4}, **changes}, language=language), "recipe")  # type: ignore[arg-type]
    assert isinstance(config, LanguageRunConfig)
    return config


def test_a_recipe_with_a_rewriter_is_another_kind_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert type(validate(recipe("http://h:1"), "recipe")) is RunConfig
    config = made(
        {"mode": "both", "rewrites": 4, "policy": {"path": "x/y", "lora": {"rank": 2}}, "engine": {"use": "vllm", "url": "u"}}
    )
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(str(tmp_path / "again.yaml")) == config
    assert config.pictures == 2 * 4 * 4 and config.compared == 16 and config.paints and config.writes
    assert config.language.policy is not None and config.language.policy.options() == {"lora": {"rank": 2}}
    assert config.language.engine.options() == {"url": "u"}


def test_an_override_makes_it_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe("http://h:1")))
    config = load(str(tmp_path / "r.yaml"), ["language.mode=language", "language.optim.lr=1e-4", "group.size=1"])
    assert isinstance(config, LanguageRunConfig) and config.language.optim.lr == 1e-4 and not config.paints


def test_weights_of_the_two() -> None:
    rewards = {"a": {"url": "u", "weight": 1.0}, "b": {"url": "u", "weight": 0.5}}
    config = made({"rewards": {"a": {"weight": 0.0}, "b": {"judged_by": "rewrite"}}}, rewards=rewards)
    assert [config.language_weight(name) for name in "ab"] == [0.0, 0.5]


def test_who_learns_by_turns() -> None:
    turns = made({"mode": "alternating", "alternate_every": 2}).language
    assert [turns.mode_at(step) for step in range(5)] == ["language", "language", "images", "images", "language"]
    assert made({"mode": "both"}).language.mode_at(7) == "both"


@pytest.mark.parametrize(
    ("language", "changes", "words"),
    [
        ({"modus": "both"}, {}, "did you mean 'language.mode'"),
        ({"optim": {"lrr": 1}}, {}, "did you mean 'language.optim.lr'"),
        ({"rewards": {"brightnes": {}}}, {}, "it has brightness"),
        ({"rewards": {"brightness": {"wait": 1}}}, {}, "did you mean 'language.rewards.brightness.weight'"),
        ({"rewards": {"brightness": {"weight": 0}}}, {}, "all weights of the rewriter's rewards are 0"),
        ({"rewrites": 1}, {}, "against each other"),
        ({"rewrites": 3}, {}, "mostly noise"),
        ({"mode": "both"}, {"group": {"prompts": 2, "size": 3}}, "group.allow_small"),
        ({"policy": None}, {}, "mode=images and rewrites=1"),
        ({"loss": {"use": "sapo", "clip_low": 0.1}}, {}, "does not clip"),
        ({"loss": {"use": "gspo", "level": "token"}}, {}, "one ratio for a sequence"),
        ({"penalties": {"length": {"min": 9, "max": 3}}}, {}, "exchange them"),
        ({"penalties": {"length": {"min": 200, "max": 300, "unit": "tokens"}}}, {}, "max_new_tokens is 96"),
        ({"penalties": {"truncated": {"weight": 1.0}}}, {}, "use=penalise"),
        ({"advantages": {"use": "product"}}, {}, "of rewrites: use one of"),
        ({}, {"gardo": {"gate": True, "aux": ["x"]}}, "gardo"),
        ({}, {"rewards": {"brightness": {"url": "u", "uncertainty": {"tau": 1}}}}, "does not read it"),
        (
            {"rewrites": 32},
            {"rewards": {"brightness": {"url": "u", "compare": {}}}, "group": {"prompts": 1, "size": 40}},
            "one request",
        ),
    ],
)
def test_mistakes(language: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(language, **changes)


def test_pictures_of_the_next_step_cannot_be_drawn_ahead() -> None:
    with pytest.raises(ConfigError, match="not known yet"):
        made({}, sampling={**recipe("u")["sampling"], "ahead": True})  # type: ignore[dict-item]
