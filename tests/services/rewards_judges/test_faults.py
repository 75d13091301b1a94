"""Every judge reward x every fault that it can meet: a status for the item, or an error at the start that says what to change.

On real engines: transformers with the tiny judge and the small judge, and the vLLM client. What a judge of a few megabytes cannot be brought to
do (decline, speak German, run out of a GPU's memory) is said by a server in vLLM's place, over real HTTP.
"""

import asyncio
import functools
import http.server
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from services.app import create_app
from services.config import ServiceConfig
from services.engines import EngineOptions, Failure, First, open_engine
from services.prompts import HERE
from services.prompts.answers import number
from services.registry import REWARDS, resolve
from services.reward import Item
from services.rewards.judge_kit import FirstToken, Judge, Labels, Read
from services.rewards.prompt_echo import PromptEcho
from services.rewards.rational_rewards import RationalOptions, RationalRewards
from services.rewards.unified_compare import UnifiedVerdict
from services.rewards.written_kit import Written
from shared import wire
from shared.image import encode
from shared.schema import Score, ScoreItem, ScoreRequest
from tests import tiny_judge
from tests.answering import Answering
from world.recipes.exam import FOLDER

VERDICT = "services.rewards.unified_compare:UnifiedVerdict"
JUDGES = [name for name in (*REWARDS, VERDICT) if isinstance(resolve(name), type) and issubclass(resolve(name), Judge)]
FIRST = [name for name in JUDGES if issubclass(resolve(name), FirstToken)]
WRITTEN = [name for name in JUDGES if issubclass(resolve(name), (Written, UnifiedVerdict))]
ECHO = [name for name in JUDGES if issubclass(resolve(name), PromptEcho)]
TWO = [{"text": "It is sharp.", "weight": 1}, {"text": "It has no bands.", "weight": -1}]
MORE: dict[str, dict[str, Any]] = {"auto_rubric": {"rubrics": TWO}, "edit_score": {"n": 2}}
PROMPT = 'a bag that says "SALE"'


def load(use: str, **options: Any) -> Any:
    return resolve(use).load("judge", {**MORE.get(use, {}), **options}, "cpu")


def items(*sides: int) -> list[Item]:
    rng = np.random.default_rng(6)
    reference = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return [Item(rng.integers(0, 256, (side, side, 3), dtype=np.uint8), PROMPT, (reference,)) for side in sides]


def kind(score: Score) -> tuple[str, str]:
    assert score.error is not None and score.value is None and score.error.title
    return score.status, score.error.type.removeprefix("urn:verism:")


def test_every_judge_is_one_of_the_kinds_below() -> None:
    assert sorted([*FIRST, *WRITTEN, *ECHO]) == sorted(JUDGES) and len(JUDGES) == 12


@pytest.mark.parametrize("use", FIRST)
def test_labels_below_the_floor_are_no_number(use: str) -> None:
    for score in load(use, folder=tiny_judge.made(), floor=0.999).score(items(28, 60)):
        assert kind(score) == ("parse_error", "label-mass")
        assert score.error is not None and "`template`" in score.error.title and not score.error.retryable


@pytest.mark.parametrize("use", JUDGES)
def test_a_picture_beyond_the_models_limit_is_refused_alone(use: str) -> None:
    brief = {"max_tokens": 16} if use in WRITTEN else {}
    small, large, other = load(use, folder=tiny_judge.made(), **floor(use), **brief, context=256).score(items(28, 448, 28))
    assert kind(large) == ("refused", "question-too-long")
    assert large.error is not None and "smaller pictures" in large.error.title and not large.error.retryable
    assert [one.error and one.error.type for one in (small, other)].count("urn:verism:question-too-long") == 0


@pytest.mark.parametrize("use", JUDGES)
def test_a_picture_that_no_processor_takes_fails_alone(use: str) -> None:
    slim = Item(np.zeros((16, 16 * 33, 3), np.uint8), PROMPT, items(28)[0].references)
    good, bad, other = load(use, folder=FOLDER, dtype="float32", **floor(use)).score([items(28)[0], slim, items(28)[0]])
    assert kind(bad) == ("error", "image-too-slim") and good.status == other.status == "ok"


