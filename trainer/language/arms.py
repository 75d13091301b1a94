"""What an evaluation compares: the same prompts and noise under several ways of writing prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from trainer.language.judges import Weighed
from trainer.loop import summary, total
from trainer.scoring import Rewards, Scorer
from trainer.types import Prompt


@dataclass(frozen=True)
class Arm:
    """An evaluation's pictures under one way of writing prompts: rewards (R, B), and what was never one."""

    values_RB: Tensor
    monitors: Mapping[str, float]
    texts: Sequence[str]
    missing: int

    @property
    def rewards(self) -> Rewards:
        return Rewards(self.values_RB, self.values_RB.isfinite(), {}, {}, missing=self.missing)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        rows = [[None if math.isnan(v) else v for v in row] for row in self.values_RB.tolist()]
        return {"values": rows, "monitors": dict(self.monitors), "texts": list(self.texts), "missing": self.missing}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Arm":
        rows = [[math.nan if v is None else v for v in row] for row in told["values"]]
        return cls(torch.tensor(rows, dtype=torch.float64), dict(told["monitors"]), list(told["texts"]), int(told["missing"]))


def compared(whole: Weighed, now: Arm, arms: Mapping[str, Arm], first: Mapping[str, Any] | None) -> dict[str, Any]:
    """An evaluation's numbers: of `now` as of any run, of the other arms under their names, and `over_ARM/REWARD` with `..._sem`.

    Totals are in standard deviations of the `first` evaluation, of `now` where there is none yet.
    """
    scorer, count, texts = cast(Scorer, whole), now.values_RB.shape[1], len(now.texts)
    values: dict[str, Any] = {**summary(scorer, now.rewards, first, "mean", "std", "sem"), "n": count}
    values |= {"failed_scores": now.missing, **now.monitors}
    first = first or values
    for name, other in arms.items():
        told = summary(scorer, other.rewards, first, "mean")
        values |= {
            f"{name}/{key}": told[f"reward/{key}{end}"] for key, end in [*((n, "/mean") for n in whole.names), ("total", "")]
        }
        values |= {f"{name}/{key}": value for key, value in other.monitors.items()}
        after, before = ([*arm.values_RB, total(scorer, arm.values_RB, first)] for arm in (now, other))
        for reward, a, b in zip((*whole.names, "total"), after, before, strict=True):
            mean, sem = paired(a - b, [i % texts for i in range(count)])
            values[f"over_{name}/{reward}"], values[f"over_{name}/{reward}_sem"] = mean, sem
    return values


def paired(differences_B: Tensor, of_B: Sequence[int]) -> tuple[float | None, float | None]:
    """Mean of the differences, and its standard error over prompts (pictures of one prompt count as one, by their mean); NaN ones are left
    out, None where nothing or too little is left."""
    groups: dict[int, list[float]] = {}
    for value, owner in zip(differences_B.tolist(), of_B, strict=True):
        if math.isfinite(value):
            groups.setdefault(owner, []).append(value)
    means = torch.tensor([sum(values) / len(values) for values in groups.values()], dtype=torch.float64)
    if not len(means):
        return None, None
    return float(means.mean()), float(means.std(correction=1)) / math.sqrt(len(means)) if len(means) > 1 else None


def write_rewrites(folder: Path, step: int, prompts: Sequence[Prompt], arm: Arm, names: Sequence[str]) -> Path:
    """rewrites/step_000000.jsonl: each prompt once, what was painted, and the mean of each reward over its pictures."""
    path, lines, count = folder / "rewrites" / f"step_{step:06d}.jsonl", [], len(arm.texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for n, text in enumerate(arm.texts):
        means = arm.values_RB[:, n::count].nanmean(1).tolist()
        rewards = {name: None if math.isnan(mean) else mean for name, mean in zip(names, means, strict=True)}
        line = {"id": prompts[n].id, "prompt": prompts[n].text, "rewrite": text, "rewards": rewards}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def unread(policy: Any, texts: Sequence[str]) -> float:
    """The share of texts longer than any encoder of the image policy reads to the end; 0 where it does not say how long that is."""
    parts = getattr(getattr(policy, "pipeline", None), "components", {})
    known = [part for name, part in parts.items() if name.startswith("tokenizer") and part is not None]
    asked = getattr(policy.options, "max_sequence_length", None) if hasattr(policy, "options") else None
    limits = [one.model_max_length if one.model_max_length < 1000 else asked or math.inf for one in known]
    if not limits or math.inf in limits:
        return 0.0
    whole = [any(len(one.tokenize(text)) + 2 <= limit for one, limit in zip(known, limits, strict=True)) for text in texts]
    return 1 - sum(whole) / len(whole)
