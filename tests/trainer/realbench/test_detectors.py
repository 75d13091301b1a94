"""Judging the judges: one that sees brightness is told from one that pays for noise, and nothing is asked twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.realbench import stub
from tests.trainer.realbench.folders import fill
from trainer.__main__ import evaluate
from trainer.realbench.alter import WAYS, altered


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
        told = {"detectors": {"real": {"url": service.url}}, "monitors": "world/monitors", "bootstrap": {"rounds": 100}}
        (tmp_path / "b.yaml").write_text(json.dumps(told))
        command = [
            "detectors",
            "--real",
            str(real),
            "--generated",
            str(fake),
            "--bench",
            str(tmp_path / "b.yaml"),
            "--out",
            str(out),
        ]
        assert evaluate([*command, "--altered", "12"]) == 0
        asked = len(service.asked)
        assert asked == 80 + 2 * 12 * 20
        assert evaluate([*command, "--altered", "12"]) == 0 and len(service.asked) == asked
    said = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["detectors"]}
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


def test_too_few_pictures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, fake = fill(tmp_path / "real", 0.6, ["a", "b", "c"]), fill(tmp_path / "fake", 0.2)
    with stub.serve() as service:
        (tmp_path / "b.yaml").write_text(json.dumps({"detectors": {"real": {"url": service.url}}}))
        command = [
            "detectors",
            "--real",
            str(real),
            "--generated",
            str(fake),
            "--bench",
            str(tmp_path / "b.yaml"),
            "--altered",
            "2",
        ]
        assert evaluate([*command, "--out", str(tmp_path / "out")]) == 2
    assert "3 photographs are too few" in capsys.readouterr().err