@pytest.mark.parametrize("use", FIRST)
@pytest.mark.parametrize(("words", "said"), [(("zwölfundvierzig", "no"), "no single token"), (("no", "no"), "same token")])
def test_labels_that_are_no_single_tokens_stop_the_start(use: str, words: tuple[str, str], said: str, tmp_path: Path) -> None:
    own = yaml.safe_load((HERE / f"{resolve(use).template}.yaml").read_text())
    own["labels"] |= dict(zip(list(own["labels"])[:2], words, strict=True))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(ValueError, match=rf"{said}.*`labels` of the template"):
        load(use, folder=tiny_judge.made(), template=tmp_path / "mine.yaml")


@pytest.mark.parametrize("use", ECHO)
def test_a_server_that_cannot_echo_stops_the_start(use: str) -> None:
    with pytest.raises(ValueError, match="leave `dialect` away"):
        load(use, engine="vllm", url="http://127.0.0.1:9", model="judge", dialect="openai")


def floor(use: str) -> dict[str, Any]:
    return {"floor": 0} if use in FIRST else {}


def name(use: str) -> str:
    return use.rpartition(":")[2].lower()


class Asked:
    """One service with every judge on one small judge, as a lane drives them, four items at a time."""

    def __init__(self) -> None:
        own = {"folder": str(FOLDER), "dtype": "float32", "batch_cap": 4, "cache_items": 0}
        rewards = {name(use): {"use": use, **own, **floor(use), **MORE.get(use, {})} for use in JUDGES}
        self.loop = asyncio.Runner()  # lanes belong to the loop of their first request
        self.app = create_app(ServiceConfig.model_validate({"rewards": rewards, "device": "cpu", "threads": 1}))
        self.model = open_engine(EngineOptions(folder=FOLDER, dtype="float32"), "cpu").model  # type: ignore[attr-defined]

    def __call__(self, use: str) -> list[Score]:
        batch = [
            ScoreItem(id=str(i), prompt=item.prompt, image=encode(item.image), references=[encode(one) for one in item.references])
            for i, item in enumerate(items(28, 28, 28, 28))
        ]
        body = wire.pack_request(ScoreRequest(request_id="r", rewards=[name(use)], items=batch))

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test") as client:
                return await client.post("/score", content=body, headers={"content-type": wire.MSGPACK})

        answer = self.loop.run(ask())
        assert answer.status_code == 200, answer.text
        return [one.scores[name(use)] for one in wire.parse_answer(answer.content, wire.MSGPACK).items]


@pytest.fixture(scope="module")
def service() -> Iterator[Asked]:
    asked = Asked()
    with asked.loop:
        yield asked


