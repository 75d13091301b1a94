"""The app with rewards that misbehave: clear errors, per item where it can be, never an invented number."""

import asyncio
import base64
import gc
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from services.app import _Flight, create_app
from services.config import ServiceConfig, load
from services.reward import Item
from shared.image import encode
from shared.schema import RewardInfo, Score, ScoreRequest


class Moody:
    """Scores the mean grey; pictures of certain greys make it misbehave."""

    def __init__(self, name: str) -> None:
        self.info = RewardInfo(name=name, version=3)
        self.batches: list[int] = []

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        assert not options and device == "cpu"
        return cls(name)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        self.batches.append(len(batch))
        greys = [int(item.image.mean()) for item in batch]
        if 13 in greys:
            raise ValueError("secret detail")
        return [Score.ok(float("nan") if g == 14 else g / 255) for g in greys]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    config = ServiceConfig.model_validate(
        {
            "device": "cpu",
            "rewards": {
                "moody": {"use": f"{__name__}:Moody"},
                "other": {"use": f"{__name__}:Moody"},
                "realism": {"use": "realism", "parts": {"moody": {"weight": 1}, "other": {"weight": 3}}},
            },
            "max_body_bytes": 200_000,
            "max_request_pixels": 20_000,
        }
    )
    with TestClient(create_app(config)) as test:
        yield test


def grey(value: int, side: int = 16) -> bytes:
    return encode(np.full((side, side, 3), value, np.uint8), "png").data


def ask(client: TestClient, values: Sequence[int], **fields: str) -> httpx.Response:
    return client.post("/score", files=[("image", (f"{i}.png", grey(v))) for i, v in enumerate(values)], data=fields)


def test_seven_scores_and_one_error(client: TestClient) -> None:
    files = [("image", (f"{i}.png", grey(i * 10))) for i in range(8)]
    files[3] = ("image", ("broken.png", grey(1)[:40]))
    answer = client.post("/score", files=files, data={"rewards": "moody"}).json()
    scores = [item["scores"]["moody"] for item in answer["items"]]
    assert [s["status"] for s in scores] == ["ok"] * 3 + ["error"] + ["ok"] * 4
    assert scores[3]["value"] is None and scores[3]["error"]["type"] == "urn:verism:image-unreadable"
    assert [round(s["value"] * 255) for s in scores if s["value"] is not None] == [0, 10, 20, 40, 50, 60, 70]


def test_a_failing_item_is_found_and_stands_alone(client: TestClient) -> None:
    answer = ask(client, [1, 2, 13, 4, 14, 6], rewards="moody")
    scores = [item["scores"]["moody"] for item in answer.json()["items"]]
    assert [s["status"] for s in scores] == ["ok", "ok", "error", "ok", "error", "ok"]
    assert scores[2]["error"]["type"] == "urn:verism:scoring-failed"
    assert scores[4]["error"]["type"] == "urn:verism:non-finite-score"
    assert "secret" not in answer.text


def test_realism_is_the_weighted_mean_and_comes_first(client: TestClient) -> None:
    item = ask(client, [100]).json()["items"][0]
    assert list(item["scores"])[0] == "realism"
    assert item["scores"]["realism"]["value"] == pytest.approx(100 / 255)
    assert item["scores"]["realism"]["parts"] == pytest.approx({"moody": 100 / 255, "other": 100 / 255})
    failed = ask(client, [14], rewards="realism").json()["items"][0]["scores"]["realism"]
    assert failed["status"] == "error" and failed["error"]["type"] == "urn:verism:part-missing"


@pytest.mark.parametrize(
    "body, content_type, status, kind",
    [
        (b"{", "application/json", 400, "malformed"),
        (b'{"items": []}', "application/json", 422, "invalid"),
        (b"\x80\x04K\x01.", "application/msgpack", 415, "unsupported-media-type"),
        (b"x", "application/x-pickle", 415, "unsupported-media-type"),
        (b"x", "text/plain", 415, "unsupported-media-type"),
        (b"--x\r\n", "multipart/form-data; boundary=y", 400, "malformed"),
        (b"x", "multipart/form-data", 400, "malformed"),
        (b"0" * 300_000, "application/json", 413, "too-large"),
    ],
)
def test_bad_bodies(client: TestClient, body: bytes, content_type: str, status: int, kind: str) -> None:
    answer = client.post("/score", content=body, headers={"content-type": content_type})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem = answer.json()
    assert problem["type"] == f"urn:verism:{kind}" and problem["title"] and "Traceback" not in answer.text


