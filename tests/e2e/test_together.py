"""One /score with two rewards: their devices work at the same time, so it takes as long as the slower one."""

import json
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from bench.process import running
from shared import wire
from shared.image import encode
from shared.schema import Score, ScoreItem, ScoreRequest
from tests import tiny_judge

pytestmark = pytest.mark.e2e
SECONDS = 0.5


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("together") / "c.yaml"
    sleeper = {"use": "tests.e2e.timed:Sleeper", "seconds": SECONDS, "batch_cap": 8, "cache_items": 0}
    judge = {"use": "tests.e2e.timed:Judge", "folder": str(tiny_judge.made()), "floor": 0, "batch_cap": 8, "cache_items": 0}
    detector = {"use": "detector", "folder": "world/detector", "batch_cap": 8, "cache_items": 0}
    rewards = {"judge": judge, "device": sleeper, "other": sleeper, "detector": detector}
    config.write_text(json.dumps({"threads": 1, "rewards": rewards}))
    with running(config) as served:
        yield served


def ask(url: str, *rewards: str) -> tuple[float, list[dict[str, Score]]]:
    """Seconds, and the scores of each of eight pictures."""
    pictures = np.random.default_rng(time.monotonic_ns()).integers(0, 256, (8, 28, 28, 3), dtype=np.uint8)
    items = [ScoreItem(id=str(i), image=encode(picture, "rgb8")) for i, picture in enumerate(pictures)]
    body = wire.pack_request(ScoreRequest(request_id=str(time.monotonic_ns()), rewards=list(rewards), items=items))
    began = time.monotonic()
    answer = httpx.post(f"{url}/score", content=body, headers={"content-type": wire.MSGPACK}, timeout=60)
    seconds = time.monotonic() - began
    assert answer.status_code == 200, answer.text
    return seconds, [dict(item.scores) for item in wire.parse_answer(answer.content, wire.MSGPACK).items]


def span(scores: list[dict[str, Score]], reward: str) -> tuple[float, float]:
    parts = [one[reward].parts for one in scores]
    return min(part["began"] for part in parts), max(part["ended"] for part in parts)


def test_detector_and_judge_answer_one_request(url: str) -> None:
    _, scores = ask(url, "detector", "judge")
    assert len(scores) == 8
    for one in scores:
        assert set(one) == {"detector", "judge"} and all(score.status == "ok" for score in one.values())


@pytest.mark.parametrize("other", ["judge", "other"])
def test_two_devices_work_at_the_same_time(url: str, other: str) -> None:
    _, scores = ask(url, "device", other)
    (began, ended), (b, e) = span(scores, "device"), span(scores, other)
    assert max(began, b) < min(ended, e), "one waited for the other"


def test_the_latency_is_that_of_the_slower_one(url: str) -> None:
    """Of several tries the quickest, for other work on the machine only adds."""
    alone = min(ask(url, "device")[0] for _ in range(3))
    both = min(ask(url, "device", "other")[0] for _ in range(5))
    with_judge, judge = min(ask(url, "device", "judge")[0] for _ in range(5)), min(ask(url, "judge")[0] for _ in range(5))
    print(
        f"alone {1000 * alone:.0f} ms, two devices {1000 * both:.0f} ms; judge {1000 * judge:.0f} ms, with it {1000 * with_judge:.0f} ms"
    )
    assert alone >= SECONDS and both < 1.1 * alone + 0.03
    assert with_judge < 1.1 * max(alone, judge) + 0.5 * min(alone, judge), "in turn it were the sum"