@pytest.mark.parametrize("use", JUDGES)
def test_out_of_memory_is_met_by_smaller_batches_and_then_said(service: Asked, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, forward = service(use), service.model.forward
    rows = 2

    @functools.wraps(forward)
    def short(*arguments: Any, **named: Any) -> Any:
        if len(named["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*arguments, **named)

    monkeypatch.setattr(service.model, "forward", short)
    assert {score.status for score in whole} == {"ok"}
    assert [score.value for score in service(use)] == pytest.approx([score.value for score in whole], abs=1e-5)
    rows = 0
    for score in service(use):
        assert kind(score) == ("error", "out-of-memory") and score.error is not None and "smaller" in score.error.title


GOOD = """<text>SALE</text>
Final Score: 3
Text faithfulness: 3
Physical and visual quality: 3
Text rendering: 3
{"score": [20, 15]}
Image 1 is better."""
SORRY, GERMAN = "I'm sorry, but I can't judge this picture.", "Das Bild zeigt eine Tasche, auf der SALE steht."
LABELS = [(word, 0.055) for word in ("yes", "no", "real", "Real", "fake", "Fake")] + [(digit, 0.07) for digit in "123456789"]
ERRORS = {
    "memory": (500, "CUDA out of memory. Tried to allocate 9.00 GiB"),
    "busy": (503, "too many requests"),
    "images": (400, "At most 1 image(s) may be provided in one prompt."),
    "long": (400, "This model's maximum context length is 4096 tokens"),
    "refused": (400, "Failed to apply the processor"),
}


class Engine(Answering):
    """What a vLLM (or OpenAI) server says over HTTP; `server.says` is how it is today, `server.lives` how many questions it answers."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._reply(200, {"data": [{"id": "judge", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            return self._reply(200, {"tokens": [ord(letter) for letter in rendered(body)]})
        if self.path.endswith("/batch"):
            return self._reply(404, {})
        if self.server.says in ERRORS:
            status, message = ERRORS[self.server.says]
            return self._reply(status, {"error": {"message": message}})
        if self.server.says == "late":
            time.sleep(0.6)
        self.server.lives -= 1
        if self.server.lives < 0:  # killed: the connection ends in mid-question
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self._reply(200, self._answer(body))

    def _answer(self, body: Any) -> Any:
        text = {"refusal": SORRY, "german": GERMAN}.get(self.server.says, GOOD)
        ids = [ord(letter) for letter in rendered(body)]
        out: dict[str, Any] = {"prompt_token_ids": ids, "prompt_logprobs": [{str(token): {"logprob": -1.0}} for token in ids]}
        top = {"german": [("Das", 0.9)], "refusal": [("I", 0.9)], "some": [("yes", 0.3), ("real", 0.3), ("1", 0.3)]}
        likely = [*top.get(self.server.says, LABELS), (" the", 0.05 if self.server.says == "some" else 1e-9)]
        told = [{"token": token, "logprob": math.log(p)} for token, p in likely]
        choice = {
            "message": {"content": text},
            "finish_reason": "stop",
            "logprobs": {"content": [{**told[0], "top_logprobs": told}]},
        }
        return {**out, "choices": [{**choice, "index": i} for i in range(body.get("n", 1))]}


def rendered(body: Any) -> str:
    """Texts in order, as a chat template puts them together."""
    several = [part["text"] for one in body.get("messages", []) for part in one["content"] if part["type"] == "text"]
    return str(body.get("prompt", "")) or " ".join(several[:1]) + "\n" + "".join(several[1:])


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        server.says, server.lives, server.daemon_threads = "", 10**9, True  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(engine: Any, use: str, says: str, lives: int = 10**9, **options: Any) -> list[Score]:
    """Six items to a judge at a URL, one question after the other, while the server is as `says`."""
    url = f"http://127.0.0.1:{engine.server_port}"
    where = {"engine": "vllm", "url": url, "model": "judge", "concurrent": 1, "dialect": "vllm" if use in ECHO else "openai"}
    reward = load(use, **{**where, **options})
    engine.says, engine.lives = says, lives
    scores: list[Score] = reward.score(items(28, 29, 30, 31, 32, 33))
    return scores


@pytest.mark.parametrize("use", JUDGES)
def test_a_server_that_answers_gives_numbers(engine: Any, use: str) -> None:
    assert {score.status for score in asked(engine, use, "")} == {"ok"}, "so that what fails below fails for its own reason"


@pytest.mark.parametrize("use", [*FIRST, *WRITTEN])
def test_another_language_is_no_number(engine: Any, use: str) -> None:
    for score in asked(engine, use, "german"):
        assert kind(score) == ("parse_error", "label-mass" if use in FIRST else "answer-unparsable")
        assert score.error is not None and "Das Bild" in score.error.title


@pytest.mark.parametrize("use", [*FIRST, *WRITTEN])
def test_a_refusal_is_refused(engine: Any, use: str) -> None:
    for score in asked(engine, use, "refusal"):
        assert kind(score) == ("refused", "judge-refused") and score.error is not None and "sorry" in score.error.title


@pytest.mark.parametrize("use", FIRST)
def test_labels_that_the_engine_did_not_return_are_no_number(engine: Any, use: str) -> None:
    for score in asked(engine, use, "some"):
        assert kind(score) == ("error", "label-missing") and score.error is not None and "vLLM" in score.error.title


@pytest.mark.parametrize(
    ("says", "status", "urn", "retryable"),
    [
        ("memory", "error", "engine-out-of-memory", False),
        ("busy", "error", "engine-busy", True),
        ("images", "error", "too-many-images", False),
        ("long", "refused", "question-too-long", False),
        ("refused", "error", "question-refused", False),
    ],
)
@pytest.mark.parametrize("use", JUDGES)
def test_what_a_server_refuses_has_its_status(engine: Any, use: str, says: str, status: str, urn: str, retryable: bool) -> None:
    for score in asked(engine, use, says):
        assert kind(score) == (status, urn) and score.error is not None and score.error.retryable == retryable


@pytest.mark.parametrize("use", JUDGES)
def test_an_engine_that_is_killed_in_mid_batch_leaves_what_it_answered(engine: Any, use: str) -> None:
    scores = asked(engine, use, "", lives=4)
    gone = [score for score in scores if score.error is not None]
    assert gone and {kind(score) for score in gone} == {("error", "engine-gone")}
    assert all(score.error is not None and score.error.retryable for score in gone)
    if not issubclass(resolve(use), (resolve("edit_score"), resolve("unified_compare"), UnifiedVerdict)):  # two rounds of questions
        assert [score.status for score in scores] == ["ok"] * (2 if use == "auto_rubric" else 4) + ["error"] * len(gone)


@pytest.mark.parametrize("use", JUDGES)
def test_an_engine_that_does_not_answer_in_time_may_be_asked_again(engine: Any, use: str) -> None:
    scores = asked(engine, use, "late", timeout_s=0.2, concurrent=16)
    assert {score.status for score in scores} <= {"timeout", "error"}
    assert all(score.error is not None and score.error.retryable for score in scores)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["yes", " Yes", "no", "NO"]), st.floats(max_value=0, allow_nan=False)), st.floats(max_value=0)
)
def test_no_probabilities_make_the_reading_raise_or_invent(logprobs: dict[str, float], ceiling: float) -> None:
    engine = open_engine(EngineOptions(folder=tiny_judge.made()), "cpu")
    found = Labels(engine, {"yes": "yes", "no": "no"}).read(First(logprobs, ceiling))
    if isinstance(found, Read):
        assert math.fsum(found.p.values()) == pytest.approx(1) and 0 < found.mass <= 1 and math.isfinite(found.margin("yes", "no"))
    else:
        assert isinstance(found, Failure) and found.type in ("label-mass", "label-missing")


ASPECTS = RationalOptions.model_fields["aspects"].default
SECTIONS = """# User Request Analysis
A bag.
# Detailed Judgement
1. Text Faithfulness:
## Justification: two of 3 things. Text rendering comes below.
## Score: 3.25
2. **Physical and Visual Quality**:
## Score: 2
3. Text Rendering:
## Score: {}
# Summary: Score: 1
# User Request Refinement:
## Refined Request: a red bag"""


@functools.cache
def rational() -> RationalRewards:
    reward: RationalRewards = load("rational_rewards", folder=FOLDER, dtype="float32")
    return reward


def test_ratings_in_sections_are_read_as_the_published_checkpoint_writes_them() -> None:
    item = items(28)[0]
    score = rational()._read(SECTIONS.format("4"), item)
    assert score.value == pytest.approx(((3.25 + 2 + 4) / 3 - 1) / 3) and score.text == "a red bag"
    assert rational()._read(SECTIONS.format("N/A"), item).value == pytest.approx(((3.25 + 2) / 2 - 1) / 3)
    for odd in ("5", "", "3\n## Score: 2", "3\n1. Text Faithfulness:\n## Score: 3", "three"):
        assert kind(rational()._read(SECTIONS.format(odd), item)) == ("parse_error", "answer-unparsable"), odd
    listed = "Text faithfulness:\n2. Physical and visual quality: 3\nText rendering: 1"
    assert kind(rational()._read(listed, item))[1] == "answer-unparsable", "the mark of a list is no rating"
    assert number("Style Score (1-5): 2.802500009536743", 1, 5, "Style Score (1-5)") == 2.802500009536743


LINES = [
    "1. Text Faithfulness:\n", "2. Physical and visual quality:\n", "Text rendering:\n", "## Score: 3\n", "## Score: N/A\n",
    "# Summary\n", "Text rendering: 2\n", "Text faithfulness: 1\n", "## Score: ", "4", ".5", "\n", "**", "#", "## Justification: 2 of 3\n", "ſ",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(LINES), max_size=16).map("".join)))
def test_no_sections_make_the_reading_raise_or_give_a_number_that_is_not_there(text: str) -> None:
    score = rational()._read(text, items(28)[0])
    assert score.value is None or (
        0 <= score.value <= 1 and all(f"{part:g}" in text for part in score.parts.values()) and len(score.parts) <= len(ASPECTS)
    )
