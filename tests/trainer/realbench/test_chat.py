"""A judge that writes: strict reading, faults, and nothing asked twice, over real HTTP to a stand-in for the endpoint."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.answering import Answering, serving
from tests.trainer.realbench import stub
from tests.trainer.realbench.folders import fill
from trainer.__main__ import evaluate
from trainer.config import ConfigError
from trainer.realbench.chat import Chat, more_realistic, real_or_fake
from trainer.realbench.config import Judge


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Real or Fake: real\nReason: sharp folds", 1.0),
        ("**Real or Fake:** Fake.\nReason: it is not real", 0.0),
        ("I think...\nreal or fake : FAKE", 0.0),
        ("Real or Fake: real\nReal or Fake: fake", None),
        ("Real or Fake: real or fake", None),
        ("Real or Fake: real (or: fake)", None),
        ("It looks real to me.", None),
        ("Real or Fake: realistic", None),
        ("", None),
    ],
)
def test_only_the_line_that_was_asked_for_is_read(text: str, value: float | None) -> None:
    assert real_or_fake(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("More Realistic Image: Image 1\nReason: hands", 1.0),
        ("More realistic image: **Image 2**", 0.0),
        ("More Realistic Image: Image 1 or Image 2", None),
        ("More Realistic Image: both", None),
        ("Image 1", None),
    ],
)
def test_so_of_two(text: str, value: float | None) -> None:
    assert more_realistic(text) == value


def say(images: list[np.ndarray]) -> str:
    """Bright is real; very dark is not talked about."""
    if len(images) == 2:
        return "More Realistic Image: Image 1"
    level = images[0].mean() / 255
    return "I cannot say." if level < 0.3 else f"Real or Fake: {'real' if level > 0.5 else 'fake'}\nReason: its light"


def bench(path: Path, url: str, photographs: Path) -> Path:
    judge = {"url": url, "model": "m", "workers": 2, "tries": 1}
    told: dict[str, Any] = {"photographs": str(photographs), "judges": {"writer": judge}, "arena": {"judge": "writer", "pairs": 10}}
    path.write_text(json.dumps({**told, "features": None, "bootstrap": {"rounds": 100}}))
    return path


def test_unparsed_answers_are_counted_apart_and_never_scored(tmp_path: Path) -> None:
    photos, dark = fill(tmp_path / "photos", 0.8), fill(tmp_path / "dark", 0.3, seed=1)
    out = tmp_path / "out"
    with stub.serve(say=say, most=50) as service:
        command = ["realbench", str(dark), "--bench", str(bench(tmp_path / "b.yaml", service.url, photos)), "--out", str(out)]
        assert evaluate(command) == 1, "it stops answering half-way"
        assert len(service.asked) == 50
        service.most = None
        assert evaluate(command) == 0
        asked = len(service.asked)
        assert asked == 40 + 40 + 2 * 10 == len(set(map(repr, service.asked))), "nothing twice"
        assert evaluate(command) == 0 and len(service.asked) == asked
    found = json.loads((out / "results.json").read_text())
    figures = {f["contestant"]: f for f in found["figures"] if f["measure"] == "writer"}
    assert figures["photographs"]["value"] == 1.0 and figures["photographs"]["low"] > 0.8
    assert (
        figures["dark"]["unparsed"] > 5
        and figures["dark"]["n"] + figures["dark"]["unparsed"] == 40
        and figures["dark"]["missing"] == 0
    )
    assert figures["dark"]["value"] == 0.0
    (less,) = [d for d in found["differences"] if d["measure"] == "writer"]
    assert less["value"] == -1.0 < less["high"] < -0.7, "all against nothing is no certainty"
    arena = found["arena"]
    assert arena["shown_first"] == 1.0 and arena["rates"][0]["value"] == 0.5, "always `Image 1` is no preference"
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert any(row["error"] == "unparsed" and row["value"] is None and row["text"] == "I cannot say." for row in rows)


class Endpoint:
    """A judge whose answer to each picture is a status and a body that a test chooses; it remembers the levels that it was shown."""

    def __init__(self, answer: Callable[[float], tuple[int, str]]) -> None:
        self.answer, self.asked = answer, list[float]()


@contextmanager
def endpoint(answer: Callable[[float], tuple[int, str]]) -> Iterator[tuple[str, Endpoint]]:
    told = Endpoint(answer)

    class Handler(Answering):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = base64.b64decode(request["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])
            level = float(np.asarray(Image.open(io.BytesIO(data))).mean())
            told.asked.append(level)
            status, text = told.answer(level)
            body = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else text
            self._send(status, body.encode())

    with serving(Handler) as url:
        yield url, told


REAL = (200, "Real or Fake: real")


@pytest.mark.parametrize(
    ("status", "body"),
    [(402, "out of credit"), (400, "unknown model"), (307, "moved"), (503, "gone"), (201, "<html>welcome</html>")],
)
def test_a_judge_that_answers_no_more_is_given_up_with_its_reason_and_asked_again(
    tmp_path: Path, status: int, body: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After 12 answers and from the first: nothing is settled but one 400 among answers."""
    photos, out = fill(tmp_path / "photos", 0.8), tmp_path / "out"
    with endpoint(lambda level: REAL) as (url, judge):
        file = bench(tmp_path / "b.yaml", url, photos)
        told = json.loads(file.read_text()) | {"arena": None}
        if status in (400, 201):  # answers under way would stand between refusals, and settle more than one
            told["judges"]["writer"]["workers"] = 1
        file.write_text(json.dumps(told))
        command = ["realbench", "--bench", str(file), "--out", str(out)]
        for most in (0, 12):
            judge.asked.clear()
            judge.answer = lambda level, most=most: REAL if len(judge.asked) <= most else (status, body)  # type: ignore[misc]
            assert evaluate(command) == 1
            assert len(judge.asked) <= most + 5 + 4, "it is left alone after five, but for those under way"
            said = capsys.readouterr().out
            assert "writer stopped answering" in said and body in said
        judge.answer = lambda level: REAL
        assert evaluate(command) == 0
    row = next(f for f in json.loads((out / "results.json").read_text())["figures"] if f["measure"] == "writer")
    assert (row["n"], row["missing"]) in ((40, 0), (39, 1)) and (row["missing"] == 0 or status in (400, 201))


