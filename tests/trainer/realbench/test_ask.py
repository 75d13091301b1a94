"""Who stops answering is left alone, and nothing that was answered is asked again."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from shared.client import ScoreTable
from shared.panel import BATCH, Panel
from shared.schema import RewardInfo, Score
from tests.trainer.realbench.folders import fill
from trainer.realbench.ask import FIELDS, Away, question_of, rewards
from trainer.realbench.ledger import Ledger
from trainer.realbench.pictures import entry, look


class Client:
    """In place of the client of a panel: `level` fails on its second request and answers all others."""

    def __init__(self) -> None:
        self.asked = list[tuple[tuple[str, ...], int]]()

    def submit(self, images: Sequence[Any], prompts: Sequence[Any], groups: None, names: Sequence[str]) -> "Future[ScoreTable]":
        self.asked.append((tuple(names), len(images)))
        gone = Score.failed("busy", "gone for the test", retryable=True)
        rows = [
            [gone if name == "level" and len(self.asked) == 2 else Score(status="ok", value=0.5)] * len(images) for name in names
        ]
        values = np.array([[np.nan if s.value is None else s.value for s in row] for row in rows])
        done: Future[ScoreTable] = Future()
        done.set_result(ScoreTable(tuple(names), values, np.isfinite(values), tuple(map(tuple, rows)), dict.fromkeys(names, 1)))
        return done


def test_a_reward_that_stops_answering_is_left_out_and_what_was_under_way_is_kept(tmp_path: Path) -> None:
    one = entry("many", fill(tmp_path / "many", 0.5, [f"{i:03d}" for i in range(10 * BATCH)], side=16), [])
    looked = {picture.key: look(picture.path) for picture in one.pictures}
    panel, client, away = Panel.__new__(Panel), Client(), Away()
    panel._client = client  # type: ignore[assignment]
    panel.infos = {name: RewardInfo(name=name, version=1, preprocessing="none") for name in ("real", "level")}
    with Ledger(tmp_path / "l.jsonl", FIELDS) as ledger:
        rewards(panel, ["real", "level"], one, looked, ledger, away, lambda count: None)
        assert away.why == {"level": "gone for the test"}
        questions = {question_of(name, info): name for name, info in panel.infos.items()}
        settled = Counter(questions[key[0]] for key in ledger.rows if ledger.settled(*key))
    both, alone = ([count for names, count in client.asked if names == group] for group in (("real", "level"), ("real",)))
    assert len(both) == 5, "one failed, three were under way, one was answered before"
    assert sum(both) + sum(alone) == 10 * BATCH, "nothing twice"
    assert settled == {"real": 10 * BATCH, "level": 4 * BATCH}
