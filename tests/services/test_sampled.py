"""What a service does with judges that sample, and with files that their options name."""

import json
from pathlib import Path

import pytest

from services.app import create_app
from services.config import ROOT, ServiceConfig
from tests import tiny_judge


def test_sampled_judgements_are_never_cached() -> None:
    judge = {"folder": str(tiny_judge.made()), "batch_cap": 2, "max_tokens": 1}
    rewards = {
        "edits": {"use": "edit_score", **judge},
        "greedy": {"use": "unified_reward", **judge},
        "sampled": {"use": "unified_reward", **judge, "temperature": 0.5},
        "small": {"use": "unified_reward", **judge, "cache_items": 3},
    }
    config = ServiceConfig.model_validate({"device": "cpu", "threads": 1, "rewards": rewards})
    served = create_app(config, tuned=False).state.verism.rewards
    assert {name: one.cache.size for name, one in served.items()} == {"edits": 0, "greedy": 4096, "sampled": 0, "small": 3}


@pytest.mark.parametrize("key", ["template", "quality_template", "rubrics"])
def test_files_of_the_repository_are_found_from_elsewhere(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = "services/prompts/edit_score_quality.yaml"
    config = ServiceConfig.model_validate({"rewards": {"edits": {"use": "edit_score", key: file}}})
    assert config.rewards["edits"].options() == {key: str(ROOT / file)}
    listed = [{"text": "sharp", "weight": 1.0}]
    other = ServiceConfig.model_validate_json(json.dumps({"rewards": {"edits": {"use": "auto_rubric", key: listed}}}))
    assert other.rewards["edits"].options() == {key: listed}
