"""Users' prompts and the pairs to begin with: what the recipe makes, honest, and readable for painter and alignment model."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.reward import Item
from services.rewards.alignment import Alignment
from services.rewards.detector import Detector
from shared import rewriting
from trainer.config import PromptsConfig
from trainer.language.data import read_pairs
from trainer.loop import read_prompts
from world import captions, photographs
from world.recipes import policy, policy_looks, rewrites, words
from world.recipes.monitors import auc

WORLD = Path(photographs.__file__).parent
FOLDER = rewrites.FOLDER


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_the_files_are_what_the_recipe_makes(tmp_path: Path) -> None:
    rewrites.make(tmp_path)
    files = sorted(path.name for path in FOLDER.glob("*.jsonl"))
    assert files == ["pairs_eval.jsonl", "pairs_train.jsonl", "prompts_eval.jsonl", "prompts_train.jsonl"]
    assert all((tmp_path / name).read_bytes() == (FOLDER / name).read_bytes() for name in files)


def test_a_run_reads_the_prompts_and_a_cold_start_the_pairs() -> None:
    train, held_out = read_prompts(PromptsConfig(train=FOLDER / "prompts_train.jsonl", eval=FOLDER / "prompts_eval.jsonl"))
    assert (len(train), len(held_out)) == (400, 160)
    for prompts in (train, held_out):
        assert [prompt.id for prompt in prompts] == list(range(len(prompts)))
        assert {prompt.meta["class_name"] for prompt in prompts} == set(photographs.CLASS_NAMES)
        forms, classes = (Counter(prompt.meta[key] for prompt in prompts) for key in ("form", "class"))
        assert forms.keys() == rewrites.FRAMES["eval"].keys() and max(forms.values()) < 2 * min(forms.values())
        assert len(classes) == 10 and max(classes.values()) < 1.5 * min(classes.values())
    pairs = read_pairs(FOLDER / "pairs_train.jsonl")
    assert len(pairs) == 800 and len(read_pairs(FOLDER / "pairs_eval.jsonl", apart_from=pairs)) == 80


def test_what_is_held_out_was_never_shown() -> None:
    train, held_out = ({row["prompt"] for row in rows(f"prompts_{split}")} for split in ("train", "eval"))
    shown = {row["prompt"] for name in ("pairs_train", "pairs_eval") for row in rows(name)} | train
    assert not held_out & shown
    assert not set(rewrites.FRAMES["train"]) ^ set(rewrites.FRAMES["eval"])
    told = " ".join([*shown, *(row["rewrite"] for row in rows("pairs_train"))])
    unseen = {rewrites.bare(name) for names in captions.HELD_OUT for name in names if name not in rewrites.MISREAD}
    assert not [name for name in unseen if name in told]
    share = np.mean([any(name in prompt for name in unseen) for prompt in held_out])
    assert 0.4 < share < 0.6, "half of the evaluation's things have names that training never used"
    frames = {split: {frame for form in rewrites.FRAMES[split].values() for frame in form} for split in ("train", "eval")}
    assert frames["train"] & frames["eval"] == set()


def test_the_thing_stands_where_it_is_read_in_signs_that_are_known() -> None:
    tokenizer, _ = words.load()
    for split in ("train", "eval"):
        for row in rewrites.wishes(split, rewrites.PROMPTS[split], 0, rewrites.counter()):
            ids = tokenizer(row["prompt"], truncation=True, max_length=words.MAX_LENGTH)["input_ids"]  # type: ignore[operator]
            read = tokenizer.decode(ids).replace(" ", "")  # type: ignore[attr-defined]
            assert rewrites.bare(row["thing"]).replace(" ", "") in read, row
            assert ids.count(tokenizer.eos_token_id) == 1, row  # type: ignore[attr-defined]


def test_rewrites_keep_the_thing_and_favour_no_look() -> None:
    count, looks = rewrites.counter(), Counter[str]()
    for name in ("pairs_train", "pairs_eval"):
        for row in rows(name):
            text = row["rewrite"]
            assert rewriting.clean(text) == rewriting.Cleaned(text) and rewriting.fault(row["prompt"], text) is None, row
            assert count(text) <= rewrites.ROOM
            found = [
                look
                for look, (before, behind) in policy_looks.LOOKS.items()
                if any(f"a {word} " in text for word in before) or text.endswith(tuple(f", {words}" for words in behind))
            ]
            assert len(found) <= 1, row
            looks[found[0] if found else "silent"] += 1
    assert all(0.25 < looks[look] / looks.total() < 0.42 for look in ("silent", *policy_looks.LOOKS)), looks


def test_the_alignment_model_can_judge_what_users_asked_for() -> None:
    """On photographs: AUC of those of the class that was meant against all others, with the user's words."""
    images, classes = photographs.load("test")
    images, classes = images[:300], classes[:300]
    alignment = Alignment.load("alignment", {"folder": WORLD / "alignment"}, "cpu")
    seen = []
    for row in rows("prompts_eval")[::4]:
        scores = alignment.score([Item(image, row["prompt"]) for image in images])
        cosine = np.array([score.value for score in scores], np.float64)
        seen.append(auc(cosine[classes == row["class"]], cosine[classes != row["class"]]))
    assert np.mean(seen) > 0.9 and min(seen) > 0.5, (np.mean(seen), min(seen))


def test_a_caption_tells_one_look_before_behind_or_both() -> None:
    rng = random.Random(0)
    told = {policy_looks.told("soft", "a shop photo of a bag", rng) for _ in range(200)}
    assert {
        "a soft shop photo of a bag",
        "a shop photo of a bag, soft light",
        "a bright shop photo of a bag, soft lighting",
    } <= told
    assert policy_looks.told(None, "a bag", rng) == "a bag"
    assert policy_looks.told("natural", "a bag", rng).startswith("a bag, ")
    several = [policy_looks.caption(n % 10, n % 2 == 0, rng) for n in range(2000)]
    silent = {text for text, _ in captions.all_captions(captions.WORDINGS, captions.TEMPLATES)}
    assert np.mean([text in silent for text in several]) == pytest.approx(0.5, abs=0.05)
    soft = [any(word in text for word in ("soft", "bright")) for text in several]
    assert np.mean(soft[::2]) > 0.3 and not any(soft[1::2])


def test_words_decide_how_its_pictures_look() -> None:
    pipe, detector = policy.load(policy_looks.FOLDER), Detector.load("detector", {"folder": WORLD / "detector"}, "cpu")

    def logits(text: str) -> NDArray[np.float64]:
        prompts = [text.format(names[0]) for names in captions.WORDINGS for _ in range(4)]
        scores = detector.score([Item(image) for image in policy.sample(pipe, prompts, seed=1, steps=10)])
        return np.array([score.parts["logit"] for score in scores])

    gain = logits("a natural photo of {}, sharp texture") - logits("a soft photo of {}, soft light")
    assert gain.mean() > 3 * gain.std(ddof=1) / len(gain) ** 0.5
