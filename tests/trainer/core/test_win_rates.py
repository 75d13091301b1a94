"""Win rates as rewards (Pref-GRPO) and uncertain scores, from a real service: whole groups out, rates and standard errors back."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.process import running
from tests.trainer.core.comparer import LEAN
from tests.trainer.run.service import recipe
from trainer import loop
from trainer.config import ConfigError, RewardConfig, RunConfig
from trainer.metrics import read
from trainer.scoring import Pending, Scorer

GREYS = [10, 60, 110, 160, 200, 14, 40, 20]
GROUPS = ["a"] * 4 + ["b"] * 4
PROMPTS = ["a bag"] * 4 + ["a boot"] * 4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("comparer") / "c.yaml"
    kit = "tests.trainer.core.comparer"
    config.write_text(
        json.dumps(
            {
                "device": "cpu",
                "rewards": {
                    "brighter": {"use": f"{kit}:Brighter"},
                    "bright": {"use": f"{kit}:Bright"},
                    "dark": {"use": f"{kit}:Bright"},
                },
            }
        )
    )
    with running(config) as served:
        yield served


def pictures(greys: list[int]) -> NDArray[np.uint8]:
    return np.stack([np.full((16, 16, 3), grey, np.uint8) for grey in greys])


def scorer(url: str, **rewards: dict[str, Any]) -> Scorer:
    return Scorer({name: RewardConfig(url=url, **options) for name, options in rewards.items()}, 30.0)


def p(first: int, second: int) -> float:
    """Both orders averaged: the lean cancels."""
    return 0.5 + (first - second) / 512


def test_a_group_s_win_rates_overlap_with_single_scores(url: str) -> None:
    with scorer(url, brighter={"compare": {}}, bright={"weight": 0.5}) as made:
        pending = made.submit(pictures(GREYS), PROMPTS, GROUPS)
        assert isinstance(pending, Pending)
        rewards = made.collect([pending])
        assert pending.done()
    a = [float(np.mean([p(x, y) for y in GREYS[:4] if y != x])) for x in GREYS[:4]]
    judged = [200, 40, 20]
    b = {x: float(np.mean([p(x, y) for y in judged if y != x])) for x in judged}
    np.testing.assert_allclose(rewards.values_RB[0], [*a, b[200], math.nan, b[40], b[20]], atol=1e-6)
    np.testing.assert_allclose(rewards.values_RB[1], np.array(GREYS) / 255, atol=1e-6)
    assert rewards.mask_RB[0].tolist() == [True] * 5 + [False, True, True] and rewards.missing == 1
    assert rewards.failures == {"urn:verism:answer-unparsable": 3}, "its three pairs"
    assert rewards.versions["brighter"] == 3
    assert 0 < rewards.notes["reward/brighter/standard_error"] < 0.5
    assert rewards.notes["reward/brighter/shown_first"] == pytest.approx(0.5 + LEAN, abs=1e-6)
    assert made.single_R.tolist() == [False, True]


@pytest.mark.parametrize(
    ("plan", "partners"), [({"plan": "anchor", "anchors": 1}, {1: [10]}), ({"plan": "swiss", "rounds": 1}, None)]
)
def test_plans_ask_fewer_pairs(url: str, plan: dict[str, Any], partners: dict[int, list[int]] | None) -> None:
    with scorer(url, brighter={"compare": plan}) as made:
        rewards = made.collect([made.submit(pictures(GREYS[:4]), PROMPTS[:4], GROUPS[:4])])
    rates = rewards.values_RB[0].tolist()
    if partners is not None:
        assert rates[1:] == pytest.approx([p(x, 10) for x in GREYS[1:4]], abs=1e-6)
    else:
        assert rates[0] + rates[1] == pytest.approx(1) and rates[2] + rates[3] == pytest.approx(1)


def test_outside_of_groups_nothing_is_compared_and_nothing_is_missing(url: str) -> None:
    with scorer(url, brighter={"compare": {}}, bright={}) as made:
        rewards = made.collect([made.submit(pictures(GREYS), PROMPTS, [""] * 8)])
        assert rewards.values_RB[0].isnan().all() and rewards.mask_RB[1].all()
        assert rewards.missing == 0 and rewards.failures == {} and rewards.notes == {}
        assert loop.total(made, rewards.values_RB, None).isfinite().all(), "the total is of what scores single pictures"


@pytest.mark.parametrize(("part", "unsure"), [("sigma", 1), ("spread", 1), ("standard_error", 0)])
def test_the_uncertainty_that_a_recipe_names(url: str, part: str, unsure: int) -> None:
    rewards: dict[str, dict[str, Any]] = {"brighter": {"compare": {}}, "bright": {}}
    rewards[list(rewards)[unsure]]["uncertainty"] = {"part": part}
    with scorer(url, **rewards) as made:
        out = made.collect([made.submit(pictures(GREYS), PROMPTS, GROUPS)])
    row = out.uncertainty[list(rewards)[unsure]]
    assert row.isnan().tolist() == [grey == 14 for grey in GREYS]
    if unsure:
        np.testing.assert_allclose(row[:5], 1 - np.array(GREYS[:5]) / 255, atol=1e-6)


def test_what_a_service_cannot_do_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no /v1/compare for it"):
        scorer(url, bright={"compare": {}})
    with pytest.raises(ConfigError, match=r"set rewards\.brighter\.compare\.plan=swiss"):
        scorer(url, brighter={})


def test_a_run_learns_from_win_rates(url: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    raw = recipe(
        url, steps=1, rewards={"brighter": {"url": url, "compare": {"plan": "swiss"}}, "bright": {"url": url, "weight": 0}}
    )
    raw["eval"] = {**raw["eval"], "monitors": "world/monitors"}  # type: ignore[dict-item]
    made = loop.Run(RunConfig.model_validate(raw), tmp_path / "run")
    try:
        loop.train(made)
    finally:
        made.close()
    lines = read(tmp_path / "run" / "metrics.jsonl")
    step = next(line for line in lines if line["kind"] == "step")
    assert step["reward/brighter/mean"] == pytest.approx(0.5, abs=1e-6) and not step["skipped"] and step["failed_scores"] == 0
    assert step["reward/brighter/standard_error"] > 0 and step["grad_norm"] > 0
    evaluation = next(line for line in lines if line["kind"] == "eval")
    assert evaluation["reward/brighter/mean"] is None and evaluation["failed_scores"] == 0
    assert evaluation["reward/bright/mean"] > 0


def test_gardo_s_gate_and_diversity_in_a_run_that_resumes(
    url: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample that is bright is doubted by `dark`; the share moves from the second step on, and comes back with a checkpoint."""
    monkeypatch.chdir(root)
    gardo = {"gate": True, "aux": ["dark"], "diversity": True, "history": 1, "share": 0.15}
    raw = recipe(url, steps=3, rewards={"bright": {"url": url}, "dark": {"url": url, "weight": 0}}, gardo=gardo)
    raw |= {"kl": {"use": "v_kl", "weight": 0.1}, "checkpoint_every": 1}
    raw["eval"] = {**raw["eval"], "every": 3, "monitors": "world/monitors"}  # type: ignore[dict-item]
    config = RunConfig.model_validate(raw)

    def train(name: str, steps: int, resume: bool = False) -> list[dict[str, Any]]:
        made = loop.Run(config, tmp_path / name, resume=resume)
        try:
            loop.train(made, stop=lambda: made.done >= steps < 3)
        finally:
            made.close()
        return [line for line in read(tmp_path / name / "metrics.jsonl") if line["kind"] == "step"]

    whole = train("whole", 3)
    assert all(0 < line["gardo/held"] < 0.5 and not line["skipped"] for line in whole)
    train("halves", 2)
    halves = train("halves", 3, resume=True)
    for key in ("gardo/share", "gardo/held", "loss", "grad_norm", "kl"):
        assert [line[key] for line in halves] == [line[key] for line in whole], key
