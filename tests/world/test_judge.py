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
