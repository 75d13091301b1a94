"""verism-eval realbench as a newcomer runs it: a folder of pictures, one command, the small world's own services; and the small world's
contestants whose place is known."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from world.realbench import make

pytestmark = pytest.mark.e2e


def bench(root: Path, out: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [
        sys.executable,
        "-c",
        "import sys; from trainer.__main__ import evaluate; sys.exit(evaluate())",
        "realbench",
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, "--out", str(out)], cwd=root, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.timeout(1200)
def test_a_folder_of_pictures_and_nothing_else(root: Path, tmp_path: Path) -> None:
    """Coloured gradients, which the embedded detector does not know: they are scored and compared as a set, and the report says so."""
    folder, rng = tmp_path / "my_pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), np.uint8))
        corners.resize((60, 40), Image.Resampling.BICUBIC).save(folder / f"holiday {i}.jpg")
    done = bench(root, tmp_path / "out", str(folder), "--pictures", "24")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(one["name"], one["pictures"]) for one in found["contestants"]] == [("photographs", 24), ("my_pictures", 12)]
    assert {f["measure"] for f in found["figures"] if f["contestant"] == "my_pictures" and f["value"] is not None} == {
        "detector", "judge", "heldout_cnn", "heldout_spectrum", "diversity",
    }  # fmt: skip
    (rate,) = found["arena"]["rates"]
    assert rate["n"] == 12 and rate["missing"] == 0 and rate["low"] <= rate["value"] <= rate["high"]
    assert rate["wins"] + rate["ties"] + rate["losses"] == 24, "each of the 12 meets two photographs"
    assert "not of the kind it was fitted on" in done.stdout and "compared as sets" in done.stdout
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.timeout(1200)
def test_photographs_are_even_with_others_and_spoilt_copies_are_not(root: Path, tmp_path: Path) -> None:
    real, again = make.chosen(0), make.chosen(1)
    make.save(again, tmp_path / "again")
    make.save([make.blurred(image) for image in real], tmp_path / "blurred")
    kinds = ["--set", f"contestants.again={{folder: {tmp_path / 'again'}, kind: photographs}}"]
    kinds += ["--set", f"contestants.blurred={{folder: {tmp_path / 'blurred'}, kind: altered}}"]
    done = bench(root, tmp_path / "out", "base=world/policy", *kinds, "--set", "arena.pairs=100", "--pictures", "130")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    rates = {(r["a"], r["b"]): r for r in found["arena"]["rates"]}
    same = next(r for (a, b), r in rates.items() if {a, b} == {"photographs", "again"})
    assert same["low"] <= 0.5 <= same["high"], same
    against = next(r for (a, b), r in rates.items() if {a, b} == {"photographs", "blurred"})
    assert against["value"] > 0.5 and against["low"] > 0.5
    verdicts = {(t["measure"], t["contestant"]): t for t in found["telling"]}
    assert verdicts["heldout_cnn", "again"]["low"] < 0.56 and verdicts["detector", "base"]["value"] > 0.95
    assert verdicts["detector", "blurred"]["verdict"] == "fooled", "it calls most blurred photographs real"
    assert verdicts["judge", "blurred"]["verdict"] == "tells"
    assert all(m["learned_by"] == [] for m in found["measures"])
    assert "blurred" in done.stdout and (tmp_path / "out" / "report.html").is_file()
