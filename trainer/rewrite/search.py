"""Best of N: several ways to say a prompt, each painted from the same noises, judged by the user's own prompt, within a budget.

The user's prompt as it is stands among them, is painted whole in any case, and is kept where nothing is better. The winner is chosen on the
very pictures that the table shows, so its gain is flattered by the choice, the more the more candidates and the fewer pictures there are;
`confirm` measures it again on fresh ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.language.arms import unread
from trainer.rewrite.budget import Ledger, Way, planned
from trainer.rewrite.judging import Estimate, Floats, Judged, Judges, scale_of, totals
from trainer.rewrite.painter import Canvas, Painter
from trainer.rewrite.prune import survivors
from trainer.rewrite.writers import Writer, Written, usable
from trainer.sampling.rollout import noise_seed

LOST = 2.0  # standard errors by which the alignment falls where the subject is lost


@dataclass
class Candidate:
    """A text and what came of it. `values_RK` (R, K) of its finished pictures; `dropped_after` steps where they never were."""

    text: str
    origin: Literal["own", "rewrite", "refined"]
    written: Written | None = None
    images: NDArray[np.uint8] | None = None
    values_RK: Floats | None = None
    texts_K: tuple[str | None, ...] = ()
    previews: list[tuple[int, list[float | None]]] = field(default_factory=list)  # (after, mean of each reward)
    dropped_after: int | None = None
    total: Estimate = Estimate(None, None)
    gain: Estimate = Estimate(None, None)
    unread: bool = False  # longer than the policy's text encoders read
    lost: Estimate | None = None  # how far its alignment is below that of the user's own prompt
    round: int = 0
    parent: int | None = None


@dataclass
class Found:
    """Everything that was tried; `best` is a place in `candidates`, of which the first is the user's own prompt."""

    prompt: str
    candidates: list[Candidate]
    left_out: dict[str, int]
    failures: dict[str, int]
    best: int = 0
    confirmed: Estimate | None = None  # gain of the best on fresh pictures
    notes: list[str] = field(default_factory=list)


Tell = Callable[[str], None]


def search(
    prompt: str,
    writer: Writer,
    painter: Painter,
    judges: Judges,
    way: Way,
    ledger: Ledger,
    *,
    wanted: int,
    seed: int = 0,
    temperature: float = 1.0,
    tell: Tell = lambda text: None,
) -> Found:
    """Rewrites are drawn for as long as there may be room for them: what one does not use of its longest length is the next one's.

    ConfigError where the budget is too small or the prompt too long. Without usable rewrites the user's own prompt is left, and a note.
    """
    written, kept, left_out = list[Written](), list[Written](), dict[str, int]()
    while (plan := planned(ledger, wanted - len(written), writer.most, way, have=len(kept))).rewrites:
        tell(f"{writer.name} writes {plan.rewrites} rewrites")
        more = writer.write(prompt, plan.rewrites, seed, temperature, first=len(written))
        ledger.spend(tokens=sum(one.tokens for one in more))
        written += more
        kept, left_out = usable(written, prompt)
    found = Found(prompt, [Candidate(prompt, "own")], left_out, {})
    found.candidates += [Candidate(one.text, "rewrite", one) for one in kept]
    if len(written) < wanted:
        found.notes.append(f"the budget holds {len(written)} rewrites of the {wanted} that were asked for")
    if wanted and not kept:
        found.notes.append("no rewrite was usable: your own prompt stands as it is")
    tell(f"painting {way.pictures} pictures each of {len(found.candidates)} prompts")
    paint(found, found.candidates[:1], painter, judges, Way(way.pictures, way.passes_T), seed, tell)
    paint(found, found.candidates[1:], painter, judges, way, seed, tell)
    settle(found, judges)
    return found


def seeds_of(seed: int, pictures: int, fresh: bool = False) -> list[int]:
    """The same noises for every candidate, so that they differ by their words alone; `fresh` ones for `confirm`."""
    return [noise_seed(seed, int(fresh), 0, k) for k in range(pictures)]


