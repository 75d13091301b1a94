"""Services that benchmarks start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
# A benchmark that is interrupted, and looks at its service before it ends it.
PROGRAM = """
import json, os, pathlib, signal, sys
from bench import process
folder = pathlib.Path(sys.argv[1])
(folder / "serve.json").write_text(json.dumps({"rewards": {"jpeg_size": {"use": "jpeg_size"}}}))
try:
    with process.running(folder / "serve.json") as url:
        print(url, flush=True)
        signal.pause()
except KeyboardInterrupt:
    print("ended", flush=True)
"""


def test_ctrl_c_leaves_the_service_to_whoever_started_it(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole group; a trainer in it finishes its step, for which it needs the service."""
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        (service,) = psutil.Process(child.pid).children()
        assert os.getpgid(service.pid) != os.getpgid(child.pid)
        assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
        os.killpg(child.pid, signal.SIGINT)
        assert child.stdout.read().strip() == "ended"
    assert child.returncode == 0 and not psutil.pid_exists(service.pid)
