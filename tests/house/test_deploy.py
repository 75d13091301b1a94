"""The files under deploy/ parse, and ask only for metrics that a service has, by labels that it has."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from services.metrics import Metrics

# What the contract of the services promises, with the labels that the dashboard groups by.
CONTRACT: dict[str, set[str]] = {
    "requests_total": {"route", "code"},
    "request_seconds": {"route"},
    "stage_seconds": {"stage"},
    "items_total": {"reward", "outcome"},
    "queue_images": {"reward", "class"},
    "queue_seconds_estimate": {"reward"},
    "batch_images": {"reward"},
    "batch_seconds": {"reward"},
    "device_busy_ratio": {"reward"},
    "decode_seconds": {"encoding"},
    "bytes_in_total": set(),
    "rejected_total": {"reason"},
    "oom_total": {"reward"},
    "bisect_total": {"reward"},
    "weights_version": {"reward"},
    "score": {"reward"},
    "inflight_images": set(),
}
SCRAPED = {"job", "instance"}
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h"}


def exported() -> dict[str, set[str]]:
    """Every metric of a service by its name, without the suffixes of a histogram, and its labels."""
    found = {}
    for collector in set(Metrics().registry._collector_to_names):
        (family,) = collector.describe() if hasattr(collector, "describe") else collector.collect()
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = set(getattr(collector, "_labelnames", ()))
    return found


@pytest.fixture(scope="module")
def dashboard(root: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((root / "deploy" / "grafana-dashboard.json").read_text())
    return read


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel and annotation, with Grafana's variables filled in."""
    asked = [(p["title"], t["expr"]) for p in dashboard["panels"] for t in p.get("targets", [])]
    asked += [(a["name"], a["expr"]) for a in dashboard["annotations"]["list"]]
    for where, text in asked:
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        for variable in dashboard["templating"]["list"]:
            text = text.replace(f"${variable['name']}", ".*")
        yield where, text


def selectors(expression: Any) -> Iterator[tuple[str, set[str], set[str]]]:
    """(metric, labels matched, labels grouped by around it) of each selector."""

    def walk(node: Any, grouped: set[str]) -> Iterator[tuple[str, set[str], set[str]]]:
        if isinstance(node, promql_parser.VectorSelector):
            yield str(node.name), {matcher.name for matcher in node.matchers.matchers}, grouped
        elif isinstance(node, promql_parser.MatrixSelector):
            yield from walk(node.vector_selector, grouped)
        elif isinstance(node, promql_parser.AggregateExpr):
            labels = set(node.modifier.labels) if node.modifier is not None else set()
            yield from walk(node.expr, grouped | labels)
        elif isinstance(node, promql_parser.Call):
            for argument in node.args:
                yield from walk(argument, grouped)
        elif isinstance(node, promql_parser.BinaryExpr):
            yield from walk(node.lhs, grouped)
            yield from walk(node.rhs, grouped)
        elif isinstance(node, (promql_parser.ParenExpr, promql_parser.UnaryExpr)):
            yield from walk(node.expr, grouped)
        else:
            assert isinstance(node, (promql_parser.NumberLiteral, promql_parser.StringLiteral)), type(node)

    yield from walk(expression, set())


def wrong(expression: str, known: dict[str, set[str]]) -> list[str]:
    """What an expression asks for that no service has, a line each; ValueError when it is no PromQL."""
    found = []
    for metric, matched, grouped in selectors(promql_parser.parse(expression)):
        name = re.sub(r"_(bucket|sum|count)$", "", metric)
        if name not in known:
            found.append(f"unknown metric {metric}")
            continue
        allowed = known[name] | SCRAPED | ({"le"} if metric.endswith("_bucket") else set())
        found += [f"{metric} has no label {label}" for label in sorted((matched | grouped) - allowed)]
    return found


def test_every_panel_asks_for_what_there_is(dashboard: dict[str, Any]) -> None:
    asked = list(expressions(dashboard))
    found = [f"{where}: {line}" for where, text in asked for line in wrong(text, exported())]
    assert len(asked) > 20 and not found, "\n".join(found)


def test_every_metric_of_the_contract_has_a_panel(dashboard: dict[str, Any]) -> None:
    text = " ".join(expression for _, expression in expressions(dashboard))
    missing = [name for name in CONTRACT if not re.search(rf"\bverism_{name}(_bucket|_sum|_count)?\b", text)]
    assert not missing


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("rate(verism_request_total[5m])", "unknown metric verism_request_total"),
        ("sum by (rewards) (verism_weights_version)", "verism_weights_version has no label rewards"),
        ('verism_bytes_in_total{reward="a"}', "verism_bytes_in_total has no label reward"),
        ("histogram_quantile(0.5, sum by (le) (rate(verism_score_sum[5m])))", "verism_score_sum has no label le"),
    ],
)
def test_a_wrong_question_is_noticed(expression: str, said: str) -> None:
    assert wrong(expression, exported()) == [said]


def test_what_is_no_promql_is_noticed() -> None:
    with pytest.raises(ValueError):
        wrong("sum by (reward) (rate(verism_score_sum[5m])", exported())


def test_a_service_exports_what_the_contract_promises() -> None:
    has = exported()
    assert {f"verism_{name}": labels for name, labels in CONTRACT.items()}.items() <= has.items()
    assert all(name.startswith("verism_") for name in has)


def test_panels_do_not_overlap_and_have_a_datasource(dashboard: dict[str, Any]) -> None:
    assert {v["name"] for v in dashboard["templating"]["list"]} >= {"datasource", "job", "instance", "reward"}
    cells: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        box = panel["gridPos"]
        for x in range(box["x"], box["x"] + box["w"]):
            for y in range(box["y"], box["y"] + box["h"]):
                assert 0 <= x < 24 and (x, y) not in cells, f"{panel['title']} lies on {cells.get((x, y))}"
                cells[x, y] = panel["title"]
        for target in panel.get("targets", []):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_prometheus_scrapes_the_ports_of_the_examples(root: Path) -> None:
    file = root / "deploy" / "prometheus.yml"
    (job,) = yaml.safe_load(file.read_text())["scrape_configs"]
    targets = {target for group in job["static_configs"] for target in group["targets"]}
    ports = {yaml.safe_load(p.read_text())["port"] for p in (root / "examples" / "serve").glob("*.yaml")}
    assert targets <= {f"localhost:{port}" for port in ports} and len(targets) == len({8000, 8001, 8002} & ports)
    assert job["metrics_path"] == "/metrics"
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "config", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
