"""What users type, and rewrites to begin with: `world/rewrites/`, made from the frames and words below.

A frame is what people say around a thing; frames and things of the evaluation are apart from those of training. The rewrites know nothing
of any reward: their look is drawn at random from what `policy_looks` taught the painter, in every mixture, so a cold start learns how a
caption is written and leaves it to training which of them to write.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.rewriting import fault
from world import captions, photographs
from world.recipes import policy_looks, words

FOLDER = Path(__file__).parents[1] / "rewrites"
ROOM = words.MAX_LENGTH - 2  # tokens that painter and alignment model read of a prompt
PROMPTS = {"train": 400, "eval": 160}
PAIRS = {"train": 800, "eval": 80}

# Names that `captions` does not have, in the order of photographs.CLASS_NAMES. No model here has seen them in training. Left out are those
# that the alignment model takes for something else, so that no reward could tell what became of them: anorak, chinos, hoodie, leggings,
# parka, pinafore, plimsoll, rucksack.
OTHERS: tuple[tuple[str, ...], ...] = (
    ("a gym top", "a cotton tee", "a tshirt"),
    ("denim pants", "corduroy trousers", "work trousers", "gym pants"),
    ("a wool jumper", "a knitted pullover", "a winter sweater"),
    ("a sundress", "a party dress", "a silk dress"),
    ("a raincoat", "a trench coat", "a spring coat"),
    ("a beach sandal", "a flat sandal", "an open summer shoe"),
    ("an office shirt", "a linen shirt", "a shirt with buttons"),
    ("a gym shoe", "a football shoe", "a basketball shoe"),
    ("a backpack", "a clutch", "a canvas bag"),
    ("a hiking boot", "a wellington boot", "a suede boot"),
)
MISREAD = ("a parka",)
# {thing} has its article and {bare} has not; the other slots are SLOTS. Only signs that the tokenizer knows.
FRAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "plain": ("{bare}", "{thing}", "{thing} please", "{adjective} {bare}", "picture of {thing}", "photo of {thing}"),
        "chatty": (
            "i need {thing} for {occasion}",
            "can i get {thing}?",
            "show me {thing}, {adjective} and {quality}",
            "draw me {thing}",
            "i want {thing} for my {person}",
            "my {person} needs {thing}",
            "something {adjective}, {thing} maybe?",
            "Do you have {thing}?",
            "make {thing} for {occasion}",
            "got {thing}? {quality}!",
            "off to {occasion} in {thing}",
            "my {person} asks for {thing}, {colour}",
            "for {occasion} {thing}",
            "where is my {bare}?",
            "we had {thing} like that for {occasion}",
            "it has to be {thing}, my {person} says",
            "can you find the {bare} of my {person}?",
        ),
        "shop": (
            "{brand} {bare}",
            "{brand} {bare} {colour}",
            "{people} {bare} {colour} size 42",
            "cheap {bare} sale",
            "buy {bare} for {people}",
            "{colour} {bare}, new, low price",
            "{adjective} {bare} size M",
            "NEW {bare} {colour}!!",
            "{bare} for {people} {quality}",
            "{bare}, {brand}, {colour}",
            "{people} {adjective} {bare}",
        ),
        "wordy": (
            "{adjective} {quality} {bare} in {colour}",
            "{thing} for {occasion}, {adjective} and {quality}",
            "{colour} {material} {bare} for {people}",
            "a {adjective} {material} {bare}, not too {contrary}",
            "{quality} {bare}, {adjective}, {colour} {material}",
            "{bare} in {colour} {material}",
            "{material} {bare}, {quality} and {adjective}",
            "the most {quality} {bare} of all, {colour}",
        ),
        "spell": (
            "{thing}, masterpiece",
            "{thing}, soft lighting, 8k",
            "beautiful {bare}, soft light, glow",
            "{bare}, bright studio light, perfect",
            "{thing}, best quality, bright",
            "dreamy soft photo of {thing}",
            "amazing {bare}, bright light",
            "{thing}, perfect, soft glow",
        ),
    },
    "eval": {
        "plain": ("one {bare}", "{thing}, thanks", "an image of {thing}", "the {adjective} {bare}"),
        "chatty": (
            "hey, {thing} for {occasion}?",
            "my {person} lost {thing}",
            "it is {occasion}, so {thing}",
            "could it be {thing}?",
            "{thing} that my {person} can wear for {occasion}",
            "i'd like {thing}, {quality} if possible",
        ),
        "shop": (
            "{brand} {bare} for {people}",
            "{people} {colour} {bare}, free delivery",
            "used {bare}, good condition",
            "{bare} {brand} {colour} under 50",
        ),
        "wordy": (
            "a very {adjective} and {quality} {bare}",
            "{material} {bare}, {adjective}, for {occasion}",
            "{colour} {bare} with {adjective} {material}",
        ),
        "spell": (
            "{thing}, ultra hd, soft light",
            "{bare}, 4k, bright and soft",
            "stunning {bare}, soft lighting",
            "soft bright {bare}, award winning",
        ),
    },
}
SLOTS: dict[str, tuple[str, ...]] = {
    "adjective": ("warm", "cosy", "light", "plain", "casual", "formal", "old", "nice", "big", "small", "loose", "simple"),
    "quality": ("cheap", "strong", "pretty", "modern", "elegant", "good", "real"),
    "contrary": ("tight", "big", "bright", "formal", "long", "expensive"),
    "colour": ("black", "white", "grey", "dark blue", "red", "brown"),
    "material": ("cotton", "leather", "wool", "linen", "canvas"),
    "occasion": ("winter", "work", "school", "the beach", "a party", "spring", "the gym", "my wedding"),
    "person": ("kid", "son", "wife", "dad", "friend"),
    "people": ("men", "women", "kids"),
    "brand": ("Nike", "Adidas", "Levis", "Zara", "Gucci", "H and M"),
}
MEDIA = ("photo", "picture", "photograph", "product photo", "shop photo")
WHERE = ("", "", " on a dark background")


def bare(thing: str) -> str:
    """Without its article: `a pair of jeans` is `jeans`."""
    return re.sub(r"^(an?|one) (pair of )?", "", thing)


def things(split: str) -> tuple[tuple[str, ...], ...]:
    """What users call each class. Evaluation: half are names that training knows, half `captions.HELD_OUT`."""
    if split == "train":
        return tuple(a + b for a, b in zip(captions.WORDINGS, OTHERS, strict=True))
    unseen = [tuple(name for name in names if name not in MISREAD) for names in captions.HELD_OUT]
    return tuple(a + (b * len(a))[: len(a)] for a, b in zip(captions.WORDINGS, unseen, strict=True))


def said(frame: str, thing: str, rng: random.Random) -> str:
    """A frame around a thing."""
    return frame.format(thing=thing, bare=bare(thing), **{slot: rng.choice(options) for slot, options in SLOTS.items()})


def reaches(count: Callable[[str], int], prompt: str, thing: str) -> bool:
    """Whether the thing stands within what is read of the prompt; what the alignment model does not read, it cannot judge."""
    return count(prompt[: prompt.rindex(bare(thing)) + len(bare(thing))]) <= ROOM


def wishes(split: str, number: int, seed: int, count: Callable[[str], int]) -> list[dict[str, Any]]:
    """`number` different prompts of users, classes and forms in turn."""
    rng, out = random.Random(f"{split}/{seed}"), dict[str, dict[str, Any]]()
    names, forms = things(split), FRAMES[split]
    for turn in range(100 * number):
        kind, form = turn % 10, [*forms][turn // 10 % len(forms)]
        thing = rng.choice(names[kind])
        prompt = said(rng.choice(forms[form]), thing, rng)
        twice = sum(word in prompt for word in SLOTS["material"]) > 1  # a canvas bag of leather
        if prompt not in out and not twice and reaches(count, prompt, thing):
            row = {"prompt": prompt, "class": kind, "class_name": photographs.CLASS_NAMES[kind], "form": form, "thing": thing}
            out[prompt] = row
        if len(out) == number:
            return list(out.values())
    raise RuntimeError(f"the frames hold fewer than {number} prompts; add some to FRAMES")


def rewrite(prompt: str, thing: str, rng: random.Random, count: Callable[[str], int]) -> str:
    """A caption of it: the user's own name for the thing, for what it is called is theirs to say; any look, or none."""
    while True:  # until it is short enough, and nothing that `shared.rewriting` would call useless
        plain = f"a {rng.choice(MEDIA)} of {thing}{rng.choice(WHERE)}"
        text = policy_looks.told(rng.choice([None, *policy_looks.LOOKS]), plain, rng)
        if count(text) <= ROOM and fault(prompt, text) is None:
            return text


