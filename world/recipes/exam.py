"""What the small judge knows, asked through the rewards themselves and their shipped questions, on pictures it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.registry import resolve
from services.reward import Comparer, Item, Pair
from world import captions
from world.recipes import lessons
from world.recipes.lessons import CRITERIA, EDITS, WORDS, Picture
from world.recipes.monitors import auc

FOLDER = Path(__file__).parents[1] / "judge"
VERDICT = "services.rewards.unified_compare:UnifiedVerdict"
OPTIONS: dict[str, dict[str, Any]] = {
    "prompt_echo": {},
    "forensic_chat": {},
    "artifact_reward": {},
    "z_reward": {},
    "unified_reward": {},
    "rational_rewards": {},
    "ocr_judge": {},
    "auto_rubric": {"rubrics": [{"text": text, "weight": 1} for text in CRITERIA]},
    "reward_dance": {},
    "unified_compare": {},
    VERDICT: {},
    "edit_score": {},
}
PAIRED = ("reward_dance", "unified_compare", VERDICT)
PROMPTED = tuple(name for name in OPTIONS if name not in ("forensic_chat", "artifact_reward"))


def load(name: str, folder: Path = FOLDER, **more: Any) -> Any:
    """The reward on the small judge, in float32."""
    return resolve(name).load(name, {"folder": folder, "dtype": "float32", **OPTIONS[name], **more}, "cpu")


def values(scores: Sequence[Any]) -> NDArray[np.float64]:
    """NaN where there is none."""
    return np.array([np.nan if score.value is None else score.value for score in scores])


@dataclass(frozen=True, eq=False)
class Exam:
    """Held-out photographs (N, 28, 28, 3) with their classes, and `count` pairs of each kind made of them."""

    real: NDArray[np.uint8]
    classes: NDArray[np.int64]
    count: int = 100
    seed: int = 0
    folder: Path = FOLDER

    @cached_property
    def _chosen(self) -> list[Picture]:
        rng = np.random.default_rng(self.seed)
        rows = rng.permutation(len(self.real))[: self.count]
        return [Picture(self.real[i], int(self.classes[i])) for i in rows]

    def _caption(self, kind: int, rng: np.random.Generator) -> str:
        wordings = captions.WORDINGS[kind]
        return captions.caption(wordings[rng.integers(len(wordings))], captions.TEMPLATES[rng.integers(4)])

    def _other(self, picture: Picture, rng: np.random.Generator) -> Picture:
        """A photograph of another class."""
        rows = np.flatnonzero(self.classes != picture.kind)
        row = int(rng.choice(rows))
        return Picture(self.real[row], int(self.classes[row]))

    def spoilt(self, name: str) -> list[tuple[Item, Item]]:
        """The same photograph clean or a little spoilt, and spoilt badly: of lettered ones, so that the word cannot be read any more."""
        rng, out = np.random.default_rng(self.seed + 1), []
        for i, picture in enumerate(self._chosen):
            prompt, references = self._caption(picture.kind, rng), ()
            defect = list(lessons.DEFECTS)[i % len(lessons.DEFECTS)]
            if name == "ocr_judge":
                good, bad = self._lettered(picture, WORDS[i % len(WORDS)], bool(i % 2), rng)
                prompt = f'{prompt} that says "{good.word}"'
                out.append((Item(good.pixels, prompt), Item(bad.pixels, prompt)))
                continue
            if name == "edit_score":
                edit = i % len(EDITS)
                references, prompt = (picture.pixels,), list(EDITS)[edit]
                picture = lessons.edited(picture, edit)
            elif name in PAIRED:
                same = np.flatnonzero(self.classes == picture.kind)
                between = Picture(self.real[int(rng.choice(same))], picture.kind)
                references = (lessons.spoilt_copy(between, rng, 0.4).pixels,)
            bad = lessons.spoilt_copy(picture, rng, float(rng.uniform(0.8, 1.0)), defect)
            good = lessons.spoilt_copy(picture, rng, 0.15, defect) if i % 2 else picture
            out.append((Item(good.pixels, prompt, references), Item(bad.pixels, prompt, references)))
        return out

    def _lettered(self, picture: Picture, word: str, little: bool, rng: np.random.Generator) -> tuple[Picture, Picture]:
        """With a word that can be read, and badly spoilt so that it cannot: neither noise nor bands hide a word."""
        good = lessons.lettered(picture, word, rng)
        while True:
            defect, severity = str(rng.choice(["blur", "blocks", "erased"])), float(rng.uniform(0.8, 1.0))
            fair = lessons.spoilt_copy(good, rng, 0.15, defect) if little else good
            bad = lessons.spoilt_copy(good, rng, severity, defect)
            seen = [lessons.legible(picture.pixels, good.pixels, one.pixels) for one in (fair, bad)]
            if seen == [True, False]:
                return fair, bad

    def asked(self, name: str) -> list[tuple[Item, Item]]:
        """The same photograph with a prompt that it shows, and with one that it does not."""
        rng, out = np.random.default_rng(self.seed + 2), []
        for i, picture in enumerate(self._chosen):
            other = self._other(picture, rng)
            right, wrong, references = self._caption(picture.kind, rng), self._caption(other.kind, rng), ()
            if name == "ocr_judge":
                picture = lessons.lettered(picture, WORDS[i % len(WORDS)], rng)
                right, wrong = (f'{right} that says "{word}"' for word in (picture.word, WORDS[(i + 1 + i % 7) % len(WORDS)]))
            elif name == "edit_score":
                edit = i % len(EDITS)
                references = (picture.pixels,)
                picture = lessons.edited(picture, edit)
                right, wrong = list(EDITS)[edit], list(EDITS)[(edit + 1 + i % 3) % len(EDITS)]
            elif name in PAIRED:
                references = (other.pixels,)
            out.append((Item(picture.pixels, right, references), Item(picture.pixels, wrong, references)))
        return out

    def ordered(self, name: str, pairs: Sequence[tuple[Item, Item]], **more: Any) -> float:
        """Share of the pairs whose first item scores higher; a tie counts as wrong, and so does one without a score."""
        return self.compared(name, pairs, **more)[0]

    def compared(self, name: str, pairs: Sequence[tuple[Item, Item]], **more: Any) -> tuple[float, float]:
        """That share, and the share of ties."""
        reward = load(name, self.folder, **more)
        first, second = (values(reward.score([pair[k] for pair in pairs])) for k in range(2))
        return float((first > second).mean()), float((first == second).mean())

    def flips(self, name: str) -> float:
        """Share of pairs (a clean photograph, one of its class that is spoilt) whose preference is right in both orders."""
        rng, reward = np.random.default_rng(self.seed + 3), load(name, self.folder)
        there, back = [], []
        for picture in self._chosen:
            bad = self.real[int(rng.choice(np.flatnonzero(self.classes == picture.kind)))]
            bad = lessons.spoilt_copy(Picture(bad, picture.kind), rng, float(rng.uniform(0.6, 1.0))).pixels
            prompt = self._caption(picture.kind, rng)
            there.append((picture.pixels, prompt, (bad,)))
            back.append((bad, prompt, (picture.pixels,)))
        ask, kind = (reward.compare, Pair) if isinstance(reward, Comparer) else (reward.score, Item)
        first, second = (values(ask([kind(*row) for row in rows])) for rows in (there, back))
        return float(((first > 0.5) & (second < 0.5)).mean())

    def real_auc(self, samples: NDArray[np.uint8]) -> float:
        """Photographs above samples (N, 28, 28, 3), by P(real)."""
        reward = load("forensic_chat", self.folder)
        a, b = (values(reward.score([Item(one) for one in several])) for several in ([p.pixels for p in self._chosen], samples))
        return auc(a, b)

    def match_auc(self, name: str) -> float:
        """Matching above mismatching captions, over all pairs of a match and a mismatch."""
        match = {"rubrics": [{"text": next(iter(CRITERIA)), "weight": 1}]} if name == "auto_rubric" else {}
        reward, pairs = load(name, self.folder, **match), self.asked(name)
        return auc(*(values(reward.score([pair[k] for pair in pairs])) for k in range(2)))

    def artefacts(self) -> float:
        """Share of clean and badly spoilt photographs that are called so."""
        reward, pairs = load("artifact_reward", self.folder), self.spoilt("artifact_reward")
        good, bad = (values(reward.score([pair[k] for pair in pairs])) for k in range(2))
        return float(((good > 0.5).mean() + (bad < 0.5).mean()) / 2)

    def read(self) -> float:
        """Share of words that are read letter by letter."""
        reward = load("ocr_judge", self.folder)
        return float((values(reward.score([pair[0] for pair in self.asked("ocr_judge")])) == 1).mean())

    def take(self, samples: NDArray[np.uint8]) -> dict[str, float]:
        """Every figure."""
        out = {
            "judge_real_auc": self.real_auc(samples),
            "judge_match_auc_by_caption": self.match_auc("prompt_echo"),
            "judge_match_auc_by_question": self.match_auc("auto_rubric"),
            "judge_match_auc_by_levels": self.match_auc("z_reward"),
            "judge_artefact_accuracy": self.artefacts(),
            "judge_words_read": self.read(),
        }
        short = {name: name.rpartition(":")[2].lower() if ":" in name else name for name in OPTIONS}
        ties: dict[str, float] = {}
        for way, names in ((self.spoilt, tuple(OPTIONS)), (self.asked, PROMPTED)):
            for name in names:
                key = f"judge_{way.__name__}_{short[name]}"
                out[key], ties[f"{key}_tied"] = self.compared(name, way(name))
        out |= {f"judge_flips_{short[name]}": self.flips(name) for name in PAIRED}
        return out | {key: tied for key, tied in ties.items() if tied}
