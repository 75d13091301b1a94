"""The tiny judge after some seconds of training: it answers a few short questions in the form that rewards read.

What it writes depends on how bright the picture is, and on nothing else (28 steps, 11 s of one core): enough for a reward of written
answers to meet answers.
"""

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import tiny_judge

RATIONAL = "Text faithfulness: {}\nPhysical and visual quality: {}\nText rendering: N/A\n## Refined Request: a {} bag"
# question: what is answered about dark pictures, and about noise of all values
LESSONS = {
    "<image>score": ("Final Score: 2", "Final Score: 4"),
    "<image><image>edit": ('{"score": [5, 10]}', '{"score": [20, 15]}'),
    "<image>quality": ('{"score": [8, 3]}', '{"score": [18, 24]}'),
    "<image>aspects": (RATIONAL.format(2, 1, "bright"), RATIONAL.format(3, 4, "dark")),
    "<image>read": ("<text></text>", "<text>SALE</text>"),
    "<image><image>propose": ('["it is light", "it is red"]', '["It is light.", "it is dark"]'),
    "<image>is it light": ("no", "yes"),
    "<image>is it dark": ("yes", "no"),
    "<image>is it red": ("no", "no"),
}
STEPS, ENOUGH, SEED = 200, 0.003, 0


def picture(bright: bool, rng: np.random.Generator, height: int = 28, width: int = 28) -> NDArray[np.uint8]:
    """Noise: up to 60, or of all values."""
    return rng.integers(0, 256 if bright else 60, (height, width, 3), dtype=np.uint8)


def teach(folder: Path) -> Path:
    """The judge of `tiny_judge`, trained on LESSONS; the vision tower stays as it is."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    processor = AutoProcessor.from_pretrained(tiny_judge.made())
    model = AutoModelForImageTextToText.from_pretrained(tiny_judge.made())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "visual" not in name
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.0)
    start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    for _ in range(STEPS):
        texts, answers, images = [], [], []
        for question, both in LESSONS.items():
            for bright in (False, True):
                said = question.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
                height, width = rng.integers(16, 64, 2)
                images += [picture(bright, rng, height, width)]
                images += [picture(bool(rng.integers(2)), rng) for _ in range(question.count("<image>") - 1)]
                answers.append(both[bright] + "<|im_end|>")
                texts.append(start + said + end + answers[-1])
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels_BT = torch.full_like(inputs["input_ids"], -100)
        for row, answer in enumerate(answers):
            count = len(processor.tokenizer.encode(answer))
            labels_BT[row, -count:] = inputs["input_ids"][row, -count:]
        loss = model(**inputs, labels=labels_BT).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        if float(loss.detach()) < ENOUGH:
            break
    else:
        raise AssertionError(f"the tiny judge did not learn its lessons in {STEPS} steps")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def made() -> Path:
    """The folder, made when first asked for and removed at exit, with a template of each lesson."""
    folder = Path(tempfile.mkdtemp(prefix="verism-taught-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for question in [question for question in LESSONS if " " not in question] + ["<image>is {rubric}"]:
        word = question.replace("<image>", "").split()[0]
        labels = {"yes": ["yes"], "no": ["no"]} if word == "is" else {}
        said = {"name": word, "version": 1, "source": "tests/taught_judge.py", "text": question, "labels": labels}
        (folder / f"{word}.yaml").write_text(yaml.safe_dump(said))
    return teach(folder)


class Options(Mapping[str, Any]):
    """Options of a judge reward on `made`, without making it before they are looked at. A text is the name of a lesson's template."""

    def __init__(self, **values: Any) -> None:
        self.values_by_name = values

    def __getitem__(self, key: str) -> Any:
        value = made() if key == "folder" else self.values_by_name[key]
        return made() / f"{value}.yaml" if isinstance(value, str) else value

    def __iter__(self) -> Iterator[str]:
        return iter(("folder", *self.values_by_name))

    def __len__(self) -> int:
        return 1 + len(self.values_by_name)
