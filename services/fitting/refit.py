"""One refit, from pictures and the last version's state to the next one's: no HTTP, no files, no threads.

Real pictures are split by their own hash, so one that a version proved itself on is not learned from later, with whatever it comes. What is
learned from comes in pairs of a real and a generated picture; a step sees new pairs and replayed ones. The average of the weights is what
scores, so the average is what has to prove itself. All that is random follows from `seed` and the version.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from services.fitting.options import FitOptions, OptimOptions
from services.fitting.replay import PastPair, Replay
from services.fitting.store import Damaged, State, key_of
from services.fitting.types import Fitter
from services.reward import Item

EVALUATED = 16  # pictures whose scores are told
AT_ONCE = 64  # pictures in one forward pass of an evaluation
LEAST_HELD_OUT = 2
Augment = Callable[[Sequence[Item], torch.Generator], list[Item]]


class Stopped(Exception):
    """Somebody wanted the refit to end."""


class Diverged(Exception):
    """Something is not a finite number; the message says what to do."""


@dataclass(frozen=True)
class Example:
    """A picture of one side, by its key; `group` ties it to those of the other side."""

    item: Item
    key: str
    group: str | None = None
    lossy: bool = False

    @classmethod
    def of(cls, item: Item, group: str | None = None, lossy: bool = False) -> "Example":
        return cls(item, key_of(item.image), group, lossy)

    @property
    def fraction(self) -> float:
        """In [0, 1), by the picture alone: below `held_out` it is not learned from."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big") / 2**64


Pairs = list[tuple[Example, Example]]


@dataclass(frozen=True)
class Progress:
    """After a step."""

    round: int
    steps: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Refitted:
    """`state` is the new version's, where it is good enough; else `reason` says what happened and what to do."""

    outcome: Literal["ready", "kept_out"]
    state: State | None
    round: int
    losses: dict[str, float]
    accuracy: float | None = None
    accuracy_before: float | None = None
    evaluated: dict[str, float] = field(default_factory=dict)
    items: tuple[Item, ...] = ()  # of `evaluated`, in its order
    reason: str | None = None


def warnings_of(real: Sequence[Example], generated: Sequence[Example]) -> list[str]:
    """What a detector could learn instead of the difference that is meant."""
    said = []
    sizes = {side: Counter(one.item.image.shape[:2] for one in some) for side, some in (("real", real), ("generated", generated))}
    for side, other in (("real", "generated"), ("generated", "real")):
        if len(sizes[side]) == 1 and sizes[other] and set(sizes[other]) != set(sizes[side]):
            height, width = next(iter(sizes[side]))
            strange = sum(count for size, count in sizes[other].items() if size != (height, width))
            said.append(
                f"all {side} pictures are {width}x{height}, but {strange} of {sizes[other].total()} {other} ones are not: the reward could "
                "learn the resampler; bring both sides to one size in one way"
            )
            break
    lossy = {side: sum(one.lossy for one in some) for side, some in (("real", real), ("generated", generated))}
    for side, other in (("real", "generated"), ("generated", "real")):
        if lossy[side] and not lossy[other]:
            said.append(
                f"{lossy[side]} {side} pictures came as JPEG or lossy WebP and no {other} one did: the reward could learn the compression; "
                "send both sides alike"
            )
    both = {one.key for one in real} & {one.key for one in generated}
    if both:
        said.append(f"{len(both)} pictures are on both sides: they teach nothing; see where the generated ones come from")
    return said


def split(real: Sequence[Example], generated: Sequence[Example], share: float) -> tuple[Pairs, Pairs]:
    """(to learn from, held out), in pairs. Those of one group stay together, on the side that one of its real pictures falls on; its other
    real pictures that fall on the other side are left out: a later refit may have them in another group.

    At least two pictures of each kind are held out, and one is learned from, wherever they fall; ValueError where there are too few for that.
    """
    shared = {one.group for one in real} & {one.group for one in generated} - {None}
    groups: dict[str, tuple[list[Example], list[Example]]] = {}
    for side, some in enumerate((real, generated)):
        for one in some:
            name = f"g{one.group}" if one.group in shared else f"{side}{one.key}"
            groups.setdefault(name, ([], []))[side].append(one)
    ordered = sorted((_fraction(unit), index, unit) for index, unit in enumerate(groups.values()))
    units, held = [unit for *_, unit in ordered], [fraction < share for fraction, *_ in ordered]
    counts = [[len(_own(unit[0], share, True)) for unit in units], [len(unit[1]) for unit in units]]
    for count in counts:
        having = [index for index, n in enumerate(count) if n]
        found = sum(count[index] for index in having if held[index])
        for index in having:
            if found < LEAST_HELD_OUT and not held[index]:
                held[index], found = True, found + count[index]
        if _all_held(count, held):
            held[having[-1]] = False
    if any(sum(n for n, out in zip(c, held, strict=True) if out) < LEAST_HELD_OUT or _all_held(c, held) for c in counts):
        if not shared:
            raise ValueError(f"more than {LEAST_HELD_OUT} different pictures of each side are needed")
        return split([replace(one, group=None) for one in real], [replace(one, group=None) for one in generated], share)

    def part(wanted: bool) -> Pairs:
        chosen = [unit for unit, out in zip(units, held, strict=True) if out == wanted]
        reals = [one for unit in chosen for one in _own(unit[0], share, wanted)]
        return pairs_of(reals, [one for unit in chosen for one in unit[1]])

    return part(False), part(True)


