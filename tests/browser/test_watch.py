"""A browser watches runs: one that really trains, invented ones that grow, and folders that mean harm. Desktop and phone."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.browser.chromium import needs_chromium
from tests.trainer.run.service import recipe, serve
from tests.trainer.watch.runs import a_grid, a_run, append, evaluation, step
from trainer.watch import server as server_module
from trainer.watch.record import Record
from trainer.watch.server import Server, Watch

ROOT = Path(__file__).resolve().parents[2]
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>\u202e"
COLOURS = {"first run": (0x00, 0x72, 0xB2), "second run": (0xD5, 0x5E, 0x00), "grid": (200, 30, 160)}
NAMELESS = """[...document.querySelectorAll('input,button,a,summary')].filter((e) => !(e.textContent || e.labels?.[0]?.textContent
  || e.getAttribute('aria-label') || e.querySelector('img')?.alt)).length"""
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("watch"),
    pytest.mark.timeout(1200),
    needs_chromium,
]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """open_page(url, **context): the page; at the end its console must be empty and nothing asked of another place."""
    opened: list[tuple[Page, list[str]]] = []

    def open_one(url: str, **context: Any) -> Page:
        page, noise = browser.new_context(**context).new_page(), list[str]()
        page.set_default_timeout(400_000)
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("console", lambda message: noise.append(message.text))
        page.on("request", lambda r: None if r.url.startswith((url, "data:")) else noise.append(f"asked {r.url}"))
        page.goto(url)
        opened.append((page, noise))
        return page

    yield open_one
    for page, noise in opened:
        page.context.close()
        # that a server has gone is told by the browser itself
        assert [text for text in noise if not text.startswith("Failed to load resource: net::ERR_")] == []


@pytest.fixture
def watching() -> Iterator[Any]:
    """watching(*paths): the address of a page."""
    servers: list[tuple[Server, threading.Thread]] = []

    def start(*paths: Path) -> str:
        server = Server(Watch(paths))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return server.url

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def overflow(page: Page) -> int:
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


def near(page: Page, path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of about a colour in a picture of the whole page."""
    page.screenshot(path=path, full_page=True)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(pixels - np.array(colour)).max(axis=2) < 12).sum())


def wait(page: Page, script: str) -> None:
    deadline = time.monotonic() + 400  # wait_for_function would evaluate a text inside the page, which its policy forbids
    while not page.evaluate(script):
        assert time.monotonic() < deadline, f"{script}\n{page.inner_text('body')[:2000]}"
        time.sleep(0.1)


def test_a_run_in_progress(open_page: Any, tmp_path: Path) -> None:
    """`verism-train --watch` with a real trainer: the page moves on by itself, tells what goes wrong, and stays when the run is over."""
    folder, length = tmp_path / "run", 14
    with serve() as service:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(service.url, steps=length, tensorboard=False)))
        command = [sys.executable, "-m", "trainer", str(tmp_path / "recipe.yaml"), "--run-dir", str(folder), "--watch"]
        with (tmp_path / "said").open("w") as said:
            trainer = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while "watching on" not in (text := (tmp_path / "said").read_text()):
            assert trainer.poll() is None, text
            time.sleep(0.1)
        url = text.split("watching on ")[1].split()[0]
        page = open_page(url)
        page.wait_for_selector("text=waiting for its first line")
        phone = open_page(url, **PHONE)
        wait(page, "document.querySelectorAll('#evals svg .point').length && document.querySelectorAll('#train svg').length")
        first = int(page.locator(".run progress").get_attribute("value") or 0)
        assert 0 < first < length and f"of {length}" in page.inner_text(".run .state")
        wait(page, f"Number(document.querySelector('.run progress').value) > {first}")
        service.fault = "some"
        wait(page, "document.querySelector('#warnings').textContent.includes('urn:verism:broken')")
        service.fault = ""
        wait(page, "[...document.querySelectorAll('#grids img')].every((i) => i.complete && i.naturalWidth > 0)")
        shares = page.inner_text("#time .legend")
        assert "sampling" in shares and "training" in shares and "%" in shares
        assert trainer.wait(timeout=300) == 0, (tmp_path / "said").read_text()
        wait(page, "document.querySelector('.run .state').textContent.startsWith('finished')")
        wait(phone, "document.querySelector('.run .state').textContent.startsWith('finished')")
        assert "brightness" in page.inner_text("#detectors") and "weight 1" in page.inner_text("#detectors")
        assert overflow(phone) == 0 and overflow(page) == 0
        wait(page, "document.querySelector('#live').textContent.startsWith('not connected')")
        assert page.locator("#evals svg").count() >= 1  # what was last seen stays


