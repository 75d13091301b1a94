"""Every judge reward on the small judge, by its shipped question: a number that means something, and through a real server the number that
transformers alone computes."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from bench.process import running
from services.prompts import HERE
from services.reward import Item
from services.rewards.judge_kit import spellings
from services.rewards.ocr import edit_distance
from shared import wire
from shared.image import encode
from shared.schema import ScoreItem, ScoreRequest
from world import photographs
from world.recipes import exam
from world.recipes.exam import OPTIONS, VERDICT, Exam

COUNT = 100
# The share of held-out pairs that must come out right, a little below what docs/rewards-judges.md says.
SPOILT = {
    "forensic_chat": 0.85,
    "artifact_reward": 0.9,
    "prompt_echo": 0.9,
    "z_reward": 0.9,
    "auto_rubric": 0.9,
    "reward_dance": 0.9,
    "unified_compare": 0.9,
    "unified_reward": 0.85,
    "rational_rewards": 0.8,
    "edit_score": 0.8,
    "ocr_judge": 0.7,
    VERDICT: 0.6,
}
ASKED = dict.fromkeys(exam.PROMPTED, 0.9)
FLIPS = {
    "reward_dance": 0.85,
    "unified_compare": 0.85,
    VERDICT: 0.85,
}


@pytest.fixture(scope="module")
def held_out() -> Exam:
    return Exam(*photographs.load("test"), count=COUNT, seed=11)


@pytest.mark.parametrize("name", SPOILT)
def test_a_more_corrupted_picture_scores_lower(held_out: Exam, name: str) -> None:
    assert held_out.ordered(name, held_out.spoilt(name)) >= SPOILT[name]


@pytest.mark.parametrize("name", ASKED)
def test_the_matching_prompt_scores_above_a_mismatching_one(held_out: Exam, name: str) -> None:
    assert held_out.ordered(name, held_out.asked(name)) >= ASKED[name]


@pytest.mark.parametrize("name", FLIPS)
def test_swapping_a_pair_flips_the_preference(held_out: Exam, name: str) -> None:
    assert held_out.flips(name) >= FLIPS[name]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real verism-serve with every judge reward on one engine."""
    config = tmp_path_factory.mktemp("judges") / "c.yaml"
    rewards = {
        short(name): {"use": name, "folder": str(exam.FOLDER), "dtype": "float32", "batch_cap": 8, **more}
        for name, more in OPTIONS.items()
    }
    rewards["edit_score"]["temperature"] = 1e-3
    config.write_text(json.dumps({"rewards": rewards}))
    with running(config) as served:
        yield served


def short(name: str) -> str:
    return "unified_verdict" if name == VERDICT else name


