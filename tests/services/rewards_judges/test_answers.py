"""Strict readers of answers: what they read, what they leave, and that no text makes one raise or invent a number."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prompts.answers import boxed, choice, is_refusal, json_fields, json_scores, json_value, number, tagged

BETTER = {"first": r"image 1 is (?:the )?better", "second": r"image 2 is (?:the )?better", "tie": r"equally good"}
PIECES = ["Final Score", ":", " ", "**", "3", "3.5", "4/5", "-1", "5%", "[1, 2]", "{", "}", '"a"', "NaN", "1e9", "<answer>", "</answer>",
          "\\boxed{", "٣", "Image 1 is better", "```json", "```", "\n", "score", "0x3", "3-4", ","]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=14).map("".join))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Final Score: 3.5", 3.5),
        ("I think so.\n**Final Score**: 4.", 4.0),
        ("final score = **5**", 5.0),
        ("Final Score: 4/5", 4.0),
        ("Final Score: 3, because. Final Score: 3", 3.0),
        ("Final Score: 3 ... Final Score: 4", None),
        ("Final Score: 4/10", None),
        ("Final Score: 7", None),
        ("Final Score: -3", None),
        ("Final Score: 80%", None),
        ("Final Score: 3-4", None),
        ("Final Score: 3.", 3.0),
        ("Final Score: 3.5.1", None),
        ("Final Score: 3e9", None),
        ("Final Score: 3rd", None),
        ("Final Score: three", None),
        ("Final Score: ٣", None),
        ("Semifinal Score: 3", None),
        ("The score is 3", None),
        ("Final Score:", None),
        ("", None),
    ],
)
def test_a_number_after_its_label(text: str, wanted: float | None) -> None:
    assert number(text, 1, 5, "Final Score") == wanted


def test_a_number_alone() -> None:
    assert number(" 4.5\n", 1, 5) == 4.5
    assert number("4.5 or so", 1, 5) is None and number("nan", 1, 5) is None and number("6", 1, 5) is None


def test_json_in_an_answer() -> None:
    assert json_scores("[4, 2.5]", 2, 0, 10) == (4.0, 2.5)
    assert json_scores('Well:\n```json\n{"score": [4, 2], "reasoning": "a [b] {c}"}\n```', 2, 0, 10, "score") == (4.0, 2.0)
    assert json_fields('{"a": 1, "b": 2.5, "c": "x"}', ["a", "b"], 0, 5) == {"a": 1.0, "b": 2.5}
    for text in (
        "[4]",
        "[4, 2, 1]",
        "[4, 11]",
        "[4, true]",
        '[4, "2"]',
        "[4, NaN]",
        "[4, 1e999]",
        "[4, null]",
        "4, 2",
        "[4, 2",
        "[" * 9999,
    ):
        assert json_scores(text, 2, 0, 10) is None, text
    assert json_fields('{"a": 1, "a": 5}', ["a"], 0, 5) is None
    assert json_value("```json\n[1]\n``` or ```json\n[2]\n```") is None


def test_tags_boxes_and_choices() -> None:
    assert tagged("<think>no</think><Answer> Image 1 is better </Answer>", "answer") == "Image 1 is better"
    assert boxed(r"so \boxed{4}") == "4"
    assert choice("After all, image 2 is better.", BETTER) == "second"
    for text in ("<answer>a</answer><answer>b</answer>", "<answer>a", "a</answer>", "<answer><answer>a</answer>", ""):
        assert tagged(text, "answer") is None, text
    assert boxed(r"\boxed{1} \boxed{2}") is None
    assert choice("Image 1 is better. No, image 2 is better.", BETTER) is None and choice("neither", BETTER) is None


def test_refusals_are_told_from_answers() -> None:
    for text in ("I'm sorry, but I can't help", "Sorry, no.", "As an AI model", "I cannot judge this", "I’m unable to see it"):
        assert is_refusal(text), text
    for text in ("real", "Fake.", "The image shows that I can see", "Das ist echt", ""):
        assert not is_refusal(text), text


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_a_number_that_is_given_stands_in_the_text(text: str) -> None:
    for label in ("Final Score", None):
        value = number(text, 1, 5, label)
        if value is not None:
            assert 1 <= value <= 5 and value in {float(n) for n in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)}


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.integers(0, 3))
def test_scores_that_are_given_stand_in_the_text(text: str, count: int) -> None:
    for found in (json_scores(text, count, 0, 10), json_scores(text, count, 0, 10, "a")):
        if found is not None:
            there = re.findall(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", text)
            assert len(found) == count and all(0 <= one <= 10 and one in {float(n) for n in there} for one in found)
    fields = json_fields(text, ["a"], 0, 10)
    assert fields is None or '"a"' in text or "\\u" in text


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_words_that_are_given_stand_in_the_text(text: str) -> None:
    for found in (tagged(text, "answer"), boxed(text)):
        assert found is None or found in text
    assert choice(text, BETTER) in (None, *BETTER)
    assert isinstance(is_refusal(text), bool)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.sampled_from("ab"), x, max_size=2), max_leaves=8))  # fmt: skip
def test_any_json_is_read_or_left(value: Any) -> None:
    text = json.dumps(value)
    found = json_scores(text, 2, 0, 1)
    if found is not None:
        assert isinstance(value, (list, dict))
    if isinstance(value, list) and len(value) == 2 and all(type(v) is float and 0 <= v <= 1 for v in value):
        assert found == tuple(value)
