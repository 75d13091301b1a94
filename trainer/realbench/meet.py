"""The arena: photographs and contestants against one another, each pair in both orders, only consistent wins counted.

Contestants with pictures of the same prompts meet prompt by prompt, the same prompts in every bout; others at random. A pair is kept by
what its two files hold, in the order of their sha256, so that neither names nor the order of contestants asks it anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np

from shared.arena import Service, matches
from shared.verdicts import consistent
from trainer.realbench.ask import Away, Tell
from trainer.realbench.chat import MORE_REALISTIC, Chat, Said, more_realistic
from trainer.realbench.ledger import Ledger, Row, digest
from trainer.realbench.pictures import Entry, Looked, Picture, Pixels, seen

FIELDS = ("question", "first", "second", "prompt")
_PAIRS, _UNDER_WAY = 16, 4  # of a request; requests


@dataclass(frozen=True)
class Bout:
    """Two pictures that meet; `a` and `b` are contestants."""

    a: str
    b: str
    one: Picture
    other: Picture

    @property
    def keys(self) -> tuple[str, ...]:
        """What resampling draws: the prompt, or both pictures."""
        return (self.one.key,) if self.one.key == self.other.key else (self.one.key, self.other.key)


def schedule(entries: Sequence[Entry], pairs: int, seed: int) -> list[Bout]:
    """Every two contestants, at most `pairs` pictures of each."""
    out = []
    for a, b in combinations(entries, 2):
        ours, theirs = ({picture.key: picture for picture in entry.pictures} for entry in (a, b))
        shared = sorted(ours.keys() & theirs.keys())
        if shared:
            order = np.random.default_rng(seed).permutation(len(shared))[:pairs]
            chosen = [(shared[i], shared[i]) for i in sorted(order)]
        else:
            chosen = matches(sorted(ours), sorted(theirs), min(pairs, max(len(ours), len(theirs))), seed)
        out += [Bout(a.name, b.name, ours[x], theirs[y]) for x, y in chosen]
    return out


class Asked(Protocol):
    """Who decides."""

    question: str
    needs_prompt: bool

    def rows(self, bouts: Sequence[Bout], away: Away) -> Iterator[tuple[int, Row]]: ...


def place(
    question: str, bout: Bout, looked: Mapping[str, Mapping[str, Looked]], needs_prompt: bool
) -> tuple[tuple[str, ...], bool]:
    """The key of a bout's row, and whether the row has the two the other way round."""
    one, other = looked[bout.a][bout.one.key].sha, looked[bout.b][bout.other.key].sha
    prompt = bout.one.prompt
    asked = digest(prompt.text) if needs_prompt and prompt is not None else ""
    return (question, *sorted((one, other)), asked), one > other


def _open(
    judge: Asked, bouts: Sequence[Bout], looked: Mapping[str, Mapping[str, Looked]], ledger: Ledger
) -> list[tuple[Bout, tuple[str, ...], bool]]:
    """What the ledger does not have, each pair of files once."""
    out: list[tuple[Bout, tuple[str, ...], bool]] = []
    asked = set[tuple[str, ...]]()
    for bout in bouts:
        where, turned = place(judge.question, bout, looked, judge.needs_prompt)
        known = where in asked or where[1] == where[2] or ledger.settled(*where)
        if not known and able(bout, looked, judge.needs_prompt):
            asked.add(where)
            out.append((bout, where, turned))
    out.sort(key=lambda one: one[1] in ledger.rows)  # what failed before comes last
    return out


def left(judge: Asked, bouts: Sequence[Bout], looked: Mapping[str, Mapping[str, Looked]], ledger: Ledger) -> int:
    """How many pairs `run` would ask for."""
    return len(_open(judge, bouts, looked, ledger))


def run(
    judge: Asked, bouts: Sequence[Bout], looked: Mapping[str, Mapping[str, Looked]], ledger: Ledger, away: Away, tell: Tell
) -> None:
    """Ask for what the ledger does not have."""
    open_ = _open(judge, bouts, looked, ledger)
    for i, row in judge.rows([bout for bout, *_ in open_], away):
        _, where, turned = open_[i]
        if turned:
            row |= {"forward": _not(row["backward"]), "backward": _not(row["forward"]), "value": _not(row["value"])}
        ledger.add([{**dict(zip(FIELDS, where, strict=True)), **row}])
        tell(1)


def able(bout: Bout, looked: Mapping[str, Mapping[str, Looked]], needs_prompt: bool) -> bool:
    """Whether both pictures can be read, and a prompt is there for a judge that asks about one."""
    both = (looked[bout.a][bout.one.key], looked[bout.b][bout.other.key])
    same = bout.one.prompt is not None and bout.one.prompt == bout.other.prompt
    return all(one.problem is None for one in both) and (same or not needs_prompt)


