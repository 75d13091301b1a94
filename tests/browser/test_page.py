"""A browser uses the page of a real service as people do; what it shows is what the service answers."""

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page
from starlette.testclient import TestClient

from bench.process import running
from services.app import create_app
from services.config import ServiceConfig
from services.page import MAPS_AT_ONCE
from services.reward import Item
from shared.image import encode
from shared.schema import RewardInfo, Score
from tests.browser.chromium import needs_chromium
from world import photographs

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<img src=x onerror=document.title='owned'> $(touch owned) `touch owned` 'q' \"d\" \\ %41 é"
in_a_browser = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("page"),  # one browser and one service of each kind, however many workers there are
    pytest.mark.timeout(600),
    needs_chromium,
]


class Drawn:
    """Mean grey; its text is the prompt, its map the mean grey of each of 4x4 patches: the darker the less generated."""

    threads: list[str] = []
    hold = threading.Event()

    def __init__(self, name: str) -> None:
        self.info = RewardInfo(name=name, range=(0.0, 1.0), description="<b>mean</b> grey")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        return cls(name)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        return [Score.ok(float(item.image.mean()) / 255, text=item.prompt) for item in batch]

    def patch_map(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.threads.append(threading.current_thread().name)
        if int(image[0, 0, 0]) == 13:
            self.hold.wait(30)
        if int(image[0, 0, 0]) == 14:
            return np.full((2, 2), np.nan, np.float32)
        height, width = (side // 4 * 4 for side in image.shape[:2])
        grey = image[:height, :width].mean(2)
        patches: NDArray[np.float32] = grey.reshape(4, height // 4, 4, width // 4).mean((1, 3)).astype(np.float32)
        return patches


def serve(config: str | Path, **variables: str) -> Iterator[str]:
    """A service as a process of its own, until the tests are done with it."""
    with running(config, stderr=subprocess.DEVNULL, variables=variables, limit_s=420) as url:
        yield url


@pytest.fixture(scope="module")
def world() -> Iterator[str]:
    yield from serve("examples/serve/world.yaml")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The reward above beside jpeg_size, and bodies of at most 300 kB."""
    config = tmp_path_factory.mktemp("page") / "c.yaml"
    rewards = {"drawn": {"use": f"{__name__}:Drawn"}, "jpeg_size": {"use": "jpeg_size"}}
    config.write_text(json.dumps({"device": "cpu", "rewards": rewards, "max_body_bytes": 300_000}))
    yield from serve(config)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """open_page(url, **context): the page, loaded; at the end its console must be empty and nothing asked of another place."""
    opened: list[tuple[Page, str, list[str]]] = []

    def open_one(url: str, path: str = "/", watched: bool = True, **context: Any) -> Page:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(120_000)
        noise: list[str] = []
        page.on("pageerror", lambda error: noise.append(str(error)))
        if watched:
            page.on("console", lambda message: noise.append(message.text))
            page.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else noise.append(f"asked {r.url}"))
        page.goto(url + path)
        if path == "/":
            page.wait_for_selector("#rewards input")
        opened.append((page, url, noise))
        return page

    yield open_one
    for page, _, noise in opened:
        page.context.close()
        assert noise == []


def save(folder: Path, name: str, pixels: NDArray[np.uint8]) -> Path:
    (folder / name).write_bytes(encode(pixels, "png").data)
    return folder / name


def grey(value: int, side: int = 32) -> NDArray[np.uint8]:
    return np.full((side, side, 3), value, np.uint8)


def choose(page: Page, *rewards: str) -> None:
    for box in page.locator("#rewards input").all():
        box.set_checked(box.get_attribute("value") in rewards)


def answered(page: Page) -> dict[str, Any]:
    """Press the button; the service's answer, once the page shows it."""
    with page.expect_response("**/score") as response:
        page.click("#go")
    page.wait_for_selector("#answer-title:focus")
    body: dict[str, Any] = response.value.json()
    return body


def shown(page: Page) -> list[dict[str, str]]:
    """Per picture: reward to the number on the page."""
    return [
        {s.get_attribute("aria-label") or "": s.locator(".value").inner_text() for s in card.locator("section:has(.value)").all()}
        for card in page.locator(".card").all()
    ]


def overflow(page: Page) -> int:
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


class TestInABrowser:
    pytestmark = in_a_browser

    def test_pictures_and_a_prompt_are_scored(self, world: str, open_page: Any, tmp_path: Path) -> None:
        y, x = np.mgrid[:90, :120]
        strange = np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8)
        Image.fromarray(strange).save(tmp_path / "strange.jpg")
        photo = save(tmp_path, "photo.png", photographs.load("test")[0][3])
        page = open_page(world)
        assert page.is_disabled("#go")
        assert page.locator("#rewards input:checked").evaluate_all("boxes => boxes.map((box) => box.value)") == ["realism"]
        page.set_input_files("#files", [photo, tmp_path / "strange.jpg"])
        page.fill("#prompt", "a photo of a bag")
        choose(page, "realism", "detector", "alignment", "ocr")
        answer = answered(page)
        files = [("image", (p.name, p.read_bytes())) for p in (photo, tmp_path / "strange.jpg")]
        data = {"prompt": "a photo of a bag", "rewards": "realism,detector,alignment,ocr"}
        asked = httpx.post(f"{world}/score", files=files, data=data, timeout=60, trust_env=False).json()
        for card, item, again in zip(shown(page), answer["items"], asked["items"], strict=True):
            values = {name: score["value"] for name, score in item["scores"].items() if score["value"] is not None}
            assert set(card) == set(values) == {"realism", "detector", "alignment"}
            assert card == {name: f"{value:.4f}" for name, value in values.items()}
            assert values == pytest.approx({name: again["scores"][name]["value"] for name in values}, abs=1e-5)
        first, second = page.locator(".card").all()
        assert "out of domain" not in first.inner_text() and "lossy" not in first.inner_text()
        assert second.inner_text().count("out of domain") == 2 and "lossy file" in second.inner_text()
        assert f"{answer['items'][0]['scores']['detector']['parts']['logit']:.2f}" in first.inner_text()
        assert answer["items"][0]["scores"]["ocr"]["error"]["title"] in first.inner_text()
        times = page.inner_text("#times")
        assert all(word in times for word in ("read", "decode", "total in the service", "with the network"))
        assert page.inner_text("#said") == "6 scores, 2 failed"

    def test_the_detectors_map_lies_over_the_picture(self, world: str, open_page: Any, tmp_path: Path) -> None:
        known = httpx.get(f"{world}/v1/map", trust_env=False).json()["rewards"]
        if "detector" not in known:
            pytest.skip("this detector draws no map")
        page = open_page(world)
        page.set_input_files("#files", save(tmp_path, "photo.png", photographs.load("test")[0][3]))
        choose(page, "detector")
        answered(page)
        page.click("text=Show where")
        page.wait_for_selector(".frame canvas")
        sides = page.evaluate("(c => [c.width, c.height])(document.querySelector('canvas'))")
        assert min(sides) >= 1 and "more like a generated picture" in page.inner_text("figcaption")

    def test_one_corrupt_picture_spoils_nothing(self, drawn: str, open_page: Any, tmp_path: Path) -> None:
        good = save(tmp_path, "good.png", grey(51))
        (tmp_path / "cut.png").write_bytes(good.read_bytes()[:50])
        (tmp_path / "not.png").write_bytes(b"<script>alert(1)</script>" * 9)
        page = open_page(drawn)
        page.set_input_files("#files", [good, tmp_path / "cut.png", tmp_path / "not.png"])
        answered(page)
        assert [card.get("drawn") for card in shown(page)] == ["0.2000", None, None]
        cards = [card.inner_text() for card in page.locator(".card").all()]
        assert cards[1].count("truncated") == 1 and "drawn, jpeg_size" in cards[1]
        assert "none of PNG, JPEG, WebP or QOI" in cards[2]

    def test_nothing_from_outside_becomes_markup(self, drawn: str, open_page: Any, tmp_path: Path) -> None:
        name = "<img src=x onerror=alert(1)>\u202e.png"
        picture = {"name": name, "mimeType": "image/png", "buffer": encode(grey(51), "png").data}
        page = open_page(drawn)
        page.set_input_files("#files", files=[picture])
        page.fill("#prompt", HOSTILE)
        choose(page, "drawn")
        answered(page)
        assert page.locator(".card bdi").nth(0).inner_text() == name
        assert page.locator(".card .pairs bdi").inner_text() == HOSTILE
        assert "<b>mean</b> grey" in page.inner_text("#rewards")
        assert "\u202e" not in page.inner_text("#curl") and page.title() == "Verism: score pictures"
        assert page.locator("img").count() == 2

    @pytest.mark.skipif(shutil.which("curl") is None or shutil.which("bash") is None, reason="needs curl and bash")
    @pytest.mark.parametrize(
        ("names", "prompt"),
        [
            (["a.png", "b.png"], ""),
            (['it\'s a "b"; $(touch owned).png', "-x.png", "a,b;type=html.png", "é ü.png"], HOSTILE),
            (["plain name.png"], "@/etc/hostname"),
            (["a.png"], "<pictures.txt"),
        ],
    )
    def test_the_curl_line_is_the_same_call(
        self, drawn: str, open_page: Any, tmp_path: Path, names: list[str], prompt: str
    ) -> None:
        files = [save(tmp_path, name, grey(20 * (i + 1))) for i, name in enumerate(names)]
        page = open_page(drawn)
        page.set_input_files("#files", files)
        page.fill("#prompt", prompt)
        choose(page, "jpeg_size", "drawn")
        answer = answered(page)
        line = page.inner_text("#curl")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        again = json.loads(done.stdout)
        for score in (s for one in (answer, again) for item in one["items"] for s in item["scores"].values()):
            score.pop("cached")  # the second time it is
        assert again["items"] == answer["items"] and again["rewards"] == answer["rewards"]
        assert [item["scores"]["drawn"]["text"] for item in again["items"]] == [prompt or None] * len(names)
        assert {path.name for path in tmp_path.iterdir()} == set(names)

    def test_the_curl_line_is_copied(self, drawn: str, open_page: Any, tmp_path: Path) -> None:
        page = open_page(drawn, permissions=["clipboard-read", "clipboard-write"])
        page.set_input_files("#files", save(tmp_path, "a.png", grey(9)))
        answered(page)
        page.click("#copy")
        page.wait_for_selector("#copy:text-is('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == page.inner_text("#curl")

    def test_a_picture_is_pasted(self, drawn: str, open_page: Any) -> None:
        page = open_page(drawn, permissions=["clipboard-read", "clipboard-write"])
        page.evaluate(
            """async (data) => {
              const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
              await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
            }""",
            base64.b64encode(encode(grey(102), "png").data).decode(),
        )
        page.focus("#prompt")
        page.keyboard.press("Control+V")
        page.wait_for_selector("#chosen li")
        assert page.input_value("#prompt") == ""
        answered(page)
        assert shown(page)[0]["drawn"] == "0.4000"

    def test_pictures_are_dropped_and_addresses_are_not_fetched(self, drawn: str, open_page: Any) -> None:
        page = open_page(drawn)
        transfer = page.evaluate_handle(
            """(data) => {
              const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], "a.png", {type: "image/png"}));
              transfer.items.add(new File(["text"], "notes.txt", {type: "text/plain"}));
              return transfer;
            }""",
            base64.b64encode(encode(grey(204), "png").data).decode(),
        )
        page.dispatch_event("main", "dragover", {"dataTransfer": transfer})
        assert "over" in (page.get_attribute("body", "class") or "")
        page.dispatch_event("main", "drop", {"dataTransfer": transfer})
        assert page.locator("#chosen li").count() == 1 and "1 file was left out" in page.inner_text("#said")
        link = page.evaluate_handle("(t => (t.setData('text/uri-list', 'http://10.0.0.1/a.png'), t))(new DataTransfer())")
        page.dispatch_event("main", "drop", {"dataTransfer": link})
        assert "never fetched" in page.inner_text("#said")
        answered(page)
        assert shown(page)[0]["drawn"] == "0.8000"

    def test_the_map_is_where_the_picture_is_bright(self, drawn: str, open_page: Any, tmp_path: Path) -> None:
        pixels = grey(0, 64)
        pixels[48:, :16] = 255
        page = open_page(drawn)
        page.set_input_files("#files", save(tmp_path, "corner.png", pixels))
        answered(page)
        assert page.locator("text=Show where").count() == 1
        page.click("text=Show where")
        page.wait_for_selector(".frame canvas")
        alpha = page.evaluate(
            "(c => [...c.getContext('2d').getImageData(0, 0, 4, 4).data].filter((_, i) => i % 4 === 3))(document.querySelector('canvas'))"
        )
        assert np.reshape(alpha, (4, 4)).nonzero() == (np.array([3]), np.array([0]))
        image, over = (page.locator(f".frame {tag}").bounding_box() for tag in ("img", "canvas"))
        assert image == over
        assert "drawn: 0" in page.inner_text("figcaption") and "255" in page.inner_text("figcaption")
        page.click("text=Show where")
        assert page.locator("canvas").count() == 0

    @pytest.mark.parametrize("width", [320, 360])
    def test_a_phone_needs_no_sideways_scroll(self, drawn: str, open_page: Any, tmp_path: Path, width: int) -> None:
        long = save(tmp_path, "x" * 180 + ".png", grey(77, 200))
        page = open_page(drawn, viewport={"width": width, "height": 700}, is_mobile=True, has_touch=True)
        assert overflow(page) == 0
        page.set_input_files("#files", [long, save(tmp_path, "b.png", grey(1))])
        page.fill("#prompt", "w" * 300)
        page.tap("#go")
        page.wait_for_selector(".card")
        page.tap("text=Show where >> nth=0")
        page.wait_for_selector("canvas")
        assert overflow(page) == 0
        for button in page.locator("button:visible, label.button").all():
            box = button.bounding_box()
            assert box is not None and min(box["width"], box["height"]) >= 36, button.inner_text()

    def test_the_keyboard_is_enough(self, drawn: str, open_page: Any, tmp_path: Path) -> None:
        page = open_page(drawn)
        page.on(
            "filechooser", lambda _: None
        )  # interception is on from here, not only from the moment of the key, which a busy machine misses

        def to(selector: str) -> None:
            for _ in range(30):
                page.keyboard.press("Tab")
                if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                    return
            raise AssertionError(f"Tab never reaches {selector}")

        to("#files")
        outline = "getComputedStyle(document.querySelector('#files + .button')).outlineStyle"
        assert page.evaluate(outline) == "solid"
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files([save(tmp_path, "a.png", grey(51)), save(tmp_path, "b.png", grey(102))])
        page.wait_for_selector("#go:focus")
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Space")
        assert page.locator("#rewards input:checked").count() == 1
        to("#go")
        page.keyboard.press("Enter")
        page.wait_for_selector("#answer-title:focus")
        assert [card["drawn"] for card in shown(page)] == ["0.2000", "0.4000"]
        to("[aria-pressed]")
        page.keyboard.press("Space")
        page.wait_for_selector("canvas")
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
        page.focus("#files")
        to("#chosen button")
        page.keyboard.press("Enter")
        assert page.locator("#chosen li").count() == 1
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove b.png"
        page.focus("#prompt")
        page.keyboard.type("a bag")
        page.keyboard.press("Enter")
        page.wait_for_selector(".card:only-child")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_can_be_read(self, drawn: str, open_page: Any, tmp_path: Path, scheme: str) -> None:
        """Contrast of every text with what lies behind it is at least 4.5 (WCAG AA)."""
        (tmp_path / "bad.png").write_bytes(b"x" * 40)
        page = open_page(drawn, color_scheme=scheme)
        page.set_input_files("#files", [save(tmp_path, "a.png", grey(51)), tmp_path / "bad.png"])
        answered(page)
        found = page.evaluate(
            """() => [...document.querySelectorAll("body *")]
              .filter((e) => e.offsetParent && !e.disabled && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
              .map((e) => {
                let behind = e;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [e.outerHTML.slice(0, 80), getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
              })"""
        )
        assert len(found) > 20

        def luminance(colour: str) -> float:
            rgb = np.array([int(v) for v in re.findall(r"\d+", colour)[:3]]) / 255
            return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

        for what, colour, ground in found:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (what, colour, ground)
        body = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert body < 0.05 if scheme == "dark" else body > 0.8

    def test_what_the_service_refuses_is_said(self, drawn: str, open_page: Any, tmp_path: Path) -> None:
        page = open_page(drawn, watched=False)  # Chromium itself writes failed requests to the console
        noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
        page.set_input_files("#files", save(tmp_path, "large.png", noise))
        page.click("#go")
        assert "the service takes" in page.inner_text("#problem")
        page.click("#clear")
        assert page.is_hidden("#problem") and page.is_disabled("#go")
        page.set_input_files("#files", save(tmp_path, "a.png", grey(51)))
        page.fill("#prompt", "p" * 9000)
        page.click("#go")
        page.wait_for_selector("#problem:visible")
        assert "longer than 8192 bytes" in page.inner_text("#problem")
        page.fill("#prompt", "")
        page.context.set_offline(True)
        page.click("#go")
        page.wait_for_selector("#problem:text-is('The service does not answer.')")
        page.context.set_offline(False)
        answered(page)
        assert page.is_hidden("#problem")

    def test_a_key_is_asked_for_and_stays_out_of_the_curl_line(self, open_page: Any, tmp_path: Path) -> None:
        secret = "a-key-of-more-than-16"
        config = tmp_path / "c.yaml"
        keys = {"someone": {"env": "VERISM_KEY_TEST"}}
        config.write_text(json.dumps({"device": "cpu", "rewards": {"jpeg_size": {"use": "jpeg_size"}}, "keys": keys}))
        for url in serve(config, VERISM_KEY_TEST=secret):
            page = open_page(url, watched=False, path="/?")
            page.wait_for_selector("#problem:text-is('This service asks for a key.')")
            assert page.locator("nav a:visible").count() == 0
            page.fill("#key", "another-key-than-that")
            page.keyboard.press("Enter")
            page.wait_for_selector("#problem:text-is('The service does not know this key.')")
            page.fill("#key", secret)
            page.keyboard.press("Enter")
            page.wait_for_selector("#rewards input")
            assert page.is_hidden("#problem")
            photo = save(tmp_path, "a.png", grey(9))
            page.set_input_files("#files", photo)
            answered(page)
            line = page.inner_text("#curl")
            assert secret not in page.content() + line and "$VERISM_KEY" in line
            environment = {**os.environ, "VERISM_KEY": secret}
            done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
            assert f"{json.loads(done.stdout)['items'][0]['scores']['jpeg_size']['value']:.4f}" == shown(page)[0]["jpeg_size"]

    def test_the_policy_stops_scripts_and_strangers(self, drawn: str, open_page: Any) -> None:
        page = open_page(drawn, watched=False)
        stopped = page.evaluate(
            """() => {
              const tries = [
                () => { document.createElement("script").textContent = "1"; },
                () => { document.createElement("button").setAttribute("onclick", "1"); },
                () => { document.body.innerHTML = "<b>1</b>"; },
                () => { document.body.insertAdjacentHTML("beforeend", "<b>1</b>"); },
              ];
              return tries.map((one) => { try { one(); return "let through"; } catch (e) { return e.name; } });
            }"""
        )
        assert stopped == ["TypeError"] * 4
        violated = page.evaluate(
            """() => new Promise((resolve) => {
              const seen = [];
              document.addEventListener("securitypolicyviolation", (event) => {
                if (seen.push(event.effectiveDirective) === 2) resolve(seen.sort());
              });
              fetch("http://127.0.0.1:1/").catch(() => null);
              document.body.append(Object.assign(document.createElement("img"), {src: "http://127.0.0.1:1/x.png"}));
            })"""
        )
        assert violated == ["connect-src", "img-src"]

    def test_the_api_page_needs_no_internet(self, drawn: str, open_page: Any) -> None:
        page = open_page(drawn, "/docs")
        page.wait_for_selector("#operations-default-score_score_post, .opblock")
        assert page.locator(".opblock").count() >= 6
        page.click(".opblock-summary >> nth=0")
        page.wait_for_selector("text=Try it out")


def picture(value: int, side: int = 32) -> dict[str, Any]:
    return {"files": {"image": ("a.png", encode(grey(value, side), "png").data)}}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    rewards = {
        "drawn": {"use": f"{__name__}:Drawn"},
        "jpeg_size": {"use": "jpeg_size"},
        "realism": {"use": "realism", "parts": {"drawn": {"weight": 1}}},
    }
    config = {"device": "cpu", "rewards": rewards, "max_body_bytes": 100_000, "max_pixels": 10_000}
    with TestClient(create_app(ServiceConfig.model_validate(config))) as test:
        yield test


def test_the_front_page_is_html_only_for_who_asks(client: TestClient) -> None:
    for accept in ("*/*", "application/json", ""):
        answer = client.get("/", headers={"accept": accept})
        assert answer.json()["rewards"] == ["drawn", "jpeg_size", "realism"] and answer.headers["vary"] == "accept"
    answer = client.get("/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.headers["content-type"].startswith("text/html") and "<form" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_pages_hold_nothing_inline_and_name_only_their_own_files(client: TestClient) -> None:
    for path in ("/", "/docs"):
        text = client.get(path, headers={"accept": "text/html"}).text
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", text)
        for address in re.findall(r"(?:src|href)=\"([^\"]+)\"", text):
            if not address.startswith("data:"):
                assert not re.match(r"\w+:|//", address), address
                assert client.get("/" + address.removeprefix("./")).status_code == 200, address
    for name in ("index.html", "__init__.py", "..%2f..%2fapp.py", "%2e%2e/app.py", "redoc.standalone.js"):
        assert client.get(f"/page/{name}").status_code == 404


def test_a_map_has_the_pictures_patches(client: TestClient) -> None:
    assert client.get("/v1/map").json() == {"rewards": ["drawn"]}
    pixels = grey(0, 64)
    pixels[:16, 48:] = 200
    answer = client.post("/v1/map?reward=drawn", files={"image": ("a.png", encode(pixels, "png").data)}).json()
    assert (answer["reward"], answer["version"], answer["height"], answer["width"]) == ("drawn", 1, 4, 4)
    assert answer["rows"] == [[0, 0, 0, 200], [0] * 4, [0] * 4, [0] * 4]
    assert client.post("/v1/map", **picture(3)).json()["rows"][0][0] == 3
    assert Drawn.threads and all(name.startswith("device-drawn") for name in Drawn.threads)


@pytest.mark.parametrize(
    ("query", "body", "status", "kind"),
    [
        ("reward=jpeg_size", picture(1), 404, "no-map"),
        ("reward=realism", picture(1), 404, "no-map"),
        ("reward=%3Cb%3E", picture(1), 404, "unknown-reward"),
        ("", {"files": {"image": ("a.png", b"x")}}, 422, "image-unreadable"),
        ("", {"files": {"image": ("a.png", encode(grey(1), "png").data[:60])}}, 422, "image-unreadable"),
        ("", picture(1, 8), 422, "image-too-small"),
        ("", picture(1, 128), 422, "image-too-large"),
        ("", {"files": [("image", ("a.png", b"")), ("image", ("b.png", b""))]}, 422, "invalid"),
        ("", {"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "unsupported-media-type"),
        ("", {"content": b"x" * 200_000, "headers": {"content-type": "application/json"}}, 413, "too-large"),
        ("", picture(14), 500, "internal"),
    ],
)
def test_what_cannot_be_mapped(client: TestClient, query: str, body: dict[str, Any], status: int, kind: str) -> None:
    answer = client.post(f"/v1/map?{query}", **body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["type"] == f"urn:verism:{kind}" and answer.json()["title"]


def test_maps_wait_outside_the_event_loop_and_are_bounded(client: TestClient) -> None:
    Drawn.hold.clear()
    answers: list[httpx.Response] = []
    asked = [
        threading.Thread(target=lambda: answers.append(client.post("/v1/map", **picture(13)))) for _ in range(MAPS_AT_ONCE + 3)
    ]
    for thread in asked:
        thread.start()
    try:
        end = time.monotonic() + 20
        while len(answers) < 3:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert [answer.json()["type"] for answer in answers] == ["urn:verism:busy"] * 3
        assert {answer.headers["retry-after"] for answer in answers} == {"1"}
        began = time.monotonic()
        assert client.get("/livez").status_code == 200 and time.monotonic() - began < 5
    finally:
        Drawn.hold.set()
    for thread in asked:
        thread.join(30)
    assert sorted(answer.status_code for answer in answers) == [200] * MAPS_AT_ONCE + [429] * 3
