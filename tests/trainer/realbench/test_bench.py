"""A bench on folders before services whose answers are known: what is asked once, what is missing, what is said, what faults do."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainer.realbench import stub
from tests.trainer.realbench.folders import IDS, bench, fill, prompts
from trainer.__main__ import evaluate
from trainer.realbench import draw


def run(tmp_path: Path, folders: list[str], file: Path, *more: str) -> int:
    return evaluate(["realbench", *folders, "--bench", str(file), "--out", str(tmp_path / "out"), *more])


def results(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    return found


def figure(found: dict[str, Any], contestant: str, measure: str, what: str = "mean") -> dict[str, Any]:
    return next(f for f in found["figures"] if (f["contestant"], f["measure"], f["what"]) == (contestant, measure, what))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    fill(tmp_path / "photos", 0.7)
    fill(tmp_path / "again", 0.7, seed=1)
    fill(tmp_path / "dark", 0.4, seed=2)
    prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def options(world: Path) -> dict[str, Any]:
    return {"photographs": str(world / "photos"), "prompts": str(world / "prompts.jsonl")}


def test_figures_come_out_and_nothing_is_asked_twice(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(world / "again"), str(world / "dark")]
    with stub.serve() as service:
        file = bench(world / "b.yaml", service.url, **options(world))
        assert run(world, folders, file) == 0
        said = capsys.readouterr().out
        asked = len(service.asked)
        assert asked == 3 * 40 * 3 + 3 * 40, "each picture once by each of three rewards, each pair once"
        assert run(world, folders, file) == 0 and len(service.asked) == asked
        assert run(world, folders[::-1], file, "--set", "arena.pairs=30") == 0 and len(service.asked) == asked, "another order"
        assert run(world, [f"renamed={folders[1]}"], file) == 0 and len(service.asked) == asked, "another name"
        service.version = 2
        assert run(world, folders, file) == 0 and len(service.asked) == 2 * asked, "other weights are asked anew"
    found = results(world)
    own = [np.asarray(Image.open(world / "dark" / f"{name}.png")).mean() / 255 for name in IDS]
    mean = figure(found, "dark", "real")
    assert mean["value"] == pytest.approx(np.mean(own), abs=1e-6) and mean["low"] < mean["value"] < mean["high"] and mean["n"] == 40
    assert figure(found, "dark", "real", "share above 0.5")["value"] == pytest.approx(np.mean(np.array(own) > 0.5))
    assert figure(found, "dark", "fit")["value"] == pytest.approx(np.mean([len(f"a thing {name}") for name in IDS]) / 100)
    rates = {(r["a"], r["b"]): r for r in found["arena"]["rates"]}
    same = rates["photographs", "again"]
    assert same["low"] < 0.5 < same["high"], "photographs against other photographs are even, within the interval"
    assert rates["photographs", "dark"]["value"] > 0.95 and rates["again", "dark"]["low"] > 0.8
    ratings = {r["contestant"]: r for r in found["arena"]["ratings"]}
    assert (
        ratings["photographs"]["value"] == 0
        and ratings["again"]["low"] < 0 < ratings["again"]["high"]
        and ratings["dark"]["high"] < -100
    )
    paired = next(d for d in found["differences"] if (d["a"], d["b"], d["measure"]) == ("photographs", "dark", "real"))
    assert paired["paired"] and paired["high"] < -0.2
    verdicts = {(t["measure"], t["contestant"]): t["verdict"] for t in found["telling"]}
    assert verdicts["real", "dark"] == "tells" and verdicts["level", "again"] == "cannot tell"
    assert verdicts["real", "again"] == "fooled", "it calls more than half of them real"
    assert "arena, rating" in said and "report.html" in said
    rows = list(csv.DictReader((world / "out" / "figures.csv").open()))
    assert {"contestant", "measure", "value", "low", "high"} <= rows[0].keys() and len(rows) > 20


def test_two_are_compared_in_every_figure(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After is nearer to the photographs than before, by every difference; and a folder of other prompts has differences too."""
    fill(world / "mine", 0.4, [f"holiday {i}" for i in range(36)], seed=3)
    with stub.serve() as service:
        file = bench(world / "b.yaml", service.url, **options(world), features="world/monitors")
        command = ["compare", f"before={world / 'dark'}", f"after={world / 'again'}", "--bench", str(file)]
        assert evaluate([*command, "--out", str(world / "out")]) == 0
        found, said = results(world), capsys.readouterr().out
        assert evaluate([*command[:2], str(world / "mine"), *command[3:], "--out", str(world / "other")]) == 0
    assert [c["name"] for c in found["contestants"]] == ["photographs", "before", "after"] and found["changes"] == []
    rows = {d["measure"]: d for d in found["differences"] if (d["a"], d["b"]) == ("before", "after")}
    better = {"real", "real, share above 0.5", "level", "arena, rating", "arena, wins against photographs"}
    nearer = {"kernel distance"}
    assert rows.keys() == better | nearer | {"fit", "diversity"}
    assert all(row["paired"] and row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert all(rows[name]["low"] > 0 and rows[name]["higher_is_better"] is not False for name in better)
    assert all(rows[name]["high"] < 0 and rows[name]["higher_is_better"] is False for name in nearer)
    ratings = {r["contestant"]: r["value"] for r in found["arena"]["ratings"]}
    assert rows["arena, rating"]["value"] == pytest.approx(ratings["after"] - ratings["before"])
    values = [figure(found, name, "distance", "kernel")["value"] for name in ("after", "before")]
    assert rows["kernel distance"]["value"] == pytest.approx(values[0] - values[1])
    assert "kernel distance: after less before" in said and "(clear)" in said
    found = json.loads((world / "other" / "results.json").read_text())
    rows = {d["measure"]: d for d in found["differences"] if (d["a"], d["b"]) == ("before", "mine")}
    kernel, lost = rows["kernel distance"], rows["arena, wins against photographs"]
    assert not kernel["paired"] and kernel["low"] < kernel["value"] < kernel["high"]
    assert lost["low"] < lost["value"] == 0 < lost["high"] < 0.2, "both lose every bout: still no certainty"
    rate = next(r for r in found["arena"]["rates"] if r["b"] == "mine")
    assert rate["n"] == 36 and rate["wins"] + rate["ties"] + rate["losses"] == 40, "pictures, of which some met two"


class Plain:
    """A painter whose pictures have one level."""

    batch = 8

    def __init__(self, level: int) -> None:
        self.level = level

    def paint(self, texts: list[str], seeds: list[int]) -> list[np.ndarray]:
        noise = [np.random.default_rng(seed).integers(0, 40, (20, 20, 3)) for seed in seeds]
        return [(one + self.level).astype(np.uint8) for one in noise]

    def close(self) -> None: ...


def test_two_runs_paint_from_the_same_noise_and_what_differs_is_listed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (Path(__file__).parents[3] / "trainer" / "recipes" / "world.yaml").read_text()
    assert recipe.count("\nseed: 0") == 1
    for name, seed in (("before", 1), ("after", 2)):
        (world / name / "checkpoints" / "step_000010").mkdir(parents=True)
        (world / name / "checkpoints" / "step_000010" / "meta.json").write_text(json.dumps({"step": 10, "of": name}))
        (world / name / "config.yaml").write_text(recipe.replace("\nseed: 0", f"\nseed: {seed}"))
    monkeypatch.setattr(draw, "open_painter", lambda one, *_: Plain(60 if one.run.name == "before" else 180))
    with stub.serve() as service:
        file = bench(world / "b.yaml", service.url, **options(world))
        command = ["compare", str(world / "before"), str(world / "after"), "--bench", str(file), "--out", str(world / "out")]
        assert evaluate(command) == 0
        asked = len(service.asked)
        assert evaluate(command) == 0 and len(service.asked) == asked
    found = results(world)
    assert found["changes"] == [{"names": ["before", "after"], "key": "seed", "a": "1", "b": "2"}]
    row = next(d for d in found["differences"] if (d["a"], d["b"], d["measure"]) == ("before", "after", "real"))
    assert row["paired"] and row["value"] == pytest.approx(120 / 255) and row["high"] - row["low"] < 1e-6, "the same noise"
    page = (world / "out" / "report.html").read_text()
    assert "What differs between the two" in page and "% of the time, 50 to 50 (50 % is no leaning)" in page


def test_a_service_that_goes_away_half_way_is_resumed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(world / "dark")]
    with stub.serve(most=130) as service:
        file = bench(world / "b.yaml", service.url, **options(world))
        assert run(world, folders, file, "--set", "timeout_s=5") == 1
        assert "stopped answering" in capsys.readouterr().out
        before = list(service.asked)
        assert 0 < len(before) <= 130
        service.most = None
        assert run(world, folders, file) == 0
        assert len(service.asked) == len(set(map(repr, service.asked))) == 2 * 40 * 3 + 40
    assert figure(results(world), "dark", "real")["n"] == 40


