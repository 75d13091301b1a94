"""Which of two folders of pictures is preferred, pair by pair: who meets whom, what is asked of a service that compares, how it adds up.

Pictures of the same name meet, where both folders have the same names; else every picture meets others at random. Each pair is asked in
both orders: who wins in both has won, anything else is half a win for each, and a pair without an answer is missing.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.client import RewardClientSync
from shared.errors import VerismError
from shared.image import decode, from_file
from shared.schema import Problem, RewardInfo, Verdict
from shared.verdicts import consistent, plus_four

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".qoi")
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
Match = tuple[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """Of folder a: consistent wins, losses, ties, and pairs without a verdict. `rate` counts a tie as half; its error is `plus_four`.
    `shown_first` is how often what is shown first was preferred: 0.5 is a judge without a leaning."""

    wins: int
    losses: int
    ties: int
    missing: int
    rate: float | None
    error: float | None
    shown_first: float | None


def names(folder: Path) -> list[str]:
    """Of its pictures. ValueError when there are none."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in ENDINGS) if folder.is_dir() else []
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(ENDINGS)})")
    return found


def matches(a: Sequence[str], b: Sequence[str], pairs: int | None, seed: int) -> list[Match]:
    """By name where both have the same names; else random, none twice, each picture of `a` as often as any other (or once more)."""
    rng = np.random.default_rng(seed)
    if set(a) == set(b):
        return [(a[i], a[i]) for i in sorted(rng.permutation(len(a))[:pairs])]
    one, other = ([several[i] for i in rng.permutation(len(several))] for several in (a, b))
    turn = math.lcm(len(a), len(b))  # pairs until the two go round together; then `b` moves on by one
    count = min(pairs or max(len(a), len(b)), len(a) * len(b))
    return [(one[k % len(a)], other[(k + k // turn) % len(b)]) for k in range(count)]


def standing(rows: Sequence[Mapping[str, Any]]) -> Standing:
    """Of rows that hold `verdict`, `forward` and `backward`."""
    verdicts = [row["verdict"] for row in rows if row["verdict"] is not None]
    count, total = len(verdicts), math.fsum(verdicts)
    shown = [(row["forward"] + row["backward"]) / 2 for row in rows if row["verdict"] is not None]
    return Standing(
        wins=verdicts.count(1.0),
        losses=verdicts.count(0.0),
        ties=verdicts.count(0.5),
        missing=len(rows) - count,
        rate=total / count if count else None,
        error=float(plus_four(total, count)) if count else None,
        shown_first=math.fsum(shown) / count if count else None,
    )


class Service:
    """A reward that compares, at a URL."""

    def __init__(self, url: str, reward: str, prompt: str | None = None, timeout_s: float = 120.0, prompted: bool = False) -> None:
        """VerismError, or ValueError, says what to mend. `prompted`: each pair comes with a prompt of its own, to `verdicts`."""
        self.reward, self.prompt, self._client = reward, prompt, RewardClientSync({reward: url}, timeout_s=timeout_s)
        try:
            self.info: RewardInfo = self._client.info()[reward]
            if self.info.mode != "pairwise":
                raise ValueError(
                    f"{reward} at {url} scores single pictures; take a reward that compares, such as `pairs` of "
                    "`verism-serve examples/serve/judge.yaml`"
                )
            if "prompt" in self.info.needs and not prompted and not (prompt or "").strip():
                raise ValueError(
                    f"{reward} asks about a prompt: give the one of these pictures (--prompt), or serve it with a question that has none "
                    "(template: services/arena.yaml)"
                )
        except BaseException:
            self._client.close()
            raise

    def close(self) -> None:
        self._client.close()

    def meet(self, a: Path, b: Path, pairs: Sequence[Match], sleep: Callable[[float], None] = time.sleep) -> list[Row]:
        """A row for each pair: a, b, forward and backward (P(what is shown first wins), with the picture of `a` first, and of `b`), verdict,
        error. What fails for a while is asked again after each of PAUSES_S."""
        rows: list[Row] = [{"a": one, "b": other} for one, other in pairs]
        shown = [[_picture(a / one), _picture(b / other)] for one, other in pairs]
        left: list[int] = []
        for i, both in enumerate(shown):
            bad = next((one for one in both if isinstance(one, Problem)), None)
            rows[i] |= {"forward": None, "backward": None, "verdict": None, "error": bad and bad.type}
            if bad is None:
                left.append(i)
        for pause in (*PAUSES_S, None):
            again: list[int] = []
            for i, told in zip(left, self._asked([shown[i] for i in left]), strict=True):
                if isinstance(told, str):
                    rows[i]["error"] = told
                elif told.error is not None:
                    rows[i]["error"] = told.error.type
                    again += [i] if told.error.retryable else []
                else:
                    forward, backward = told.orders[0], None if told.orders[1] is None else 1 - told.orders[1]
                    rows[i] |= {"forward": forward, "backward": backward, "verdict": consistent(forward, backward), "error": None}
            left = again
            if not left or pause is None:
                break
            sleep(pause)
        return rows

    def _asked(self, shown: Sequence[Sequence[Any]]) -> list[Verdict | str]:
        """Of each two pictures the verdict, or why their request had no answer; the client has tried it for timeout_s."""
        return self.verdicts(shown, [self.prompt] * len(shown))

    def verdicts(self, shown: Sequence[Sequence[NDArray[np.uint8]]], prompts: Sequence[str | None]) -> list[Verdict | str]:
        """Of each two pictures, made for one prompt, the verdict, or why their request had no answer; tried for timeout_s. From any thread."""
        if not shown:
            return []
        images: list[NDArray[np.uint8]] = [one for both in shown for one in both]
        groups = [str(i) for i in range(len(shown)) for _ in range(2)]
        table = self._client.compare(images, groups, [p for p in prompts for _ in range(2)], reward=self.reward)
        kinds = " or ".join(table.failures)
        return [table.groups[str(i)].pairs[0] if str(i) in table.groups else kinds for i in range(len(shown))]


def _picture(path: Path) -> NDArray[np.uint8] | Problem:
    """Its pixels, or why there are none."""
    try:
        return decode(from_file(path.read_bytes())).pixels
    except OSError as error:
        return Problem(type="urn:verism:file-unreadable", title=f"{path} cannot be read: {error}")
    except VerismError as error:
        return error.problem()
