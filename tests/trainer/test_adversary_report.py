"""The report of a run whose detector learned along: its accuracy, its version, and how references stand above samples."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.trainer.report.test_report import GOOD, make_run
from trainer.report import changes, curves, panels, read, verdict, write_report

ADVERSARY = {"detector": {"admin": "http://127.0.0.1:8906"}}


def refitted(folder: Path, name: str, refits: bool = True, **config: Any) -> Path:
    """A run folder with invented numbers: data of a test, never shown to anyone."""
    run = make_run(
        folder, name, [{**e, "adversary/detector/gap": 2.0 - e["step"] / 8} for e in GOOD], adversary=ADVERSARY, **config
    )
    rows, version = [], 1
    for step in range(1, 21):
        row: dict[str, Any] = {"kind": "step", "step": step, "kl": 0.1, "seconds/refit": 1.0}
        if refits and step % 3 == 1:
            version += 1
            row |= {"adversary/detector/accuracy": 0.8 + 0.1 * (step % 2), "adversary/detector/accuracy_before": 0.55}
        rows.append({**row, "adversary/detector/version": version})
    metrics = run / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"kind": "eval"' in line]
    metrics.write_text("\n".join([*kept, *map(json.dumps, rows)]) + "\n")
    return run


def test_accuracy_and_version_are_drawn_beside_the_other_curves(tmp_path: Path) -> None:
    run, other = refitted(tmp_path / "a", "learns"), make_run(tmp_path / "b", "frozen", GOOD)
    chosen = panels([read(run), read(other)])
    assert [key for key, *_ in chosen[-2:]] == ["adversary accuracy: detector", "adversary/detector/gap"]
    still = refitted(tmp_path / "c", "learns", refits=False)
    drawn = [hashlib.sha256(curves([read(one)], [chosen[-2]], 1)).hexdigest() for one in (run, still)]
    assert drawn[0] != drawn[1], "only one has an accuracy to draw"
    page = write_report(run).read_text()
    assert "detector: photographs told from samples" in page and "detector: references above samples" in page


def test_rewards_of_several_versions_are_no_measure(tmp_path: Path) -> None:
    evals = [{**e, "adversary/detector/refits": n} for n, e in enumerate(GOOD)]
    record = read(make_run(tmp_path / "a", "learns", evals, adversary=ADVERSARY))
    (reward,) = [change for change in changes(record) if change.label == "trained reward"]
    assert reward.good is None and "several versions" in reward.words
    assert "got better" in verdict(record) and "38%" in verdict(record) and "cannot be told, since a detector" in verdict(record)
    assert "several versions" not in verdict(read(make_run(tmp_path / "b", "frozen", GOOD)))


def test_a_detector_that_was_never_refitted_has_no_accuracy_to_draw(tmp_path: Path) -> None:
    keys = [key for key, *_ in panels([read(refitted(tmp_path / "a", "waits", refits=False))])]
    assert "adversary/detector/gap" in keys and "adversary accuracy: detector" not in keys


def test_names_are_not_trusted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "odd", GOOD, rewards="no mapping")
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + 'adversary: ["<script>"]\n')
    assert [key for key, *_ in panels([read(run)])][-1] == "heldout_cnn"
    evil = make_run(tmp_path / "b", "evil", GOOD)
    (evil / "config.yaml").write_text((evil / "config.yaml").read_text() + 'adversary: {"$x^<script>": {}}\n')
    assert "<script>" not in write_report(evil).read_text()
