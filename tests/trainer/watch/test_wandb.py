"""Weights & Biases in its offline mode: the real package writes the real file, which is read back here."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.run.service import recipe
from trainer.config import ConfigError, RunConfig
from trainer.metrics import Metrics

pytest.importorskip("wandb")
pytestmark = pytest.mark.xdist_group("wandb")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(root)


def configured(**wandb: Any) -> RunConfig:
    url = "http://someone:secret@localhost:1"
    return RunConfig.model_validate(recipe(url, wandb={"project": "verism-tests", "mode": "offline", **wandb}))


def records(folder: Path) -> Iterator[Any]:
    """What wandb's own files of finished offline runs hold; its process may write the end of one after `finish` has returned."""
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        deadline = time.monotonic() + 60
        while not any(record.HasField("exit") for record in written(path)):
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.05)
        yield from written(path)


def written(path: Path) -> Iterator[Any]:
    """Of a LevelDB log (blocks of 32 KiB, records of 7 bytes and data) of protobufs, those that are whole."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4) and at <= len(data):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(held)
            yield record
        if kind in (0, 1, 4):
            held = b""


def history(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(folder):
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def test_numbers_grids_and_alarms_offline(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, tensorboard=False, wandb=configured(tags=["a"], group="g"))
    warnings: list[str] = []
    metrics.warn = warnings.append
    metrics.write("eval", 0, {"reward/total_mean": 0.0, "note": "text"})
    metrics.grid(tmp_path, 0, np.zeros((4, 8, 8, 3), np.uint8), 4)
    metrics.write("step", 1, {"loss": 0.5, "bad": float("nan"), "failures": {}})
    metrics.write("alarm", 1, {"reason": "it is hacked", "action": "warn", "best_step": 0})
    metrics.close()
    assert warnings == []
    rows = history(tmp_path)
    assert {"trainer/step": 0, "eval/reward/total_mean": 0.0} in rows and {"trainer/step": 1, "step/loss": 0.5} in rows
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/grid*.png"))) == 1
    [run] = [record.run for record in records(tmp_path) if record.HasField("run") and record.run.project]
    assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("verism-tests", "tiny", "g", ["a"])
    alerts = [record.alert.text for record in records(tmp_path) if record.HasField("alert")]
    assert alerts == ["it is hacked"]
    for path in (tmp_path / "wandb").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ["eval", "step", "alarm"]


def test_a_resumed_run_keeps_its_place(tmp_path: Path) -> None:
    for first in (True, False):
        metrics = Metrics(tmp_path, None if first else 1, tensorboard=False, wandb=configured())
        metrics.write("step", 1 if first else 2, {"loss": 0.5})
        metrics.close()
    ids = {record.run.run_id for record in records(tmp_path) if record.HasField("run")}
    assert ids == {json.loads((tmp_path / "wandb.json").read_text())["id"]}
    assert [row["trainer/step"] for row in history(tmp_path)] == [1, 2]


def test_other_ranks_and_runs_without_it_write_nothing(tmp_path: Path) -> None:
    for options in ({"quiet": True, "wandb": configured()}, {"wandb": RunConfig.model_validate(recipe("http://localhost:1"))}, {}):
        metrics = Metrics(tmp_path, tensorboard=False, **options)  # type: ignore[arg-type]
        metrics.write("step", 1, {"loss": 0.5})
        metrics.close()
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb.json").exists()


def test_it_stops_no_run(tmp_path: Path) -> None:
    metrics, warnings = Metrics(tmp_path, tensorboard=False, wandb=configured()), list[str]()
    metrics.warn = warnings.append
    metrics._wandb.close()  # as if it had died
    for step in (1, 2):
        metrics.write("step", step, {"loss": 0.5})
    metrics.close()
    assert len(warnings) == 1 and "metrics.jsonl goes on without it" in warnings[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'verism\[wandb\]'"):
        Metrics(tmp_path, tensorboard=False, wandb=configured())


def test_the_key_is_checked() -> None:
    with pytest.raises(ValueError, match="project"):
        RunConfig.model_validate(recipe("http://localhost:1", wandb={"mode": "offline"}))
    with pytest.raises(ValueError, match="entry"):
        RunConfig.model_validate(recipe("http://localhost:1", wandb={"project": "p", "entry": "x"}))
