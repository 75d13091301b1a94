"""Real processes, real HTTP: what a person with curl sees."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from bench.process import free_port, running, start, wait
from shared.client import RewardClientSync
from world import photographs

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("serve") / "c.yaml"
    rewards = {
        "realism": {"use": "realism", "parts": {"detector": {"weight": 1}}},
        "detector": {"use": "detector", "folder": "world/detector"},
        "alignment": {"use": "alignment", "folder": "world/alignment"},
    }
    config.write_text(json.dumps({"rewards": rewards, "default": ["realism"]}))
    with running(config) as served:
        yield served


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_three_ways_to_ask_give_one_score(url: str, tmp_path: Path) -> None:
    pixels = photographs.load("test")[0][7]
    (tmp_path / "photo.png").write_bytes(png(pixels))
    rewards = "detector"
    if shutil.which("curl"):
        command = ["curl", "-sS", "-F", f"image=@{tmp_path / 'photo.png'}", "-F", f"rewards={rewards}", f"{url}/score"]
        form = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    else:
        form = httpx.post(f"{url}/score", files={"image": ("photo.png", png(pixels))}, data={"rewards": rewards}).json()
    image = {"encoding": "png", "height": 28, "width": 28, "data": base64.b64encode(png(pixels)).decode()}
    plain = httpx.post(f"{url}/score", json={"rewards": [rewards], "items": [{"image": image}]}).json()
    with RewardClientSync({"detector": url}) as client:
        table = client.score([pixels])
    from_form = form["items"][0]["scores"]["detector"]["value"]
    assert from_form > 0.5
    assert plain["items"][0]["scores"]["detector"]["value"] == pytest.approx(from_form, abs=1e-6)
    assert table.values_RB[0, 0] == pytest.approx(from_form, abs=1e-6)


def test_realism_comes_first_and_knows_its_domain(url: str) -> None:
    answer = httpx.post(f"{url}/score", files={"image": png(photographs.load("test")[0][0])}).json()
    score = answer["items"][0]["scores"]["realism"]
    assert score["status"] == "ok" and score["in_domain"] is True and score["parts"]["detector"] == score["value"]
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    assert httpx.post(f"{url}/score", files={"image": png(noise)}).json()["items"][0]["scores"]["realism"]["in_domain"] is False


def test_eight_pictures_one_of_them_corrupt(url: str) -> None:
    pixels = photographs.load("test")[0][:8]
    files = [("image", (f"{i}.png", png(p))) for i, p in enumerate(pixels)]
    files[5] = ("image", ("5.png", png(pixels[5])[:60]))
    items = httpx.post(f"{url}/score", files=files).json()["items"]
    statuses = [item["scores"]["realism"]["status"] for item in items]
    assert statuses == ["ok"] * 5 + ["error"] + ["ok"] * 2


def test_the_client_masks_what_failed(url: str) -> None:
    pixels = list(photographs.load("test")[0][:3])
    with RewardClientSync({"detector": url, "alignment": url}) as client:
        assert client.info()["alignment"].needs == ["prompt"]
        table = client.score(pixels, prompts=["a photo of a bag", None, "a photo of a dress"])
    assert table.mask_RB.tolist() == [[True] * 3, [True, False, True]]
    assert np.isnan(table.values_RB[1, 1]) and table.failures == {"urn:verism:prompt-missing": 1}
    assert np.isfinite(table.part("detector", "logit")).all()
    with pytest.raises(KeyError, match="known: domain_distance, logit"):
        table.part("detector", "logits")


def test_sigterm_finishes_and_exits_cleanly() -> None:
    port = free_port()
    process = start("examples/serve/minimal.yaml", port)
    wait(f"http://127.0.0.1:{port}", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)


def test_a_taken_port_and_a_misspelt_key_are_said(url: str, tmp_path: Path) -> None:
    taken = start("examples/serve/minimal.yaml", int(url.rsplit(":", 1)[1]))
    _, error = taken.communicate(timeout=60)
    assert taken.returncode == 2 and b"cannot listen" in error and b"Traceback" not in error
    bad = tmp_path / "bad.yaml"
    bad.write_text("rewrads: {}\n")
    process = start(str(bad), free_port())
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and b"rewards" in error and b"Traceback" not in error


def test_verism_score_with_and_without_a_server(url: str, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(photographs.load("test")[0][0]))
    (tmp_path / "text.png").write_bytes(b"hello")
    command = [sys.executable, "-c", "import sys; from services.__main__ import score; sys.exit(score())"]
    files = [str(tmp_path / "photo.png"), str(tmp_path / "text.png"), "--json"]
    local = subprocess.run([*command, *files], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120, check=False)
    remote = subprocess.run(
        [*command, *files, "--url", url], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120, check=False
    )
    assert local.returncode == remote.returncode == 1  # one of the two is no picture
    a, b = json.loads(local.stdout), json.loads(remote.stdout)
    assert list(a["failed"]) == [str(tmp_path / "text.png")]
    assert a["items"][0]["scores"]["realism"]["value"] == pytest.approx(b["items"][0]["scores"]["realism"]["value"], abs=1e-6)
    down = subprocess.run(
        [*command, files[0], "--url", f"http://127.0.0.1:{free_port()}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert down.returncode == 2 and b"no service answers" in down.stderr


def test_verism_score_sends_its_key(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png(photographs.load("test")[0][0]))
    config, key = tmp_path / "c.yaml", "the key of somebody"
    keys = {"somebody": {"env": "KEY_OF_SOMEBODY"}, "grafana": {"env": "KEY_OF_GRAFANA", "scopes": ["read"]}}
    config.write_text(json.dumps({"rewards": {"jpeg_size": {"use": "jpeg_size"}}, "keys": keys}))
    command = [sys.executable, "-c", "import sys; from services.__main__ import score; sys.exit(score())"]
    command += [str(tmp_path / "photo.png"), "--json", "--url"]

    def run(url: str, *more: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
        environment = {k: v for k, v in ENVIRONMENT.items() if k != "VERISM_API_KEY"} | variables
        return subprocess.run([*command, url, *more], cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)

    with running(config, variables={"KEY_OF_SOMEBODY": key, "KEY_OF_GRAFANA": "the key of grafana"}) as url:
        for done in (run(url), run(url, "--api-key", "a wrong one"), run(url, VERISM_API_KEY="the key of grafana")):
            said = b" ".join(done.stderr.split())
            assert done.returncode == 2 and b"--api-key" in said and b"VERISM_API_KEY" in said and b"Traceback" not in said
        for done in (run(url, "--api-key", key), run(url, VERISM_API_KEY=key)):
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["items"][0]["scores"]["jpeg_size"]["status"] == "ok"
