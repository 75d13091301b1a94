"""What every registered reward keeps to, whoever wrote it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from services.config import ROOT
from services.registry import REWARDS, resolve
from services.reward import Item, Reward
from shared.schema import Score
from tests.services.rewards_clip import tiny as tiny_clip
from tests.services.rewards_detectors import tiny as tiny_detectors

JUDGE = {"folder": ROOT / "world" / "judge"}
OPTIONS: dict[str, Mapping[str, Any]] = {
    "detector": {"folder": ROOT / "world" / "detector"},
    "alignment": {"folder": ROOT / "world" / "alignment"},
    "realism": {"parts": {"detector": {"weight": 1}}},
    "omniaid": tiny_detectors.contract_options("omniaid"),
    "dino_head": tiny_detectors.contract_options("dino_head"),
    "pickscore": tiny_clip.Tiny("pickscore"),
    "hpsv2": tiny_clip.Tiny("hpsv2"),
    "hpsv3": tiny_clip.Tiny("hpsv3"),
    "image_reward": tiny_clip.Tiny("image_reward"),
    "aesthetic": tiny_clip.Tiny("aesthetic"),
    "forensic_chat": JUDGE,
    "prompt_echo": JUDGE,
    "artifact_reward": JUDGE,
    "reward_dance": JUDGE,
    "z_reward": JUDGE,
    "unified_reward": JUDGE,
    "edit_score": JUDGE,
    "rational_rewards": JUDGE,
    "ocr_judge": JUDGE,
    "auto_rubric": {**JUDGE, "rubrics": [{"text": "It is sharp.", "weight": 2}, {"text": "It has no bands.", "weight": -1}]},
    "unified_compare": JUDGE,
}
PLAIN = sorted(set(REWARDS) - {"realism"})


@pytest.fixture(scope="module")
def rewards() -> dict[str, Any]:
    return {name: resolve(name).load(name, OPTIONS.get(name, {}), "cpu") for name in REWARDS}


def items(prompt: str | None) -> list[Item]:
    rng = np.random.default_rng(0)
    sizes = [(16, 16), (28, 28), (40, 17), (100, 64), (28, 28)]
    reference = np.full((32, 32, 3), 128, np.uint8)
    return [Item(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), prompt, (reference,)) for h, w in sizes]


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_it_says_what_it_is(rewards: dict[str, Any], name: str) -> None:
    info = rewards[name].info
    assert info.name == name and info.description and info.version >= 1 and info.licence


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_misspelt_options_are_refused_before_anything_loads(name: str) -> None:
    with pytest.raises(ValueError, match="flavour"):
        resolve(name).load(name, {**OPTIONS.get(name, {}), "flavour": 1}, "cpu")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("prompt", [None, 'a photo of a bag that says "SALE"', ""])
def test_one_score_per_item_in_order_and_in_range(rewards: dict[str, Any], name: str, prompt: str | None) -> None:
    reward = rewards[name]
    assert isinstance(reward, Reward)
    batch = items(prompt)
    scores = reward.score(batch)
    assert len(scores) == len(batch) and all(isinstance(score, Score) for score in scores)
    for score in scores:
        if score.value is not None:
            assert math.isfinite(score.value)
            if reward.info.range is not None:
                assert reward.info.range[0] <= score.value <= reward.info.range[1]
        else:
            assert score.error is not None and score.error.title
    if not prompt and "prompt" in reward.info.needs:
        assert {s.error.type for s in scores if s.error} == {"urn:verism:prompt-missing"}
    if prompt:
        assert all(score.status == "ok" for score in scores)


@pytest.mark.parametrize("name", PLAIN)
def test_a_score_does_not_depend_on_its_neighbours(rewards: dict[str, Any], name: str) -> None:
    batch = items('a bag with "SALE"')
    together = [score.value for score in rewards[name].score(batch)]
    alone = [rewards[name].score([item])[0].value for item in batch]
    assert together == pytest.approx(alone, abs=1e-5)
    backwards = [score.value for score in rewards[name].score(batch[::-1])]
    assert backwards[::-1] == pytest.approx(together, abs=1e-5)


def test_ocr_reads_what_is_written(rewards: dict[str, Any]) -> None:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(picture).text((30, 30), "OPEN", fill="black", font=ImageFont.load_default(60))
    score, other = rewards["ocr"].score(
        [Item(np.asarray(picture), 'a sign that says "OPEN"'), Item(np.asarray(picture), 'it says "XYZQ"')]
    )
    assert score.value == 1.0 and score.text == "OPEN"
    assert other.value == 0.0


def test_compressible_pictures_are_small(rewards: dict[str, Any]) -> None:
    flat = Item(np.full((64, 64, 3), 100, np.uint8))
    noise = items(None)[3]
    a, b = rewards["jpeg_size"].score([flat, noise])
    assert a.value is not None and b.value is not None and a.value < b.value
    assert rewards["jpeg_size"].info.higher_is_better is False
