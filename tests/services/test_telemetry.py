"""Spans that continue the caller's trace, nothing where nobody asked for them, and log lines that a machine reads."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once
from starlette.testclient import TestClient

from bench.process import start, wait
from services import logs, telemetry
from services.app import create_app
from services.config import ServiceConfig
from shared.client import RewardClientSync
from shared.image import encode

ROOT = Path(__file__).resolve().parents[2]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PICTURE = encode(np.full((32, 32, 3), 90, np.uint8), "png").data
CONFIG = {"device": "cpu", "rewards": {"jpeg_size": {"use": "jpeg_size"}}}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not configured anything."""
    for name in (*telemetry.ENDPOINTS, "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(telemetry, "_tracer", None)
    monkeypatch.setattr(telemetry, "_provider", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())


@pytest.fixture
def spans(fresh: None) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    assert telemetry.configure(exporter)
    yield exporter
    assert telemetry._provider is not None
    telemetry._provider.shutdown()


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the process logs, as logs.configure writes it."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    logs.configure(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


def score(client: TestClient, **headers: str) -> httpx.Response:
    return client.post("/score", files={"image": ("a.png", PICTURE)}, data={"prompt": "a secret"}, headers=headers)


def test_off_unless_an_endpoint_is_set(fresh: None) -> None:
    assert not telemetry.configure()
    assert telemetry.span("a", items=1) is telemetry.span("b")
    telemetry.record("queue", 0.0, 1.0)
    assert telemetry.trace_id() is None
    telemetry.flush()


def test_off_imports_no_sdk() -> None:
    code = (
        "import sys, services.app as a; from services.config import ServiceConfig;"
        f"a.create_app(ServiceConfig.model_validate({CONFIG!r}));"
        "print([m for m in sys.modules if m.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    quiet = {k: v for k, v in os.environ.items() if not k.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=quiet, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_spans_continue_the_callers_trace(spans: InMemorySpanExporter) -> None:
    with TestClient(create_app(ServiceConfig.model_validate(CONFIG))) as client:
        assert score(client, traceparent=f"00-{TRACE}-{PARENT}-01").status_code == 200
    found = by_name(spans)
    server, decode = found["POST /score"], found["decode"]
    assert server.parent is not None and f"{server.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for span in found.values()} == {TRACE}
    assert server.attributes is not None and server.attributes["http.response.status_code"] == 200
    queue, forward = found["queue"], found["forward"]
    assert decode.attributes == {"items": 1}
    assert queue.attributes == {"reward": "jpeg_size"} and forward.attributes == {"reward": "jpeg_size", "items": 1}
    times = [
        server.start_time,
        decode.start_time,
        decode.end_time,
        queue.start_time,
        queue.end_time,
        forward.end_time,
        server.end_time,
    ]
    assert None not in times and times == pytest.approx(sorted(filter(None, times)), abs=1e6)
    assert queue.end_time == pytest.approx(forward.start_time, abs=1e6)
    assert not any("secret" in str(span.attributes) for span in found.values())


def test_a_trace_goes_from_the_client_through_the_service(spans: InMemorySpanExporter) -> None:
    transport = httpx.ASGITransport(create_app(ServiceConfig.model_validate(CONFIG)))
    with RewardClientSync({"jpeg_size": "http://service"}, transport=transport) as client:
        with telemetry.span("a step of training") as step:
            future = client.submit([np.full((32, 32, 3), 90, np.uint8)] * 2)
        assert future.result(30).mask_RB.all()
    found = by_name(spans)
    assert found["POST /score"].parent is not None and found["POST /score"].parent.span_id == step.get_span_context().span_id
    assert {"decode", "queue", "forward"} <= set(found)
    assert {span.context.trace_id for span in found.values() if span.context} == {step.get_span_context().trace_id}


def test_a_caller_that_says_not_to_sample_is_heard(spans: InMemorySpanExporter) -> None:
    with TestClient(create_app(ServiceConfig.model_validate(CONFIG))) as client:
        assert score(client, traceparent=f"00-{TRACE}-{PARENT}-00").status_code == 200
        assert score(client, traceparent="00-zz-;DROP-01").status_code == 200
    ids = {f"{span.context.trace_id:032x}" for span in spans.get_finished_spans() if span.context}
    assert len(ids) == 1 and TRACE not in ids


def test_probes_leave_no_trace(spans: InMemorySpanExporter) -> None:
    with TestClient(create_app(ServiceConfig.model_validate(CONFIG))) as client:
        for path in telemetry.QUIET:
            assert client.get(path).status_code == 200
        assert client.get("/v1/rewards").status_code == 200
    assert {span.name.split()[0] + " " + span.name.split()[-1] for span in spans.get_finished_spans()} >= {"GET /v1/rewards"}
    assert not any(path in span.name for span in spans.get_finished_spans() for path in telemetry.QUIET)
    assert len({span.context.trace_id for span in spans.get_finished_spans() if span.context}) == 1


def test_a_span_told_afterwards(spans: InMemorySpanExporter) -> None:
    asked = time.monotonic()
    with telemetry.span("server") as server:
        telemetry.record("queue", asked - 2.0, asked - 0.5, reward="detector", batch=3)
    queue = by_name(spans)["queue"]
    assert queue.parent is not None and queue.parent.span_id == server.get_span_context().span_id
    assert queue.attributes == {"reward": "detector", "batch": 3}
    assert queue.end_time is not None and queue.start_time is not None
    assert queue.end_time - queue.start_time == pytest.approx(1.5e9, abs=1e3)
    assert abs(queue.end_time - (time.time_ns() - 0.5e9)) < 5e9


def test_missing_packages_are_named(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(telemetry.ENDPOINTS[0], "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'verism\[otel\]'"):
        create_app(ServiceConfig.model_validate(CONFIG))


class Collector(HTTPServer):
    """Keeps what is posted to it."""

    received: list[tuple[str, bytes]]


class Take(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.received.append((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_collector_gets_them_before_the_service_leaves(free_port: int) -> None:
    collector = Collector(("127.0.0.1", 0), Take)
    collector.received = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "600000",  # nothing leaves by itself within the test
    }
    url = f"http://127.0.0.1:{free_port}"
    with start("examples/serve/minimal.yaml", free_port, subprocess.DEVNULL, variables) as process:
        try:
            wait(url, process, 150)
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            answer = httpx.post(f"{url}/score", files={"image": PICTURE}, headers=headers, timeout=30, trust_env=False)
            assert answer.status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    collector.shutdown()
    collector.server_close()
    assert {path for path, _ in collector.received} == {"/v1/traces"}
    said = [ExportTraceServiceRequest.FromString(body).resource_spans for _, body in collector.received]
    resources = [resource for group in said for resource in group]
    named = {a.value.string_value for r in resources for a in r.resource.attributes if a.key == "service.name"}
    found = {span.name: span for r in resources for scope in r.scope_spans for span in scope.spans}
    assert named == {"verism-reward"}
    assert {"POST /score", "decode", "queue", "forward"} <= set(found)
    assert found["POST /score"].parent_span_id.hex() == PARENT and found["decode"].trace_id.hex() == TRACE


def test_one_json_line_for_each_request(lines: io.StringIO, spans: InMemorySpanExporter) -> None:
    with TestClient(create_app(ServiceConfig.model_validate(CONFIG))) as client:
        scored = client.post(
            "/score", files={"image": ("a.png", PICTURE)}, data={"request_id": 'r1"\n{"code": 200}', "prompt": "a secret"}
        )
        client.get("/no%0Asuch%0A{}")
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert all(set(line) >= {"ts", "level", "logger", "message"} for line in said)
    first, second = (line for line in said if "reference" in line)
    assert (first["route"], first["method"], first["code"], first["items"]) == ("/score", "POST", 200, 1)
    assert first["request_id"] == 'r1"\n{"code": 200}' and first["rewards"] == ["jpeg_size"] and first["ms"] > 0
    assert first["reference"] == scored.headers["x-request-reference"]
    server = by_name(spans)["POST /score"]
    assert server.context is not None and first["trace_id"] == f"{server.context.trace_id:032x}"
    assert (second["route"], second["code"]) == ("other", 404) and second["path"] == "/no\nsuch\n{}"
    assert "secret" not in lines.getvalue()


def test_an_exception_stays_on_its_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("elsewhere").exception("request %s failed", "a1")
    (line,) = [json.loads(text) for text in lines.getvalue().splitlines()]
    assert line["message"] == "request a1 failed" and line["level"] == "error" and line["ts"].endswith("Z")
    assert "two\nlines" in line["exception"] and "Traceback" in line["exception"]
