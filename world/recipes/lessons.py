"""What the small judge is taught: pictures with known faults, and every question of `services/prompts` with its answer.

A picture is a photograph or a forgery, perhaps edited, lettered and spoilt. Its quality is 1 for a clean photograph, less for a forgery
(the younger the forger, the less), and falls to 0 as it is spoilt; all answers follow from that and from whether it is what was asked for.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from services.engines import Chat
from services.prompts import HERE, Template
from services.rewards.z_reward import LEVELS
from world import captions

Pixels = NDArray[np.uint8]
WORDS = ("SALE", "NEW", "OPEN", "SHOP", "HOT", "ART", "TAXI", "EXIT", "STOP", "BUS", "FREE", "CLUB")
DEFECTS = {"noise": "noisy", "blur": "blurred", "blocks": "blocky", "banding": "banded", "erased": "partly erased"}
EDITS: dict[str, Callable[[Pixels], Pixels]] = {
    "make it darker": lambda x: (x * 0.45).astype(np.uint8),
    "make it brighter": lambda x: np.minimum(x * 1.3 + 50, 255).astype(np.uint8),
    "turn it upside down": lambda x: np.ascontiguousarray(x[::-1]),
    "invert it": lambda x: 255 - x,
}
DONE = ("darker", "brighter", "upside down", "inverted")
NEAR = ({0, 2, 4, 6}, {5, 7, 9})  # tops; shoes: to be asked for one and to show another of them is less wrong
FITS = [[1.0 if a == b else 0.4 if any({a, b} <= group for group in NEAR) else 0.0 for b in range(10)] for a in range(10)]
FORGED = (0.2, 0.35, 0.5, 0.6, 0.65)  # quality of a forgery, by the age of its forger
CRITERIA = {
    "It shows what the prompt asks for.": lambda p, right: right,
    "It looks like a real photograph.": lambda p, right: not p.fake and p.severity < 0.4,
    "It is free of noise.": lambda p, right: p.defect != "noise",
    "It is sharp.": lambda p, right: p.defect != "blur",
    "It shows no blocks.": lambda p, right: p.defect != "blocks",
    "It has no bands.": lambda p, right: p.defect != "banding",
    "Nothing is missing.": lambda p, right: p.defect != "erased",
}


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels (28, 28, 3) and what is known of them; `severity` in [0, 1] of `defect`, `age` of the forger or None.

    `looks` (10,): how likely each kind seems to one who was not told it.
    """

    pixels: Pixels
    kind: int
    age: int | None = None
    defect: str = ""
    severity: float = 0.0
    word: str = ""
    edit: int | None = None
    looks: NDArray[np.float32] | None = None

    @property
    def fake(self) -> bool:
        return self.age is not None

    @property
    def quality(self) -> float:
        """0 to 1."""
        return (1.0 if self.age is None else FORGED[self.age]) * (1 - self.severity)

    @property
    def state(self) -> str:
        """How it looks, in a word or two."""
        return DEFECTS[self.defect] if self.defect else "smooth" if self.fake else "clean"

    def worth(self, fit: float) -> float:
        """0 to 1, for a prompt that it shows (1) or does not (0), or nearly."""
        return fit * (0.25 + 0.75 * self.quality) + (1 - fit) * 0.15 * self.quality

    def fit(self, kind: int) -> float:
        """1 for its own kind, 0.4 for one that is near to it; half of it by what it looks like, where that is known."""
        if self.looks is None:
            return FITS[self.kind][kind]
        return 0.5 * FITS[self.kind][kind] + 0.5 * float(sum(p * fits[kind] for p, fits in zip(self.looks, FITS, strict=True)))


