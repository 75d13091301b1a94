"""What a rewrite costs by its text: known cases, bounds, and hostile text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.language.config import PenaltiesConfig
from trainer.language.penalties import complaints, costs, form, length, missing, painted, repetition

DOG = "a dog on a beach"


@pytest.mark.parametrize(
    ("answer", "found", "cost"),
    [
        ("A brown dog runs along a beach, soft evening light", (), 0.0),
        ("", ("empty",), 1.0),
        (" ... ", ("empty",), 1.0),
        ("I'm sorry, I cannot do that", ("refusal",), 1.0),
        ("Here is the prompt: a dog on a wet beach", ("opening",), 0.5),
        ('"a dog on a wet beach"', ("quotes",), 0.5),
        ("**a dog** on a wet beach", ("markup",), 0.5),
        ("a dog\non a wet beach", ("lines",), 0.5),
        ('Sure! Here is the prompt:\n\n"a dog on a wet beach"', ("opening", "quotes", "lines"), 0.875),
    ],
)
def test_form(answer: str, found: tuple[str, ...], cost: float) -> None:
    assert complaints(DOG, answer) == found and form(found) == cost


def test_an_echo_of_the_instruction() -> None:
    told = "Rewrite the prompt so that the picture looks like a photograph that somebody took, and add nothing else"
    said = "a dog so that the picture looks like a photograph that somebody took, and add nothing else"
    assert complaints(DOG, said, told) == ("instruction",) and complaints(DOG, said, "") == ()


def test_what_is_painted() -> None:
    assert painted(DOG, 'Here is the prompt:\n\n"a wet dog on a beach"') == "a wet dog on a beach"
    assert painted(DOG, "") == painted(DOG, "I'm sorry, I can't") == painted(DOG, "!!") == DOG, (
        "nothing of use: the user's own words"
    )
    assert painted(DOG, "a red car") == "a red car", "a rewrite that lost its subject is painted, or nobody would see what it costs"


@pytest.mark.parametrize(("count", "cost"), [(0, 1.0), (2, 0.5), (4, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (99, 1.0)])
def test_length(count: int, cost: float) -> None:
    assert length(count, 4, 10) == cost


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("a brown dog on a beach in soft light, a brown coat of fur", 0.0, 0.1),
        ("dog dog dog dog", 1.0, 1.0),
        ("soft light, fine grain, soft light, fine grain, soft light, fine grain", 0.5, 1.0),
        ("dog", 0.0, 0.0),
        ("dog dog", 0.5, 0.5),
        ("", 0.0, 0.0),
    ],
)
def test_repetition(text: str, low: float, high: float) -> None:
    assert low <= repetition(text) <= high


@pytest.mark.parametrize(
    ("prompt", "text", "share"),
    [
        ("two red bags", "a bag of red leather, two of them", 0.0),
        ("a dog on a beach", "a cat in a tree", 1.0),
        ("a dog on a beach", "a dog in a tree", 0.5),
        ("a photo of a coat", "a coat", 0.0),
        ("собака на пляже", "бурая собака бежит по пляжу", 1 / 3),  # a preposition is a word like any other
        ("собака на пляже", "бурая кошка", 1.0),
        ("海滩上的狗", "一只狗在海滩上奔跑", 0.2),  # of five letters one, a particle, is not there
        ("a dog", "一只狗", 0.0),  # another script: words cannot tell
        ("a photo of", "anything", 0.0),
    ],
)
def test_a_lost_subject(prompt: str, text: str, share: float) -> None:
    assert missing(prompt, text) == pytest.approx(share)


def test_costs_are_weighed_and_told() -> None:
    raw = {"length": {"min": 3, "max": 4, "weight": 2.0}, "format": {"weight": 1.0}, "subject": {"weight": 0.0}}
    config = PenaltiesConfig.model_validate({**raw, "truncated": {"use": "penalise", "weight": 0.25}})
    answers = ["a dog, soft light", "a cat in soft light of an evening", '"a wet dog"']
    out = costs([DOG] * 3, answers, torch.tensor([5, 9, 4]), torch.tensor([True, False, True]), config)
    assert out.values_B["length"].tolist() == [0.0, 1.0, 0.0] and out.values_B["subject"].tolist() == [0.5, 1.0, 0.5]
    assert out.total_B.tolist() == [0.0, 2.25, 0.5]
    assert out.numbers["penalty/truncated"] == pytest.approx(1 / 3) and out.numbers["rewrites/quotes"] == pytest.approx(1 / 3)
    assert out.numbers["penalty/total"] == pytest.approx(2.75 / 3) and out.numbers["rewrites/words"] == pytest.approx(15 / 3)
    tokens = PenaltiesConfig.model_validate({"length": {"min": 6, "max": 8, "unit": "tokens"}})
    counted = costs([DOG] * 2, answers[:2], torch.tensor([3, 10]), torch.tensor([True, True]), tokens)
    assert counted.values_B["length"].tolist() == [0.5, 0.25]


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=60))
def test_any_text_costs_between_nothing_and_one(prompt: str, answer: str, instruction: str) -> None:
    for value in (form(complaints(prompt, answer, instruction)), repetition(answer), missing(prompt, answer)):
        assert 0.0 <= value <= 1.0
    assert painted(prompt, answer) == prompt or painted(prompt, answer).strip()
