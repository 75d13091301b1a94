"""vLLM's environment where it cannot be built: said with the reason, and by two that build at once only once."""

import collections
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.engines import environment

USAGE = collections.namedtuple("USAGE", "total used free")


def test_of_two_at_once_the_second_reports_what_the_first_did(tmp_path: Path, free_port: int, root: Path) -> None:
    nowhere = {
        "PIP_INDEX_URL": f"http://127.0.0.1:{free_port}",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    command = [sys.executable, "-m", "services.engines.environment", str(tmp_path / "env")]
    both = [
        subprocess.Popen(command, cwd=root, env={**kept, **nowhere}, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [1, 1]
    assert sum("making " in one for one in said) == 1, "built once"
    last = {one.strip().splitlines()[-1] for one in said}
    assert (
        len(last) == 1 and "env could not be made" in (line := last.pop()) and "No matching distribution" in line and "PIP_" in line
    )


def test_a_disk_that_is_too_full_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**11, 10**11 - 10**9, 10**9))
    monkeypatch.setattr(sys, "argv", ["environment", str(tmp_path / "env")])
    assert environment.main() == 1
    assert "1.0 GB free on the disk" in capsys.readouterr().err and not (tmp_path / "env" / "bin").exists()