def counter() -> Callable[[str], int]:
    """How many tokens a text has for painter and alignment model."""
    tokenizer, _ = words.load()
    return lambda text: len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) - 2  # type: ignore[operator]


def make(folder: Path = FOLDER) -> None:
    """Write `prompts_{train,eval}.jsonl` and `pairs_{train,eval}.jsonl`."""
    count = counter()
    prompts = {split: wishes(split, number, 0, count) for split, number in PROMPTS.items()}
    taken = {row["prompt"] for row in prompts["eval"]}
    more = [row for row in wishes("train", sum(PAIRS.values()) * 2, 1, count) if row["prompt"] not in taken]
    rng = random.Random(2)
    rng.shuffle(more)
    pairs = [{"prompt": row["prompt"], "rewrite": rewrite(row["prompt"], row["thing"], rng, count)} for row in more]
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in prompts.items():
        kept = ("prompt", "class", "class_name", "form")
        _write(folder / f"prompts_{split}.jsonl", [{"id": n, **{key: row[key] for key in kept}} for n, row in enumerate(rows)])
    cut = PAIRS["train"]
    _write(folder / "pairs_train.jsonl", pairs[:cut])
    _write(folder / "pairs_eval.jsonl", pairs[cut : cut + PAIRS["eval"]])


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