@pytest.mark.parametrize(("status", "again"), [(500, True), (400, False)])
def test_one_picture_that_never_gets_an_answer_stops_no_other(tmp_path: Path, status: int, again: bool) -> None:
    photos, out = fill(tmp_path / "photos", 0.8), tmp_path / "out"
    first = float(np.asarray(Image.open(photos / "p-00.png")).mean())
    last = float(np.asarray(Image.open(photos / "p-39.png")).mean())
    with endpoint(lambda level: (status, "not this one") if level in (first, last) else REAL) as (url, judge):
        file = bench(tmp_path / "b.yaml", url, photos)
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"arena": None, "judges": {"writer": told["judges"]["writer"] | {"workers": 1}}}))
        command = ["realbench", "--bench", str(file), "--out", str(out)]
        assert evaluate(command) == 1 and len(judge.asked) == 40
        assert evaluate(command) == (1 if again else 0) and sorted(judge.asked[40:]) == sorted({first, last} if again else {first})
        asked = len(judge.asked)
        assert evaluate(command) == (1 if again else 0) and (len(judge.asked) > asked) == again
    row = next(f for f in json.loads((out / "results.json").read_text())["figures"] if f["measure"] == "writer")
    assert (row["n"], row["missing"]) == (38, 2)


def test_a_key_that_is_not_set_and_one_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        Chat("writer", Judge(url="http://127.0.0.1:9", model="m", key_env="NO_SUCH_KEY"))
    chat, slept = Chat("writer", Judge(url="http://127.0.0.1:9", model="m", tries=3), lambda s: slept.append(s)), list[float]()
    image = np.zeros((20, 20, 3), np.uint8)
    said = [one for _, one in chat.ask_all([lambda: ("?", [image])] * 8)]
    chat.close()
    assert all(one.retry and one.error == "urn:verism:unreachable" for one in said) and chat.gave_up.is_set()
    assert slept and all(0.5 <= pause <= 4 for pause in slept)
