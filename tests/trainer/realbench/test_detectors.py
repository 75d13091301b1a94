"""Judging the judges: one that sees brightness is told from one that pays for noise, and nothing is asked twice."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.realbench import stub
from tests.trainer.realbench.folders import IDS, fill
from trainer.__main__ import evaluate
from trainer.realbench.alter import WAYS, altered


def judge(tmp_path: Path, bench: dict[str, Any], real: Path, fake: Path, *more: str) -> int:
    """`verism-eval detectors` on two folders; its report lies in tmp_path / "out"."""
    (tmp_path / "b.yaml").write_text(json.dumps({"bootstrap": {"rounds": 100}, **bench}))
    folders = ["--real", str(real), "--generated", str(fake)]
    return evaluate(["detectors", *folders, "--bench", str(tmp_path / "b.yaml"), "--out", str(tmp_path / "out"), *more])


def detectors(tmp_path: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["detectors"]}


def test_alterations_grow_and_repeat() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
    for way, (_, strengths, _) in WAYS.items():
        changed = [np.abs(altered(image, way, s, "0123456789abcdef").astype(int) - image).mean() for s in strengths]
        assert all(a < b for a, b in zip(changed, changed[1:], strict=False)), way
        assert altered(image, way, strengths[0], "0123456789abcdef").shape == image.shape
        same = [altered(image, way, strengths[1], "0123456789abcdef") for _ in range(2)]
        assert (same[0] == same[1]).all()


def test_a_table_says_whom_to_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`real` is brightness: dark generated pictures are told apart, and noise on dark ones, which cannot go below 0, makes them brighter."""
    real, fake = fill(tmp_path / "real", 0.6), fill(tmp_path / "fake", 0.05, seed=1)
    out = tmp_path / "out"
    with stub.serve() as service:
        told = {"detectors": {"real": {"url": service.url}}, "monitors": "world/monitors"}
        assert judge(tmp_path, told, real, fake, "--altered", "12") == 0
        asked = len(service.asked)
        assert asked == 80 + 2 * 12 * 20
        assert judge(tmp_path, told, real, fake, "--altered", "12") == 0 and len(service.asked) == asked
    said = capsys.readouterr().out
    rows = detectors(tmp_path)
    assert set(rows) == {"real", "heldout_cnn", "heldout_spectrum"}
    one = rows["real"]
    assert (
        one["auc"]["value"] == 1.0
        and one["average_precision"]["value"] == pytest.approx(1.0)
        and one["calibration_error"]["value"] > 0.05
    )
    assert one["rewards"] == ["noise"] and "pays for noise" in one["words"] and "real: pays for noise" in said
    noise = [c for c in one["altered"] if c["way"] == "noise"]
    assert (
        noise[-1]["moved"]["low"] > 0.02
        and noise[-1]["higher"]["value"] > 0.9
        and noise[0]["moved"]["value"] < noise[-1]["moved"]["value"]
    )
    assert all(abs(c["moved"]["value"]) < 0.02 for c in one["altered"] if c["way"] == "blur")
    page = (out / "report.html").read_text()
    assert "<script" not in page and page.count("<svg") == 9
    assert (out / "detectors.csv").read_text().count("\n") > 100


def test_what_was_not_measured_is_not_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that writes is not asked about altered pictures, and of a detector that is refitted meanwhile no two versions are mixed."""
    real, fake = fill(tmp_path / "real", 0.6, IDS[:20]), fill(tmp_path / "fake", 0.3, IDS[:20], seed=1)
    with stub.serve(
        say=lambda images: f"Real or Fake: {'real' if images[0].mean() > 115 else 'fake'}", refit=40 + 40 + 60
    ) as service:
        told = {"detectors": {"real": {"url": service.url}}, "judges": {"writer": {"url": service.url, "model": "m"}}}
        assert judge(tmp_path, told, real, fake, "--altered", "5") == 1
        said, rows = capsys.readouterr().out, detectors(tmp_path)
        assert rows["writer"]["words"] == "tells them apart well; alterations not measured" and "not measured" in said
        assert "its weights changed in the middle" in said and "not measured" in rows["real"]["words"]
        assert judge(tmp_path, told, real, fake, "--altered", "5") == 0
    assert detectors(tmp_path)["real"]["words"].endswith("none of the alterations pays")
    kept = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    counts = Counter(row["question"] for row in kept if ":" in row["sha"])
    assert len(counts) == 2 and min(counts.values()) <= 60 and max(counts.values()) == 2 * 5 * 20


def test_too_few_pictures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = fill(tmp_path / "real", 0.6, ["a", "b", "c"]), fill(tmp_path / "fake", 0.2)
    with stub.serve() as service:
        assert judge(tmp_path, {"detectors": {"real": {"url": service.url}}}, real, fake, "--altered", "2") == 2
        assert service.asked == []
        with pytest.raises(SystemExit):
            judge(tmp_path, {}, real, fake, "--photographs", str(real))
    said = capsys.readouterr().err
    assert "3 photographs are too few" in said and "unrecognized arguments: --photographs" in said
