"""One bench from its configuration to what everyone said: paint, ask, let meet, measure. Everything lies in `out` and is done once.

out/pictures/NAME/*.png painted pictures; scores.jsonl and arena.jsonl every answer; features/; services.log. The same command goes on where
it was stopped.
"""

import contextlib
import fcntl
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.arena import Service
from shared.panel import Panel
from shared.schema import RewardInfo
from trainer.config import ConfigError
from trainer.honesty import Monitors
from trainer.realbench import ask, draw, meet
from trainer.realbench.chat import REAL_OR_FAKE, Chat
from trainer.realbench.config import PHOTOGRAPHS, Bench, Contestant, found
from trainer.realbench.distance import Features
from trainer.realbench.ledger import Ledger, Row
from trainer.realbench.pictures import Entry, Looked, entry, look, seen
from trainer.realbench.prompts import BenchPrompt, read_prompts
from trainer.realbench.serving import started
from trainer.realbench.stats import Floats

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]  # what is counted, how many


@dataclass(frozen=True)
class Measure:
    """One number of a picture. `group`: detector, monitor, judge (all say how real) or reward (something else).

    `unit`: values are probabilities, of real or (not `higher`) of fake. `learned` are the contestants that were trained on it.
    """

    name: str
    group: str
    unit: bool
    higher: bool = True
    learned: tuple[str, ...] = ()
    description: str = ""

    @property
    def realism(self) -> bool:
        return self.group != "reward"


@dataclass
class Judged:
    """What everyone said. `values` by measure, contestant and picture's key; only numbers that were given."""

    bench: Bench
    out: Path
    entries: list[Entry]
    kinds: dict[str, str]
    looked: dict[str, dict[str, Looked]]
    measures: list[Measure] = field(default_factory=list)
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    errors: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    outside: dict[tuple[str, str], tuple[int, int]] = field(
        default_factory=dict
    )  # (contestant, measure): out of domain, of how many
    arena: list[Row] = field(default_factory=list)
    arbiter: str = ""
    features: dict[str, tuple[list[str], Floats]] = field(default_factory=dict)
    space: str = ""
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    away: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.away


