"""The arena: consistent wins, ties, missing pairs, a file that is gone on with, and a remote judge that speaks OpenAI's chat."""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services import arena
from services.arena import Arena, asked, main, matches, standing
from services.reward import Item, Pair
from shared.schema import RewardInfo, Score
from shared.verdicts import consistent
from tests.answering import Answering, serving


class Bright:
    """Prefers the brighter picture; `lean` is added to whatever is shown first, `down` calls fail retryably."""

    def __init__(self, lean: float = 0.0, down: int = 0, question: str = "bright") -> None:
        self.info = RewardInfo(name="bright", mode="pairwise", description="a test's", preprocessing=question)
        self.lean, self.down, self.seen = lean, down, 0

    @classmethod
    def load(cls, name: str, options: Any, device: str) -> "Bright":
        return cls()

    def score(self, batch: Sequence[Item]) -> list[Score]:
        raise NotImplementedError

    def compare(self, pairs: Sequence[Pair]) -> list[Score]:
        self.seen += len(pairs)
        if self.down:
            self.down -= 1
            return [Score.failed("engine-gone", "later", retryable=True)] * len(pairs)
        margins = [(float(pair.image.mean()) - float(pair.references[0].mean())) / 40 + self.lean for pair in pairs]
        return [Score.ok(1 / (1 + math.exp(-margin))) for margin in margins]


def folder(place: Path, greys: Sequence[int], names: Sequence[str] = ()) -> Path:
    place.mkdir()
    for i, grey in enumerate(greys):
        Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(place / (names[i] if names else f"{i}.png"))
    return place


@pytest.mark.parametrize(
    ("forward", "backward", "verdict"),
    [
        (0.9, 0.2, 1.0),
        (0.1, 0.7, 0.0),
        (0.9, 0.9, 0.5),
        (0.2, 0.3, 0.5),
        (0.5, 0.1, 0.5),
        (0.5, 0.5, 0.5),
        (None, 0.5, None),
        (0.5, None, None),
    ],
)
def test_only_a_win_in_both_orders_counts(forward: float | None, backward: float | None, verdict: float | None) -> None:
    assert consistent(forward, backward) == verdict


def test_who_meets_whom() -> None:
    same = [f"{i}.png" for i in range(5)]
    assert matches(same, same, None, 0) == [(name, name) for name in same]
    assert len(matches(same, same, 3, 0)) == 3
    a, b = [f"a{i}" for i in range(6)], [f"b{i}" for i in range(40)]
    for pairs in (None, 6, 100, 239, 240, 1000):
        met = matches(a, b, pairs, 1)
        assert len(set(met)) == len(met) == min(pairs or 40, 240) and met == matches(a, b, pairs, 1)
        assert {x for x, _ in met} <= set(a) and {y for _, y in met} <= set(b)
    counts = Counter(x for x, _ in matches(a, b, 100, 1))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert matches(a, b, 20, 1) != matches(a, b, 20, 2)


def test_verdicts_their_sum_and_a_broken_picture(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", [200, 50, 120, 90, 10]), folder(tmp_path / "b", [100, 150, 121, 80, 20])
    (b / "4.png").write_bytes(b"no picture")
    judge = Bright(lean=0.5)
    one = Arena(a, b, judge, tmp_path / "out.jsonl")
    rows = one.run(matches(arena.names(a), arena.names(b), None, 0), 2)
    one.close()
    assert [row["verdict"] for row in rows] == [1.0, 0.0, 0.5, 0.5, None] and judge.seen == 8
    assert rows[4]["error"].startswith("urn:verism:") and rows[4]["forward"] is None and rows[4]["backward"] is None
    result = standing(rows)
    assert (result.wins, result.losses, result.ties, result.missing) == (1, 1, 2, 1) and result.rate == 0.5
    assert result.error == pytest.approx((0.5 * 0.5 / 6) ** 0.5) and result.shown_first is not None and result.shown_first > 0.5
    empty = standing([])
    assert empty.rate is None and empty.error is None


def test_the_file_is_gone_on_with(tmp_path: Path) -> None:
    a, b, out = folder(tmp_path / "a", [200, 50, 120]), folder(tmp_path / "b", [100, 150, 20]), tmp_path / "runs" / "out.jsonl"
    wanted = matches(arena.names(a), arena.names(b), None, 0)
    one = Arena(a, b, Bright(), out)
    first = one.run(wanted[:2], 1)
    one.close()
    with out.open("ab") as file:
        file.write(b'{"a": "2.png", "b"')  # killed in mid-line
    judge, heard = Bright(), list[int]()
    other = Arena(a, b, judge, out)
    rows = other.run(wanted, 2, heard.append)
    other.close()
    assert judge.seen == 2 and heard == [2, 3] and rows[:2] == first, "only the pair that was missing"
    assert [json.loads(line)["a"] for line in out.read_text().splitlines()[1:]] == ["0.png", "1.png", "2.png"]
    Image.fromarray(np.full((16, 16, 3), 7, np.uint8)).save(a / "0.png")
    judge = Bright()
    changed = Arena(a, b, judge, out)
    assert changed.run(wanted, 2)[0]["verdict"] == 0.0 and judge.seen == 2, "another picture of the same name"
    changed.close()
    with pytest.raises(ValueError, match="another judge or question"):
        Arena(a, b, Bright(question="other"), out)
    out.write_text("{}\n")
    with pytest.raises(ValueError, match="another judge"):
        Arena(a, b, Bright(), out)


def test_what_fails_for_a_while_is_asked_again(tmp_path: Path) -> None:
    white, black = np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)
    slept: list[float] = []
    ((forward, backward),) = asked(Bright(down=2), [Pair(white, None, (black,))], slept.append)
    assert slept == [1.0, 2.0] and forward.value is not None and forward.value > 0.9 and backward.value is not None
    ((forward, _),) = asked(Bright(down=99), [Pair(white, None, (black,))], slept.append)
    assert forward.error is not None and len(slept) == 2 + len(arena.PAUSES_S)


