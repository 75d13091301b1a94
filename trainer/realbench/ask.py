"""Every question about a single picture, asked once: of rewards over HTTP, and of judges that write."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shared.panel import Look, Panel
from shared.schema import RewardInfo, Score
from trainer.realbench.chat import REAL_OR_FAKE, Chat, real_or_fake
from trainer.realbench.ledger import Ledger, Row, digest
from trainer.realbench.pictures import Entry, Looked, Picture, Pixels, seen

CHANGED = "its weights changed in the middle: call again"
_CHUNK = 64  # answers of a judge that are written at once
Tell = Callable[[int], None]


@dataclass
class Away:
    """Who stopped answering, and why: what is missing of them is asked by the next call."""

    why: dict[str, str] = field(default_factory=dict)


def question_of(name: str, info: RewardInfo) -> str:
    """Changes with the weights, so that other weights are asked anew."""
    return f"{name}@{digest(info.version, info.weights_sha256, info.preprocessing)}"


def question_of_chat(chat: Chat, text: str) -> str:
    judge = chat.judge
    return f"{chat.name}@{digest(judge.model, text, judge.max_tokens, judge.temperature)}"


def key(question: str, picture: Picture, sha: str, info: RewardInfo | None) -> tuple[str, str, str]:
    """What a row is found by: the prompt counts where it is asked about."""
    asked = picture.prompt.text if picture.prompt is not None and info is not None and "prompt" in info.needs else ""
    return question, sha, digest(asked) if asked else ""


FIELDS = ("question", "sha", "prompt")


def wanted(entry: Entry, looked: Mapping[str, Looked], question: str, info: RewardInfo | None, ledger: Ledger) -> list[Picture]:
    """The pictures that this question has no answer for."""
    out, asked = list[Picture](), set[tuple[str, str, str]]()
    for picture in entry.pictures:
        seen_as = looked[picture.key]
        if seen_as.problem is not None or (info is not None and "prompt" in info.needs and picture.prompt is None):
            continue
        place = key(question, picture, seen_as.sha, info)
        if place not in asked and not ledger.settled(*place):
            asked.add(place)
            out.append(picture)
    return out


def rewards(
    panel: Panel, names: Sequence[str], entry: Entry, looked: Mapping[str, Looked], ledger: Ledger, away: Away, tell: Tell
) -> None:
    """Rewards that want the same pictures share their requests. A reward whose whole request fails for a while is left for the next call, and
    the others go on without it.
    """
    together: dict[tuple[str, ...], list[str]] = {}
    by_key = {picture.key: picture for picture in entry.pictures}
    for name in names:
        if name not in away.why:
            info = panel.infos[name]
            open_ = tuple(p.key for p in wanted(entry, looked, question_of(name, info), info, ledger))
            if open_:
                together.setdefault(open_, []).append(name)
    for keys, group in together.items():
        for places, rows in _answers(panel, group, [by_key[k] for k in keys], looked, away):
            ledger.add(rows)
            tell(len(places) * len(group))
        if any(name in away.why for name in group):
            return rewards(panel, names, entry, looked, ledger, away, tell)


def _answers(
    panel: Panel, names: Sequence[str], pictures: Sequence[Picture], looked: Mapping[str, Looked], away: Away
) -> Iterator[tuple[range, list[Row]]]:
    looks = _Looks(map(_look, pictures), lambda: any(name in away.why for name in names))
    for places, table in panel.told(names, looks):
        rows: list[Row] = []
        for name, scores in zip(names, table.scores, strict=True):
            info = panel.infos[name]
            if table.versions.get(name, info.version) != info.version:
                away.why[name] = CHANGED
                continue
            for i, score in zip(places, scores, strict=True):
                row = dict(zip(FIELDS, key(question_of(name, info), pictures[i], looked[pictures[i].key].sha, info), strict=True))
                rows.append({**row, **told(score)})
            if errors := [s.error for s in scores if s.error is not None and s.error.retryable]:
                if len(errors) == len(scores):
                    away.why[name] = errors[0].title
        yield places, rows


class _Looks(list[Look]):
    """They end when somebody stops answering: what is under way then is still waited for, and no more is sent."""

    def __init__(self, looks: Iterable[Look], ended: Callable[[], bool]) -> None:
        super().__init__(looks)
        self._ended = ended

    def __iter__(self) -> Iterator[Look]:
        return itertools.takewhile(lambda _: not self._ended(), super().__iter__())


def _look(picture: Picture) -> Look:
    return lambda: (seen(picture), None if picture.prompt is None else picture.prompt.text)


def told(score: Score) -> Row:
    """A row's answer: a value, or an error."""
    error = score.error
    kind = None if error is None else "unparsed" if score.status in ("parse_error", "refused") else error.type
    row: Row = {"value": score.value, "error": kind, "retry": bool(error is not None and error.retryable)}
    return row if score.in_domain is None else {**row, "in_domain": score.in_domain}


def chat(judge: Chat, entry: Entry, looked: Mapping[str, Looked], ledger: Ledger, away: Away, tell: Tell) -> None:
    """Real or fake, of each picture that has no answer yet. What it wrote is kept beside what was read from it."""
    text = judge.judge.question or REAL_OR_FAKE
    question = question_of_chat(judge, text)
    open_ = wanted(entry, looked, question, None, ledger)
    open_.sort(
        key=lambda picture: key(question, picture, looked[picture.key].sha, None) in ledger.rows
    )  # what failed before comes last
    judge.answered |= any(row["question"] == question and row.get("text") for row in ledger.rows.values())
    lacking = 0
    for start in range(0, len(open_), _CHUNK):
        if judge.gave_up.is_set():
            break
        chunk = open_[start : start + _CHUNK]

        def ask(picture: Picture) -> Callable[[], tuple[str, list[Pixels]]]:
            return lambda: (text, [seen(picture)])

        for i, said in judge.ask_all([ask(picture) for picture in chunk]):
            value = None if said.text is None else real_or_fake(said.text)
            error = said.error if said.text is None else None if value is not None else "unparsed"
            row = dict(zip(FIELDS, key(question, chunk[i], looked[chunk[i].key].sha, None), strict=True))
            ledger.add([{**row, "value": value, "error": error, "retry": said.retry, "text": (said.text or "")[:500]}])
            lacking += said.retry
            tell(1)
    if judge.gave_up.is_set() or lacking:
        away.why[judge.name] = f"{judge.judge.url}: {judge.why}"