def test_two_runs_side_by_side_that_grow(watching: Any, open_page: Any, tmp_path: Path) -> None:
    rows = [evaluation(0), *(step(n) for n in range(1, 11)), evaluation(10)]
    a_run(tmp_path / "runs" / "a", rows, name="first", grids=[0, 10])
    url = watching(tmp_path / "runs")
    page = open_page(url)
    page.wait_for_selector("#evals svg")
    assert page.locator(".run").count() == 1 and "together" not in page.inner_text("#apart")
    b = a_run(tmp_path / "runs" / "b", rows, name="second", grids=[0, 10])  # appears later
    wait(page, "document.querySelectorAll('.run').length === 2 && document.querySelectorAll('#grids img').length === 2")
    append(b, [step(11), evaluation(20, distance=90.0), {"kind": "alarm", "step": 20, "reason": "it is hacked", "action": "stop"}])
    a_grid(b, 20)
    wait(page, "document.querySelector('#warnings').textContent.includes('it is hacked')")
    wait(page, "document.querySelector('#grids').textContent.includes('after step 20, newest')")
    assert [card.inner_text().split("\n")[0] for card in page.locator("#apart .card").all()] == ["first", "second"]
    assert "apart by 3.1" in page.inner_text("#apart")  # 2 standard deviations up, ln 3 = 1.1 farther
    for name, colour in COLOURS.items():
        assert near(page, tmp_path / "shot.png", colour) > 100, name
    slider = page.locator("#grids .card").nth(1).locator("input")
    slider.fill("0")
    assert "after step 0" in page.locator("#grids .card").nth(1).inner_text()
    append(b, [evaluation(30)])  # the chosen grid stays chosen
    a_grid(b, 30)
    wait(page, "document.querySelectorAll('#grids input')[1].max === '3'")
    assert "after step 0" in page.locator("#grids .card").nth(1).inner_text()
    page.locator(".run input").nth(1).uncheck()
    wait(page, "document.querySelectorAll('#apart .card').length === 1")
    assert near(page, tmp_path / "shot.png", COLOURS["second run"]) < near(page, tmp_path / "other.png", COLOURS["first run"])
    page.locator(".run input").nth(1).check()
    wait(page, "document.querySelectorAll('#apart .card').length === 2")
    shutil.rmtree(b)
    wait(page, "document.querySelector('#warnings').textContent.includes('the folder is gone')")


