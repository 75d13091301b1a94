"""Which picture is more realistic? Two folders against each other, before any judge that compares.

    python -m services.arena ours/ theirs/ judge.yaml --out arena.jsonl

judge.yaml is a reward that compares, as in a service's file, for instance a remote judge:

    {use: unified_compare, engine: vllm, url: "https://api.example.org", model: NAME, key_env: JUDGE_KEY, dialect: openai}

Without a `template` the question is services/arena.yaml. Pictures of the same name meet, where both folders have the same names; else
every picture meets others at random. Each pair is asked in both orders: who wins in both has won, anything else is half a win for each.
Each pair is a line of the file as soon as it is judged. The same command again asks only for what is missing there.

Of a reward service that runs, `verism-eval arena ours/ theirs/ --url http://HOST:PORT --reward NAME` asks the same.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from services.config import RewardConfig
from services.registry import resolve
from services.reward import Comparer, Pair
from services.worker import pick_device
from shared.arena import PAUSES_S, Match, Standing, matches, names, standing
from shared.errors import VerismError
from shared.image import decode, from_file
from shared.schema import Score
from shared.verdicts import consistent

QUESTION = Path(__file__).with_suffix(".yaml")


def asked(judge: Comparer, pairs: Sequence[Pair], sleep: Callable[[float], None] = time.sleep) -> list[tuple[Score, Score]]:
    """Both orders of each pair; what fails retryably is asked again after each of PAUSES_S."""
    both = [one for pair in pairs for one in (pair, pair.swapped)]
    scores = judge.compare(both)
    for pause in PAUSES_S:
        again = [i for i, score in enumerate(scores) if score.error is not None and score.error.retryable]
        if not again:
            break
        sleep(pause)
        for i, score in zip(again, judge.compare([both[i] for i in again]), strict=True):
            scores[i] = score
    return list(zip(scores[::2], scores[1::2], strict=True))


class Arena:
    """Two folders, a judge, and the file of what was said."""

    def __init__(self, a: Path, b: Path, judge: Comparer, out: Path) -> None:
        """ValueError when the file holds another judge's verdicts."""
        self.folders, self.judge, self.out = (a, b), judge, out
        engine = getattr(judge, "engine", None)
        info = judge.info
        self.head = {
            "judge": {"model": getattr(engine, "name", info.name), "weights": info.weights_sha256, "question": info.preprocessing},
            "prompt": None,
        }
        self.rows: dict[tuple[Match, str, str], dict[str, Any]] = {}
        whole = 0
        if out.is_file():
            data = out.read_bytes()
            whole = data.rfind(b"\n") + 1  # a line that was cut off is asked again
            lines = [self._line(at, line) for at, line in enumerate(data[:whole].splitlines(), 1)]
            if lines and lines[0] != self.head:
                raise ValueError(f"{out} holds the verdicts of another judge or question: {lines[0]}; give another --out")
            self.rows = {((row["a"], row["b"]), row["sha_a"], row["sha_b"]): row for row in lines[1:]}
        out.parent.mkdir(parents=True, exist_ok=True)
        self._file = out.open("ab")
        self._file.truncate(whole)
        if not whole:
            self._write(self.head)

    def _line(self, at: int, line: bytes) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
            if at > 1:
                for key in ("a", "b", "sha_a", "sha_b"):
                    str(row[key])
                _ = row["verdict"], row["forward"], row["backward"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.out}, line {at} is none of an arena's ({error}); give another --out") from error
        return row

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def run(self, wanted: Sequence[Match], batch: int, told: Callable[[int], None] = lambda count: None) -> list[dict[str, Any]]:
        """The rows of all `wanted`, in order; `told` hears how many pairs have been dealt with. Pairs with a verdict are not asked again."""
        out: list[dict[str, Any]] = []
        for start in range(0, len(wanted), batch):
            out += self._batch(wanted[start : start + batch])
            told(len(out))
        return out

    def _batch(self, wanted: Sequence[Match]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        pairs: list[Pair] = []
        open_: list[dict[str, Any]] = []
        for match in wanted:
            (sha_a, one), (sha_b, other) = (self._picture(folder / name) for folder, name in zip(self.folders, match, strict=True))
            known = self.rows.get((match, sha_a, sha_b))
            if known is not None and known["verdict"] is not None:
                rows.append(known)
                continue
            row = {"a": match[0], "b": match[1], "sha_a": sha_a, "sha_b": sha_b}
            rows.append(row)
            if isinstance(one, Score) or isinstance(other, Score):
                bad = one if isinstance(one, Score) else other
                assert isinstance(bad, Score)
                self._done(row, bad, bad)
            else:
                pairs.append(Pair(one, None, (other,)))
                open_.append(row)
        for row, (forward, backward) in zip(open_, asked(self.judge, pairs) if pairs else [], strict=True):
            self._done(row, forward, backward)
        return rows

    def _done(self, row: dict[str, Any], forward: Score, backward: Score) -> None:
        """`forward` and `backward`: P(what is shown first is more realistic), with a and with b first."""
        error = forward.error or backward.error
        verdict = consistent(forward.value, backward.value)
        row |= {"forward": forward.value, "backward": backward.value, "verdict": verdict, "error": error and error.type}
        self._write(row)

    def _picture(self, path: Path) -> tuple[str, NDArray[np.uint8] | Score]:
        """SHA-256 of the file, and its pixels or its error."""
        try:
            data = path.read_bytes()
        except OSError as error:
            return "", Score.failed("file-unreadable", f"{path} cannot be read: {error}")
        sha = hashlib.sha256(data).hexdigest()
        try:
            return sha, decode(from_file(data)).pixels
        except VerismError as error:
            return sha, Score(status="error", error=error.problem())


def load_judge(path: Path, device: str) -> Comparer:
    """ValueError when the file is none, or what it names does not compare."""
    told = yaml.safe_load(path.read_text())
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no mapping; it holds `use: unified_compare` and that reward's options")
    told = {"use": "unified_compare", **told}
    if told["use"] == "unified_compare":
        told.setdefault("template", str(QUESTION))
    config = RewardConfig.model_validate(told)
    judge = resolve(config.use).load("arena", config.options(), device)
    if not isinstance(judge, Comparer):
        raise ValueError(f"{path}: {config.use} scores single pictures; take unified_compare, or UnifiedVerdict by its full name")
    if "prompt" in judge.info.needs:
        raise ValueError(f"{path}: the template asks about a {{prompt}}, and pictures in folders have none; leave it away")
    return judge


def _show(console: Console, a: Path, b: Path, result: Standing) -> None:
    table = Table("more realistic", "pairs", "share")
    count = result.wins + result.losses + result.ties
    for name, number in ((str(a), result.wins), (str(b), result.losses), ("neither: ties, or by their place", result.ties)):
        table.add_row(name, str(number), f"{number / count:.1%}" if count else "")
    table.add_row("without a verdict", str(result.missing), "")
    console.print(table)
    if result.rate is not None and result.error is not None:
        console.print(
            f"{a}: {result.rate:.3f} +- {result.error:.3f} with ties as half; shown first is preferred {result.shown_first:.1%}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every pair has a verdict, 1 when some are missing, 2 when it cannot begin."""
    parser = argparse.ArgumentParser(
        prog="python -m services.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="a folder of pictures")
    parser.add_argument("b", type=Path, help="the other folder")
    parser.add_argument("judge", type=Path, help="YAML: a reward that compares, and its options")
    parser.add_argument("--out", type=Path, default=Path("runs/arena.jsonl"), help="JSON lines (default runs/arena.jsonl)")
    parser.add_argument("--pairs", type=int, help="how many (default: as many as the larger folder has pictures)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs (default 0)")
    parser.add_argument("--batch", type=int, default=16, help="pairs asked at once (default 16)")
    parser.add_argument("--device", default="auto")
    told = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        if (told.pairs is not None and told.pairs < 1) or told.batch < 1:
            raise ValueError("--pairs and --batch are at least 1")
        wanted = matches(names(told.a), names(told.b), told.pairs, told.seed)
        judge = load_judge(told.judge, pick_device(told.device))
        arena = Arena(told.a, told.b, judge, told.out)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"python -m services.arena: {error}", file=sys.stderr)
        return 2
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("pairs", total=len(wanted))
            rows = arena.run(wanted, told.batch, lambda count: progress.update(task, completed=count))
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {told.out}", file=sys.stderr)
        return 130
    finally:
        arena.close()
    result = standing(rows)
    _show(Console(), told.a, told.b, result)
    return 1 if result.missing else 0


if __name__ == "__main__":
    sys.exit(main())
