"""The services of a bench are this repository's, and end with it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from trainer.realbench.serving import started

pytestmark = pytest.mark.e2e
CONFIG = {"threads": 1, "rewards": {"jpeg_size": {"use": "jpeg_size"}}}


@pytest.mark.timeout(180)
def test_a_project_with_a_package_named_services_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "__init__.py").write_text("raise RuntimeError('another project')\n")
    monkeypatch.chdir(tmp_path)
    with started(CONFIG, tmp_path / "out") as url:
        assert "jpeg_size" in httpx.get(f"{url}/v1/rewards").text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/readyz")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_bench_that_is_ended_takes_its_services_along(tmp_path: Path, root: Path, number: signal.Signals) -> None:
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests were started to ignore it, by nohup perhaps, and what they start does so too")
    script = f"""
import pathlib, sys, time
from trainer.realbench.command import _guarded
from trainer.realbench.serving import started

def work():
    with started({CONFIG!r}, pathlib.Path({str(tmp_path)!r})) as url:
        print(url, flush=True)
        time.sleep(120)

sys.exit(_guarded(work))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert httpx.get(f"{url}/readyz").status_code == 200
        process.send_signal(number)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/readyz")
