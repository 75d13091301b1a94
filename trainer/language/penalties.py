"""What a rewrite costs by its text alone: length, form, repetition, a subject that got lost, an end that was not reached.

Pure functions of text, each in [0, 1], 0 for nothing to complain of. All are lexical: the subject is looked for by its letters
(`shared.rewriting.kept`), so a synonym counts as lost, and whether the picture shows what was asked for is the alignment reward's to say.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.rewriting import clean, fault, kept, repeats
from trainer.language.config import PenaltiesConfig

USELESS = ("empty", "refusal", "too-long")  # nothing to paint from


def painted(prompt: str, answer: str) -> str:
    """What is painted of a model's answer, as who serves it cleans it; the user's own words where nothing of use is left."""
    text = clean(answer).text
    return prompt if fault(prompt, text) in USELESS else text


def length(count: float, low: int, high: int) -> float:
    """0 from `low` to `high`; how far outside, as a share of the bound that was missed, 1 at most."""
    if count < low:
        return (low - count) / low
    return min(1.0, (count - high) / high) if count > high else 0.0


def complaints(prompt: str, answer: str, instruction: str = "") -> tuple[str, ...]:
    """What is wrong with the form: useless altogether (`empty`, `refusal`, `too-long`), or what `clean` takes away (opening, markup, quotes,
    notes, ...), lines, and `instruction` where that is quoted."""
    cleaned = clean(answer)
    useless = fault(prompt, cleaned.text, instruction)
    if useless in USELESS:
        return (str(useless),)
    more = {"lines": "\n" in answer.strip(), "instruction": useless == "instruction"}
    return (*cleaned.removed, *(name for name, there in more.items() if there))


def form(found: Sequence[str]) -> float:
    """1 for a useless one; else a half for the first complaint, a quarter more for the second, and so on."""
    return 1.0 if any(name in USELESS for name in found) else 1 - 0.5 ** len(found)


def repetition(text: str) -> float:
    """The share of word triples (of words, where there are no four) that came before; 1 where one is stuck on a word."""
    told = re.findall(r"\w+", text.casefold())
    runs = [tuple(told[n : n + 3]) for n in range(len(told) - 2)] if len(told) > 3 else [(word,) for word in told]
    if not runs or repeats(text):
        return float(bool(runs))
    return 1 - len(set(runs)) / len(runs)


def missing(prompt: str, text: str) -> float:
    """The share of the prompt's content words of which the text has no form; 0 where words cannot tell (none, or another script)."""
    share = kept(prompt, text)
    return 0.0 if share is None else 1 - share


@dataclass(frozen=True)
class Costs:
    """`values_B` (B,) of each penalty in [0, 1], `total_B` what they cost by their weights, and numbers for the log."""

    values_B: Mapping[str, Tensor]
    total_B: Tensor
    numbers: Mapping[str, float]


def costs(
    prompts: Sequence[str],
    answers: Sequence[str],
    tokens_B: Tensor,
    ended_B: Tensor,
    config: PenaltiesConfig,
    instruction: str = "",
) -> Costs:
    """Of B answers as the model gave them; `tokens_B` counts what was drawn, `ended_B` is False where the length ran out."""
    c, texts = config.length, [clean(answer).text for answer in answers]
    words = [len(text.split()) for text in texts]
    found = [complaints(prompt, answer, instruction) for prompt, answer in zip(prompts, answers, strict=True)]
    each = {
        "length": [length(count, c.min, c.max) for count in (words if c.unit == "words" else tokens_B.tolist())],
        "format": [form(names) for names in found],
        "repetition": [repetition(text) for text in texts],
        "subject": [missing(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        "truncated": (~ended_B.bool()).double().tolist(),
    }
    values_B = {name: torch.tensor(row, dtype=torch.float64) for name, row in each.items()}
    total_B = torch.zeros(len(texts), dtype=torch.float64)
    for name, row in values_B.items():
        total_B += getattr(config, name).weight * row
    numbers = {f"penalty/{name}": float(row.mean()) for name, row in values_B.items()} | {"penalty/total": float(total_B.mean())}
    for name in sorted({name for names in found for name in names}):
        numbers[f"rewrites/{name}"] = sum(name in names for names in found) / len(found)
    return Costs(values_B, total_B, numbers | {"rewrites/words": sum(words) / max(1, len(words))})
