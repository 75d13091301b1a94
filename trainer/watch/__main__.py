"""`verism-watch RUN ...`: a live page of runs. `verism-train --watch` starts the same beside itself."""

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.watch.server import HERE_ONLY, PORT, Server, Watch, open_server

HELP = """\
  verism-watch runs/world                     a run, whether it goes on, has ended, or has not begun
  verism-watch runs/world runs/naive          side by side
  verism-watch runs                           every run in a folder, new ones too
  verism-watch runs --host 0.0.0.0            from a phone: other machines may look, with the token in the printed address
  VERISM_WATCH_TOKEN=... verism-watch runs    the same token every time, and one on this machine too
  ssh -L 8790:localhost:8790 gpu3             a run on another machine, without opening anything
"""
LINGER_S = 6.0  # after the trainer has ended, so that whoever watches sees the end


def main(argv: Sequence[str] | None = None) -> int:
    """Until Ctrl-C; exit status 0, or 2 when it cannot begin."""
    parser = argparse.ArgumentParser(
        "verism-watch", description="A live page of runs.", epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of runs")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, help=f"default: the first that is free from {PORT} on")
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)  # of a trainer, whose end closes standard input
    args = parser.parse_args(argv)
    if args.port is not None and not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port} is no port: 0 to 65535")
    token = os.environ.get("VERISM_WATCH_TOKEN") or (None if args.host in HERE_ONLY else secrets.token_urlsafe(18))
    if token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{12,200}", token):
        parser.error(
            "VERISM_WATCH_TOKEN wants 12 or more of A-Z a-z 0-9 - _, so that it fits into an address and cannot be guessed"
        )
    try:
        server = open_server(Watch(args.runs), args.host, args.port, token)
    except OSError as error:
        print(f"error: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"watching on {server.url}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if args.beside:
        _give_way(server)
    with suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=1.0 if args.beside else 0.5)
    server.server_close()
    return 0


@contextmanager
def beside(folder: Path) -> Iterator[str]:
    """The page of a run that trains inside, by a process of the lowest priority that ends soon after; says where it is.

    A page that cannot be served stops no training: then that is what is said.
    """
    command = [sys.executable, "-P", "-m", "trainer.watch", "--beside", "--", str(folder)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=_variables()
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().decode(errors="replace").strip() or "the page could not be served"
    finally:
        process.stdin.close()
        process.stdout.close()
        threading.Thread(target=process.wait, daemon=True).start()  # it lingers, this process need not


def _variables() -> dict[str, str]:
    """This repository's `trainer` first; -P keeps that of the working directory out."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _give_way(server: Server) -> None:
    """To the trainer: its processor, and its end."""
    os.nice(19 - os.nice(0))

    def until_it_ends() -> None:
        sys.stdin.buffer.read()
        time.sleep(LINGER_S)
        server.shutdown()

    threading.Thread(target=until_it_ends, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
