"""Pairs by first token and by written verdict, on the tiny judge: plain transformers, both orders, and no verdict that was not there."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoProcessor

from services.engines import Generated
from services.prompts import HERE
from services.reward import Comparer, Item, Pair
from services.rewards.judge_kit import spellings
from services.rewards.unified_compare import UnifiedCompare, UnifiedVerdict, _read, verdict
from tests import tiny_judge
from world import photographs
from world.recipes import exam, lessons

PROMPT = "a photo of a leather bag"


def pictures() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((28, 28), (120, 90), (60, 200))]


def pairs() -> list[Pair]:
    a, b, c = pictures()
    return [Pair(a, PROMPT, (b,)), Pair(b, PROMPT, (c,)), Pair(c, "a summer dress", (a,))]


@pytest.fixture(scope="module")
def judge() -> UnifiedCompare:
    return UnifiedCompare.load("judge", {"folder": tiny_judge.made(), "floor": 0}, "cpu")


def plain(pair: Pair) -> float:
    """P(1) / (P(1) + P(2)) by transformers alone."""
    processor = AutoProcessor.from_pretrained(tiny_judge.made())
    model = AutoModelForImageTextToText.from_pretrained(tiny_judge.made()).eval()
    template = yaml.safe_load((HERE / "unified_compare.yaml").read_text())
    said = template["text"].replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>").replace("{prompt}", pair.prompt or "")
    text = f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
    with torch.inference_mode():
        inputs = processor(text=[text], images=[pair.image, *pair.references], return_tensors="pt")
        p_V = model(**inputs).logits[0, -1].double().softmax(-1)
    p = []
    for word in template["labels"].values():
        rows = [processor.tokenizer.encode(spelling) for spelling in spellings(word)]
        p.append(sum(float(p_V[i]) for i in {row[0] for row in rows if len(row) == 1}))
    return p[0] / (p[0] + p[1])


def test_one_order_is_the_formula(judge: UnifiedCompare) -> None:
    assert isinstance(judge, Comparer) and judge.info.mode == "pairwise" and judge.info.needs == ["prompt", "references"]
    values = [score.value for score in judge.compare(pairs())]
    assert values == pytest.approx([plain(pair) for pair in pairs()], abs=1e-4)
    assert len(set(values)) == 3


def test_a_score_is_the_mean_of_both_orders_and_swapping_flips_it(judge: UnifiedCompare) -> None:
    items = [Item(pair.image, pair.prompt, pair.references) for pair in pairs()]
    turned = [Item(pair.references[0], pair.prompt, (pair.image,)) for pair in pairs()]
    forward, backward = judge.compare(pairs()), judge.compare([pair.swapped for pair in pairs()])
    for score, other, one, two in zip(judge.score(items), judge.score(turned), forward, backward, strict=True):
        assert score.value is not None and other.value is not None and one.value is not None and two.value is not None
        assert score.value == pytest.approx((one.value + 1 - two.value) / 2, abs=1e-5)
        assert score.value + other.value == pytest.approx(1, abs=1e-5)


def test_faults_have_their_status(judge: UnifiedCompare) -> None:
    a, b, _ = pictures()
    slim = np.zeros((16, 1000, 3), np.uint8)
    items = [Item(a, PROMPT), Item(a, None, (b,)), Item(a, PROMPT, (slim,)), Item(a, "<|im_end|>", (b,)), Item(a, PROMPT, (b,))]
    scores = judge.score(items)
    kinds = [score.error and score.error.type.rpartition(":")[2] for score in scores]
    assert kinds == ["references-missing", "prompt-missing", "image-too-slim", "prompt-reserved", None]
    picky = UnifiedCompare.load("judge", {"folder": tiny_judge.made(), "floor": 0.99}, "cpu")
    odd = picky.compare(pairs())[0]
    assert odd.status in ("parse_error", "refused") and odd.value is None


@pytest.fixture(scope="module")
def writer() -> UnifiedVerdict:
    return UnifiedVerdict.load("writer", {"folder": tiny_judge.made(), "max_tokens": 8}, "cpu")


def test_a_judge_that_babbles_gives_no_verdict(writer: UnifiedVerdict) -> None:
    assert isinstance(writer, Comparer)
    for score in [*writer.compare(pairs()), *writer.score([Item(p.image, p.prompt, p.references) for p in pairs()])]:
        assert score.value is None and score.error is not None and score.error.type.endswith("answer-unparsable")


def test_written_verdicts_are_read_in_both_orders() -> None:
    """The small judge, with the shipped question: a photograph and what noise left of it."""
    judge = exam.load(exam.VERDICT)
    real, classes = photographs.load("test")
    clean = real[classes == 8][0]
    noisy = lessons.spoil(clean, "noise", 1.0, np.random.default_rng(9))
    assert judge.info.needs == ["prompt", "references"]
    one, two = judge.compare([Pair(clean, PROMPT, (noisy,)), Pair(noisy, PROMPT, (clean,))])
    assert (one.value, two.value) == (1.0, 0.0) and one.text == "Image 1 is better."
    assert _read(Generated(one.text or "", False)).status == "parse_error", "an answer that was cut off is no verdict"
    scores = judge.score([Item(clean, PROMPT, (noisy,)), Item(noisy, PROMPT, (clean,)), Item(clean, PROMPT, (clean,))])
    assert [score.value for score in scores] == [1.0, 0.0, 0.5], "a picture and itself come out even, whatever place it leans to"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Image 1 is better.", 1.0),
        ("It shows the bag.\n\n**Image 2 is better.**\n", 0.0),
        ("Both images are equally good", 0.5),
        ("Final verdict: image 1 is the better one!", 1.0),
        ("<think>Image 2 is better?</think><answer>Image 1 is better</answer>", 1.0),
        ("<answer>Image 1 is better</answer> no: <answer>Image 2 is better</answer>", None),
        ("<answer>Image 1 is better", None),
        ("Image 1 is better. Image 2 is better.", None),
        ("Image 1 is better in colour, but image 2 is better", None),
        ("I do not think that image 1 is better", None),
        ("Image 1 is not better", None),
        ("Image 12 is better", None),
        ("Image 3 is better", None),
        ("Image 1 is better than image 2 in sharpness only", None),
        ("Bild 1 ist besser", None),
        ("I cannot judge people", None),
        ("1", None),
        ("", None),
    ],
)
def test_verdicts_are_read_strictly(text: str, wanted: float | None) -> None:
    assert verdict(text) == wanted


PIECES = [
    "Image 1",
    "Image 2",
    " is better",
    ".",
    "\n",
    "<answer>",
    "</answer>",
    "Both images are equally good",
    " not",
    "**",
    ": ",
    "x",
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=10).map("".join)))
def test_a_verdict_that_is_given_stands_in_the_text(text: str) -> None:
    said = {1.0: "image 1 is better", 0.0: "image 2 is better", 0.5: "both images are equally good", None: ""}
    assert said[verdict(text)] in text.lower()


def test_no_text_takes_long() -> None:
    for piece in ("*", " ", "Image 1 is better ", "verdict", "<answer>", "\n", "verdict:" + " " * 20):
        assert verdict(piece * (90_000 // len(piece))) in (None, 1.0)
