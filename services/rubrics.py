"""Find the criteria of `auto_rubric` from preference pairs, after AutoRubric-T2I's page.

    python -m services.rubrics pairs.jsonl judge.yaml rubrics.yaml

Each line of pairs.jsonl is {"prompt": ..., "better": "a.png", "worse": "b.png"} (paths from its folder); judge.yaml holds the options of
`auto_rubric` without `rubrics`. A judge proposes criteria from some pairs, scores every picture of every pair by all of them, and

    min_w  1/P sum_p log(1 + exp(-w x_p)) + penalty |w|_1,    x_p = s(better) - s(worse)

keeps the heaviest. The next round proposes from pairs that come out wrong. The published sign rule, intercept and grid of penalties are not
known; here weights have any sign, there is no intercept (a pair swapped is its negative), and the penalty is given. Needs scikit-learn.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from services.engines import Engine, Failure, Sampling
from services.prompts import Template, read
from services.prompts.answers import json_value
from services.reward import Item
from services.rewards.auto_rubric import AutoRubric, Rubric
from shared.errors import VerismError
from shared.image import decode, from_file

Picture = NDArray[np.uint8]
_LONGEST, _MOST = 500, 5
_JUDGED = 0.9  # share of the pairs about which a criterion must have an answer


@dataclass(frozen=True, eq=False)
class Preference:
    """Two pictures (H, W, 3) of one prompt, of which people took the first."""

    prompt: str
    better: Picture
    worse: Picture


@dataclass(frozen=True)
class Learned:
    """Criteria, heaviest first; the share of pairs that they order as people did; pairs that the judge could answer, and all."""

    rubrics: tuple[Rubric, ...]
    agreement: float
    judged: int
    pairs: int


def criteria(text: str) -> list[str]:
    """The sentences of an answer that is a JSON list of one to five strings; of any other answer none."""
    value = json_value(text)
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST or not all(isinstance(one, str) for one in value):
        return []
    return [one for one in (" ".join(one.split()) for one in value) if 0 < len(one) <= _LONGEST]


def propose(engine: Engine, question: Template, pairs: Sequence[Preference], max_tokens: int = 512) -> list[str]:
    """Criteria of all pairs in order, each once, whatever its case; answers that cannot be read give none."""
    chats = [question.chat([pair.better, pair.worse], {"prompt": pair.prompt}) for pair in pairs]
    found: dict[str, str] = {}
    for answer in engine.generate(chats, Sampling(max_tokens=max_tokens)):
        if not isinstance(answer, Failure) and answer[0].finished:
            for one in criteria(answer[0].text):
                if not engine.reserved.search(one):
                    found.setdefault(one.casefold().rstrip("."), one)
    return list(found.values())


def select(difference_PR: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Weights (R,) of the L1 logistic regression; ValueError without pairs."""
    from sklearn.linear_model import LogisticRegression

    count = len(difference_PR)
    if count == 0:
        raise ValueError("the judge answered about no pair; look at its answers, or lower `floor`")
    both = np.concatenate([difference_PR, -difference_PR])  # each pair in both orders: two classes, the same optimum
    model = LogisticRegression(
        l1_ratio=1.0, solver="liblinear", C=1 / (2 * penalty * count), fit_intercept=False, tol=1e-6, max_iter=10_000
    )
    model.fit(both, np.repeat([1, 0], count))
    weights_R: NDArray[np.float64] = model.coef_[0]
    return weights_R