class Remote(Answering):
    """OpenAI's chat with pictures: likelier `1` the brighter the first one is than the second."""

    key, asked = "secret", 0

    def do_GET(self) -> None:
        allowed = self.headers["authorization"] == f"Bearer {self.key}"
        self._reply(200 if allowed else 401, {"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        type(self).asked += 1
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {self.key}" or set(body) & {"top_k", "min_p", "logprob_token_ids"}:
            return self._reply(401, {"error": {"message": "no"}})
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
        one, other = (float(np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))).mean()) for url in urls)
        p = 1 / (1 + math.exp((other - one) / 40))
        top = [
            {"token": "1", "logprob": math.log(p)},
            {"token": "2", "logprob": math.log1p(-p)},
            {"token": "The", "logprob": -12.0},
        ]
        content = [{"token": "1", "logprob": top[0]["logprob"], "top_logprobs": top}]
        message = {"role": "assistant", "content": "1"}
        choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": {"content": content}}
        return self._reply(200, {"choices": [choice]})


@pytest.fixture
def url() -> Iterator[str]:
    with serving(Remote) as url:
        yield url


def test_a_remote_judge_with_a_key(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, judge = (
        folder(tmp_path / "a", [200, 150, 90]),
        folder(tmp_path / "b", [100, 50, 180], ["x.png", "y.png", "z.png"]),
        tmp_path / "judge.yaml",
    )
    judge.write_text(json.dumps({"engine": "vllm", "url": url, "model": "judge", "key_env": "ARENA_KEY", "dialect": "openai"}))
    command = [str(a), str(b), str(judge), "--out", str(tmp_path / "out.jsonl"), "--pairs", "9"]
    monkeypatch.setenv("ARENA_KEY", "wrong")
    assert main(command) == 2 and "401" in capsys.readouterr().err
    monkeypatch.setenv("ARENA_KEY", Remote.key)
    Remote.asked = 0
    assert main(command) == 0 and Remote.asked == 18
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][1:]
    greys = {"0.png": 200, "1.png": 150, "2.png": 90, "x.png": 100, "y.png": 50, "z.png": 180}
    assert len(rows) == 9 and all(row["verdict"] == (greys[row["a"]] > greys[row["b"]]) for row in rows)
    said = capsys.readouterr().out
    assert "0.667" in said and "secret" not in (tmp_path / "out.jsonl").read_text() + said
    assert main(command) == 0 and Remote.asked == 18, "nothing is asked twice"


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("[]", "no mapping"),
        ("{use: jpeg_size}", "scores single pictures"),
        ("{use: unified_compere}", "did you mean"),
        ("{engine: vllm, url: 'http://127.0.0.1:9', model: judge}", "does not answer"),
    ],
)
def test_a_judge_that_cannot_be_is_said(judge: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder(tmp_path / "a", [1]), folder(tmp_path / "b", [2])
    (tmp_path / "judge.yaml").write_text(judge)
    assert main([str(a), str(b), str(tmp_path / "judge.yaml"), "--out", str(tmp_path / "o.jsonl")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()
    assert (
        main([str(a), str(tmp_path / "none"), str(tmp_path / "judge.yaml")]) == 2 and "holds no pictures" in capsys.readouterr().err
    )
