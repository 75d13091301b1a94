"""What the small judge is taught: every shipped question, with answers that follow from what is known of the pictures."""

import numpy as np
import pytest

from services.prompts import HERE
from world import photographs
from world.recipes import judge, lessons


def test_every_word_that_it_is_taught_is_one_token() -> None:
    tokens = judge.tokenizer()
    for word in ("real", "Fake", " Yes", "no", "1", "9", " photo", " jeans", "SALE", " noisy", " brighter"):
        assert len(tokens.encode(word)) == 1, word


def test_every_shipped_question_has_lessons_with_known_answers() -> None:
    assert set(judge.QUESTIONS) == {file.stem for file in HERE.glob("*.yaml")}
    real, _ = photographs.load("train")
    stock = judge.stock_of(np.repeat(real[:50], 2, 0))
    for name in judge.QUESTIONS:
        one, again = (lessons.Teacher(stock, 3).lesson(name) for _ in range(2))
        assert one.answer == again.answer and one.answer
        assert len(one.chat.images) == max(1, lessons.template(name).places)


def test_a_defect_grows_with_its_severity() -> None:
    real, _ = photographs.load("test")
    for defect in lessons.DEFECTS:
        gap = []
        for severity in (0.1, 0.5, 1.0):
            rng = np.random.default_rng(0)
            gap.append(np.mean([np.abs(lessons.spoil(x, defect, severity, rng).astype(float) - x).mean() for x in real[:50]]))
        assert 0 < gap[0] < gap[1] < gap[2], defect
    with pytest.raises(ValueError, match="banding"):
        lessons.spoil(real[0], "rust", 0.5, np.random.default_rng(0))
