"""A browser opens the report: nothing in its console, tables and grids sort, and it fits a phone."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.chromium import needs_chromium
from tests.trainer.realbench import stub
from tests.trainer.realbench.folders import bench, fill, prompts
from trainer.__main__ import evaluate

pytestmark = [pytest.mark.e2e, needs_chromium]


def test_the_report_sorts(tmp_path: Path, browser: Browser) -> None:
    more = {"photographs": str(fill(tmp_path / "photos", 0.7)), "prompts": str(prompts(tmp_path / "prompts.jsonl"))}
    dark = fill(tmp_path / "dark", 0.4, seed=2)
    with stub.serve() as service:
        file = bench(tmp_path / "b.yaml", service.url, **more)
        assert evaluate(["realbench", str(dark), "--bench", str(file), "--out", str(tmp_path / "out")]) == 0
    page = browser.new_page(viewport={"width": 390, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "out" / "report.html").as_uri())
    table = page.locator("table.sortable").first
    table.locator("th button", has_text="dark").click()
    cells = [float(v) for v in table.locator("tbody td:nth-child(3)").evaluate_all("all => all.map(c => c.dataset.v)") if v]
    assert len(cells) > 3 and cells == sorted(cells, reverse=True)
    table.locator("th button", has_text="dark").click()
    cells = [float(v) for v in table.locator("tbody td:nth-child(3)").evaluate_all("all => all.map(c => c.dataset.v)") if v]
    assert cells == sorted(cells)
    for name in ("real", "level"):
        page.select_option("#by", name)
        top, low = (
            [float(t) for t in page.locator(f".grid-of:nth-of-type(2) .{part} b").all_text_contents()] for part in ("top", "low")
        )
        assert len(top) == len(low) == 8 and top == sorted(top, reverse=True) and low == sorted(low) and top[-1] > low[-1]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"
    assert page.locator(".strip img").evaluate_all("all => all.every(i => i.naturalWidth > 0)")
    page.close()
    assert said == []