def answered(judge: Asked, bouts: Sequence[Bout], looked: Mapping[str, Mapping[str, Looked]], ledger: Ledger) -> list[Row]:
    """A row for each bout: its verdict for `a` (1, 0.5, 0 or None), what each order said, and the error of one without a verdict."""
    out = []
    for bout in bouts:
        row: Row = {"a": bout.a, "b": bout.b, "keys": bout.keys, "value": None, "forward": None, "backward": None, "error": None}
        where, turned = place(judge.question, bout, looked, judge.needs_prompt)
        known = ledger.rows.get(where)
        if not able(bout, looked, judge.needs_prompt):
            row["error"] = "unreadable, or of no prompt"
        elif where[1] == where[2]:
            row["value"] = 0.5  # the same file: nothing to prefer, and nothing is asked
        elif known is None:
            row["error"] = "not asked yet"
        else:
            row |= {name: known[name] for name in ("value", "forward", "backward", "error")}
            if turned:
                row |= {"forward": _not(row["backward"]), "backward": _not(row["forward"]), "value": _not(row["value"])}
        out.append(row)
    return out


def _not(p: float | None) -> float | None:
    return None if p is None else 1 - p


def _row(forward: float | None, backward: float | None, error: str | None, retry: bool) -> Row:
    """`forward` and `backward` are P(the picture of `a` wins), shown first and shown second."""
    value = consistent(forward, _not(backward))
    return {"forward": forward, "backward": backward, "value": value, "error": error, "retry": retry}


class ByService:
    """A reward that compares, over HTTP."""

    def __init__(self, service: Service) -> None:
        info = service.info
        self.service, self.needs_prompt = service, "prompt" in info.needs
        self.question = f"{service.reward}@{digest(info.version, info.weights_sha256, info.preprocessing)}"

    def rows(self, bouts: Sequence[Bout], away: Away) -> Iterator[tuple[int, Row]]:
        chunks = [range(i, min(i + _PAIRS, len(bouts))) for i in range(0, len(bouts), _PAIRS)]

        def ask(chunk: range) -> list[Row]:
            if "arena" in away.why:
                return []
            shown = [[seen(bouts[i].one), seen(bouts[i].other)] for i in chunk]
            prompts = [p.text if self.needs_prompt and (p := bouts[i].one.prompt) is not None else None for i in chunk]
            rows = []
            for verdict in self.service.verdicts(shown, prompts):
                if isinstance(verdict, str):
                    rows.append(_row(None, None, verdict, True))
                elif verdict.error is not None:
                    rows.append(_row(None, None, verdict.error.type, verdict.error.retryable))
                else:
                    rows.append(_row(*verdict.orders, None, False))
            if rows and all(row["retry"] for row in rows):
                away.why.setdefault("arena", f"{self.service.reward} stopped answering: {rows[0]['error']}")
            return rows

        with ThreadPoolExecutor(_UNDER_WAY, "arena") as threads:
            for chunk, rows in zip(chunks, threads.map(ask, chunks), strict=True):
                yield from zip(chunk, rows, strict=False)


class ByChat:
    """A judge that writes which of two is more realistic: two questions a pair."""

    needs_prompt = False

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.question = f"{chat.name}@{digest(chat.judge.model, MORE_REALISTIC, chat.judge.max_tokens, chat.judge.temperature)}"

    def rows(self, bouts: Sequence[Bout], away: Away) -> Iterator[tuple[int, Row]]:
        def ask(one: Picture, other: Picture) -> Callable[[], tuple[str, list[Pixels]]]:
            return lambda: (MORE_REALISTIC, [seen(one), seen(other)])

        lacking = 0
        for start in range(0, len(bouts), 64):
            if self.chat.gave_up.is_set():
                break
            chunk = bouts[start : start + 64]
            questions = [ask(*both) for bout in chunk for both in ((bout.one, bout.other), (bout.other, bout.one))]
            said = [one for _, one in self.chat.ask_all(questions)]
            lacking += sum(one.retry for one in said)
            for i, (forward, backward) in enumerate(zip(said[::2], said[1::2], strict=True)):
                yield start + i, self._read(forward, backward)
        if self.chat.gave_up.is_set() or lacking:
            away.why["arena"] = f"{self.chat.judge.url}: {self.chat.why}"

    def _read(self, forward: Said, backward: Said) -> Row:
        first, second = (None if one.text is None else more_realistic(one.text) for one in (forward, backward))
        error = forward.error or backward.error or ("unparsed" if first is None or second is None else None)
        row = _row(first, _not(second), error, forward.retry or backward.retry)
        return {**row, "text": [(one.text or "")[:300] for one in (forward, backward)]}