def test_unknown_rewards_and_versions(client: TestClient) -> None:
    answer = ask(client, [1], rewards="moddy")
    assert answer.status_code == 404 and "moody, other, realism" in answer.json()["title"]
    image = {"encoding": "png", "height": 16, "width": 16, "data": base64.b64encode(grey(1)).decode()}
    body = {"rewards": ["moody"], "require_version": {"moody": 2}, "items": [{"image": image}]}
    assert client.post("/v1/score", json=body).status_code == 409
    assert client.post("/v1/score", json={**body, "require_version": {"moody": 3}}).status_code == 200
    late = client.post("/v1/score", json={**body, "require_version": None, "deadline_ms": 60_000})
    assert late.json()["rewards"]["moody"]["version"] == 3


def test_the_pixel_budget_of_a_request(client: TestClient) -> None:
    answer = ask(client, [1] * 3, rewards="moody")
    assert all(i["scores"]["moody"]["status"] == "ok" for i in answer.json()["items"])
    files = [("image", (f"{i}.png", grey(5, 120))) for i in range(2)]
    statuses = [
        i["scores"]["moody"]["status"] for i in client.post("/score", files=files, data={"rewards": "moody"}).json()["items"]
    ]
    assert statuses == ["ok", "error"]


def test_health_metrics_and_documents(client: TestClient) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert {r["name"] for r in client.get("/v1/rewards").json()["rewards"]} == {"moody", "other", "realism"}
    metrics = client.get("/metrics").text
    assert 'verism_items_total{outcome="ok",reward="moody"}' in metrics and "verism_batch_images_bucket" in metrics
    document = client.get("/openapi.json").json()
    assert set(document["paths"]["/score"]["post"]["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
    assert client.get("/nowhere").json()["type"] == "urn:verism:http-404"
    assert client.get("/").json()["rewards"] == ["moody", "other", "realism"]


def test_pictures_of_a_training_step_are_not_looked_up_and_others_are(client: TestClient) -> None:
    def cached(priority: str) -> list[bool]:
        image = {"encoding": "rgb8", "height": 16, "width": 16, "data": base64.b64encode(bytes([77]) * 768).decode()}
        body = {"rewards": ["moody"], "priority": priority, "items": [{"image": image}]}
        answers = [client.post("/score", json=body).json() for _ in range(2)]
        assert all(a["items"][0]["scores"]["moody"]["value"] == pytest.approx(77 / 255) for a in answers)
        return [a["items"][0]["scores"]["moody"]["cached"] for a in answers]

    assert cached("train") == [False, False]
    assert cached("interactive") == [False, True]
    assert cached("bulk") == [True, True]


def test_an_app_for_one_use_is_not_warmed_up() -> None:
    config = ServiceConfig.model_validate({"device": "cpu", "rewards": {"moody": {"use": f"{__name__}:Moody", "batch_most": 3}}})
    app = create_app(config, tuned=False)
    (lane,) = app.state.verism.lanes
    assert lane.work.reward.batches == [] and lane.cap == 3
    with TestClient(app) as test:
        assert ask(test, [1, 2, 3, 4]).status_code == 200
    assert sum(lane.work.reward.batches) == 4 and max(lane.work.reward.batches) <= 3


def test_what_was_dropped_is_in_the_metrics() -> None:
    config = ServiceConfig.model_validate({"device": "cpu", "rewards": {"moody": {"use": f"{__name__}:Moody", "batch_cap": 4}}})
    with TestClient(app := create_app(config)) as test:
        app.state.verism.lanes[0].counts.update(expired=3, cancelled=2)
        for _ in range(2):
            lines = test.get("/metrics").text.splitlines()
    dropped = {line for line in lines if line.startswith("verism_dropped_total")}
    assert dropped == {
        f'verism_dropped_total{{reward="moody",why="{w}"}} {n}.0' for w, n in (("cancelled", 2), ("expired", 3), ("wasted", 0))
    }


def test_requests_of_one_id_join_the_one_with_their_body() -> None:
    config = ServiceConfig.model_validate(
        {"device": "cpu", "rewards": {"moody": {"use": f"{__name__}:Moody", "batch_cap": 4, "cache_items": 0}}}
    )
    app = create_app(config)
    (lane,) = app.state.verism.lanes
    score, gate = lane.work.reward.score, threading.Event()
    lane.work.reward.score = lambda batch: (gate.wait(20), score(batch))[1]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:

            async def post(value: int) -> httpx.Response:
                image = {"encoding": "rgb8", "height": 16, "width": 16, "data": base64.b64encode(bytes([value]) * 768).decode()}
                body = {"request_id": "one", "priority": "train", "items": [{"image": image}]}
                return await client.post("/score", json=body, timeout=30)

            asked = [asyncio.create_task(post(value)) for value in (50, 60, 50, 60, 60)]
            while sum(flight.waiters for flights in app.state.verism.flights.values() for flight in flights) < 5:
                await asyncio.sleep(0.01)
            gate.set()
            return await asyncio.gather(*asked)

    answers = [answer.json()["items"][0]["scores"]["moody"]["value"] for answer in asyncio.run(all_at_once())]
    assert answers == pytest.approx([v / 255 for v in (50, 60, 50, 60, 60)])
    assert (
        sum(lane.work.reward.batches[-2:]) == 2 and app.state.verism.metrics.registry.get_sample_value("verism_joined_total") == 3
    )
    assert not app.state.verism.flights


def test_a_refused_request_leaves_nothing_behind() -> None:
    """Its body is free again at once: an exception that holds the frames which hold it would wait for the garbage collector."""
    config = ServiceConfig.model_validate({"device": "cpu", "rewards": {"moody": {"use": f"{__name__}:Moody", "batch_cap": 4}}})
    with TestClient(app := create_app(config)) as test:
        app.state.verism.lanes[0]._draining = True
        gc.collect()
        gc.disable()
        try:
            assert [ask(test, [1]).status_code for _ in range(3)] == [503] * 3
            left = [
                one for one in gc.get_objects() if type(one) in (ScoreRequest, _Flight)
            ]  # isinstance wakes lazy objects of torch
        finally:
            gc.enable()
    assert left == []


def test_the_document_says_how_a_key_is_sent_where_there_are_keys(client: TestClient) -> None:
    open_to_all = client.get("/openapi.json").json()
    assert "securitySchemes" not in open_to_all["components"] and "security" not in open_to_all["paths"]["/score"]["post"]
    keys = {"trainer": {"sha256": "0" * 64}}
    config = {"device": "cpu", "rewards": {"moody": {"use": f"{__name__}:Moody", "batch_cap": 4}}, "keys": keys}
    with TestClient(create_app(ServiceConfig.model_validate(config))) as test:
        document = test.get("/openapi.json").json()
        schemes = document["components"]["securitySchemes"]
        assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"], schemes["header"]["name"]) == (
            "http",
            "bearer",
            "x-api-key",
        )
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                code = test.request(method, path).status_code
                assert (code == 401) == ("security" in operation), f"{method} {path} answers {code}"
        bodies = [document["paths"][path]["post"]["requestBody"]["content"] for path in ("/score", "/v1/map")]
        assert bodies[0] == bodies[1]


def test_configurations_name_what_is_wrong(tmp_path: Any) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"prot": 8000, "rewards": {"a": {"use": "jpeg_size"}}}))
    with pytest.raises(ValueError, match="unknown key 'prot'; did you mean 'port'"):
        load(file)
    with pytest.raises(ValueError, match="examples/serve/world.yaml"):
        load(tmp_path / "missing.yaml")
    file.write_text(json.dumps({"rewards": {"a": {"use": "jpeg_sise"}}}))
    with pytest.raises(ValueError, match="did you mean 'jpeg_size'"):
        create_app(load(file))
    file.write_text(json.dumps({"rewards": {"a": {"use": "jpeg_size", "incompresible": True}}}))
    with pytest.raises(ValueError, match="incompresible"):
        create_app(load(file))
    file.write_text(json.dumps({"rewards": {"a": {"use": "realism", "parts": {"b": {}}}}}))
    with pytest.raises(ValueError, match="made of 'b'"):
        create_app(load(file))
