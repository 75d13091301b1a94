"""Forward passes: what is counted, what a search will cost at most, and how many rewrites fit.

One token of one rewrite is a pass of the language model, one step of one picture a pass of the image model (two where guidance takes a
second). They cost very different amounts: `token` says how many passes of the image model one token counts as, `look` the same of decoding
and scoring one picture. Nothing is ever spent that is not there.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.config import ConfigError


class OverBudget(RuntimeError):
    """A plan was wrong: it would have spent what is not there."""


@dataclass(frozen=True)
class Costs:
    """In passes of the image model."""

    token: float = 1.0
    look: float = 0.0


@dataclass
class Ledger:
    """What was spent; `limit` None is no limit. `held` is kept back for later. `watch` hears of every expense."""

    costs: Costs = Costs()
    limit: float | None = None
    tokens: int = 0
    passes: int = 0
    looks: int = 0
    held: float = 0.0
    watch: Callable[["Ledger"], None] = field(default=lambda ledger: None, repr=False)

    @property
    def spent(self) -> float:
        return self.tokens * self.costs.token + self.passes + self.looks * self.costs.look

    @property
    def left(self) -> float:
        return math.inf if self.limit is None else self.limit - self.spent - self.held

    def hold(self, *, passes: int, looks: int) -> None:
        """Keep this back; ConfigError where it is not there."""
        if not self.allows(passes=passes, looks=looks):
            raise ConfigError(
                f"{self.left:g} passes are too few to confirm anything with {passes}; raise --budget, or lower --confirm"
            )
        self.held += passes + looks * self.costs.look

    def allows(self, *, tokens: int = 0, passes: int = 0, looks: int = 0) -> bool:
        """Whether that much is left; rounding of the costs aside."""
        wanted = tokens * self.costs.token + passes + looks * self.costs.look
        return wanted <= self.left + 1e-9 * max(1.0, abs(self.limit or 0.0))

    def spend(self, *, tokens: int = 0, passes: int = 0, looks: int = 0) -> None:
        """OverBudget, before anything is done, where it is not there."""
        if not self.allows(tokens=tokens, passes=passes, looks=looks):
            raise OverBudget(f"{tokens} tokens, {passes} passes and {looks} looks are more than the {self.left:g} that are left")
        self.tokens, self.passes, self.looks = self.tokens + tokens, self.passes + passes, self.looks + looks
        self.watch(self)


@dataclass(frozen=True)
class Stage:
    """After `after` steps, keep this share of those that are left, at least one."""

    after: int
    keep: float

    def left(self, alive: int) -> int:
        return max(1, math.floor(alive * self.keep + 0.5)) if alive else 0


@dataclass(frozen=True)
class Way:
    """How each candidate is painted: `pictures` of it, `passes_T` of each step, and where poor ones are dropped."""

    pictures: int
    passes_T: tuple[int, ...]
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        places = [0, *(stage.after for stage in self.stages), len(self.passes_T)]
        if any(a >= b for a, b in zip(places, places[1:], strict=False)):
            raise ConfigError(
                f"stages of pruning must lie in order between step 1 and step {len(self.passes_T) - 1}: {[s.after for s in self.stages]}"
            )
        if any(not 0 < stage.keep <= 1 for stage in self.stages):
            raise ConfigError("a stage keeps a share above 0 and up to 1, e.g. --prune 2:0.5,5:0.5")

    def survivors(self, candidates: int) -> list[tuple[int, int, int]]:
        """(first step, one behind the last, how many are painted) of each stretch."""
        out, begun, alive = [], 0, candidates
        for stage in self.stages:
            out.append((begun, stage.after, alive))
            begun, alive = stage.after, stage.left(alive)
        return [*out, (begun, len(self.passes_T), alive)]

    def painting(self, candidates: int) -> tuple[int, int]:
        """(passes, looks) of so many; one or none are not looked at on the way."""
        stretches = self.survivors(candidates)
        passes = sum(self.pictures * alive * sum(self.passes_T[first:last]) for first, last, alive in stretches)
        dropped = [alive for (_, _, alive), (_, _, after) in zip(stretches, stretches[1:], strict=False) if after < alive]
        return passes, self.pictures * (sum(dropped) + stretches[-1][2])

    def whole(self, candidates: int) -> tuple[int, int]:
        """(passes, looks) of so many, none of them dropped."""
        return self.pictures * candidates * sum(self.passes_T), self.pictures * candidates


@dataclass(frozen=True)
class Plan:
    """`rewrites` to draw, and what that costs at most with the painting of all."""

    rewrites: int
    tokens: int
    passes: int
    looks: int

    def cost(self, costs: Costs) -> float:
        return self.tokens * costs.token + self.passes + self.looks * costs.look


def planned(ledger: Ledger, wanted: int, most_tokens: int, way: Way, have: int = 0) -> Plan:
    """As many rewrites as are wanted and fit, each of the longest length, beside those that are there already (`have`); all of them and the
    user's own prompt are still to be painted. ConfigError when not even that fits."""
    own_passes, own_looks = way.whole(1)
    for rewrites in range(wanted, -1, -1):
        passes, looks = way.painting(have + rewrites)
        plan = Plan(rewrites, rewrites * most_tokens, own_passes + passes, own_looks + looks)
        if ledger.allows(tokens=plan.tokens, passes=plan.passes, looks=plan.looks):
            return plan
    (one_passes, one_looks), prices = way.painting(1), ledger.costs
    need = Plan(0, 0, own_passes, own_looks).cost(prices)
    with_one = need + Plan(1, most_tokens, one_passes, one_looks).cost(prices)
    raise ConfigError(
        f"{ledger.left:g} passes are too few: {way.pictures} pictures of your own prompt alone take {need:g}, with one rewrite {with_one:g}; "
        "raise --budget, or lower --pictures"
    )


# (share of the steps, share that is kept): ours, for rewards that know finished pictures only; and TTSnap's, for noise-aware ones
SCHEDULES = {"auto": ((0.7, 0.5),), "ttsnap": ((0.1, 0.4), (0.3, 0.4), (0.55, 0.5))}


def stages(text: str, steps: int) -> tuple[Stage, ...]:
    """`2:0.5,5:0.5`: after step 2 keep a half, after step 5 a half of those. Or a schedule's name."""
    if text in SCHEDULES:
        return scheduled(SCHEDULES[text], steps)
    out = []
    for part in text.split(","):
        after, _, keep = part.partition(":")
        try:
            out.append(Stage(int(after), float(keep)))
        except ValueError as error:
            raise ConfigError(f"--prune {text!r}: write AFTER:SHARE,..., e.g. 6:0.5,8:0.5, or {' or '.join(SCHEDULES)}") from error
    return tuple(out)


def scheduled(schedule: Sequence[tuple[float, float]], steps: int) -> tuple[Stage, ...]:
    """For so many steps; where they are few, stages that fall together are one."""
    out: dict[int, float] = {}
    for place, share in schedule:
        after = min(max(1, round(place * steps)), steps - 1)
        out[after] = out.get(after, 1.0) * share
    return tuple(Stage(after, keep) for after, keep in sorted(out.items()) if 0 < after < steps)