@pytest.mark.parametrize("context", [{"viewport": {"width": 1280, "height": 900}}, PHONE, {**PHONE, "color_scheme": "dark"}])
def test_all_there_is_to_see(watching: Any, open_page: Any, tmp_path: Path, context: Any) -> None:
    folder = a_run(tmp_path / "r", [evaluation(0)], grids=[0])
    for n in range(1, 41):
        refitted = {"version": 3 + n // 10, "refits": n // 10, "kept_out": 0}
        if n % 10 == 0:
            refitted |= {"accuracy": 0.85 + n / 1000, "loss": 3 / n}
        more = {f"adversary/detector/{key}": value for key, value in refitted.items()}
        append(folder, [step(n, kl=n / 100, grad_norm=1 / n, **more, **{"rewrites/words": n})])
    append(folder, [evaluation(40, **{"over_none/total": 0.5, "adversary/detector/gap": 0.3})])
    (folder / "rewrites").mkdir()
    row = {"id": 0, "prompt": "a bag", "rewrite": "a worn leather bag on a table", "rewards": {"detector": 0.25}}
    (folder / "rewrites" / "step_000040.jsonl").write_text(12 * (json.dumps(row) + "\n"))
    page = open_page(watching(folder), **context)
    page.wait_for_selector("#rewrites .pair")
    for name in ("apart", "grids", "evals", "train", "time", "detectors", "rewrites"):
        assert page.locator(f"#{name}").is_visible(), name
    assert overflow(page) == 0
    rewrites = page.inner_text("#rewrites")
    assert "a worn leather bag on a table" in rewrites and "detector 0.25" in rewrites and "8 more" in rewrites
    detectors = page.inner_text("#detectors")
    assert (
        "4 refits" in detectors
        and "accuracy 0.89" in detectors
        and "accuracy at refits" in detectors
        and "held out" in detectors
        and "detector: version" in detectors
    )
    page.click("#more summary")
    page.wait_for_selector("#more svg")
    assert page.locator("svg path[d*=NaN], svg [y1*=NaN], svg [cx*=NaN]").count() == 0
    box = page.locator("#evals svg").first.bounding_box()
    assert box is not None and box["width"] > 250
    page.locator("#evals svg").first.dispatch_event("pointermove", {"clientX": box["x"] + 50, "clientY": box["y"] + 50})
    assert "step 0" in page.locator("#evals .legend").first.inner_text()
    assert page.evaluate(NAMELESS) == 0


def test_nothing_from_a_folder_becomes_markup(watching: Any, open_page: Any, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=document.title='owned'>"
    a_run(folder, [evaluation(0)])
    config = {"name": HOSTILE, "description": HOSTILE, "steps": 10, "rewards": {HOSTILE: {"weight": 1}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    (folder / "versions.json").write_text(json.dumps({"rewards": {HOSTILE: {"description": HOSTILE, "weights_sha256": HOSTILE}}}))
    odd = {HOSTILE: 1.5, "__proto__": 1, "constructor": 2, "toString": 3, "adversary/__proto__/accuracy": 0.5, "seconds/<b>": 1.0}
    append(folder, [step(n, failed_scores=1, failures={HOSTILE: HOSTILE}, **odd) for n in range(1, 4)])
    append(folder, [evaluation(3, **odd), {"kind": "alarm", "step": 3, "reason": HOSTILE, "action": HOSTILE}])
    (folder / "rewrites").mkdir()
    (folder / "rewrites" / "step_000003.jsonl").write_text(
        json.dumps({"prompt": HOSTILE, "rewrite": HOSTILE, "rewards": {HOSTILE: 1}}) + "\n"
    )
    page = open_page(watching(folder))
    page.wait_for_selector("#rewrites .pair")
    page.click("#more summary")
    page.wait_for_selector("#more svg")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1 and page.locator("section b b").count() == 0
    assert "owned" not in page.title().replace("document.title='owned'", "")
    assert "onerror" in page.inner_text("#warnings") and "\u202e" not in page.inner_text("body")


def test_runs_that_are_left_out_or_cannot_be_shown_are_said(
    watching: Any, open_page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RUNS", 3)
    for n, name in enumerate("abcde"):
        a_run(tmp_path / name, [evaluation(0), step(1), evaluation(2)], name=name)
        os.utime(tmp_path / name / "metrics.jsonl", (1e9 + n, 1e9 + n))
    inner = Record.brief

    def stumble(record: Record) -> dict[str, Any]:
        if record.folder.name == "d" and record.seen:
            raise TypeError("nobody thought of this")
        return inner(record)

    monkeypatch.setattr(Record, "brief", stumble)
    page = open_page(watching(tmp_path))
    wait(page, "document.querySelectorAll('#apart .card').length === 2")
    assert page.locator(".run .name").all_inner_texts() == ["e", "d", "c"]
    assert "2 more runs, written to longer ago, are left out" in page.inner_text("#runs")
    assert "cannot be shown (TypeError: nobody thought of this)" in page.inner_text("#runs")
    assert "this run cannot be shown" in page.inner_text("#warnings")


def test_a_server_that_went_away_is_found_again(watching: Any, open_page: Any, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "r", [evaluation(0), step(1)])
    watch = Watch([folder])
    server = Server(watch)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    page = open_page(server.url)
    page.wait_for_selector("#evals svg")
    server.shutdown()
    server.server_close()
    port = server.server_port
    page.context.set_offline(True)
    wait(page, "document.querySelector('#live').textContent.startsWith('not connected')")
    page.context.set_offline(False)
    append(folder, [step(2), evaluation(2)])
    server = Server(Watch([folder]), port=port)  # started anew: it knows nothing of what the page holds
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    wait(page, "document.querySelector('.run .state').textContent.includes('step 2')")
    wait(page, "document.querySelectorAll('#apart .card').length === 1")
    server.shutdown()
    server.server_close()