def confirm(found: Found, painter: Painter, judges: Judges, pictures: int, seed: int) -> None:
    """The best against the user's own prompt on so many fresh pictures of each, in their deviations; nothing where the own is best."""
    if not found.best or not pictures:
        return
    texts = [text for text in (found.prompt, found.candidates[found.best].text) for _ in range(pictures)]
    canvas = painter.begin(texts, seeds_of(seed, pictures, fresh=True) * 2)
    judged = _scored(found, painter.advance(canvas, len(painter.passes_T)), painter, judges)
    values_RNK = judged.values_RB.reshape(len(judges.names), 2, pictures)
    own_K, best_K = totals(values_RNK, scale_of(values_RNK), judges.signs_R, judges.weights_R)
    found.confirmed = Estimate.of(best_K - own_K)


def paint(found: Found, some: Sequence[Candidate], painter: Painter, judges: Judges, way: Way, seed: int, tell: Tell) -> None:
    """Paint and score `some`; at each stage the worst are left as they are. What cannot be scored counts as the worst."""
    alive, k = list(some), way.pictures
    if not alive:
        return
    for one in alive:
        one.unread = unread(painter.policy, [one.text]) > 0
    seeds = seeds_of(seed, k) * len(alive)
    canvas = painter.begin([one.text for one in alive for _ in range(k)], seeds)
    for stage in way.stages:
        canvas = painter.advance(canvas, stage.after)
        keep = stage.left(len(alive))
        if keep == len(alive):
            continue
        judged = _scored(found, canvas, painter, judges)
        means_RN = _mean(judged.values_RB.reshape(len(judges.names), len(alive), k))
        for n, one in enumerate(alive):
            one.previews.append((stage.after, [float(v) if np.isfinite(v) else None for v in means_RN[:, n]]))
        rows = survivors(judges.signs_R[:, None] * means_RN, judges.weights_R, keep)
        for n in set(range(len(alive))) - set(rows):
            alive[n].dropped_after = stage.after
        alive = [alive[n] for n in rows]
        canvas = canvas.keep([n * k + j for n in rows for j in range(k)])
        tell(f"after step {stage.after}: {keep} of {len(some)} go on")
    canvas = painter.advance(canvas, len(way.passes_T))
    images = painter.look(canvas)
    judged = judges.score(images, found.prompt)
    _count(found, judged)
    for n, one in enumerate(alive):
        rows_K = slice(n * k, (n + 1) * k)
        one.images, one.values_RK, one.texts_K = images[rows_K], judged.values_RB[:, rows_K], judged.texts_B[rows_K]


def settle(found: Found, judges: Judges) -> None:
    """Totals over all finished pictures, gains over the user's own prompt paired by noise, and the best that keeps the subject."""
    done = [one for one in found.candidates if one.values_RK is not None]
    values_RNK = np.stack([one.values_RK for one in done if one.values_RK is not None], 1)
    total_NK = totals(values_RNK, scale_of(values_RNK), judges.signs_R, judges.weights_R)
    own = found.candidates[0]
    for one, total_K in zip(done, total_NK, strict=True):
        one.total, one.gain = Estimate.of(total_K), Estimate.of(total_K - total_NK[0])
        one.lost = None
        if judges.alignment is not None and one is not own and one.values_RK is not None and own.values_RK is not None:
            row = judges.names.index(judges.alignment)
            change = Estimate.of(judges.signs_R[row] * (one.values_RK[row] - own.values_RK[row]))
            if change.mean is not None and change.error is not None and change.mean < -LOST * change.error:
                one.lost = change
    able = [i for i, one in enumerate(found.candidates) if one.gain.mean is not None and one.lost is None]
    found.best = max(able, key=lambda i: (found.candidates[i].gain.mean or 0.0, -i), default=0)


def _scored(found: Found, canvas: Canvas, painter: Painter, judges: Judges) -> Judged:
    judged = judges.score(painter.look(canvas), found.prompt)
    _count(found, judged)
    return judged


def _count(found: Found, judged: Judged) -> None:
    for kind, count in judged.failures.items():
        found.failures[kind] = found.failures.get(kind, 0) + count


def _mean(values_RNK: Floats) -> Floats:
    """(R, N), NaN where no picture was scored."""
    known = np.isfinite(values_RNK)
    count = known.sum(-1)
    return np.where(count > 0, np.where(known, values_RNK, 0.0).sum(-1) / np.maximum(count, 1), np.nan)