def _fraction(unit: tuple[list[Example], list[Example]]) -> float:
    """Of the picture with the smallest key: as even as that of any one picture."""
    return min(unit[0] or unit[1], key=lambda one: one.key).fraction


def _own(real: Sequence[Example], share: float, held: bool) -> list[Example]:
    """Those of a group that are held out, or are not, by their own fraction; where none is, the nearest to it."""
    near = sorted(real, key=lambda one: one.fraction, reverse=not held)
    return [one for one in real if (one.fraction < share) == held] or near[:1]


def _all_held(counts: Sequence[int], held: Sequence[bool]) -> bool:
    return all(out for n, out in zip(counts, held, strict=True) if n)


def pairs_of(real: Sequence[Example], generated: Sequence[Example]) -> Pairs:
    """Every picture in a pair: with one of its group, else of its prompt, else with the next in turn; some more than once."""
    pairs = list(zip(_partners(generated, real), generated, strict=True))
    used = {id(one) for one, _ in pairs}
    left = [one for one in real if id(one) not in used]
    return pairs + list(zip(left, _partners(left, generated), strict=True))


def _partners(some: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """For each of `some` one of the others, those in turn."""
    by: dict[tuple[str, str], list[Example]] = {}
    for one in others:
        for name in _names(one):
            by.setdefault(name, []).append(one)
    turns: Counter[tuple[str, str]] = Counter()
    found = []
    for one in some:
        name = next(name for name in _names(one) if name in by)
        found.append(by[name][turns[name] % len(by[name])])
        turns[name] += 1
    return found


def _names(one: Example) -> list[tuple[str, str]]:
    """What a partner should have in common with it, the nearest first."""
    near = [("group", one.group), ("prompt", one.item.prompt)]
    return [(what, name) for what, name in near if name is not None] + [("", "")]


def generator_of(seed: int, version: int) -> torch.Generator:
    digest = hashlib.sha256(f"verism refit {seed} {version}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def optimiser(options: OptimOptions, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if options.use == "adamw" else torch.optim.Adam
    made: torch.optim.Optimizer = kind(list(parameters), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    return made


def refit(
    fitter: Fitter,
    before: State,
    version: int,
    learned: Pairs,
    proof: Pairs,
    options: FitOptions,
    *,
    augment: Augment,
    past: Callable[[PastPair], tuple[Item, Item]],
    rounds: int | None = None,
    until_accuracy: float | None = None,
    after_step: Callable[[Progress], None] = lambda progress: None,
    rest: Callable[[], None] = lambda: None,
) -> Refitted:
    """`past` gives a replayed pair's pictures, or raises Damaged for one that is left out; pairs with a picture of `proof` are not asked for.
    `rest` is called after each pass; it may raise Stopped.

    A version whose accuracy on `proof` is below the served one's (by more than `worse`), or that is not finite, is kept out.
    """
    generator, weights = generator_of(options.seed, version), fitter.trainable()
    rounds, until = rounds or options.rounds, until_accuracy or options.until_accuracy
    average = {name: value.detach().clone() for name, value in _placed(before.weights, weights).items()}
    steps, ended = optimiser(options.optim, weights.values()), False
    restore(steps, weights, before.optim)
    held_out = {one.key for pair in proof for one in pair}
    replayed = Replay(before.replay.size, [one for one in before.replay.pairs if held_out.isdisjoint((one.real, one.generated))])
    left = list[PastPair]()
    done, number, losses = before.steps, 0, dict[str, float]()
    was: float | None = None
    try:
        put(weights, before.weights)
        was, _ = _evaluated(fitter, proof, rest)
        put(weights, before.raw)
        for number in range(1, rounds + 1):
            told: list[float] = []
            for new in _batches(learned, options.batch, generator):
                old, lost = _drawn(replayed, _share(len(new), options.replay.share), generator, past)
                left += lost
                pairs = [(a.item, b.item) for a, b in new] + old
                changed = augment([item for side in (0, 1) for item in (pair[side] for pair in pairs)], generator)
                parts = fitter.losses(changed[: len(pairs)], changed[len(pairs) :], generator)
                losses = {name: float(value.detach()) for name, value in parts.items()}
                if not all(map(math.isfinite, losses.values())):
                    raise Diverged(f"the loss is not a finite number after {done - before.steps} steps")
                steps.zero_grad(set_to_none=True)
                parts["total"].backward()  # type: ignore[no-untyped-call]
                steps.step()
                done += 1
                with torch.no_grad():
                    for name, value in weights.items():
                        average[name].lerp_(value, 1 - options.ema)
                if "accuracy" in losses:
                    told.append(losses["accuracy"])
                after_step(Progress(number, done - before.steps, losses))
                rest()
                ended = options.steps is not None and done - before.steps >= options.steps
                if ended:
                    break
            reached = sum(told) / len(told) if told else _evaluated(fitter, learned[: 4 * options.batch], rest)[0]
            losses = {**losses, "accuracy": reached}
            if ended or reached >= until:
                break
        raw = taken(weights)
        if not all(bool(torch.isfinite(value).all()) for value in (*raw.values(), *average.values())):
            raise Diverged(f"the weights are not finite numbers after {done - before.steps} steps")
        put(weights, average)
        accuracy, scores = _evaluated(fitter, proof, rest)
    except Diverged as error:
        reason = f"{error}: lower optim.lr ({options.optim.lr:g}), or look at the pictures that were sent"
        return Refitted("kept_out", None, number, losses, None, was, reason=reason)
    items = {example.key: example.item for pair in proof for example in pair}
    told_items = dict(list(items.items())[:EVALUATED])
    evaluated = {key[:64]: scores[key, item.prompt] for key, item in told_items.items()}
    if accuracy < was - options.worse - 1e-9:
        reason = (
            f"on {len(proof)} pairs that it did not learn from its accuracy is {accuracy:.3f}, and {was:.3f} of the version that is served: "
            "send more pictures, lower optim.lr or rounds, or allow it (`worse`)"
        )
        return Refitted("kept_out", None, number, losses, accuracy, was, evaluated, reason=reason)
    gone = set(left)
    survivors = Replay(before.replay.size, [pair for pair in before.replay.pairs if pair not in gone])
    replay = survivors.with_added([PastPair(a.key, a.item.prompt, b.key, b.item.prompt) for a, b in learned], generator)
    state = State(version, {n: v.cpu() for n, v in average.items()}, raw, replay, saved(steps, weights), done, accuracy)
    return Refitted("ready", state, number, losses, accuracy, was, evaluated, tuple(told_items.values()))


def put(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Values into the leaves."""
    with torch.no_grad():
        for name, leaf in weights.items():
            leaf.copy_(values[name])


def taken(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}


def saved(steps: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's tensors by `NAME/what`."""
    return {
        f"{name}/{what}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for name, leaf in weights.items()
        for what, value in steps.state.get(leaf, {}).items()
    }


def restore(steps: torch.optim.Optimizer, weights: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """What `saved` gave; what is of no weight here, or of another shape, is left out."""
    for full, value in held.items():
        name, _, what = full.rpartition("/")
        leaf = weights.get(name)
        if leaf is not None and value.shape in (leaf.shape, torch.Size([])):
            steps.state[leaf][what] = value.clone() if value.ndim == 0 else value.to(leaf.device, copy=True)


def _placed(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name].to(leaf.device) for name, leaf in like.items()}


def _batches(pairs: Pairs, size: int, generator: torch.Generator) -> Iterator[Pairs]:
    """One pass in random order; the pieces differ by one at most, and the largest has `size`."""
    order = torch.randperm(len(pairs), generator=generator).tolist()
    count = math.ceil(len(order) / size)
    for number in range(count):
        yield [pairs[i] for i in order[number * len(order) // count : (number + 1) * len(order) // count]]


def _share(new: int, share: float) -> int:
    """How many replayed pairs go with so many new ones."""
    return round(new * share / (1 - share))


def _drawn(
    replay: Replay, n: int, generator: torch.Generator, past: Callable[[PastPair], tuple[Item, Item]]
) -> tuple[list[tuple[Item, Item]], list[PastPair]]:
    """Pictures of replayed pairs, and the pairs whose pictures are gone."""
    found, lost = [], []
    for pair in replay.draw(n, generator):
        try:
            found.append(past(pair))
        except Damaged:
            lost.append(pair)
    return found, lost


def _evaluated(fitter: Fitter, pairs: Pairs, rest: Callable[[], None]) -> tuple[float, dict[tuple[str, str | None], float]]:
    """Accuracy, and the score of each picture."""
    unique = {(one.key, one.item.prompt): one.item for pair in pairs for one in pair}
    items, scores = list(unique.values()), list[Tensor]()
    for begin in range(0, len(items), AT_ONCE):
        scores.append(fitter.scores(items[begin : begin + AT_ONCE]).detach().float().cpu())
        rest()
    values = torch.cat(scores)
    if not bool(torch.isfinite(values).all()):
        raise Diverged("some scores are not finite numbers")
    by = dict(zip(unique, values.tolist(), strict=True))
    sides = [torch.tensor([by[one.key, one.item.prompt] for one in side]) for side in zip(*pairs, strict=True)]
    return float(fitter.accuracy(sides[0], sides[1])), by
