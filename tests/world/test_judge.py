"""The small judge: what is shipped, and that it knows what its card says, on pictures that it was not trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from services.prompts import HERE
from world import photographs
from world.recipes import cards, exam, judge, lessons, policy
from world.recipes.monitors import auc

SCORES = json.loads((exam.FOLDER.parent / "scores.json").read_text())


def test_the_folder_is_a_small_qwen_in_half_precision() -> None:
    files = {file.name: file.stat().st_size for file in exam.FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(files)
    assert sum(files.values()) < 9e6 and not [name for name in files if Path(name).suffix in (".bin", ".pt", ".pth", ".pkl", ".py")]
    assert {tensor.dtype for tensor in load_file(exam.FOLDER / "model.safetensors").values()} == {torch.float16}
    config = AutoConfig.from_pretrained(exam.FOLDER)
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    text, vision = config.text_config, config.vision_config
    assert text.hidden_size // text.num_attention_heads == vision.hidden_size // vision.num_heads == 64, (
        "what vLLM's CPU attention takes"
    )
    model = AutoModelForImageTextToText.from_pretrained(exam.FOLDER, dtype="float32")
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration) and 3e6 < model.num_parameters() < 5e6


@pytest.mark.parametrize(("height", "width"), [(28, 28), (300, 300), (16, 16), (64, 60)])
def test_a_picture_is_four_tokens(height: int, width: int) -> None:
    processor = AutoProcessor.from_pretrained(exam.FOLDER)
    made = processor.image_processor([np.zeros((height, width, 3), np.uint8)], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_every_word_that_it_is_taught_is_one_token() -> None:
    tokens = AutoProcessor.from_pretrained(exam.FOLDER).tokenizer
    for word in ("real", "Fake", " Yes", "no", "1", "9", " photo", " jeans", "SALE", " noisy", " brighter"):
        assert len(tokens.encode(word)) == 1, word
    assert judge.tokenizer().get_vocab() == tokens.get_vocab(), "the recipe makes what is shipped"


def test_every_question_that_a_reward_asks_by_itself_has_lessons_with_known_answers() -> None:
    own = {exam.resolve(name).template for name in exam.OPTIONS} | {"edit_score_quality", "auto_rubric_propose"}
    assert set(judge.QUESTIONS) == own <= {file.stem for file in HERE.glob("*.yaml")}
    real, classes = photographs.load("train")
    stock = judge.stock_of(np.repeat(real[:50], 2, 0))
    for name in judge.QUESTIONS:
        one, again = (lessons.Teacher(stock, 3).lesson(name) for _ in range(2))
        assert one.answer == again.answer and one.chat.images and one.answer
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


def test_a_word_is_legible_through_noise_and_bands_and_not_through_blur_and_blocks() -> None:
    real, classes = photographs.load("test")
    rng = np.random.default_rng(0)
    for defect, read in (("noise", True), ("banding", True), ("blur", False), ("blocks", False)):
        told = []
        for i in range(20):
            plain = lessons.Picture(real[i], int(classes[i]))
            written = lessons.lettered(plain, lessons.WORDS[i % 12], rng)
            told.append(lessons.legible(plain.pixels, written.pixels, lessons.spoilt_copy(written, rng, 1.0, defect).pixels))
        assert np.mean(told) == pytest.approx(float(read), abs=0.15), defect


def test_a_kind_near_to_the_one_asked_for_is_less_wrong() -> None:
    shirt = lessons.Picture(np.zeros((28, 28, 3), np.uint8), 6)
    assert [shirt.fit(kind) for kind in (6, 0, 8)] == [1.0, 0.4, 0.0]
    assert shirt.worth(1.0) == 1 > shirt.worth(0.4) > shirt.worth(0.0) == pytest.approx(0.15)


def test_a_kind_that_it_might_be_is_less_wrong() -> None:
    looks = np.array([0, 0, 0, 0.75, 0, 0, 0.25, 0, 0, 0], np.float32)  # a shirt that looks like a dress
    shirt = lessons.Picture(np.zeros((28, 28, 3), np.uint8), 6, looks=looks)
    assert [shirt.fit(kind) for kind in (6, 3, 0, 8)] == pytest.approx([0.625, 0.375, 0.25, 0.0])


def test_what_a_photograph_looks_like_is_told_by_a_classifier_that_never_saw_it() -> None:
    stock = judge.stock_of(np.zeros((10, 28, 28, 3), np.uint8))
    stock = lessons.Stock(stock.real[:300], stock.classes[:300], stock.forged, stock.wanted, stock.ages)
    looks = judge.looks_of(stock, steps=60)
    assert looks.shape == (310, 10) and looks.sum(1) == pytest.approx(np.ones(310), abs=1e-5)
    swapped = lessons.Stock(stock.real, np.where(np.arange(300) % 2, stock.classes, 0), stock.forged, stock.wanted, stock.ages)
    again = judge.looks_of(swapped, steps=60)[:300]
    assert again[0::2] == pytest.approx(looks[:300:2]), "fitted on the other half, whose classes are as they were"
    assert again[1::2, 0].min() > 0.5, "fitted on the half that is all of one class now"


def test_the_eyes_notice_the_steps_of_a_banded_picture_before_they_are_trained() -> None:
    real, classes = photographs.load("test")
    model, made = judge.new()
    judge.notice_steps(model.model.visual)
    seen = list[torch.Tensor]()
    model.model.visual.blocks[0].register_forward_hook(lambda block, inputs, out: seen.append(out[:, -2].view(50, 16).sum(1)))
    rng = np.random.default_rng(0)
    for severity in (0.0, 0.15, 1.0):
        shown = [lessons.spoil(one, "banding", severity, rng) if severity else one for one in real[:50]]
        inputs = made.image_processor(shown, return_tensors="pt")
        with torch.inference_mode():
            model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert all(auc(seen[0].numpy().astype(float), banded.numpy().astype(float)) > 0.9 for banded in seen[1:])


def test_it_knows_what_its_card_says() -> None:
    """A sample of the figures; `python -m world.make cards` measures all of them."""
    assert SCORES["judge_real_auc"] >= 0.8
    assert SCORES["judge_match_auc_by_caption"] >= 0.9 and SCORES["judge_match_auc_by_levels"] >= 0.9
    assert str(SCORES["judge_real_auc"]) in (exam.FOLDER / "README.md").read_text()
    sat = exam.Exam(*photographs.load("test"), count=100, seed=5)
    prompts, _ = cards._prompts(100, cards.captions.WORDINGS, 91)
    samples = policy.sample(policy.load(), prompts, seed=91_000, steps=10)
    assert sat.real_auc(samples) == pytest.approx(SCORES["judge_real_auc"], abs=0.1) and sat.real_auc(samples) >= 0.8
    for way, name in (("caption", "prompt_echo"), ("levels", "z_reward")):
        assert sat.match_auc(name) == pytest.approx(SCORES[f"judge_match_auc_by_{way}"], abs=0.07) and sat.match_auc(name) >= 0.85
    assert sat.artefacts() == pytest.approx(SCORES["judge_artefact_accuracy"], abs=0.1)
    assert sat.read() == pytest.approx(SCORES["judge_words_read"], abs=0.12)
