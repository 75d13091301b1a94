"""One run as the page shows it, brought up to date by looking at its folder."""

import hashlib
import json
import re
import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.watch.described import Described, described, loaded
from trainer.watch.files import names, opened, plain, small, stamp
from trainer.watch.gains import gains
from trainer.watch.table import Table, finite
from trainer.watch.tail import Tail

GRIDS, REWRITES, WARNINGS, RECENT = 400, 40, 100, 20
GRID_BYTES, GRID_PIXELS, REWRITE_BYTES = 32 << 20, 64_000_000, 1 << 20
QUIET_S, QUIET_STEPS = 300.0, 20  # no line for so long, and for as long as so many steps take
_GRID, _REWRITES = re.compile(r"step_(\d{1,12})\.png"), re.compile(r"step_(\d{1,12})\.jsonl")


class Record:
    """What is known of a run folder, whether it is there yet or not. `revision` rises whenever something changed."""

    def __init__(self, folder: Path, boot: str) -> None:
        self.folder, self.revision = folder, 1
        self.id = hashlib.sha256(str(folder.absolute()).encode(errors="surrogatepass")).hexdigest()[:12]
        self.seen = False  # it was there once
        self.steps, self.evals = Table(boot), Table(boot)
        self._lines, self._notes = Tail(folder, "metrics.jsonl"), Tail(folder, "notes.jsonl")
        self._stamps: dict[str, Any] = {}
        self.about = Described()
        self.done: Mapping[str, Any] = {}
        self.grids: dict[int, str] = {}
        self._whole: set[tuple[int, str]] = set()  # grids that were seen to be written to their end
        self._listed = 0
        self.rewrites: dict[str, Any] | None = None
        self._said: deque[dict[str, Any]] = deque(maxlen=WARNINGS)
        self._state, self._more = "", False
        self._clear()

    def _clear(self) -> None:
        """What comes from metrics.jsonl."""
        self._lines.clear()
        self.steps.clear()
        self.evals.clear()
        self._first: dict[str, Any] | None = None
        self.damaged = 0
        self.alarms: list[dict[str, Any]] = []
        self._warnings: deque[dict[str, Any]] = deque(maxlen=WARNINGS)
        self._seconds: deque[dict[str, float]] = deque(maxlen=RECENT)
        self._versions: dict[str, dict[str, float]] = {}
        self._changes: dict[str, list[int]] = {}  # steps in which a detector came to another version
        self._hacked, self._problem, self.last = "", "", -1

    def look(self, until: float) -> bool:
        """Read what is new, until a moment of time.monotonic(); whether anything is left to read."""
        changed = False
        if self._differs("about", (stamp(self.folder, "config.yaml"), stamp(self.folder, "versions.json"))):
            self.about, changed = described(self.folder), True
            self._clear()  # what is held out may be something else now
        changed |= self._read(until)
        changed |= self._read_notes()
        if self._differs("done", stamp(self.folder, "done.json")):
            self.done, changed = loaded(self.folder, "done.json"), True
        changed |= self._look_at_grids()
        changed |= self._look_at_rewrites()
        self.seen |= self._lines.there or self._stamps["about"][0] is not None
        state = self.state()
        changed |= state != self._state
        self._state = state
        self.revision += changed
        return self._more

    def stumbled(self, error: Exception) -> None:
        """Over something that nobody thought of, while it was read."""
        text = trouble(error)
        self.revision += text != self._problem
        self._problem = text

    def _differs(self, what: str, now: Any) -> bool:
        before, self._stamps[what] = self._stamps.get(what, ""), now
        return bool(before != now)

    def _read(self, until: float) -> bool:
        changed = False
        while True:
            before, lines = self._lines.offset, self._lines.next()
            if lines is None:
                self._clear()
                changed = True
                continue
            for line in lines:
                self._take(line)
            moved = self._lines.offset > before
            changed |= moved
            self._more = moved and self._lines.behind > 0
            if not self._more or time.monotonic() > until:
                return changed

    def _read_notes(self) -> bool:
        lines = self._notes.next()
        if lines is None:
            self._said.clear()
            return True
        for line in lines[-WARNINGS:]:
            if (note := _object(line)) is not None:
                step = _step(note) or 0
                self._said.append(
                    {"kind": "note", "step": step, "until": step, "text": plain(note.get("text"), 500), "level": "warn"}
                )
        return bool(lines)

    def _take(self, line: bytes) -> None:
        row = _object(line)
        step = _step(row) if row is not None else None
        if row is None or step is None:
            self.damaged += bool(line.strip())
            return
        kind = row.get("kind")
        if kind == "step":
            self._take_step(step, row)
        elif kind == "eval":
            if self._first is None:
                self._first = row
            gained = gains(self._first, row, self.about.held)
            self.damaged += not self.evals.add(step, {**row, "step": None, **gained})
            self._hacked = _hacked(gained)
        elif kind == "alarm" and len(self.alarms) < WARNINGS:
            self.alarms.append({"step": step, "best_step": finite(row.get("best_step"))})
            self._warn("alarm", step, f"alarm: {plain(row.get('reason'), 500)} (action: {plain(row.get('action'), 20)})", "bad")
        self.last = max(self.last, step)

    def _take_step(self, step: int, row: dict[str, Any]) -> None:
        if not self.steps.add(step, {**row, "step": None}):
            self.damaged += 1
            return
        seconds = {key[8:]: number for key, value in row.items() if key.startswith("seconds/") and (number := finite(value))}
        self._seconds.append(dict(list(seconds.items())[:12]))
        missing, failures = finite(row.get("failed_scores")) or 0, row.get("failures")
        if missing > 0:
            why = failures if isinstance(failures, dict) else {}
            reasons = "; ".join(f"{plain(key, 160)} ({plain(count, 12)})" for key, count in list(why.items())[:3])
            count = "1 score was" if missing == 1 else f"{missing:.0f} scores were"
            self._warn("scores", step, f"{count} missing" + (f": {reasons}" if reasons else ""))
        if row.get("skipped") is True:
            self._warn("skipped", step, "nothing was learned in this step: no group had scores that differ")
        for key in ("loss", "grad_norm"):
            if key in row and row[key] is None:
                self._warn(key, step, f"{key} was not a finite number", "bad")
        for key, value in row.items():
            if key.startswith("adversary/") and key.count("/") == 2:
                _, name, what = key.split("/")
                self._take_detector(step, name, what, value)

    def _take_detector(self, step: int, name: str, what: str, value: Any) -> None:
        number = finite(value)
        if number is None or (name not in self._versions and len(self._versions) >= 32) or len(what) > 40:
            return
        name = plain(name, 80)
        known = self._versions.setdefault(name, {})
        if what == "version" and known.get("version") not in (None, number):
            self._changes[name] = [*self._changes.get(name, []), step][-200:]
        if what == "kept_out" and number > known.get("kept_out", 0):  # counted from the run's start
            self._warn(f"kept out {name}", step, f"a refit of {name} was kept out or failed: the version before goes on")
        if len(known) < 20 or what in known:
            known[what] = number

    def _warn(self, kind: str, step: int, text: str, level: str = "warn") -> None:
        """Warnings of a kind in neighbouring steps are one, with the latest text."""
        last = next((w for w in reversed(self._warnings) if w["kind"] == kind), None)
        if last is not None and kind != "alarm" and step - last["until"] <= 1:
            last["until"], last["text"] = step, text
            return
        self._warnings.append({"kind": kind, "step": step, "until": step, "text": text, "level": level})

    def _look_at_grids(self) -> bool:
        """Those that are written to their end; the first is kept whatever their number."""
        changed = self._differs("grids", (_changed(self.folder / "grids"), self._lines.offset))
        if not changed and len(self._whole) == self._listed:
            return False
        before = self.grids
        found = sorted(int(m[1]) for name in names(self.folder / "grids") if (m := _GRID.fullmatch(name)))
        known: dict[int, str] = {}
        chosen = [*found[:1], *found[1:][1 - GRIDS :]]
        for step in chosen:
            at = self._grid_stamp(step)
            if at is None:
                continue
            version = f"{at[3]:x}-{at[2]:x}"
            if (step, version) in self._whole or self._is_whole(step):
                known[step] = version
        self._whole, self._listed = set(known.items()), len(chosen)
        self.grids = known
        return known != before

    def _grid_stamp(self, step: int) -> Any:
        return next((at for name in _grid_names(step) if (at := stamp(self.folder, "grids", name)) is not None), None)

    def _is_whole(self, step: int) -> bool:
        return self.grid(step, ends_only=True) is not None

    def grid(self, step: int, ends_only: bool = False) -> bytes | None:
        """The PNG file, or None where it is none, too large, or not written to its end."""
        for name in _grid_names(step):
            try:
                with opened(self.folder, "grids", name) as (handle, (_, _, size, _)), open(handle, "rb", closefd=False) as file:
                    head = file.read(24)
                    file.seek(max(0, size - 12))
                    tail = file.read(12)
                    if not _png(head, tail, size):
                        return None
                    file.seek(0)
                    return b"" if ends_only else file.read(GRID_BYTES)
            except OSError:
                continue
        return None

    def _look_at_rewrites(self) -> bool:
        found = [(int(m[1]), name) for name in names(self.folder / "rewrites") if (m := _REWRITES.fullmatch(name))]
        newest = max(found, default=None)
        now = (newest, stamp(self.folder, "rewrites", newest[1])) if newest is not None else None
        if not self._differs("rewrites", now):
            return False
        if newest is None:
            self.rewrites = None
            return True
        data = small(self.folder, "rewrites", newest[1], limit=REWRITE_BYTES) or b""
        rows = [row for line in data.split(b"\n")[:-1][:REWRITES] if (row := _object(line)) is not None]
        self.rewrites = {"step": newest[0], "rows": [_rewrite(row) for row in rows]}
        return True

    # -- telling

    def state(self) -> str:
        """waiting, gone, running, quiet, finished or stopped."""
        if not self._lines.there:
            return "gone" if self.seen and not self.folder.is_dir() else "waiting"
        if self.done:
            return "finished" if self.done.get("reason") == "finished" else "stopped"
        silent = time.time() - self._lines.changed_ns / 1e9
        return "quiet" if silent > max(QUIET_S, QUIET_STEPS * (self._step_s() or 0)) and not self._more else "running"

    def _step_s(self) -> float | None:
        wholes = [sum(parts.values()) for parts in self._seconds if parts]
        return finite(statistics.median(wholes)) if wholes else None

    def brief(self) -> dict[str, Any]:
        """What is asked for again and again."""
        step_s, target = self._step_s(), self.about.steps
        left = (target - self.last) * step_s if target and step_s and 0 <= self.last < target else None
        return {
            "id": self.id,
            "revision": self.revision,
            "name": self.about.name or plain(self.folder.name, 80) or plain(str(self.folder), 80),
            "folder": plain(str(self.folder), 300),
            "state": self._state or "waiting",
            "reason": plain(self.done.get("reason"), 500),
            "step": self.last if self.last >= 0 else None,
            "steps": target,
            "step_s": step_s,
            "left_s": left if self._state == "running" else None,
            "read": 1.0 if not self._more else self._lines.offset / max(1, self._lines.size),
        }

    def whole(self, steps: str = "", evals: str = "") -> dict[str, Any]:
        """All that the page shows, the curves from the given cursors on."""
        parts: dict[str, float] = {}
        for one in self._seconds:
            for name, value in one.items():
                parts[plain(name, 40)] = parts.get(plain(name, 40), 0.0) + value / len(self._seconds)
        return {
            **self.brief(),
            "text": self.about.text,
            "mode": self.about.mode,
            "rewards": self.about.rewards,
            "detectors": {name: {**known, "changes": self._changes.get(name, [])} for name, known in self._versions.items()},
            "best_step": finite(self.done.get("best_step")),
            "alarms": self.alarms,
            "warnings": self.warnings(),
            "seconds": parts,
            "grids": [[step, version] for step, version in self.grids.items()],
            "rewrites": self.rewrites,
            "train": self.steps.since(steps),
            "evals": self.evals.since(evals),
        }

    def warnings(self) -> list[dict[str, Any]]:
        """Newest first; what holds now before what was."""
        now: list[dict[str, Any]] = []

        def say(kind: str, text: str, level: str = "warn") -> None:
            now.append({"kind": kind, "step": None, "until": None, "text": text, "level": level})

        if self._problem:
            say("problem", f"not all of this run could be read ({self._problem}): what is shown may lack something", "bad")
        if self._state == "gone":
            say("gone", "the folder is gone; what it held is not shown any more")
        if self._state == "quiet":
            say("quiet", "no line for a while: was it stopped? `verism-train RECIPE --resume` goes on")
        if self._hacked and not self.alarms:
            say("apart", self._hacked)
        left_out = self.damaged + self._lines.left_out
        if left_out:
            say("damaged", f"{left_out} lines of metrics.jsonl could not be read and are left out")
        if self.steps.left_out or self.evals.left_out:
            say("columns", "more kinds of numbers than a run has: some are left out")
        return now + sorted([*self._warnings, *self._said], key=lambda w: -w["until"])[:WARNINGS]


