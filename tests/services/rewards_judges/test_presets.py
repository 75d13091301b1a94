"""Presets: each names a checkpoint as options that load, here with the small judge in its place; what is given beside one wins."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from services import config as configuration
from services.engines import EngineOptions
from services.prompts import HERE
from services.registry import REWARDS, resolve
from services.reward import Item
from services.rewards.judge_kit import Judge
from services.rewards.presets import FILE, Preset, expand, presets
from world.recipes.exam import FOLDER

VERDICT = "services.rewards.unified_compare:UnifiedVerdict"
JUDGES = [name for name in (*REWARDS, VERDICT) if isinstance(resolve(name), type) and issubclass(resolve(name), Judge)]
EVERY = [(name, preset) for name in JUDGES for preset in presets(resolve(name).template)]
MORE: dict[str, dict[str, Any]] = {"auto_rubric": {"rubrics": [{"text": "It is sharp.", "weight": 1}]}}
COMMIT = "0123456789" * 4


def question(use: str) -> str:
    return str(resolve(use).template)


def test_every_entry_is_of_a_judge_that_there_is() -> None:
    told = yaml.safe_load(FILE.read_text())
    assert set(told) - {"any"} <= {question(use) for use in JUDGES}
    for several in told.values():
        for one in several.values():
            options = Preset.model_validate(one).options
            assert "template" not in options or (HERE / f"{options['template']}.yaml").is_file()


@pytest.mark.parametrize(("use", "name"), EVERY)
def test_each_loads_on_the_small_judge_by_its_folder_alone(use: str, name: str) -> None:
    reward = resolve(use).load("judge", {"preset": name, "folder": FOLDER, **MORE.get(use, {})}, "cpu")
    known = presets(question(use))[name]
    assert reward.info.licence == f"{known.licence} ({known.model})", "GET /v1/rewards says it"
    wanted = known.options.get("template", question(use))
    assert reward.question.name == wanted and reward.info.preprocessing.startswith(f"{wanted}-{reward.question.version}-")
    shown = np.zeros((28, 28, 3), np.uint8)
    (score,) = reward.score([Item(shown, 'a bag that says "SALE"', (shown,))])
    assert (score.value is None) != (score.error is None)


@pytest.mark.parametrize(("use", "name"), EVERY)
def test_each_names_a_checkpoint_with_its_commit_or_says_what_to_do(use: str, name: str) -> None:
    known = presets(question(use))[name]
    if known.by_hand is not None:
        with pytest.raises(ValueError, match="`folder`"):
            expand(question(use), {"preset": name, "revision": COMMIT})
        return
    if known.revision is None:
        with pytest.raises(ValueError, match=rf"`revision`.*{known.model}/commits"):
            expand(question(use), {"preset": name})
    for given in ({}, {"revision": COMMIT}) if known.revision is not None else ({"revision": COMMIT},):
        told = {**expand(question(use), {"preset": name, **given}), **MORE.get(use, {})}
        options = resolve(use).options_class.model_validate(told)
        assert (options.model, options.revision) == (known.model, given.get("revision", known.revision))


def test_what_is_given_beside_a_preset_wins() -> None:
    told = expand(
        "unified_reward", {"preset": "unifiedreward-2.0-qwen-7b", "folder": FOLDER, "aspects": ("Style",), "licence": "mine"}
    )
    assert told["aspects"] == ("Style",) and told["licence"] == "mine" and not {"model", "revision", "preset"} & set(told)
    told = expand("unified_reward", {"preset": "unifiedreward-qwen-7b", "engine": "vllm", "url": "http://gpu1:8000"})
    assert told["model"] == "CodeGoat24/UnifiedReward-qwen-7b" and "revision" not in told
    served = EngineOptions(engine="vllm", url=told["url"], model=told["model"])
    assert served.url == "http://gpu1:8000"
    assert expand("artifact_reward", {"folder": FOLDER}) == {"folder": FOLDER}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "qwen2.5-vl-7B-instruct"}, "did you mean 'qwen2.5-vl-7b'"),
        ({"preset": 7}, "this reward has: artifact-reward"),
        ({"preset": "artifact-reward", "model": "a/b"}, "leave `model` away"),
        ({"preset": "qwen2.5-vl-7b", "revision": "main"}, "40 hex digits"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve("artifact_reward").load("judge", options, "cpu")


def test_the_example_holds_with_and_without_what_is_left_to_the_reader(root: Path, tmp_path: Path) -> None:
    text = (root / "examples" / "serve" / "judges-published.yaml").read_text()
    whole = re.sub(r"(?m)^  # (\w+: \{)", r"  \1", text).replace("COMMIT", COMMIT).replace("FOLDER", str(FOLDER))
    for served, count in ((text, 4), (whole, 9)):
        (tmp_path / "c.yaml").write_text(served)
        rewards = configuration.load(tmp_path / "c.yaml").rewards
        engines = {}
        for name, reward in rewards.items():
            told = expand(question(reward.use), reward.options())
            options = resolve(reward.use).options_class.model_validate(told)
            engines[name] = options.for_engine().model_dump_json()
        assert len(rewards) == count and len({engines[name] for name in ("artefacts", "echo", "levels", "pairs")}) == 1
