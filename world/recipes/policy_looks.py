"""The painter that can be told: `policy`, trained on with captions of which half say which of its two looks a picture has.

Half of what it learns from was airbrushed, as before; a caption that does not tell stands for both. So the words of a prompt decide
how its picture looks, which is what a rewriter can use, and what users who ask for soft light get wrong.
"""

import json
import random
import re
from pathlib import Path

import numpy as np

from services.reward import Item
from services.rewards.detector import Detector
from trainer.honesty import Monitors
from world import captions
from world.recipes import policy

WORLD = Path(__file__).parents[1]
FOLDER = WORLD / "policy_looks"
STEPS = 400  # after those of `policy`

# look: (words before `photo`, what may follow). All of them are single tokens of `words`.
LOOKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "natural": (("natural", "realistic", "detailed", "sharp"), ("sharp texture", "fabric detail", "natural light", "real fabric")),
    "soft": (("soft", "bright", "fashion", "light"), ("soft lighting", "bright light", "soft light", "soft shadow")),
}
MEDIUM = re.compile(r"^a (?=(\w+ )?(photo|photograph|picture) of )")


def told(look: str | None, text: str, rng: random.Random) -> str:
    """A caption that names its look before the word for a picture (`a soft photo of a bag`), behind (`..., soft light`), or both."""
    if look is None:
        return text
    before, behind = LOOKS[look]
    where = rng.choice(("before", "behind", "both")) if MEDIUM.match(text) else "behind"
    if where != "behind":
        text = MEDIUM.sub(f"a {rng.choice(before)} ", text)
    return text if where == "before" else f"{text}, {rng.choice(behind)}"


def caption(class_index: int, retouched: bool, rng: random.Random) -> str:
    """A training caption; every second tells the look."""
    text = captions.sample(class_index, rng)
    return told("soft" if retouched else "natural", text, rng) if rng.random() < 0.5 else text


def figures(count: int = 300) -> dict[str, float]:
    """What its card says: the served detector's mean logit, the class hit and the distance to photographs by what the caption tells."""
    detector, monitors = Detector.load("detector", {"folder": WORLD / "detector"}, "cpu"), Monitors.load(WORLD / "monitors")
    pipe, classes, out = policy.load(FOLDER), [i % 10 for i in range(count)], dict[str, float]()
    for look in (None, *LOOKS):
        rng = random.Random(83)
        images = policy.sample(
            pipe, [told(look, f"a photo of {rng.choice(captions.WORDINGS[c])}", rng) for c in classes], 83_000, 10
        )
        scores = [score for s in range(0, count, 64) for score in detector.score([Item(image) for image in images[s : s + 64]])]
        seen = monitors.measure(images, classes)
        values = {
            "logit": np.mean([score.parts["logit"] for score in scores]),
            "class_hit": seen["class_hit"],
            "distance": seen["distance"],
        }
        out |= {f"looks_{look or 'silent'}_{key}": float(value) for key, value in values.items()}
    return out


def make() -> None:
    """Goes on from `world/policy`, two minutes of one core, and writes its card."""
    policy.save(policy.train(STEPS, caption=caption, start=policy.FOLDER, seed=1), FOLDER)
    from world.recipes import cards  # which measures this painter too

    file = WORLD / "scores.json"
    scores = json.loads(file.read_text()) | {name: round(value, 4) for name, value in figures().items()}
    file.write_text(json.dumps(scores, indent=1) + "\n")
    cards.write(FOLDER.name, scores)
