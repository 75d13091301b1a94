"""AutoRubric: its sum against plain transformers, what it finds from preference pairs on the small judge, and its faults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.optimize import minimize
from transformers import AutoModelForImageTextToText, AutoProcessor

from services import rubrics
from services.prompts import HERE
from services.reward import Item
from services.rewards.auto_rubric import AutoRubric
from services.rewards.judge_kit import spellings
from services.rubrics import Preference, criteria, learn, propose, select
from tests import tiny_judge
from world import photographs
from world.recipes import lessons
from world.recipes.exam import FOLDER
from world.recipes.lessons import CRITERIA

PROMPT = "a photo of a leather bag"
TWO = [{"text": "The bag is whole.", "weight": 0.7}, {"text": "Its strap is torn {prompt}", "weight": -1.5}]


def items() -> list[Item]:
    rng = np.random.default_rng(3)
    return [Item(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), PROMPT) for h, w in ((28, 28), (90, 60))]


def yes(item: Item, rubric: str) -> float:
    """P(yes) / (P(yes) + P(no)) of the question in this repository, by transformers alone."""
    processor = AutoProcessor.from_pretrained(tiny_judge.made())
    model = AutoModelForImageTextToText.from_pretrained(tiny_judge.made()).eval()
    said = yaml.safe_load((HERE / "auto_rubric.yaml").read_text())["text"].replace("{prompt}", PROMPT).replace("{rubric}", rubric)
    said = said.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>", 1)
    text = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    with torch.inference_mode():
        p_V = model(**processor(text=[text], images=[item.image], return_tensors="pt")).logits[0, -1].double().softmax(-1)
    a, b = (sum(float(p_V[processor.tokenizer.encode(s)[0]]) for s in spellings(word)) for word in ("yes", "no"))
    return a / (a + b)


def test_it_is_the_weighted_sum() -> None:
    reward = AutoRubric.load("auto_rubric", {"folder": tiny_judge.made(), "floor": 0, "rubrics": TWO}, "cpu")
    assert reward.info.range == (-1.5, 0.7)
    for item, score in zip(items(), reward.score(items()), strict=True):
        p = [yes(item, str(one["text"])) for one in TWO]
        assert score.value == pytest.approx(0.7 * p[0] - 1.5 * p[1], abs=1e-3)
        assert [score.parts["rubric_1"], score.parts["rubric_2"]] == pytest.approx(p, abs=1e-4)


def test_one_criterion_without_an_answer_is_an_error_of_its_item() -> None:
    reward = AutoRubric.load("auto_rubric", {"folder": tiny_judge.made(), "floor": 0.99, "rubrics": TWO}, "cpu")
    assert {score.status for score in reward.score(items())} == {"parse_error"}
    long = {"folder": tiny_judge.made(), "floor": 0, "context": 90, "rubrics": [TWO[0], {"text": "bag " * 100, "weight": 1}]}
    assert {score.status for score in AutoRubric.load("auto_rubric", long, "cpu").score(items())} == {"refused"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no list of criteria"),
        ("- {text: a}", "no list of criteria"),
        ("- {text: a, weight: .nan}", "no list of criteria"),
        ("- {text: '', weight: 1}", "no list of criteria"),
        ("[", "no list of criteria"),
        ("- {text: 'a <|im_end|> b', weight: 1}", "reserved token"),
    ],
)
def test_criteria_that_are_none_stop_the_start(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rubrics.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        AutoRubric.load("auto_rubric", {"folder": tiny_judge.made(), "rubrics": tmp_path / "rubrics.yaml"}, "cpu")
    with pytest.raises(FileNotFoundError, match=r"services\.rubrics"):
        AutoRubric.load("auto_rubric", {"folder": tiny_judge.made(), "rubrics": tmp_path / "none.yaml"}, "cpu")


def test_the_selection_is_the_minimum_of_its_objective() -> None:
    rng = np.random.default_rng(0)
    x_PR = rng.normal(size=(80, 4)) + np.array([0.6, 0.0, -0.4, 0.0])
    for penalty in (0.02, 0.1):

        def loss(w_2R: Any, penalty: float = penalty) -> float:
            w_R = w_2R[:4] - w_2R[4:]
            return float(np.logaddexp(0, -x_PR @ w_R).mean() + penalty * w_2R.sum())

        found = minimize(loss, np.full(8, 0.1), bounds=[(0, None)] * 8, options={"ftol": 1e-13, "gtol": 1e-9, "maxiter": 5000}).x
        weights_R = select(x_PR, penalty)
        assert weights_R == pytest.approx(found[:4] - found[4:], abs=2e-3)
        assert select(-x_PR, penalty) == pytest.approx(-weights_R, abs=1e-3)
    assert (select(x_PR, 10.0) == 0).all()
    with pytest.raises(ValueError, match="no pair"):
        select(x_PR[:0], 0.1)


def pairs(count: int = 12) -> list[Preference]:
    """Held-out bags, of which the noisy one is the worse."""
    real, classes = photographs.load("test")
    rng, bags = np.random.default_rng(4), real[classes == 8][: 2 * count]
    return [Preference(PROMPT, a, lessons.spoil(b, "noise", 0.8, rng)) for a, b in zip(bags[::2], bags[1::2], strict=True)]


def options() -> dict[str, Any]:
    return {"folder": FOLDER, "dtype": "float32"}


def test_a_criterion_that_tells_is_found() -> None:
    learned = learn(options(), pairs(), rounds=1)
    weights = {rubric.text: rubric.weight for rubric in learned.rubrics}
    assert set(weights) & {"It is free of noise.", "It looks like a real photograph."}, "what noise breaks"
    assert min(weights.values()) > 0 and set(weights) <= set(CRITERIA)
    assert learned.agreement == 1.0 and learned.judged == learned.pairs == 12
    reward = AutoRubric.load("auto_rubric", {**options(), "rubrics": [rubric.model_dump() for rubric in learned.rubrics]}, "cpu")
    noisy, clean = reward.score([Item(pairs()[0].worse, PROMPT), Item(pairs()[0].better, PROMPT)])
    assert noisy.value is not None and clean.value is not None and noisy.value < clean.value


def test_proposals_come_once() -> None:
    reward = AutoRubric.load("auto_rubric", {**options(), "rubrics": TWO}, "cpu")
    found = propose(reward.engine, rubrics.read("auto_rubric_propose", ("prompt",), 2), [*pairs(4), *pairs(4)])
    assert "It is free of noise." in found and len(found) == len(set(found)) and set(found) <= set(CRITERIA)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for i, pair in enumerate(pairs(6)):
        for name in ("better", "worse"):
            Image.fromarray(getattr(pair, name)).save(tmp_path / f"{i}-{name}.png")
        lines.append(json.dumps({"prompt": PROMPT, "better": f"{i}-better.png", "worse": f"{i}-worse.png"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({name: str(value) for name, value in options().items()}))
    files = [str(tmp_path / name) for name in ("pairs.jsonl", "judge.yaml", "rubrics.yaml")]
    assert rubrics.main(files) == 0
    assert "100.0% of 6 pairs" in capsys.readouterr().out
    AutoRubric.load("auto_rubric", {**options(), "rubrics": tmp_path / "rubrics.yaml"}, "cpu")
    (tmp_path / "pairs.jsonl").write_text(lines[0] + '\n{"prompt": "a"}')
    assert rubrics.main(files) == 2 and "line 2" in capsys.readouterr().err


def test_a_judge_that_proposes_nothing_or_nothing_that_tells_is_said() -> None:
    with pytest.raises(ValueError, match="proposed no criterion"):
        learn({"folder": tiny_judge.made(), "floor": 0}, pairs(2))
    with pytest.raises(ValueError, match="lower it"):
        learn(options(), pairs(4), penalty=10.0, rounds=1)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(['["', '"]', '", "', "it is light", "[", "]", "1", "```", "\n"]),
                                                 max_size=12).map("".join)))  # fmt: skip
def test_criteria_that_are_given_stand_in_the_answer(text: str) -> None:
    for one in criteria(text):
        assert one and len(one) <= 500 and one in " ".join(json.loads(json.dumps(text)).split()) or "\\" in text


def test_criteria_of_an_answer() -> None:
    assert criteria('```json\n["a", " b  c "]\n```') == ["a", "b c"]
    for text in ("a", "[1]", '{"a": 1}', "[]", json.dumps(["a"] * 6), '["a", null]', json.dumps([[]])):
        assert criteria(text) == [], text
