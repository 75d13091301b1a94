"""The container images install what the Makefile installs, and the compose file's processes come up healthy.

The real build takes minutes and gigabytes: `VERISM_IMAGES=1 pytest -m images`, or `make images`.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

BIN = Path(sys.executable).parent
DOCKERFILES = {"Dockerfile.reward": "services", "Dockerfile.trainer": "trainer"}
REWARDS = ("detector", "alignment", "judge", "rewards")


def compose(root: Path) -> dict[str, Any]:
    document = yaml.safe_load((root / "docker-compose.yml").read_text())
    assert isinstance(document, dict)
    return document


def tool(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / name, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str, root: Path) -> None:
    done = tool("hadolint", name, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_fits_the_published_schema(root: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml", cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_check_can_fail(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text("services: {a: {image: x, comand: [y]}}")
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "c.yml", cwd=tmp_path)
    assert done.returncode != 0


@pytest.mark.parametrize(("name", "extra"), DOCKERFILES.items())
def test_images_and_makefile_share_the_set_up(name: str, extra: str, root: Path) -> None:
    """The same script with the same constraints; nothing else in a Dockerfile installs anything."""
    text = (root / name).read_text()
    called = re.findall(r"scripts/setup\.sh ((?:[a-z]+ ?)+)", re.sub(r"(?m)^COPY .*$", "", text))
    assert [c.split() for c in called] == [[extra]]
    assert not re.search(r"\b(pip3?|uv|apt-get|conda) install\b", text)
    assert "constraints.txt" in text
    made = re.findall(r"scripts/setup\.sh ((?:[a-z]+ ?)+)", (root / "Makefile").read_text())
    assert made and all(extra in m.split() for m in made)
    torch = re.search(r'VERISM_TORCH="([^"]+)"', text)
    assert torch and f"VERISM_TORCH:-{torch[1]}}}" in (root / "scripts/setup.sh").read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_is_there_and_let_through(name: str, root: Path) -> None:
    allowed = {line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in (root / name).read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (root / source).exists(), source
                assert source.split("/")[0] in allowed, source


def test_no_image_runs_as_root_and_no_build_secret_stays(root: Path) -> None:
    for name in DOCKERFILES:
        text = (root / name).read_text()
        users = re.findall(r"^USER (\d+)", text, re.M)
        assert users and int(users[-1]) > 0
        assert "--mount=type=secret" in text
        assert not re.search(r"find-links|index-url|https?://", text)


def test_profiles_gpus_and_ports(root: Path) -> None:
    services = compose(root)["services"]
    for name, service in services.items():
        gpu = service["profiles"] == ["gpu"]
        assert gpu == name.endswith("-gpu") == ("deploy" in service), name
        assert service["read_only"] is True
        if service["image"] == "verism-reward":
            config = yaml.safe_load((root / service["command"][1]).read_text())
            host_port, inner_port = service["ports"][0].rsplit(":", 2)[1:]
            assert host_port == inner_port == str(config.get("port", 8000)), name
            assert f":{inner_port}/readyz" in service["healthcheck"]["test"][-1]
    for name in (*REWARDS, "trainer"):
        assert services[name]["command"] == services[f"{name}-gpu"]["command"]
    urls = dict(word.split(".url=http://") for word in services["trainer"]["command"] if ".url=" in word)
    assert urls == {"rewards.detector": "detector:8001", "rewards.alignment": "alignment:8002", "rewards.judge": "judge:8004"}


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def running(root: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.mark.e2e
@pytest.mark.timeout(240)
@pytest.mark.xdist_group("compose-ports")
@pytest.mark.parametrize("name", REWARDS)
def test_each_process_of_the_compose_file_becomes_healthy(
    name: str, root: Path, running: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The commands, ports and health checks as written, in this environment instead of an image."""
    service = compose(root)["services"][name]
    port = int(service["ports"][0].rsplit(":", 1)[1])
    if taken(port):
        pytest.skip(f"port {port} is in use by something else on this machine")
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    kind, *check = service["healthcheck"]["test"]
    assert kind == "CMD"

    def healthy() -> bool:
        done = subprocess.run(check, env=environment, capture_output=True, timeout=20, check=False)
        return done.returncode == 0

    assert not healthy(), "the health check passes with nothing running"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(service["command"], cwd=root, env=environment, stdout=output, stderr=output)
    running.append(process)
    deadline = time.monotonic() + 180
    while subprocess.run(check, env=environment, capture_output=True, timeout=20, check=False).returncode != 0:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/v1/rewards")
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    assert answer.status == 200
    expected = ("detector", "alignment") if name == "rewards" else (name,)
    assert all(f'"{reward}"' in body for reward in expected), body


@pytest.mark.images
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("VERISM_IMAGES") != "1", reason="builds images for minutes: set VERISM_IMAGES=1")
def test_both_images_build_and_run(root: Path) -> None:
    if not (shutil.which("docker") or (shutil.which("buildah") and shutil.which("debootstrap"))):
        pytest.skip("needs Docker, or buildah and debootstrap")
    done = subprocess.run(["scripts/images.sh"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "both images built" in done.stderr or "verism-trainer:" in done.stderr