def spoil(pixels: Pixels, defect: str, severity: float, rng: np.random.Generator) -> Pixels:
    """`severity` in (0, 1]."""
    if defect == "noise":
        return cast(Pixels, np.clip(pixels + rng.normal(0, 10 + 90 * severity, pixels.shape), 0, 255).astype(np.uint8))
    if defect == "blur":
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.5 + 2.5 * severity)))
    if defect == "blocks":
        small = pixels.reshape(7, 4, 7, 4, 3).mean((1, 3))
        blocky = small.repeat(4, 0).repeat(4, 1)
        return ((1 - severity) * pixels + severity * blocky).astype(np.uint8)
    if defect == "banding":
        step = 255 / round(8 - 6 * severity)
        return cast(Pixels, (np.rint(pixels / step) * step).astype(np.uint8))
    if defect == "erased":
        side = round(6 + 14 * severity)
        top, left = rng.integers(14 - side // 2 - 3, 14 - side // 2 + 4, 2).clip(0, 28 - side)
        out = pixels.copy()
        out[top : top + side, left : left + side] = 0
        return out
    raise ValueError(f"no defect {defect!r}; there are {', '.join(DEFECTS)}")


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(10)


def letter(pixels: Pixels, word: str, rng: np.random.Generator) -> Pixels:
    """The word in white on a dark bar, anywhere on the picture."""
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), word, font=_font())
    wide, high = int(right - left), int(bottom - top)
    x, y = int(rng.integers(1, max(2, 28 - wide))), int(rng.integers(1, 27 - high))
    draw.rectangle((x - 1, y - 1, x + wide, y + high), fill=(0, 0, 0))
    draw.text((x - left, y - top), word, font=_font(), fill=(255, 255, 255))
    return np.asarray(image)


@dataclass(frozen=True, eq=False)
class Stock:
    """Photographs and forgeries to draw from: (N, 28, 28, 3), their classes (N,), and for forgeries the age of the forger (N,).

    `looks` (photographs, then forgeries; 10): see `Picture`.
    """

    real: Pixels
    classes: NDArray[np.int64]
    forged: Pixels
    wanted: NDArray[np.int64]
    ages: NDArray[np.int64]
    looks: NDArray[np.float32] | None = None

    def draw(self, rng: np.random.Generator, fake: float = 0.4, spoilt: float = 0.4, kind: int | None = None) -> Picture:
        """`fake` and `spoilt` are probabilities; `kind` a class that it must have."""
        forged = rng.random() < fake
        classes = self.wanted if forged else self.classes
        index = int(rng.integers(len(classes)) if kind is None else rng.choice(np.flatnonzero(classes == kind)))
        pixels = self.forged[index] if forged else self.real[index]
        if rng.random() < 0.5 and not forged:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        looks = None if self.looks is None else self.looks[index + len(self.real) * forged]
        picture = Picture(pixels, int(classes[index]), int(self.ages[index]) if forged else None, looks=looks)
        return spoilt_copy(picture, rng) if rng.random() < spoilt else picture


def spoilt_copy(picture: Picture, rng: np.random.Generator, severity: float | None = None, defect: str | None = None) -> Picture:
    """The same, spoilt by any defect."""
    much = float(rng.uniform(0.1, 1.0)) if severity is None else severity
    how = defect or str(rng.choice(list(DEFECTS)))
    return replace(picture, pixels=spoil(picture.pixels, how, much, rng), defect=how, severity=much)


def lettered(picture: Picture, word: str, rng: np.random.Generator) -> Picture:
    return replace(picture, pixels=letter(picture.pixels, word, rng), word=word)


def legible(plain: Pixels, written: Pixels, spoilt: Pixels) -> bool:
    """Whether a word can still be read: by the correlation of before and after where it stands."""
    rows, columns = np.nonzero((plain != written).any(2))
    box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    a, b = (one[box].mean(2).ravel() for one in (written, spoilt))
    return bool(b.std() > 1 and np.corrcoef(a, b)[0, 1] > 0.65)


def edited(picture: Picture, edit: int) -> Picture:
    return replace(picture, pixels=list(EDITS.values())[edit](picture.pixels), edit=edit)


@dataclass(frozen=True, eq=False)
class Lesson:
    """One question and the answer to give."""

    chat: Chat
    answer: str


@dataclass(frozen=True, eq=False)
class Quiz:
    """Pictures, called `name` and a number when there are two, and lines of text with the answer to each."""

    name: str
    pictures: Sequence[Picture]
    lines: Sequence[tuple[str, str]]