def test_pictures_that_a_detector_does_not_know_are_said(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(world / "bright", 0.96, [f"x{i}" for i in range(10)], seed=6)
    with stub.serve() as service:
        assert run(world, [str(world / "bright")], bench(world / "b.yaml", service.url, **options(world))) == 0
    said = capsys.readouterr().out
    assert "bright: real says of" in said and "not of the kind it was fitted on" in said and "photographs: real says" not in said


def test_a_killed_bench_leaves_half_a_line_and_goes_on(world: Path) -> None:
    with stub.serve() as service:
        file = bench(world / "b.yaml", service.url, **options(world))
        assert run(world, [str(world / "dark")], file) == 0
        count = len(service.asked)
        ledger = world / "out" / "scores.jsonl"
        lines = ledger.read_bytes().splitlines(keepends=True)
        ledger.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
        assert run(world, [str(world / "dark")], file) == 0
        assert len(service.asked) == count + 1
        ledger.write_text('{"question": 3}\n')
        assert run(world, [str(world / "dark")], file) == 2


def test_a_probability_of_fake_is_one_of_real_the_other_way_round(world: Path) -> None:
    with stub.serve() as service:
        more = {"detectors": {name: {"url": service.url} for name in ("real", "fake")}, "rewards": {}, "arena": None}
        assert run(world, [str(world / "dark")], bench(world / "b.yaml", service.url, **options(world), **more)) == 0
    found = results(world)
    assert figure(found, "dark", "fake")["value"] == pytest.approx(1 - figure(found, "dark", "real")["value"], abs=1e-6)
    for part in ("telling", "calibration"):
        real, fake = (
            {k: v for k, v in next(row for row in found[part] if row["measure"] == name).items() if k != "measure"}
            for name in ("real", "fake")
        )
        assert fake == real or part == "calibration"
        assert fake["value"] == pytest.approx(real["value"]) and fake["low"] == pytest.approx(real["low"])
    assert all(0 <= b["p"] <= 1 for b in fake["bins"]) and found["agreement"][0]["value"] == pytest.approx(1)


def test_bad_pictures_are_counted_and_left_out(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is no picture, one is a decompression bomb's header, one is missing, one of another size, one a JPEG that ends half-way, and one of
    no prompt.
    """
    dark = world / "dark"
    (dark / "p-00.png").write_bytes(b"no picture")
    bomb = bytearray((dark / "p-01.png").read_bytes())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    (dark / "p-01.png").write_bytes(bytes(bomb))
    (dark / "p-02.png").unlink()
    Image.fromarray(np.full((30, 50, 3), 90, np.uint8)).save(dark / "p-03.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(dark / "p-04.jpg")
    (dark / "p-04.png").unlink()
    (dark / "p-04.jpg").write_bytes((dark / "p-04.jpg").read_bytes()[:-200])
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(dark / "unasked.png")
    with stub.serve() as service:
        file = bench(world / "b.yaml", service.url, **options(world), features="world/monitors")
        assert run(world, [str(dark)], file) == 0
    said, found = capsys.readouterr().out, results(world)
    mean = figure(found, "dark", "real")
    assert (mean["n"], mean["missing"]) == (36, 4) and figure(found, "dark", "distance", "kernel")["n"] == 36
    for text in (
        "3 files cannot be read",
        "1 of the prompts have no picture",
        "1 files are of no prompt",
        "2 sizes, 20x20 to 50x30",
    ):
        assert text in said
    rate = next(r for r in found["arena"]["rates"])
    assert rate["n"] == 36 and rate["missing"] == 3


def test_contestants_of_other_prompts_are_compared_as_sets(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(world / "mine", 0.5, [f"holiday {i}" for i in range(25)], seed=3)
    with stub.serve() as service:
        assert run(world, [str(world / "mine"), str(world / "dark")], bench(world / "b.yaml", service.url, **options(world))) == 0
    found = results(world)
    assert "compared as sets" in capsys.readouterr().out
    assert not any(f["contestant"] == "mine" and f["measure"] == "fit" for f in found["figures"]), "no prompt, no alignment"
    loose = next(d for d in found["differences"] if (d["a"], d["b"], d["measure"]) == ("photographs", "mine", "real"))
    assert not loose["paired"] and loose["high"] < 0
    assert next(r for r in found["arena"]["rates"] if r["b"] == "mine")["n"] >= 25


def test_too_few_photographs_for_a_distance_are_said(world: Path) -> None:
    fill(world / "few", 0.7, IDS[:8], seed=5)
    with stub.serve() as service:
        more = {**options(world), "photographs": str(world / "few"), "features": "world/monitors"}
        assert run(world, [str(world / "dark")], bench(world / "b.yaml", service.url, **more)) == 0
        found = results(world)
        assert figure(found, "dark", "distance", "kernel")["value"] is None
        assert (
            "8" in figure(found, "dark", "distance", "kernel")["why"]
            and "needs" in figure(found, "dark", "distance", "frechet")["why"]
        )
        more["photographs"] = str(world / "photos")
        assert run(world, [str(world / "dark")], bench(world / "b.yaml", service.url, **more)) == 0
    found = results(world)
    kernel = figure(found, "dark", "distance", "kernel")
    assert kernel["low"] < kernel["value"] < kernel["high"] and figure(found, "dark", "distance", "frechet")["value"] is None
    assert figure(found, "dark", "diversity", "diversity")["value"] > 0


def test_a_judge_that_always_says_the_first_has_no_preference(world: Path) -> None:
    with stub.serve(first=True) as service:
        assert run(world, [str(world / "dark")], bench(world / "b.yaml", service.url, **options(world))) == 0
    arena = results(world)["arena"]
    assert arena["shown_first"] == pytest.approx(0.9) == arena["shown_first_interval"]["low"]
    assert arena["rates"][0]["value"] == 0.5 and arena["rates"][0]["ties"] == 40
    assert arena["ratings"][1]["value"] == pytest.approx(0, abs=1e-6)


class Tags(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.addresses, self.attributes = list[str](), list[str](), set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_names_and_prompts_are_only_text_in_the_page(world: Path) -> None:
    evil = "<script>alert(1)</script>"
    lines = [json.dumps({"id": name, "prompt": f"{evil}\"' onerror={name}"}) for name in IDS]
    (world / "prompts.jsonl").write_text("\n".join(lines))
    named = fill(world / "names", 0.5, ["=cmd()", "<img src=x onerror=alert(2)>", "a b"], seed=4)
    with stub.serve() as service:
        assert run(world, [str(world / "dark"), f"odd={named}"], bench(world / "b.yaml", service.url, **options(world))) == 0
    page, tags = (world / "out" / "report.html").read_text(), Tags()
    tags.feed(page)
    assert tags.seen.count("script") == 1 and "default-src 'none'" in page and evil not in page
    assert tags.addresses and all(address.startswith("data:image/") for address in tags.addresses)
    assert not [name for name in tags.attributes if name.startswith("on")]
    table = (world / "out" / "pictures.csv").read_text()
    assert "'=cmd()" in table and "\n=cmd" not in table and ",=cmd" not in table


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["a=dark", "a=again"], "given twice"),
        (["--photographs", "empty", "dark"], "holds no pictures"),
        (["photographs=photos", "dark"], "give those as --photographs"),
        (["--set", "detectors.real.url=http://127.0.0.1:9", "dark"], "no reward service answers"),
        (["--set", "detectors.reel={}", "dark"], "has no url"),
        (["--set", "detector={}", "dark"], "detector: Extra inputs"),
        (["--set", "arena.reward=real", "dark"], "scores single pictures"),
        (["--set", "rewards.pairs.url=URL", "dark"], "judges a picture against another"),
        (["--set", "form=long", "--set", "prompts=null", "m=model"], "no prompts"),
        (["--bench", "missing.yaml", "dark"], "no file"),
    ],
)
def test_what_cannot_begin_says_what_to_mend(
    world: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "empty").mkdir()
    (world / "model").mkdir()
    (world / "model" / "model_index.json").write_text("{}")
    monkeypatch.chdir(world)
    with stub.serve() as service:
        bench(world / "b.yaml", service.url, **options(world))
        told = [one.replace("URL", service.url) for one in arguments]
        where = [] if "--bench" in told else ["--bench", "b.yaml"]
        assert evaluate(["realbench", *told, *where, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (("realbench", "my_pictures/"), ("compare", "runs/before runs/after"), ("detectors", "--real photos/")):
        with pytest.raises(SystemExit) as end:
            evaluate([command, "--help"])
        assert end.value.code == 0 and said in capsys.readouterr().out
