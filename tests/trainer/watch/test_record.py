"""A run folder as the page shows it: while it is written, resumed, damaged, deleted, and when somebody means harm."""

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.watch.runs import a_grid, a_run, append, evaluation, step
from trainer.watch import record as module
from trainer.watch import tail
from trainer.watch.notes import kept
from trainer.watch.record import Record


def look(record: Record) -> dict[str, Any]:
    while record.look(time.monotonic() + 60):
        pass
    return json.loads(json.dumps(record.whole(), allow_nan=False))


def said(told: dict[str, Any]) -> list[str]:
    return [one["text"] for one in told["warnings"]]


def test_a_run_is_followed_from_before_its_start_to_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "world"
    record = Record(folder, "b")
    assert look(record)["state"] == "waiting"
    a_run(folder)
    told = look(record)
    assert (told["state"], told["name"], told["step"], told["steps"]) == ("running", "world", None, 40)
    append(folder, [evaluation(0), step(1), step(2)])
    before = record.revision
    told = look(record)
    assert record.revision > before and told["step"] == 2 and told["train"]["at"] == [1, 2] and told["evals"]["at"] == [0]
    assert told["step_s"] == pytest.approx(1.0) and told["left_s"] == pytest.approx(38.0)
    assert told["seconds"] == pytest.approx({"sample": 0.3, "wait": 0.1, "train": 0.6})
    before = record.revision
    look(record)
    assert record.revision == before  # nothing new
    (folder / "done.json").write_text(json.dumps({"best_step": 2, "reason": "finished"}))
    told = look(record)
    assert (told["state"], told["best_step"], told["left_s"]) == ("finished", 2, None)
    (folder / "done.json").unlink()  # --resume
    append(folder, [step(3)])
    assert look(record)["state"] == "running"
    shutil.rmtree(folder)
    told = look(record)
    assert told["state"] == "gone" and told["train"]["at"] == [] and "gone" in said(told)[0]
    a_run(folder, [step(1)])
    assert look(record)["state"] == "running"


def test_roles_come_from_the_configuration_and_addresses_stay_there(tmp_path: Path) -> None:
    record = Record(a_run(tmp_path / "r", [evaluation(0), evaluation(10, **{"reward/taste/mean": 3.0, "distance": 15.0})]), "b")
    told = look(record)
    roles = {one["name"]: (one["held_out"], one["sign"], one["version"]) for one in told["rewards"]}
    assert roles == {"detector": (False, 1.0, 3), "taste": (True, -1.0, 1)}
    gained = {key: column[-1] for key, column in told["evals"]["columns"].items() if key.startswith("gain/") or key == "apart"}
    assert gained["gain/taste"] == pytest.approx(1.0) and gained["apart"] == pytest.approx(1.0)  # taste: lower is better
    assert "secret" not in json.dumps(told)


def test_a_resumed_run_is_read_anew(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r", [evaluation(0), step(1), step(2), step(3)])
    record = Record(folder, "b")
    cursor = look(record)["train"]["cursor"]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]  # as Metrics does it
    (folder / ".metrics.building").write_text("".join(lines))
    (folder / ".metrics.building").replace(folder / "metrics.jsonl")
    append(folder, [step(2, **{"reward/total": 7.0})])
    look(record)
    told = record.whole(steps=cursor)["train"]
    assert told["from"] == 0 and told["at"] == [1, 2] and told["columns"]["reward/total"] == [0.1, 7.0]


def test_warnings(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r", [evaluation(0)])
    record = Record(folder, "b")
    append(folder, [step(n, failed_scores=3, failures={"detector: timeout": 3}) for n in (1, 2, 3)])
    append(
        folder,
        [step(4, skipped=True), step(5, grad_norm=None), *(step(n, **{"adversary/detector/kept_out": 1}) for n in (6, 7, 8))],
    )
    append(folder, [evaluation(10, distance=90.0)])
    kept(folder, lambda line: None)({"kind": "note", "step": 7, "text": "the disk is full"})
    told = look(record)
    texts = said(told)
    assert texts[0] == "the trained reward has risen by 1.00 while distance got worse: look at the pictures"
    assert texts[1:] == [
        "the disk is full",
        "a refit of detector was kept out or failed: the version before goes on",
        "grad_norm was not a finite number",
        "nothing was learned in this step: no group had scores that differ",
        "3 scores were missing: detector: timeout (3)",
    ]
    assert [(w["step"], w["until"]) for w in told["warnings"]][-1] == (1, 3)
    append(folder, [{"kind": "alarm", "step": 10, "reason": "it is hacked", "action": "stop", "best_step": 0}])
    told = look(record)
    assert said(told)[0] == "alarm: it is hacked (action: stop)" and told["alarms"] == [{"step": 10, "best_step": 0.0}]
    old = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (old, old))
    assert look(record)["state"] == "quiet" and "no line for a while" in said(look(record))[0]