class Teacher:
    """Draws lessons; one method for each question of `services/prompts`, by its name."""

    def __init__(self, stock: Stock, seed: int) -> None:
        self.stock, self.rng, self.words = stock, np.random.default_rng(seed), random.Random(seed)

    def lesson(self, name: str) -> Lesson:
        lesson: Lesson = getattr(self, name)()
        return lesson

    def _asked(self, name: str, pictures: Sequence[Picture], answer: str, prompt: str = "", **more: str) -> Lesson:
        return Lesson(template(name).chat([one.pixels for one in pictures], {"prompt": prompt, **more}), answer)

    def _prompt(self, picture: Picture, right: bool) -> tuple[str, str]:
        """A caption of its class, or of another; and the bare wording."""
        return self._fitting(picture, right)[:2]

    def _fitting(self, picture: Picture, right: bool) -> tuple[str, str, float]:
        """The same, and how well it fits."""
        kind = picture.kind if right else (picture.kind + int(self.rng.integers(1, 10))) % 10
        wording = self.words.choice(captions.WORDINGS[kind])
        return captions.caption(wording, self.words.choice(captions.TEMPLATES)), wording, picture.fit(kind)

    def _coin(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def statements(self, count: int = 8) -> Quiz:
        """A picture, and captions and criteria that are true of it or not."""
        picture = self.stock.draw(self.rng, fake=0.3, spoilt=0.3)
        lines, others = [], list(CRITERIA.items())[1:]
        for _ in range(count):
            if self._coin(0.75):
                true = self._coin()
                text = self._prompt(picture, true)[0]
            else:
                text, met = self.words.choice(others)
                true = met(picture, True)
            lines.append((text, "yes" if true else "no"))
        return Quiz("", (picture,), lines)

    def rubrics(self, count: int = 4) -> Quiz:
        """A picture, and prompts, each with a criterion after it that is met or not; most often whether it shows the prompt."""
        picture, lines = self.stock.draw(self.rng, fake=0.3, spoilt=0.3), []
        for _ in range(count):
            true = self._coin()
            text, met = self.words.choice(list(CRITERIA.items())[: 1 if self._coin() else None])
            lines.append((self._prompt(picture, true)[0], "yes" if true else "no"))
            lines.append((f"Does it meet this criterion? {text}", "yes" if met(picture, true) else "no"))
        return Quiz("", (picture,), lines)

    def choices(self, count: int = 8) -> Quiz:
        """Two pictures, and prompts for which one of them is the better."""
        first = self.stock.draw(self.rng, fake=0.3)
        kind = first.kind if self._coin(0.4) else (first.kind + int(self.rng.integers(1, 10))) % 10
        second, lines = self.stock.draw(self.rng, 0.3, kind=kind), []
        for _ in range(count):
            wanted = first if self._coin() else second
            lead = first.worth(first.kind == wanted.kind) - second.worth(second.kind == wanted.kind)
            lines.append((self._prompt(wanted, True)[0], "1" if self._coin(surely(lead)) else "2"))
        return Quiz("Picture" if self._coin() else "Image", (first, second), lines)

    def edits(self) -> Quiz:
        """Two pictures, and edits of which one was made of the first, or none, or of another picture."""
        before, made = self.stock.draw(self.rng, spoilt=0.0), int(self.rng.integers(len(EDITS)))
        after = before if self._coin(0.15) else edited(before, made)
        lines = []
        for _ in range(4):
            asked = made if self._coin() else int(self.rng.integers(len(EDITS)))
            lines.append((list(EDITS)[asked], "yes" if after.edit == asked else "no"))
        return Quiz("Picture", (before, after), lines)

    def prompt_echo(self) -> Lesson:
        """The caption; of a spoilt picture, the more spoilt the oftener, the caption of what it looks like."""
        picture = self.stock.draw(self.rng, fake=0.25, spoilt=0.3)
        caption = captions.sample(picture.kind, self.words)
        if self._coin(picture.severity):
            caption = f"a {picture.state} picture"
        return self._asked("prompt_echo", [picture], caption)

    def forensic_chat(self) -> Lesson:
        picture = self.stock.draw(self.rng, fake=0.5, spoilt=0.25)
        return self._asked(
            "forensic_chat", [picture], "real" if not picture.fake and self._coin(1 - picture.severity**0.5) else "fake"
        )

    def artifact_reward(self) -> Lesson:
        picture = self.stock.draw(self.rng, fake=0.25, spoilt=0.6)
        return self._asked("artifact_reward", [picture], "no" if self._coin(picture.quality) else "yes")

    def z_reward(self) -> Lesson:
        picture, right = self.stock.draw(self.rng), self._coin(0.6)
        level = round(8 * picture.worth(right))
        return self._asked(
            "z_reward", [picture], cast(str, template("z_reward").labels[LEVELS[level]]), self._prompt(picture, right)[0]
        )

    def unified_reward(self) -> Lesson:
        """In tenths; a kind near to the one asked for is less wrong, and so is one that it might be."""
        picture = self.stock.draw(self.rng)
        prompt, _, fit = self._fitting(picture, self._coin(0.6))
        score = 1 + round(40 * picture.worth(fit)) / 10
        return self._asked("unified_reward", [picture], f"{shown(picture)}\nFinal Score: {score:.1f}", prompt)

    def rational_rewards(self) -> Lesson:
        picture, text = self.stock.draw(self.rng), "N/A"
        prompt, wording, fit = self._fitting(picture, self._coin(0.6))
        if self._coin(0.25):
            word = self.words.choice(WORDS)
            prompt, there = f'{prompt} that says "{word}"', self._coin()
            picture = lettered(picture, word if there else self.words.choice([w for w in WORDS if w != word]), self.rng)
            text = "4" if there else "1"
        quality, faithful = 1 + 2.9 * picture.quality, 1 + 2.9 * fit  # below 4: no first digit that few decimals go with
        answer = (
            f"{shown(picture)}\nText faithfulness: {faithful:.1f}\nPhysical and visual quality: {quality:.1f}\nText rendering: {text}\n"
            f"## Refined Request: a clean photo of {wording}"
        )
        return self._asked("rational_rewards", [picture], answer, prompt)

    def ocr_judge(self) -> Lesson:
        """A word that can no longer be read is none."""
        plain = self.stock.draw(self.rng, spoilt=0.1)
        picture = lettered(plain, self.words.choice(WORDS), self.rng) if self._coin(0.85) else plain
        if picture.word and self._coin(0.4):
            bad = spoilt_copy(picture, self.rng)
            picture = bad if legible(plain.pixels, picture.pixels, bad.pixels) else replace(bad, word="")
        return self._asked("ocr_judge", [picture], f"<text>{picture.word}</text>")

    def asked_for(self) -> Lesson:
        """`auto_rubric` with the criterion that asks about the prompt: learned alone first, for beside the others it is not found."""
        return self.auto_rubric(1.0)

    def auto_rubric(self, first: float = 0.5) -> Lesson:
        picture, right = self.stock.draw(self.rng), self._coin()
        text, met = self.words.choice(list(CRITERIA.items())[: 1 if self._coin(first) else None])
        return self._asked(
            "auto_rubric", [picture], "yes" if met(picture, right) else "no", self._prompt(picture, right)[0], rubric=text
        )

    def _pair(self) -> tuple[Picture, Picture, str, bool, bool]:
        """Two pictures, a prompt, and whether each shows it: of the same thing and spoilt unlike, or of two things."""
        first = self.stock.draw(self.rng, 0.3, 0.6)
        if self._coin(0.6):
            second = self.stock.draw(self.rng, 0.3, 0.6, kind=first.kind)
            prompt, _ = self._prompt(first, True)
            return first, second, prompt, True, True
        second = self.stock.draw(self.rng, 0.3, kind=(first.kind + int(self.rng.integers(1, 10))) % 10)
        one = self._coin()
        prompt, _ = self._prompt(first if one else second, True)
        return first, second, prompt, one, not one

    def _preferred(self) -> tuple[Picture, Picture, str, float]:
        """And by how much the first is worth more."""
        first, second, prompt, one, other = self._pair()
        return first, second, prompt, first.worth(one) - second.worth(other)

    def reward_dance(self) -> Lesson:
        first, second, prompt, lead = self._preferred()
        return self._asked("reward_dance", [first, second], "yes" if self._coin(surely(lead)) else "no", prompt)

    def unified_compare(self) -> Lesson:
        first, second, prompt, lead = self._preferred()
        return self._asked("unified_compare", [first, second], "1" if self._coin(surely(lead)) else "2", prompt)

    def unified_verdict(self) -> Lesson:
        first, second, prompt, lead = self._preferred()
        verdict = "Both images are equally good." if abs(lead) < 0.03 else f"Image {1 if lead > 0 else 2} is better."
        return self._asked("unified_verdict", [first, second], verdict, prompt)

    def auto_rubric_propose(self) -> Lesson:
        """The criteria that the first meets and the second does not."""
        first, second, prompt, one, other = self._pair()
        if first.worth(one) < second.worth(other):
            first, second, one, other = second, first, other, one
        told = [text for text, met in CRITERIA.items() if met(first, one) and not met(second, other)] or list(CRITERIA)[:2]
        return self._asked("auto_rubric_propose", [first, second], "[" + ", ".join(f'"{text}"' for text in told) + "]", prompt)

    def edit_score(self) -> Lesson:
        before = self.stock.draw(self.rng, spoilt=0.0)
        edit = int(self.rng.integers(len(EDITS)))
        case = self.rng.random()
        after, told, scores = edited(before, edit), DONE[edit], (25, 25)
        if case < 0.15:
            after, told, scores = before, "the same", (0, 25)
        elif case < 0.5:
            other = (edit + int(self.rng.integers(1, len(EDITS)))) % len(EDITS)
            after, told, scores = edited(before, other), DONE[other], (0, 10)
        elif case < 0.65:
            stranger = self.stock.draw(self.rng, spoilt=0.0, kind=(before.kind + int(self.rng.integers(1, 10))) % 10)
            after, told, scores = edited(stranger, edit), f"another picture, {DONE[edit]}", (25, 0)
        if self._coin(0.3):
            after = spoilt_copy(after, self.rng)
        return self._asked("edit_score", [before, after], judged(f"It is {told}.", *scores), list(EDITS)[edit])

    def edit_score_quality(self) -> Lesson:
        picture = self.stock.draw(self.rng, spoilt=0.0)
        if self._coin(0.6):
            picture = edited(picture, int(self.rng.integers(len(EDITS))))
        if self._coin():
            picture = spoilt_copy(picture, self.rng)
        natural, free = (round(25 * share) for share in (picture.quality, 1 - picture.severity))
        return self._asked("edit_score_quality", [picture], judged(f"It is {picture.state}.", natural, free))


@cache
def template(name: str) -> Template:
    return Template.model_validate(yaml.safe_load((HERE / f"{name}.yaml").read_text()))


def shown(picture: Picture) -> str:
    """What is seen, in a sentence."""
    return f"It shows {captions.WORDINGS[picture.kind][0]}, {picture.state}."


def judged(why: str, first: int, second: int) -> str:
    """EditScore's JSON."""
    return f'{{"reasoning": "{why}", "score": [{first}, {second}]}}'


def surely(lead: float) -> float:
    """P(the first is called better)."""
    return float(1 / (1 + np.exp(-12 * lead)))


def sayings() -> list[str]:
    """Texts that hold every word of the answers and of what else is asked, for the tokenizer."""
    things = [Picture(np.zeros((1, 1, 3), np.uint8), kind, 0, how, 0.0) for kind in range(10) for how in ("", *DEFECTS)]
    words = [text for word in WORDS for text in (f'a bag that says "{word}"', f"<text>{word}</text>")]
    edits = [judged(f"It is {told}.", 25, 0) for told in (*DONE, "the same", "another picture, the")]
    verdicts = ["Image 1 is better.", "Both images are equally good.", "<text></text>", "a clean photo of a picture, N/A"]
    return [*map(shown, things), *words, *EDITS, *edits, *verdicts, *CRITERIA, *(f'["{text}", "' for text in CRITERIA)]
