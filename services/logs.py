"""Logs that machines read: one JSON object per line on standard error, whatever was logged and by whom.

>>> logs.configure()
>>> logs.note(request, request_id="r1", items=8)
>>> logs.request(log, request, reference="a1b2", route="/score", code=200, seconds=0.012)

Every value is JSON, so nothing that a caller sends can begin a line of its own. Pictures and prompts are never logged.
"""

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

from services import telemetry

LONGEST = 200
_KEY = "verism_log"


class JsonLines(logging.Formatter):
    """`ts`, `level`, `logger`, `message`, then the fields that were given; `exception` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = int(record.created)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int((record.created - seconds) * 1000):03d}Z"
        line: dict[str, Any] = {"ts": stamp, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line.update(getattr(record, "fields", None) or {})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


def configure(level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """JSON lines for the whole process, in place of what was configured before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def note(request: Any, **fields: Any) -> None:
    """Remember fields (request_id, items, rewards) for the line that `request` writes at the end of this Starlette request."""
    known: dict[str, Any] = request.scope.setdefault("state", {}).setdefault(_KEY, {})
    known.update(fields)


def request(log: logging.Logger, request: Any, *, reference: str, route: str, code: int, seconds: float) -> None:
    """The one line of a request."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "reference": reference,
        "method": request.method,
        "route": route,
        "path": request.scope["path"][:LONGEST],
        "code": code,
        "ms": round(seconds * 1000, 2),
        **request.scope.get("state", {}).get(_KEY, {}),
    }
    if trace := telemetry.trace_id():
        fields["trace_id"] = trace
    log.info("%s %s %d reference %s", request.method, route, code, reference, extra={"fields": fields})