def learn(
    options: Mapping[str, Any],
    pairs: Sequence[Preference],
    device: str = "cpu",
    *,
    seeds: int = 256,
    rounds: int = 2,
    top: int = 10,
    penalty: float = 0.01,
    question: Path | None = None,
) -> Learned:
    """`options` are those of `auto_rubric` without `rubrics`; `seeds` pairs are shown in each round. ValueError when nothing comes of it."""
    template = read(question or "auto_rubric_propose", ("prompt",), 2)
    shown, found = list(pairs[:seeds]), dict[str, None]()
    columns: dict[str, NDArray[np.float64]] = {}
    names, weights_R, difference_PR = list[str](), np.zeros(0), np.zeros((0, 0))
    for _ in range(rounds):
        judge = AutoRubric.load("auto_rubric", {**options, "rubrics": [{"text": "unused", "weight": 1}]}, device)
        found |= dict.fromkeys(propose(judge.engine, template, shown))
        if not found:
            raise ValueError("the judge proposed no criterion that can be read; give a question that it answers with a JSON list")
        for text in [text for text in found if text not in columns]:
            columns[text] = _differences(options, text, pairs, device)
        names = [text for text in found if np.isfinite(columns[text]).mean() >= _JUDGED]
        all_PR = np.stack([columns[text] for text in names], 1) if names else np.zeros((0, 0))
        judged_P = np.isfinite(all_PR).all(1)
        difference_PR = all_PR[judged_P]
        weights_R = select(difference_PR, penalty)
        margins_P = np.where(judged_P, np.nan_to_num(all_PR) @ weights_R, 0.0)
        shown = [pair for pair, margin in zip(pairs, margins_P, strict=True) if margin <= 0][:seeds]
        if not shown:
            break
    order = [i for i in np.argsort(-np.abs(weights_R), kind="stable") if weights_R[i] != 0][:top]
    if not order:
        raise ValueError(f"no criterion tells the better pictures at penalty {penalty:g}; lower it, or take more pairs")
    agreement = float((difference_PR[:, order] @ weights_R[order] > 0).mean())
    rubrics = tuple(Rubric(text=names[i], weight=float(weights_R[i])) for i in order)
    return Learned(rubrics, agreement, len(difference_PR), len(pairs))


def _differences(options: Mapping[str, Any], text: str, pairs: Sequence[Preference], device: str) -> NDArray[np.float64]:
    """s(better) - s(worse) of one criterion, NaN where the judge gave no answer."""
    judge = AutoRubric.load("auto_rubric", {**options, "rubrics": [{"text": text, "weight": 1}]}, device)
    scores = judge.score([Item(picture, pair.prompt) for pair in pairs for picture in (pair.better, pair.worse)])
    values_P2 = np.array([np.nan if score.value is None else score.value for score in scores]).reshape(-1, 2)
    out: NDArray[np.float64] = values_P2[:, 0] - values_P2[:, 1]
    return out


def load_pairs(path: Path) -> list[Preference]:
    """ValueError says which line is wrong."""
    out = []
    for at, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            a, b = (decode(from_file((path.parent / told[name]).read_bytes())).pixels for name in ("better", "worse"))
            out.append(Preference(str(told["prompt"]), a, b))
        except (ValueError, KeyError, TypeError, OSError, VerismError) as error:
            wanted = '{"prompt": ..., "better": "a.png", "worse": "b.png"}'
            raise ValueError(f"{path}, line {at}: {error or type(error).__name__}; a line is {wanted}") from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """0 when criteria were written, 2 when none could be found."""
    parser = argparse.ArgumentParser(
        prog="python -m services.rubrics", description="Criteria of auto_rubric from preference pairs."
    )
    parser.add_argument("pairs", type=Path, help="JSON lines: prompt, better, worse")
    parser.add_argument("judge", type=Path, help="YAML: options of auto_rubric without rubrics")
    parser.add_argument("out", type=Path, help="YAML file for the criteria")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=256, help="pairs shown in each round (default 256)")
    parser.add_argument("--rounds", type=int, default=2, help="from the second on, pairs that came out wrong are shown (default 2)")
    parser.add_argument("--top", type=int, default=10, help="criteria to keep (default 10)")
    parser.add_argument("--penalty", type=float, default=0.01, help="of the weights' absolute values (default 0.01)")
    parser.add_argument("--question", type=Path, help="template of the proposal (default: auto_rubric_propose)")
    told = vars(parser.parse_args(argv))
    pairs, judge, out = told.pop("pairs"), told.pop("judge"), told.pop("out")
    try:
        learned = learn(yaml.safe_load(judge.read_text()), load_pairs(pairs), told.pop("device"), **told)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"python -m services.rubrics: {error}", file=sys.stderr)
        return 2
    out.write_text(yaml.safe_dump([rubric.model_dump() for rubric in learned.rubrics], sort_keys=False, allow_unicode=True))
    print(
        f"{len(learned.rubrics)} criteria order {learned.agreement:.1%} of {learned.judged} pairs ({learned.pairs} given) as people did"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
