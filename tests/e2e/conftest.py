"""vLLM's tests (xdist_group "vllm") run last, in one process; `make test` builds the environment that they need while others run."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from services.engines.options import ROOT, VllmOptions

PYTHON = VllmOptions().python
BUILD_S = 330.0  # a build of two minutes here; with the tests after it, `make test` stays below ten
_build: "list[Build]" = []


@dataclass
class Build:
    """`make vllm`'s program, at low priority. Each test process starts one: the first builds, the others wait for it."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]
    began: float

    @classmethod
    def start(cls) -> "Build":
        nice = [tool, "-n", "10"] if (tool := shutil.which("nice")) else []
        said = tempfile.TemporaryFile()  # noqa: SIM115
        command = [*nice, sys.executable, "-m", "services.engines.environment"]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        return cls(process, said, time.monotonic())

    def why_not(self) -> str | None:
        """Waits for the end, up to BUILD_S after the start; why there is no environment, or None."""
        try:
            code = self.process.wait(max(0.0, self.began + BUILD_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"vLLM's environment was not built within {BUILD_S:.0f} s; `make vllm` goes on with it"
        if code == 0:
            return None
        self.said.seek(0)
        last = (self.said.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return f"vLLM's environment could not be built: {last[:400]}"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(20)
        self.said.close()


def group_of(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0] if mark.args else mark.kwargs["name"]) if mark else item.nodeid


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM's last; with several processes large groups first, as xdist itself would do it."""
    sizes = Counter(map(group_of, items)) if "PYTEST_XDIST_WORKER" in os.environ else Counter[str]()
    items.sort(key=lambda item: (group_of(item) == "vllm", -sizes[group_of(item)]))


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("VERISM_VLLM") == "build" and any(group_of(item) == "vllm" for item in session.items):
        _build.append(Build.start())


def pytest_sessionfinish() -> None:
    while _build:
        _build.pop().end()


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter that has vLLM, once it is there; without one the test is skipped, and the summary says why."""
    why = _build[0].why_not() if _build else None
    if why is None and not PYTHON.is_file():
        why = f"no {PYTHON.relative_to(ROOT)}: `make vllm` builds it, and so does `make test`"
    if why is not None:
        pytest.skip(why)
    return PYTHON
