"""What /metrics shows; names begin with `verism_`."""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from services.reward import Item
from services.scheduler import TURNS, Lane, Ran
from shared.schema import Score

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Dropped(Collector):
    """Items that were dropped, as the lanes count them, read when somebody looks."""

    _labelnames = ("reward", "why")  # under the name that prometheus_client's own metrics have

    def __init__(self) -> None:
        self.lanes: list[Lane[Item, Score]] = []

    def collect(self) -> Iterator[CounterMetricFamily]:
        what = "items that were dropped: cancelled, expired; wasted ones had run"
        family = CounterMetricFamily("verism_dropped", what, labels=self._labelnames)
        for lane in self.lanes:
            for why in ("cancelled", "expired", "wasted"):
                family.add_metric([lane.name, why], lane.counts[why])
        yield family


class Metrics:
    """In a registry of its own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        p = "verism_"
        self.requests = Counter(p + "requests", "requests by route and status", ["route", "code"], registry=r)
        self.request_seconds = Histogram(p + "request_seconds", "whole requests", ["route"], buckets=SECONDS, registry=r)
        self.stage_seconds = Histogram(p + "stage_seconds", "stages of a request", ["stage"], buckets=SECONDS, registry=r)
        self.decode_seconds = Histogram(p + "decode_seconds", "decoding one picture", ["encoding"], buckets=SECONDS, registry=r)
        self.items = Counter(p + "items", "items by reward and outcome", ["reward", "outcome"], registry=r)
        self.dropped = Dropped()
        r.register(self.dropped)
        self.rejected = Counter(p + "rejected", "requests refused, by reason", ["reason"], registry=r)
        self.joined = Counter(p + "joined", "requests that joined one of the same id and body", registry=r)
        self.queue = Gauge(p + "queue_images", "pictures waiting", ["reward", "class"], registry=r)
        self.queue_seconds = Gauge(p + "queue_seconds_estimate", "seconds until what waits is answered", ["reward"], registry=r)
        self.busy = Gauge(
            p + "device_busy_ratio", "share of the time since the last look that the device ran", ["reward"], registry=r
        )
        self.inflight = Gauge(p + "inflight_images", "pictures admitted and not answered", registry=r)
        self.batch_images = Histogram(p + "batch_images", "pictures per forward pass", ["reward"], buckets=SIZES, registry=r)
        self.batch_seconds = Histogram(p + "batch_seconds", "forward passes", ["reward"], buckets=SECONDS, registry=r)
        self.batch_cap = Gauge(p + "batch_cap", "most pictures of a forward pass", ["reward"], registry=r)
        self.bytes_in = Counter(p + "bytes_in", "bytes of request bodies", registry=r)
        self.bisected = Counter(p + "bisect", "batches split to find a failing item", ["reward"], registry=r)
        self.oom = Counter(p + "oom", "batches that did not fit into memory", ["reward"], registry=r)
        self.version = Gauge(p + "weights_version", "version of the weights", ["reward"], registry=r)
        fit = p + "fit_"
        self.fit_running = Gauge(fit + "running", "1 while a refit runs", ["reward"], registry=r)
        self.fit_round = Gauge(fit + "round", "pass over the pictures that the last refit came to", ["reward"], registry=r)
        self.fit_steps = Counter(fit + "steps", "optimiser steps", ["reward"], registry=r)
        self.fit_loss = Gauge(fit + "loss", "of the last step, by part", ["reward", "part"], registry=r)
        self.fit_accuracy = Gauge(
            fit + "accuracy",
            "on pictures that a refit did not learn from, of the served version and its own",
            ["reward", "of"],
            registry=r,
        )
        self.fit_outcomes = Counter(fit + "outcomes", "refits by how they ended", ["reward", "outcome"], registry=r)
        self.fit_seconds = Histogram(
            fit + "seconds", "whole refits", ["reward"], buckets=(1, 3, 10, 30, 100, 300, 1000, 3000), registry=r
        )
        self.fit_replay = Gauge(fit + "replay_pairs", "past pairs that a refit learns from again", ["reward"], registry=r)
        self.fit_waiting = Gauge(fit + "waiting_pictures", "pictures that the next refit will see", ["reward", "side"], registry=r)
        self.score = Histogram(p + "score", "scores, for drift", ["reward"], buckets=[i / 20 for i in range(-20, 21)], registry=r)

    def watch(self, lane: Lane[Item, Score]) -> None:
        """Gauges that read the lane when somebody looks."""
        name = lane.name
        self.dropped.lanes.append(lane)
        for kind in dict.fromkeys(TURNS):
            self.queue.labels(name, kind).set_function(lambda kind=kind: max(0, lane.waiting[kind]))  # type: ignore[misc]
        self.queue_seconds.labels(name).set_function(lane.estimate)
        self.batch_cap.labels(name).set_function(lambda: lane.cap)
        self.busy.labels(name).set_function(_ratio(lane))

    def ran(self, name: str, batch: Ran) -> None:
        """After each batch of a lane."""
        self.batch_images.labels(name).observe(batch.size)
        self.batch_seconds.labels(name).observe(batch.seconds)
        self.bisected.labels(name).inc(batch.bisected)
        self.oom.labels(name).inc(batch.out_of_memory)

    def scored(self, name: str, scores: Sequence[Score]) -> None:
        """Every score that leaves."""
        outcomes: dict[str, int] = {}
        histogram = self.score.labels(name)
        for score in scores:
            outcome: str = "cached" if score.cached and score.status == "ok" else score.status
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if score.value is not None:
                histogram.observe(score.value)
        for outcome, count in outcomes.items():
            self.items.labels(name, outcome).inc(count)


def _ratio(lane: Lane[Item, Score]) -> Callable[[], float]:
    seen = [time.monotonic(), 0.0]

    def ratio() -> float:
        now, busy = time.monotonic(), lane.busy_s
        elapsed, ran = now - seen[0], busy - seen[1]
        seen[:] = now, busy
        return min(1.0, ran / elapsed) if elapsed > 0 else 0.0

    return ratio