Also = Callable[[Judged, Panel | None, Ledger, ask.Away], None]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """One bench at a time in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another bench is writing into {out}: wait for it, or give another --out") from error
        yield


def judge(
    bench: Bench, out: Path, progress: Progress, also: Also | None = None, check: Callable[[Judged], None] = lambda told: None
) -> Judged:
    """ConfigError, VerismError or NoService's like where it cannot begin; what stops answering on the way is in `away`. `check` sees the
    pictures before anything is asked about them, `also` asks for more while the services are there.
    """
    prompts = read_prompts(found(bench.prompts)) if bench.prompts is not None else []
    if not bench.contestants and bench.photographs is None:
        raise ConfigError("nothing to judge: name a folder of pictures, a model or a run")
    chats = {name: Chat(name, one) for name, one in bench.judges.items()}
    try:
        entries, about = contestants(bench, prompts, out, progress)
        looked = looked_at(entries, progress)
        kinds = {PHOTOGRAPHS: PHOTOGRAPHS} | {name: one.kind for name, one in bench.contestants.items()}
        told = Judged(bench, out, entries, kinds, looked, about=about)
        for one in entries:
            if all(own.problem is not None for own in looked[one.name].values()):
                raise ConfigError(f"{one.name}: none of its {len(one.pictures)} pictures can be read; see `verism-score FILE`")
        check(told)
        _score(told, chats, progress, also)
    finally:
        for chat in chats.values():
            chat.close()
    _monitors(told)
    _features(told, progress)
    return told


def contestants(
    bench: Bench, prompts: Sequence[BenchPrompt], out: Path, progress: Progress
) -> tuple[list[Entry], dict[str, dict[str, Any]]]:
    """Photographs first; what has to be painted is painted. Every name and path is checked before the first picture."""
    entries: list[Entry] = []
    about: dict[str, dict[str, Any]] = {}
    most = bench.pictures
    if bench.photographs is not None:
        entries.append(entry(PHOTOGRAPHS, found(bench.photographs), prompts, most, extra=True))
        about[PHOTOGRAPHS] = {"folder": str(bench.photographs)}
    painted: list[tuple[str, Contestant, dict[str, Any], Path]] = []
    for name, one in bench.contestants.items():
        if one.folder is not None:
            entries.append(entry(name, found(one.folder), prompts, most))
            about[name] = {"folder": str(one.folder)}
            continue
        if not prompts:
            raise ConfigError(
                f"{name} has to be painted, and there are no prompts: give --prompts world/realbench/prompts.jsonl, or yours"
            )
        folder, form = out / "pictures" / name, one.form or bench.form
        if one.run is not None:
            one = one.model_copy(update={"run": found(one.run)})
        told = draw.settle(folder, draw.about(one, one.drawing or bench.drawing, form, bench.seed), one.step)
        for prompt in prompts[:most]:
            prompt.form(form)
        painted.append((name, one, told, folder))
        about[name] = told
    for name, one, told, folder in painted:
        left = sum(1 for _ in draw.unpainted(folder, prompts[:most]))
        if left:
            with progress(f"{name}: painting", left) as tell:
                painter = draw.open_painter(one, one.drawing or bench.drawing, told, _device(bench))
                try:
                    draw.paint(painter, prompts[:most], told["form"], bench.seed, folder, tell)
                finally:
                    painter.close()
        entries.append(entry(name, folder, prompts, most))
    order = [PHOTOGRAPHS, *bench.contestants]
    return sorted(entries, key=lambda one: order.index(one.name)), about


def looked_at(entries: Sequence[Entry], progress: Progress) -> dict[str, dict[str, Looked]]:
    with progress("reading", sum(len(one.pictures) for one in entries)) as tell:
        out: dict[str, dict[str, Looked]] = {}
        for one in entries:
            out[one.name] = {}
            for picture in one.pictures:
                out[one.name][picture.key] = look(picture.path)
                tell(1)
    return out


def _device(bench: Bench) -> str:
    if bench.device != "auto":
        return bench.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _urls(bench: Bench, served: str) -> dict[str, str]:
    return {name: one.url or served for name, one in {**bench.detectors, **bench.rewards}.items()}


def _score(told: Judged, chats: Mapping[str, Chat], progress: Progress, also: Also | None) -> None:
    bench = told.bench
    arena = bench.arena if len(told.entries) > 1 else None
    open_ = [one for one in {**bench.detectors, **bench.rewards}.values() if one.url is None]
    wanted = bool(open_) or (arena is not None and arena.reward is not None and arena.url is None)
    with contextlib.ExitStack() as stack:
        if wanted and bench.serve is not None:
            with progress("starting the services", 1) as tell:
                served = stack.enter_context(started(bench.serve, told.out))
                tell(1)
        else:
            served = ""
        ledger = stack.enter_context(Ledger(told.out / "scores.jsonl", ask.FIELDS))
        away = ask.Away()
        infos: dict[str, RewardInfo] = {}
        panel: Panel | None = None
        if urls := _urls(bench, served):
            panel = stack.enter_context(Panel(urls, bench.timeout_s))
            infos = panel.infos
            for name, info in infos.items():
                if "references" in info.needs:
                    raise ConfigError(f"{name} judges a picture against another: name it as arena.reward, not among the rewards")
            _ask_rewards(told, panel, ledger, away, progress)
        questions = {name: ask.question_of(name, info) for name, info in infos.items()}
        for name, chat in chats.items():
            text = chat.judge.question or REAL_OR_FAKE
            questions[name] = ask.question_of_chat(chat, text)
            count = sum(len(ask.wanted(one, told.looked[one.name], questions[name], None, ledger)) for one in told.entries)
            with progress(f"{name}: real or fake", count) as tell:
                for one in told.entries:
                    ask.chat(chat, one, told.looked[one.name], ledger, away, tell)
        told.measures += _measures(told, infos)
        for measure in told.measures:
            _collect(told, measure.name, questions[measure.name], infos.get(measure.name), ledger)
        if arena is not None:
            _meet(told, chats, arena.url or served, away, stack, progress)
        if also is not None:
            also(told, panel, ledger, away)
        told.away = dict(away.why)


def _ask_rewards(told: Judged, panel: Panel, ledger: Ledger, away: ask.Away, progress: Progress) -> None:
    names = list(panel.infos)
    count = sum(
        len(ask.wanted(one, told.looked[one.name], ask.question_of(name, panel.infos[name]), panel.infos[name], ledger))
        for one in told.entries
        for name in names
    )
    with progress("scoring", count) as tell:
        for one in told.entries:
            ask.rewards(panel, names, one, told.looked[one.name], ledger, away, tell)


def _measures(told: Judged, infos: Mapping[str, RewardInfo]) -> list[Measure]:
    bench = told.bench
    runs = {name: draw.trained(found(one.run)) for name, one in bench.contestants.items() if one.run is not None}

    def learned(name: str, sha: str | None) -> tuple[str, ...]:
        """By name (another version of a detector that was trained on is no stranger), or by the weights under another name."""
        out = [who for who, one in bench.contestants.items() if name in one.trained_on]
        out += [who for who, rewards in runs.items() if name in rewards or (sha is not None and sha in rewards.values())]
        return tuple(dict.fromkeys(out))

    out = []
    for name, info in infos.items():
        unit = info.range is not None and tuple(info.range) == (0.0, 1.0)
        group = "detector" if name in bench.detectors else "reward"
        out.append(
            Measure(
                name,
                group,
                unit and group == "detector",
                info.higher_is_better,
                learned(name, info.weights_sha256),
                info.description,
            )
        )
    for name, one in bench.judges.items():
        out.append(Measure(name, "judge", True, True, learned(name, None), f"{one.model}: real or fake, in words"))
    return out


def _collect(told: Judged, name: str, question: str, info: RewardInfo | None, ledger: Ledger) -> None:
    """What the ledger holds of one measure."""
    values = told.values.setdefault(name, {})
    for one in told.entries:
        mine, wrong, outside, domain = values.setdefault(one.name, {}), Counter[str](), 0, 0
        for picture in one.pictures:
            looked = told.looked[one.name][picture.key]
            row = ledger.rows.get(ask.key(question, picture, looked.sha, info))
            if looked.problem is not None:
                wrong["unreadable"] += 1
            elif info is not None and "prompt" in info.needs and picture.prompt is None:
                wrong["no prompt"] += 1
            elif row is None:
                wrong["not asked yet"] += 1
            elif row["value"] is None:
                wrong[str(row["error"])] += 1
            else:
                mine[picture.key] = float(row["value"])
                if isinstance(row.get("in_domain"), bool):
                    domain += 1
                    outside += not row["in_domain"]
        if wrong:
            told.errors[one.name, name] = wrong
        if domain:
            told.outside[one.name, name] = (outside, domain)


def _meet(
    told: Judged, chats: Mapping[str, Chat], url: str, away: ask.Away, stack: contextlib.ExitStack, progress: Progress
) -> None:
    arena = told.bench.arena
    assert arena is not None
    arbiter: meet.Asked
    if arena.judge is not None:
        arbiter, told.arbiter = meet.ByChat(chats[arena.judge]), f"{arena.judge} ({told.bench.judges[arena.judge].model})"
    else:
        assert arena.reward is not None
        try:
            service = Service(url, arena.reward, None, told.bench.timeout_s, prompted=True)
        except ValueError as error:
            raise ConfigError(f"arena: {error}") from error
        stack.callback(service.close)
        arbiter, told.arbiter = meet.ByService(service), arena.reward
    bouts = meet.schedule(told.entries, arena.pairs, told.bench.seed)
    ledger = stack.enter_context(Ledger(told.out / "arena.jsonl", meet.FIELDS))
    with progress("arena", meet.left(arbiter, bouts, told.looked, ledger)) as tell:
        meet.run(arbiter, bouts, told.looked, ledger, away, tell)
    told.arena = meet.answered(arbiter, bouts, told.looked, ledger)


def _monitors(told: Judged) -> None:
    """The held-out detectors of verism-train, in this process: P(photograph)."""
    if told.bench.monitors is None:
        return
    monitors = Monitors.load(found(told.bench.monitors))
    for name in ("heldout_cnn", "heldout_spectrum"):
        told.measures.append(Measure(name, "monitor", True, description="held-out detector of verism-train; never a reward"))
        told.values[name] = {one.name: {} for one in told.entries}
    for one in told.entries:
        readable = [p for p in one.pictures if told.looked[one.name][p.key].problem is None]
        wrong = len(one.pictures) - len(readable)
        for start in range(0, len(readable), 256):
            chunk = readable[start : start + 256]
            shown = [(p.key, seen(p)) for p in chunk]
            for name, said in said_by(monitors, shown).items():
                told.values[name][one.name] |= said
        for name in ("heldout_cnn", "heldout_spectrum"):
            if wrong:
                told.errors[one.name, name] = Counter(unreadable=wrong)


def said_by(monitors: Monitors, shown: Sequence[tuple[str, NDArray[np.uint8]]]) -> dict[str, dict[str, float]]:
    """P(photograph) of pictures of any size, by detector and key."""
    by_size: dict[tuple[int, ...], list[tuple[str, NDArray[np.uint8]]]] = {}
    for key, image in shown:
        by_size.setdefault(image.shape, []).append((key, image))
    out: dict[str, dict[str, float]] = {}
    for group in by_size.values():
        for name, logits in monitors.logits(np.stack([image for _, image in group])).items():
            p = 1 / (1 + np.exp(-logits.clip(-60, 60)))
            out.setdefault(name, {}).update({key: float(x) for (key, _), x in zip(group, p, strict=True)})
    return out


def _features(told: Judged, progress: Progress) -> None:
    if told.bench.features is None or told.bench.photographs is None:
        return
    features = Features(told.bench.features, _device(told.bench))
    told.space = features.label
    with progress("features", sum(len(one.pictures) for one in told.entries)) as tell:
        for one in told.entries:
            told.features[one.name] = features.of(one.pictures, told.looked[one.name], told.out / "features")
            tell(len(one.pictures))
