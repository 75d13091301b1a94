"""`verism-eval arena`: two folders before a real service with the small judge, over HTTP; who wins, what is missing, what is said."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.process import running
from services.reward import Pair
from shared import arena
from shared.arena import Service
from shared.schema import Problem, Verdict
from shared.verdicts import consistent
from trainer.__main__ import evaluate
from world import photographs
from world.recipes import exam, lessons

PROMPT = "a photo of a bag"
COUNT = 12


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    judge = {"folder": str(exam.FOLDER), "dtype": "float32", "batch_cap": 16}
    config = tmp_path_factory.mktemp("arena") / "c.yaml"
    config.write_text(
        json.dumps({"rewards": {"pairs": {"use": "unified_compare", **judge}, "one": {"use": "forensic_chat", **judge}}})
    )
    with running(config) as served:
        yield served


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Held-out bags, and the same ones under noise."""
    real, classes = photographs.load("test")
    rng, place = np.random.default_rng(2), tmp_path_factory.mktemp("folders")
    clean, noisy = place / "clean", place / "noisy"
    for folder in (clean, noisy):
        folder.mkdir()
    for i, bag in enumerate(real[classes == 8][:COUNT]):
        Image.fromarray(bag).save(clean / f"{i}.png")
        Image.fromarray(lessons.spoil(bag, "noise", 1.0, rng)).save(noisy / f"{i}.png")
    return clean, noisy


def test_the_cleaner_folder_wins_and_the_pairs_are_the_judges_own(
    url: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, noisy = folders
    out = tmp_path / "runs" / "arena.jsonl"
    command = ["arena", str(clean), str(noisy), "--url", url, "--prompt", PROMPT, "--batch", "5", "--out", str(out)]
    assert evaluate(command) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == COUNT and all(row["a"] == row["b"] and row["error"] is None for row in rows)
    result = arena.standing(rows)
    assert result.rate is not None and result.rate > 0.8 and result.missing == 0
    assert f"{result.rate:.3f} +- {result.error:.3f}" in said.out and "12/12" in said.err
    judge = exam.load("unified_compare")
    for row in rows[:4]:
        one, other = (np.asarray(Image.open(folder / row["a"])) for folder in folders)
        pair = Pair(one, PROMPT, (other,))
        forward, backward = judge.compare([pair, pair.swapped])
        assert (row["forward"], row["backward"]) == pytest.approx((forward.value, backward.value), abs=1e-3)
        assert row["verdict"] == consistent(forward.value, backward.value)
    assert evaluate(["arena", str(noisy), str(clean), "--url", url, "--prompt", PROMPT]) == 0
    assert f"{1 - result.rate:.3f} +- {result.error:.3f}" in capsys.readouterr().out, "the other way round"
    assert evaluate(command) == 2 and "another --out" in capsys.readouterr().out


def test_a_picture_that_is_none_is_a_missing_pair(
    url: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in folders:
        mine = tmp_path / folder.name
        mine.mkdir()
        for name in ("0.png", "1.png"):
            (mine / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "noisy" / "1.png").write_bytes(b"no picture")
    assert evaluate(["arena", str(tmp_path / "clean"), str(tmp_path / "noisy"), "--url", url, "--prompt", PROMPT]) == 1
    assert "1 without a verdict: urn:verism:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reward", "one"], "scores single pictures; take a reward that compares"),
        (["--reward", "pair"], "it serves: pairs, one"),
        ([], "give the one of these pictures (--prompt)"),
        (["--url", "http://127.0.0.1:9"], "start it with `verism-serve"),
        (["--url", "localhost"], "write it as http://HOST:PORT"),
    ],
)
def test_what_cannot_begin_says_what_to_mend(
    url: str, folders: tuple[Path, Path], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(["arena", *map(str, folders), "--url", url, *more]) == 2
    assert said in capsys.readouterr().out


def test_folders_and_numbers_that_cannot_be(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(["arena", str(folders[0]), str(tmp_path)]) == 2 and "holds no pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate(["arena", *map(str, folders), "--pairs", "0"])
    assert "give 1 or more" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (
        (["--help"], "verism-eval arena FOLDER_A FOLDER_B"),
        (["arena", "--help"], "verism-serve examples/serve/judge.yaml"),
    ):
        with pytest.raises(SystemExit) as end:
            evaluate(command)
        assert end.value.code == 0 and said in capsys.readouterr().out


def test_what_fails_for_a_while_is_asked_again_and_what_does_not_is_missing(
    url: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(url, "pairs", PROMPT)
    gone = Verdict(first=0, second=1, error=Problem(type="urn:verism:engine-gone", title="later", retryable=True))
    odd = Verdict(first=0, second=1, error=Problem(type="urn:verism:label-mass", title="no label"))
    good = Verdict(first=0, second=1, value=0.8, orders=(0.9, 0.7))
    answers, slept = [[gone, odd, good, "urn:verism:unreachable"], [gone], [good]], list[float]()
    monkeypatch.setattr(service, "_asked", lambda shown: answers.pop(0))
    rows = service.meet(*folders, [(f"{i}.png", f"{i}.png") for i in range(4)], slept.append)
    service.close()
    assert slept == [1.0, 2.0] and [row["verdict"] for row in rows] == [1.0, None, 1.0, None]
    assert [row["error"] for row in rows] == [None, "urn:verism:label-mass", None, "urn:verism:unreachable"]
    assert rows[0]["forward"] == 0.9 and rows[0]["backward"] == pytest.approx(0.3)