class Plain:
    """The same questions to transformers alone, one at a time."""

    def __init__(self) -> None:
        self.processor = AutoProcessor.from_pretrained(exam.FOLDER)
        self.model = AutoModelForImageTextToText.from_pretrained(exam.FOLDER, dtype=torch.float32).eval()

    def logits(self, said: str, images: list[Any]) -> tuple[list[int], torch.Tensor]:
        several = [np.array(one) for one in (images if isinstance(images, list) else [images])]
        inputs = self.processor(text=[said], images=several, return_tensors="pt")
        with torch.inference_mode():
            return inputs["input_ids"][0].tolist(), self.model(**inputs).logits[0].double()

    def asks(self, name: str, prompt: str, **fields: str) -> str:
        said = yaml.safe_load((HERE / f"{name}.yaml").read_text())["text"].replace(
            "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
        )
        for field, value in {"prompt": prompt, **fields}.items():
            said = said.replace(f"{{{field}}}", value)
        return f"<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"

    def share(self, said: str, images: list[Any], words: list[str]) -> list[float]:
        """Of the probability of all words, with their spellings, that of each."""
        p_V = self.logits(said, images)[1][-1].softmax(-1)
        rows = [{row[0] for s in spellings(word) if len(row := self.processor.tokenizer.encode(s)) == 1} for word in words]
        p = [sum(float(p_V[i]) for i in row) for row in rows]
        return [one / sum(p) for one in p]

    def writes(self, said: str, images: list[Any]) -> str:
        """The likeliest answer, token by token."""
        ids: list[int] = []
        while len(ids) < 200:
            whole = said + self.processor.tokenizer.decode(ids)
            ids.append(int(self.logits(whole, images)[1][-1].argmax()))
            if ids[-1] == self.processor.tokenizer.eos_token_id:
                return str(self.processor.tokenizer.decode(ids[:-1]))
        raise AssertionError("the judge does not end its answer")

    def score(self, name: str, item: Item) -> float:
        """The formula of each, from its paper."""
        prompt, image, several = item.prompt or "", [item.image], [item.image, *item.references]
        said = self.asks(short(name) if name != "auto_rubric" else name, prompt)
        if name == "prompt_echo":
            ids, logits_TV = self.logits(said + prompt, image)
            count = len(self.processor.tokenizer.encode(prompt))
            logp_TV = logits_TV.log_softmax(-1)
            return sum(float(logp_TV[t - 1, ids[t]]) for t in range(len(ids) - count, len(ids))) / count
        if name == "forensic_chat":
            row_V = self.logits(said, image)[1][-1]
            real, fake = (
                sum(float(row_V[self.processor.tokenizer.encode(w)[0]]) for w in both) / 2
                for both in (("real", "Real"), ("fake", "Fake"))
            )
            return 1 / (1 + math.exp(fake - real))
        if name == "artifact_reward":
            return self.share(said, image, ["no", "yes"])[0]
        if name == "z_reward":
            return sum((1 + k / 2) * one for k, one in enumerate(self.share(said, image, list("123456789"))))
        if name == "auto_rubric":
            texts = [one["text"] for one in OPTIONS[name]["rubrics"]]
            return sum(self.share(self.asks(name, prompt, rubric=text), image, ["yes", "no"])[0] for text in texts)
        if name == "reward_dance":
            return self.share(said, several, ["yes", "no"])[0]
        if name == "unified_compare":
            return (self.share(said, several, ["1", "2"])[0] + self.share(said, several[::-1], ["2", "1"])[0]) / 2
        if name == VERDICT:
            worth = {"Image 1 is better.": 1.0, "Image 2 is better.": 0.0, "Both images are equally good.": 0.5}
            return (worth[self.writes(said, several)] + 1 - worth[self.writes(said, several[::-1])]) / 2
        if name == "edit_score":
            semantic = json.loads(self.writes(said, several[::-1]))["score"]
            quality = json.loads(self.writes(self.asks("edit_score_quality", prompt), image))["score"]
            return math.sqrt(min(semantic) * min(quality)) * 10 / 25
        text = self.writes(said, image)
        if name == "unified_reward":
            return float(text.rpartition("Final Score: ")[2])
        if name == "rational_rewards":
            marks = [float(mark) for mark in re.findall(r": ([\d.]+)\n", text)]
            return (sum(marks) / len(marks) - 1) / 3
        wanted, seen = re.findall(r'"(\w+)"', prompt)[0].lower(), text.removeprefix("<text>").removesuffix("</text>").lower()
        assert name == "ocr_judge"
        return 1 - edit_distance(wanted, seen) / max(len(wanted), len(seen))


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain()


@pytest.mark.e2e
@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_server_gives_what_transformers_alone_computes(url: str, plain: Plain, held_out: Exam, name: str) -> None:
    items = [item for pair in held_out.spoilt(name)[:2] for item in pair]
    batch = [
        ScoreItem(id=str(i), prompt=item.prompt, image=encode(item.image), references=[encode(one) for one in item.references])
        for i, item in enumerate(items)
    ]
    body = wire.pack_request(ScoreRequest(request_id="r", rewards=[short(name)], items=batch))
    answer = httpx.post(f"{url}/score", content=body, headers={"content-type": wire.MSGPACK}, timeout=120)
    assert answer.status_code == 200, answer.text
    told = [one.scores[short(name)].value for one in wire.parse_answer(answer.content, wire.MSGPACK).items]
    assert told == pytest.approx([plain.score(name, item) for item in items], abs=1e-3)
    assert np.isfinite(told).all()