def trouble(error: Exception) -> str:
    """In words that can be shown."""
    return plain(f"{type(error).__name__}: {error}", 200)


def _changed(folder: Path) -> int | None:
    """When something came into a folder or left it."""
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return None


def _hacked(gained: Mapping[str, float]) -> str:
    """In words, when the trained reward has risen and something that is held out has clearly fallen."""
    trained = gained.get("gain/trained")
    held = {key.removeprefix("gain/"): value for key, value in gained.items() if key.startswith("gain/") and key != "gain/trained"}
    if trained is None or not held or trained < 0.1 or min(held.values()) > -0.25:
        return ""
    name = plain(min(held, key=lambda key: held[key]), 80)
    return f"the trained reward has risen by {trained:.2f} while {name} got worse: look at the pictures"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _step(row: Mapping[str, Any]) -> int | None:
    step = row.get("step")
    return step if type(step) is int and 0 <= step < 1 << 40 else None


def _rewrite(row: Mapping[str, Any]) -> dict[str, Any]:
    rewards = row.get("rewards")
    told = list(rewards.items())[:16] if isinstance(rewards, dict) else []
    return {
        "prompt": plain(row.get("prompt"), 600),
        "rewrite": plain(row.get("rewrite"), 2000),
        "rewards": {plain(name, 80): finite(value) for name, value in told},
    }


def _grid_names(step: int) -> tuple[str, ...]:
    return f"step_{step:05d}.png", f"step_{step:06d}.png"


def _png(head: bytes, tail: bytes, size: int) -> bool:
    """A PNG with its end, of a size that a browser can take."""
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or tail[4:8] != b"IEND" or size > GRID_BYTES:
        return False
    width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    return 0 < width * height <= GRID_PIXELS
