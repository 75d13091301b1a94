"""What the photographs are called: wordings to learn from, and wordings that no model here has ever been trained on."""

import itertools
import random
from collections.abc import Sequence

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a photograph of {}",
    "a product photo of {}",
    "a picture of {}",
    "a shop photo of {}",
    "{} on a dark background",
    "a studio photo of {}",
)
HELD_OUT_TEMPLATES = ("an image showing {}", "a catalogue photo of {}", "{} for sale")

# per class, in the order of world.photographs.CLASS_NAMES
WORDINGS: tuple[tuple[str, ...], ...] = (
    ("a t-shirt", "a tee", "a short sleeve top", "a plain t-shirt"),
    ("a pair of trousers", "a pair of jeans", "a pair of pants", "long trousers"),
    ("a pullover", "a sweater", "a knitted jumper", "a warm pullover"),
    ("a dress", "a long dress", "a summer dress", "a gown"),
    ("a coat", "a jacket", "a winter coat", "a long jacket"),
    ("a sandal", "an open shoe", "a strappy sandal", "a summer sandal"),
    ("a shirt", "a button shirt", "a dress shirt", "a collared shirt"),
    ("a sneaker", "a trainer", "a running shoe", "a sports shoe"),
    ("a bag", "a handbag", "a leather bag", "a purse"),
    ("an ankle boot", "a boot", "a leather boot", "a high boot"),
)
HELD_OUT: tuple[tuple[str, ...], ...] = (
    ("a short sleeve tee",),
    ("slacks", "a pair of slacks"),
    ("a woollen sweatshirt",),
    ("an evening gown",),
    ("an overcoat", "a parka"),
    ("a flip flop",),
    ("a blouse",),
    ("a tennis shoe",),
    ("a tote bag", "a satchel"),
    ("a chelsea boot",),
)


def caption(wording: str, template: str) -> str:
    """One caption, e.g. `a photo of a pair of jeans`."""
    return template.format(wording)


def all_captions(wordings: Sequence[Sequence[str]], templates: Sequence[str]) -> list[tuple[str, int]]:
    """Every (caption, class)."""
    return [(caption(w, t), c) for c, words in enumerate(wordings) for w, t in itertools.product(words, templates)]


def sample(class_index: int, rng: random.Random) -> str:
    """A training caption of one class."""
    return caption(rng.choice(WORDINGS[class_index]), rng.choice(TEMPLATES))