def test_notes_of_a_run_are_told_and_kept(tmp_path: Path) -> None:
    heard: list[Any] = []
    tell = kept(tmp_path, heard.append)
    tell({"kind": "step", "step": 1})
    tell({"kind": "note", "step": 2, "text": "waiting for http://x"})
    assert [line["kind"] for line in heard] == ["step", "note"]
    assert [json.loads(line)["text"] for line in (tmp_path / "notes.jsonl").read_text().splitlines()] == ["waiting for http://x"]
    kept(tmp_path / "no folder", heard.append)({"kind": "note", "step": 3, "text": "x"})
    assert heard[-1]["step"] == 3


def test_detector_versions_over_time(tmp_path: Path) -> None:
    rows = []
    for n in range(1, 5):
        refitted = {"version": 1 + n // 2, "refits": n // 2, "accuracy": 0.9}
        rows.append(step(n, **{f"adversary/detector/{key}": value for key, value in refitted.items()}))
    told = look(Record(a_run(tmp_path / "r", rows), "b"))
    assert told["detectors"] == {"detector": {"version": 3.0, "refits": 2.0, "accuracy": 0.9, "changes": [2, 4]}}
    assert told["train"]["columns"]["adversary/detector/version"] == [1, 2, 2, 3]


def test_pictures_are_shown_when_they_are_whole(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r", [evaluation(0)], grids=[0])
    record = Record(folder, "b")
    assert [n for n, _ in look(record)["grids"]] == [0]
    whole = a_grid(folder, 10).read_bytes()
    (folder / "grids" / "step_00010.png").write_bytes(whole[:-20])
    (folder / "grids" / "step_00011.png").write_bytes(b"<script>alert(1)</script>")
    (folder / "grids" / "step_00012.png").symlink_to("/etc/hostname")
    (folder / "grids" / "x.png").write_bytes(whole)
    huge = whole[:16] + (60000).to_bytes(4) + (60000).to_bytes(4) + whole[24:]
    (folder / "grids" / "step_00013.png").write_bytes(huge)
    append(folder, [evaluation(10)])
    assert [n for n, _ in look(record)["grids"]] == [0]
    (folder / "grids" / "step_00010.png").write_bytes(whole)
    told = look(record)
    assert [n for n, _ in told["grids"]] == [0, 10] and record.grid(10) == whole and record.grid(11) is None
    (folder / "grids" / "step_1000000.png").write_bytes(whole)
    assert [n for n, _ in look(record)["grids"]] == [0, 10, 1000000] and record.grid(1000000) == whole
    a_grid(folder, 10, (0, 90, 0))
    append(folder, [evaluation(11)])
    assert look(record)["grids"][1] != told["grids"][1]  # drawn again by a resumed run: another address for the browser


def test_what_the_rewriter_wrote(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r")
    record = Record(folder, "b")
    assert look(record)["rewrites"] is None
    (folder / "rewrites").mkdir()
    row = {"id": 0, "prompt": "a bag", "rewrite": "a worn leather bag", "rewards": {"detector": 0.5, "judge": None}}
    (folder / "rewrites" / "step_000000.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    told = look(record)["rewrites"]
    assert told == {"step": 0, "rows": [{key: row[key] for key in ("prompt", "rewrite", "rewards")}]}
    (folder / "rewrites" / "step_000010.jsonl").write_text(json.dumps({"prompt": ["x"], "rewrite": 5, "rewards": "no"}) + "\n[]\n")
    assert look(record)["rewrites"] == {"step": 10, "rows": [{"prompt": "?", "rewrite": "5", "rewards": {}}]}


HOSTILE = [
    b"[" * 100_000,
    b'{"kind": "step", "step": ' + b"9" * 5000 + b"}",
    b'{"kind": "step", "step": 1e400}',
    b'{"kind": "step", "step": -1}',
    b'{"kind": "step", "step": true}',
    b'{"kind": "step"}',
    b'"text"',
    b"\xff\xfe\x00",
    b"}{",
]


def test_lines_that_mean_harm(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\n".join(HOSTILE) + b"\n")
        file.write(b'{"kind": "step", "step": 1, "a": NaN, "b": Infinity, "\\ud800": 1, "failed_scores": 1e300, "failures": [1]}\n')
        file.write(b'{"kind": "eval", "step": 1, "reward/total_mean": "high", "distance": null, "n": {}}\n')
        file.write(b'{"kind": "alarm", "step": 1, "reason": {"a": 1}, "best_step": []}\n{"kind": ["x"], "step": 2}\n')
        file.write(json.dumps({"kind": "step", "step": 3, **{f"key{n}": n for n in range(2000)}, "k" * 1000: 1}).encode() + b"\n")
    told = look(Record(folder, "b"))
    assert told["train"]["at"] == [1, 3] and len(told["train"]["columns"]) <= 256
    assert f"{len(HOSTILE)} lines of metrics.jsonl could not be read and are left out" in said(told)
    assert "more kinds of numbers than a run has: some are left out" in said(told)


def test_a_detector_that_claims_the_pages_own_keys(tmp_path: Path) -> None:
    claims = {"adversary/d/changes": 5, "adversary/d/version": 1}
    told = look(Record(a_run(tmp_path / "r", [step(1, **claims), step(2, **{"adversary/d/version": 2})]), "b"))
    assert told["detectors"] == {"d": {"version": 2.0, "changes": [2]}}


def test_numbers_at_the_edge(tmp_path: Path) -> None:
    """Finite ones whose sums, differences and quotients are not."""
    edges = [1e308, -1e308, 5e-324, 0.0]
    rows = [step(n, **{"seconds/a": 1e308, "seconds/b": 1e308, "x": edges[n % 4]}) for n in range(1, 2000)]
    rows += [
        evaluation(n, **{key: edges[(n + k) % 4] for k, key in enumerate(("distance", "n", "reward/taste/std", "x"))})
        for n in range(8)
    ]
    told = look(Record(a_run(tmp_path / "r", rows), "b"))
    assert told["step"] == 1999 and told["step_s"] is None and told["left_s"] is None
    told = look(Record(a_run(tmp_path / "s", [evaluation(0, distance=5e-324), evaluation(1, distance=0.0)]), "b"))
    assert told["evals"]["at"] == [0, 1]


ALIASES = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(ALIASES)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "[" * 5000,
        "!!python/object/apply:os.system [touch owned]",
        "rewards: [1, 2]",
        "- 1",
        "\x00",
        "x" * 400_000,
        "&a {a: *a}",
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode(),
)
def test_a_configuration_that_means_harm(tmp_path: Path, text: str) -> None:
    folder = a_run(tmp_path / "r", [step(1)])
    (folder / "config.yaml").write_text(text)
    (folder / "versions.json").write_text("[" * 5000)
    (folder / "done.json").write_text('{"best_step": "x", "reason": {}}')
    start = time.monotonic()
    told = look(Record(folder, "b"))
    assert told["name"] == "r" and told["rewards"] == [] and told["train"]["at"] == [1]
    assert time.monotonic() - start < 20 and not (folder / "owned").exists()


def test_a_name_of_thousands_of_digits(tmp_path: Path) -> None:
    """Python reads them as hexadecimal, and refuses to write them as decimal."""
    folder, digits = a_run(tmp_path / "r", [step(1)]), "0x" + "f" * 5000
    (folder / "config.yaml").write_text(f"name: {digits}\nsteps: {digits}\nrewards: {{? {digits} : {{weight: {digits}}}}}\n")
    told = look(Record(folder, "b"))
    assert (told["name"], told["steps"], told["rewards"][0]["name"], told["rewards"][0]["weight"]) == ("?", None, "?", None)


def test_a_long_file_takes_bounded_memory_and_is_read_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CHUNK", 1 << 16)
    folder = a_run(tmp_path / "r")
    append(folder, (step(n, **{f"x{k}": n * k for k in range(20)}) for n in range(1, 6_001)))
    size = (folder / "metrics.jsonl").stat().st_size
    record = Record(folder, "b")
    tracemalloc.start()
    assert record.look(0.0)  # no time at all: one piece is read, and more is left
    assert 0 < record.brief()["read"] < 0.1 and record.brief()["state"] == "running"
    told = look(record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told["step"] == 6_000 and len(told["train"]["at"]) <= 600 and told["train"]["at"][-1] == 6_000
    assert size > 2_400_000 and peak < 1_800_000
    assert told["train"]["columns"]["x1"][0] < told["train"]["columns"]["x1"][-1]


def test_many_grids_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRIDS", 5)
    folder = a_run(tmp_path / "r", grids=range(20))
    assert [n for n, _ in look(Record(folder, "b"))["grids"]] == [0, 16, 17, 18, 19]
