"""Write the bench's prompts and photographs anew: `python -m world.realbench.make`.

`--contestants FOLDER` writes three contestants whose place is known instead: `again`, other photographs of the same kinds; `blurred` and
`jpeg`, the bench's own photographs, blurred and compressed.
"""

import argparse
import io
import json
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from world import captions, photographs

HERE = Path(__file__).parent
EACH, SEED = 26, 42  # prompts of a class
BLUR, QUALITY = 0.7, 25  # radius in pixels of 28; of JPEG
VIEWS = ("seen from the front", "seen from the side", "a little turned", "laid out flat", "filling the frame")
LIGHTS = ("in soft even light", "in the light of a studio", "lit from above", "in daylight from a window")
DETAILS = (
    "with seams and folds that can be made out",
    "with the grain of the material",
    "with small creases, as after wear",
    "with edges that are sharp but not drawn",
)


def prompts() -> list[dict[str, object]]:
    """EACH of every class: a wording in a template, none twice, and the same with view, background, light and detail."""
    rng, out = random.Random(SEED), []
    for kind, words in enumerate(captions.WORDINGS):
        name = photographs.CLASS_NAMES[kind].replace(" ", "-")
        pairs = [(word, template) for word in words for template in captions.TEMPLATES]
        for i, (word, template) in enumerate(rng.sample(pairs, EACH)):
            short = captions.caption(word, template)
            where = "" if "background" in short else " on a plain dark background"
            long = f"{short}, {rng.choice(VIEWS)}{where}, {rng.choice(LIGHTS)}, {rng.choice(DETAILS)}"
            out.append({"id": f"{name}-{i:02d}", "prompt": short, "long": long, "class": kind})
    return out


def chosen(turn: int) -> list[NDArray[np.uint8]]:
    """A held-out photograph for each prompt; those of another turn are others."""
    images, classes = photographs.load("test")
    rng, out = np.random.default_rng(SEED), []
    for kind in range(len(captions.WORDINGS)):
        rows = rng.permutation(np.flatnonzero(classes == kind))
        out += [images[row] for row in rows[turn * EACH : (turn + 1) * EACH]]
    return out


def save(images: list[NDArray[np.uint8]], folder: Path) -> None:
    """PNG files, named by the prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    for prompt, image in zip(prompts(), images, strict=True):
        Image.fromarray(image).convert("L").save(folder / f"{prompt['id']}.png", optimize=True)


def blurred(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR)))


def compressed(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", type=Path, metavar="FOLDER", help="write `again`, `blurred` and `jpeg` there")
    folder = parser.parse_args().contestants
    real = chosen(0)
    if folder is None:
        rows = sorted(prompts(), key=lambda row: str(row["id"])[-2:])  # classes in turn, so that the first N are of every class
        (HERE / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save(real, HERE / "photographs")
        return
    save(chosen(1), folder / "again")
    save([blurred(image) for image in real], folder / "blurred")
    save([compressed(image) for image in real], folder / "jpeg")


if __name__ == "__main__":
    main()
