"""Which steps of a path are stochastic and trained: a function of (seed, step, group) alone, the same for all members of a group.

`random` draws a place for every step and group; `fixed` stays at the first; `sliding` walks from noise to data as MixGRPO (2507.21802)
does, whose own windows shrink at the end and are empty at last: these keep their length, and turn back before that.
"""

import math
from bisect import bisect_right
from itertools import accumulate
from typing import Any

from trainer.registry import resolve
from trainer.sampling.rollout import noise_seed
from trainer.types import Window


def places(length: int, first: int, last: int) -> int:
    """How many windows of `length` steps lie inside [first, last); ValueError when none does."""
    count = last - first - length + 1
    if count < 1:
        raise ValueError(f"a window of {length} steps does not fit into [{first}, {last}); change sampling.window")
    return count


def random(seed: int, step: int, group: int, length: int, first: int, last: int, **_: Any) -> Window:
    """A place drawn for this step and group."""
    return Window(first + noise_seed(seed, step, group, -1) % places(length, first, last), length)


def fixed(seed: int, step: int, group: int, length: int, first: int, last: int, **_: Any) -> Window:
    """The first place, always."""
    places(length, first, last)
    return Window(first, length)


def sliding(
    seed: int,
    step: int,
    group: int,
    length: int,
    first: int,
    last: int,
    *,
    stride: int = 1,
    every: int = 25,
    back: bool = True,
    strategy: str = "progressive",
    decay: float = 0.1,
    hold: int | None = None,
) -> Window:
    """From the first place to the last, `stride` further after every `every` training steps, then back (or it stays there).

    `exp_decay` dwells round(every exp(-decay max(0, start - hold))) steps, one at least: longer where the noise is high. `hold` is the
    middle of the range unless given (MixGRPO: 13 of 25 steps, decay 0.1).
    """
    end = first + places(length, first, last) - 1
    starts = [*range(first, end, stride), end]
    knee = (first + last) // 2 if hold is None else hold
    fall = decay if strategy == "exp_decay" else 0.0
    until = list(accumulate(max(1, round(every * math.exp(-fall * max(0, start - knee)))) for start in starts))
    at = step % until[-1] if back else min(step, until[-1] - 1)
    return Window(starts[bisect_right(until, at)], length)


def window_of(seed: int, step: int, group: int, length: int, first: int, last: int, kind: str = "random", **options: Any) -> Window:
    """The window of a registered kind, of `length` steps inside [first, last); options as in `sliding`."""
    out: Window = resolve("window", kind)(seed, step, group, length, first, last, **options)
    return out
