"""A browser shows the report: nothing in its console, curves and grids painted, no address asked."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser.chromium import CHROMIUM, needs_chromium
from trainer.report import write_report

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
CURVE, GRID = (0x00, 0x72, 0xB2), (200, 30, 160)


def a_run(folder: Path) -> Path:
    """Invented numbers and one-coloured grids: data of a test."""
    (folder / "grids").mkdir(parents=True)
    rows = [{"kind": "eval", "step": s, "reward/total_mean": s, "reward/total_sem": 0.1, "distance": 9 - s} for s in (0, 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "done.json").write_text(json.dumps({"best_step": 2, "reason": "finished"}))
    for step in (0, 2):
        Image.fromarray(np.full((60, 60, 3), GRID, np.uint8)).save(folder / "grids" / f"step_{step:05d}.png")
    return folder


@pytest.mark.e2e
@needs_chromium
@pytest.mark.parametrize("width", [500, 1280])
def test_the_report_renders(tmp_path: Path, width: int) -> None:
    page = write_report(a_run(tmp_path / "run"))
    shot = tmp_path / "shot.png"
    size, profile = f"--window-size={width},3000", f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *QUIET, size, profile, f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.is_file(), done.stderr[-2000:]
    assert ":CONSOLE" not in done.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    for name, colour, least in (("curves", CURVE, 200), ("grids", GRID, 20_000)):
        near = (abs(pixels - np.array(colour)).max(axis=2) < 12).sum()
        assert near > least, f"{name}: {near} pixels"


@needs_chromium
def test_a_page_with_a_mistake_is_noticed(tmp_path: Path) -> None:
    """The check above can fail: a script that throws does reach the console's log."""
    page = tmp_path / "bad.html"
    page.write_text("<script>throw new Error('seen')</script>")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [str(CHROMIUM), *QUIET, profile, f"--screenshot={tmp_path / 's.png'}", page.as_uri()]
    assert ":CONSOLE" in subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
