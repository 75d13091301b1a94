"""Runs of the command line as processes of their own that start in an instant: forked from one that has loaded the libraries already.

    python -m tests.e2e.forks < requests > answers

A request is a line of JSON, {"arguments": [...], "log": PATH}; the answer the process's id at once, then, when it has ended, its status.
"""

import json
import os
import sys
import traceback


def child(arguments: list[str], log: str) -> None:
    """Never returns."""
    from trainer.__main__ import train

    status = 70
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
            child(request["arguments"], request["log"])
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
