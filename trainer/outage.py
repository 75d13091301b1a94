"""Services that are away for a while: what they did not answer is asked again, all of a request, until they are back or it is too late.

All pictures of a request are asked again and not only those that were missed, so that one version of a service's weights judges them.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

AWAY = ("urn:verism:unreachable", "urn:verism:deadline-exceeded")
PAUSE_S = 1.0  # between two questions to a service that is away


class Patient:
    """A reward client (synchronous) that waits for its services: up to `outage_s` after a request was made. `waiting` hears that it does."""

    def __init__(self, client: Any, outage_s: float) -> None:
        self.client, self.outage_s = client, outage_s
        self.waiting: Callable[[str], None] = lambda text: None

    def submit(self, *request: Any) -> "Waited":
        """(pictures, prompts, groups, and rewards if not all), as the client's; returns at once, and the answer's `result` waits."""
        return Waited(self, request, self.client.submit(*request), time.monotonic() + self.outage_s)

    def compare(self, *request: Any, **options: Any) -> Any:
        """As the client's, until no pair is missing because the service was away."""
        until = time.monotonic() + self.outage_s
        table, told = self.client.compare(*request, **options), False
        while any(kind in AWAY for kind in table.failures) and (left := until - time.monotonic()) > 0:
            told = told or self.tell([table.reward], table.failures, left)
            time.sleep(min(PAUSE_S, left))
            table = self.client.compare(*request, **options)
        return table

    def tell(self, names: list[str], failures: dict[str, int], left: float) -> bool:
        """Once for each wait."""
        self.waiting(f"no answer from {', '.join(names)} ({', '.join(failures)}); the step waits for up to {left:.0f} s more")
        return True

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


class Waited:
    """The answer to a request, when it is there."""

    def __init__(self, patient: Patient, request: tuple[Any, ...], future: "Future[Any]", until: float) -> None:
        self._patient, self._request, self._future, self._until = patient, request, future, until
        self._table: Any = None

    def done(self) -> bool:
        """Whether the first answer is there; services that are away are waited for in `result`."""
        return self._future.done()

    def result(self) -> Any:
        """The client's table, with the rewards whose services were away asked again."""
        if self._table is not None:
            return self._table
        table, told = self._future.result(), False
        while (names := gone(table)) and (left := self._until - time.monotonic()) > 0:
            told = told or self._patient.tell(names, table.failures, left)
            time.sleep(min(PAUSE_S, left))
            table = merged(table, self._patient.client.submit(*self._request[:3], names).result())
        self._table = table
        return table


def gone(table: Any) -> list[str]:
    """The rewards that lack a score of some picture because their service was away, or of all, each of which may have one later."""
    return [
        name
        for name, row in zip(table.rewards, table.scores, strict=True)
        if any(score.error is not None and score.error.type in AWAY for score in row)
        or (row and all(score.error is not None and score.error.retryable for score in row))
    ]


def merged(table: Any, more: Any) -> Any:
    """`table` with the rows of the rewards in `more` in place of its own."""
    rows = dict(zip(more.rewards, more.scores, strict=True))
    scores = tuple(rows.get(name, row) for name, row in zip(table.rewards, table.scores, strict=True))
    values = np.array([[np.nan if score.value is None else score.value for score in row] for row in scores], dtype=np.float64)
    kinds = [score.error.type for row in scores for score in row if score.error is not None]
    return replace(
        table,
        values_RB=values.reshape(table.values_RB.shape),
        mask_RB=np.isfinite(values).reshape(table.values_RB.shape),
        scores=scores,
        versions={name: version for name, version in table.versions.items() if name not in rows} | more.versions,
        failures={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
    )
