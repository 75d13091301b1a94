"""Runs of the command line as processes of their own that start in an instant: forked from one that has loaded the libraries already.

    python -m tests.forks < requests > answers

A request is a line of JSON, {"arguments": [...], "log": PATH, "environment": {...}}; the answer the process's id at once, then, when it has
ended, its status. One at a time.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Forks:
    """The other side: `start` a run, ask whether it has `ended`."""

    def __init__(self, root: Path) -> None:
        command, environment = [sys.executable, "-m", "tests.forks"], os.environ | ENVIRONMENT
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, cwd=root, env=environment, bufsize=0, **pipes)
        self._waiting, self._ready = b"", False

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def start(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
        """The process's id; what it says is added to `log`."""
        assert self._server.stdin is not None and self._server.stdout is not None
        if not self._ready:
            assert self._server.stdout.readline() == b"ready\n"
            os.set_blocking(self._server.stdout.fileno(), False)
            self._ready = True
        request = {"arguments": list(arguments), "log": str(log), "environment": dict(environment or {})}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        while (process := self.ended()) is None:
            time.sleep(0.001)
        return process

    def ended(self) -> int | None:
        """The exit status of what was started, minus the signal's number where it was killed; None while it runs."""
        assert self._server.stdout is not None
        with suppress(BlockingIOError):
            read = os.read(self._server.stdout.fileno(), 4096)
            assert read, "the process to fork from has ended"
            self._waiting += read
        if b"\n" not in self._waiting:
            return None
        text, _, self._waiting = self._waiting.partition(b"\n")
        return int(text)


def child(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Never returns."""
    from trainer.__main__ import train

    status = 70
    os.environ.update(environment)
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        status = train(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Load, say so, serve one request after the other."""
    import trainer.loop
    import trainer.policies.sd3  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            child(request["arguments"], request["log"], request["environment"])
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
