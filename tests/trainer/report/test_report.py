"""The page says what the numbers say, holds everything, and trusts no string."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from trainer.report import ReportError, changes, main, read, verdict, write_report


def make_run(folder: Path, name: str, evals: list[dict[str, Any]], alarm: bool = False, **config: Any) -> Path:
    """A run folder with invented numbers: data of a test, never shown to anyone."""
    (folder / "grids").mkdir(parents=True)
    rows = [{"kind": "eval", **e} for e in evals]
    rows += [
        {
            "kind": "step",
            "step": i,
            "kl": 0.01,
            "grad_norm": 0.1,
            "seconds/sample": 1.0,
            "failed_scores": 1,
            "failures": {"timeout": 1},
        }
        for i in range(3)
    ]
    if alarm:
        rows.append({"kind": "alarm", "step": evals[-1]["step"], "reason": "<b>bad</b>", "action": "stop", "best_step": 0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "ev')
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "rewards": {"detector": {"url": "http://x"}}, **config}))
    (folder / "versions.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    best = min(evals, key=lambda e: e["distance"] or 1e9)["step"]
    (folder / "done.json").write_text(json.dumps({"best_step": best, "reason": "finished"}))
    for e in evals:
        Image.fromarray(np.full((60, 60, 3), e["step"], np.uint8)).save(folder / "grids" / f"step_{e['step']:06d}.png")
    return folder


def evaluation(step: int, total: float, distance: float | None, hit: float) -> dict[str, Any]:
    return {
        "step": step,
        "reward/total_mean": total,
        "reward/total_sem": 0.05,
        "reward/detector/mean": total * 3,
        "distance": distance,
        "class_hit": hit,
        "heldout_cnn": -3.0 + total,
        "heldout_spectrum": None,
    }


GOOD = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, 0.4, 10.0, 0.75), evaluation(20, 0.5, 11.0, 0.76)]
HACKED = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, 1.4, 60.0, 0.55), evaluation(20, 2.5, 110.0, 0.40)]


def test_the_verdict_comes_from_the_numbers(tmp_path: Path) -> None:
    record = read(make_run(tmp_path / "good", "good", GOOD))
    text = verdict(record)
    assert "got better" in text and "step 10" in text and "38%" in text
    found = {change.label: change for change in changes(record)}
    assert found["trained reward"].good and "+5.7 standard errors" in found["trained reward"].words
    assert found["distance to photographs"].words == "-38%" and "held-out spectrum (log-odds)" not in found
    hacked = verdict(read(make_run(tmp_path / "naive", "naive", HACKED, alarm=True)))
    assert "hacked" in hacked and "risen by 2.50" in hacked and "16.0 to 110.0" in hacked
    assert "the reward rose by 0.40 (+5.7 standard errors)" in text and "1 held-out detector, 1 believes them more" in text


def test_an_alarm_is_judged_by_where_it_ended(tmp_path: Path) -> None:
    """Its best checkpoint is often the untouched policy, against which nothing would seem to have happened."""
    record = read(make_run(tmp_path / "naive", "naive", HACKED, alarm=True))
    found = {change.label: change for change in changes(record)}
    assert record.best()["step"] == 0 and found["distance to photographs"].after == 110.0
    assert found["distance to photographs"].good is False and found["class hit"].good is False
    assert "where it ended, step 20" in write_report(record.folder).read_text()


def test_an_alarm_after_real_progress_does_not_hide_it(tmp_path: Path) -> None:
    """The run is stopped because it turned, and its best checkpoint is still better than its start."""
    turned = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, 0.4, 10.0, 0.75), evaluation(20, 0.6, 12.0, 0.72)]
    record = read(make_run(tmp_path / "a", "turned", turned, alarm=True))
    assert "got better" in verdict(record) and "38%" in verdict(record) and "alarm rang at step 20" in verdict(record)
    assert {c.label: c.after for c in changes(record)}["distance to photographs"] == 10.0
    lost = [*turned[:2], evaluation(20, 2.0, 40.0, 0.5)]
    text = verdict(read(make_run(tmp_path / "b", "lost", lost, alarm=True)))
    assert "hacked" in text and "at step 10, the distance was down to 10.0" in text


def test_an_alarm_without_a_risen_reward_is_not_called_hacked(tmp_path: Path) -> None:
    fallen = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, -0.5, 60.0, 0.55)]
    text = verdict(read(make_run(tmp_path / "r", "fallen", fallen, alarm=True)))
    assert "hacked" not in text and "alarm rang at step 10" in text


def test_a_distance_that_hardly_moved_is_not_called_better(tmp_path: Path) -> None:
    still = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, 0.9, 15.6, 0.70)]
    assert "not get clearly better" in verdict(read(make_run(tmp_path / "r", "still", still)))


def test_no_change_is_neither_good_nor_bad(tmp_path: Path) -> None:
    same = [evaluation(0, 0.0, 16.0, 0.70)]
    assert [change.good for change in changes(read(make_run(tmp_path / "r", "same", same)))] == [None] * 4


def test_a_small_rise_is_not_called_better(tmp_path: Path) -> None:
    flat = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, 0.1, 15.0, 0.70)]
    assert "not everything" in verdict(read(make_run(tmp_path / "r", "flat", flat)))
    fallen = [evaluation(0, 0.0, 16.0, 0.70), evaluation(10, 0.9, 10.0, 0.60)]
    assert "not everything" in verdict(read(make_run(tmp_path / "s", "fallen", fallen)))


def test_the_page_is_whole_and_trusts_nothing(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    good = make_run(tmp_path / "good", "good", GOOD, description=evil)
    naive = make_run(tmp_path / "naive", "naive", HACKED, alarm=True)
    page = write_report(good, [naive]).read_text()
    assert evil not in page and "&lt;script&gt;" in page and "<b>bad</b>" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page) and "<script" not in page
    assert page.count("data:image/png;base64,") >= 7  # curves, training, three grids, two or three of the other run
    assert "Alarm at step 20" in page
    assert '<td>scores that failed in training</td><td class="n">3</td>' in page and "failures: timeout" in page
    with Image.open(good / "report_curves.png") as picture:
        assert picture.width > 800


def test_pieces_may_be_missing(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 0, "reward/total_mean": None}) + "\n")
    assert "cannot be said" in write_report(folder).read_text()


def test_a_folder_that_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match="no run folder"):
        read(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "verism-train" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="no evaluation yet"):
        read(tmp_path)


def test_hostile_names_do_not_break_the_plots(tmp_path: Path) -> None:
    for n, name in enumerate((r"$\frac{", "_hidden", "\u5b9f\u884c", "a\x07b" * 50)):
        run = make_run(tmp_path / str(n), name, GOOD, rewards={r"$\bad{": {"url": "http://x"}, "detector": None})
        assert write_report(run, [run]).is_file()


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", "r", GOOD)
    (folder / "metrics.jsonl").write_text(
        '{"kind": "eval", "step": 0, "reward/total_mean": NaN, "distance": Infinity, "class_hit": null}\n'
        '[1]\n{"kind": "eval"}\n{"kind": "step", "step": 1, "kl": NaN, "seconds/sample": NaN, "failed_scores": null}\n'
        '{"kind": "alarm", "step": 1}\n'
    )
    (folder / "done.json").write_text("{}")
    page = write_report(folder).read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower() and "no reason was written" in page
    assert "the run has not ended" in page


def test_a_broken_picture_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", "r", GOOD)
    (folder / "grids" / "step_000000.png").write_bytes(b"no picture")
    (folder / "grids" / "photographs.png").write_text("<svg onload=alert(1)>")
    page = write_report(folder).read_text()
    assert 'pictures at step 0"' not in page and 'pictures at step 10"' in page and "<figcaption>photographs" not in page


def test_a_broken_line_in_the_middle_is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", "r", GOOD)
    (folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\nbroken\n{"kind": "eval", "step": 1}\n')
    with pytest.raises(ReportError, match="line 2 is not JSON"):
        read(folder)
    (folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ReportError, match=r"config\.yaml cannot be read"):
        read(folder)
