"""Runs whose detector is refitted, against a service of one feature that speaks the real wire; the twin of it is in tests/e2e."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.fitting.options import FitOptions
from tests.trainer.refitting import Kept, Refitting, serve
from tests.trainer.run.runs import run
from tests.trainer.run.service import recipe
from trainer import checkpoint, loop
from trainer.adversary import Detector, DetectorGone, due
from trainer.config import RECIPES, AdversaryConfig, ConfigError, RunConfig, ScheduleConfig, load, validate
from trainer.metrics import read
from trainer.scoring import NoService

ADVERSARY = {"key_env": "ADVERSARY_KEY", "lease_s": 2.0, "wait_s": 5.0}


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setenv("ADVERSARY_KEY", "secret")


@pytest.fixture
def service() -> Iterator[Refitting]:
    with serve() as running:
        yield running


def raw(url: str, adversary: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        **recipe(url),
        "sampling": {"steps": 3, "window": 1, "window_last": 2, "height": 28, "width": 28, "micro_batch": 8},
        "eval": {"every": 2, "samples": 4, "steps": 2, "grid": 4},
        "tensorboard": False,
        "rewards": {"brightness": {"url": url}, "darkness": {"url": url, "weight": 0}},
        "adversary": {"brightness": {"admin": url, **ADVERSARY, **(adversary or {})}},
        "references": {"path": "world/photographs", "evaluated": 12},
        "checkpoint_best": "heldout:darkness",
        **changes,
    }


def config(url: str, adversary: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(raw(url, adversary, **changes))


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The metrics without wall-clock times."""
    lines = read(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "seconds" not in k and not k.startswith("pictures/")} for line in lines]


def steps(folder: Path) -> list[dict[str, Any]]:
    return [line for line in numbers(folder) if line["kind"] == "step"]


def test_a_refit_after_each_step_serves_both_sides_and_the_next_step_is_scored_by_it(service: Refitting, tmp_path: Path) -> None:
    assert run(config(service.url), tmp_path / "run") == "finished"
    lines = steps(tmp_path / "run")
    assert [line["adversary/brightness/version"] for line in lines] == [2, 3, 4, 5]
    assert [line["adversary/brightness/refits"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["adversary/brightness/accuracy"] == 0.9 and lines[0]["adversary/brightness/accuracy_before"] == 0.6
    assert lines[0]["adversary/brightness/loss"] > 0 and lines[0]["adversary/brightness/kept_out"] == 0
    assert all(fit["real"] == fit["generated"] == 8 and fit["publish"] is False for fit in service.fits)
    generated = service.fits[0]["items"]["generated"]
    mean = np.mean([sum(item["image"]["data"]) / len(item["image"]["data"]) / 255 for item in generated])
    assert lines[0]["reward/brightness/mean"] == pytest.approx(mean, rel=1e-6), "the step's own pictures, by the version before"
    asked = [(pins, count) for names, pins, count in service.asked if "brightness" in names]
    assert all(pins is not None for pins, _ in asked)
    scored = [(pins["brightness"], count) for pins, count in asked if pins is not None]
    # evaluation and its references, two steps, the same, two steps, the same
    assert scored == [(1, 4), (1, 12), (1, 8), (2, 8), (3, 4), (3, 12), (3, 8), (4, 8), (5, 4), (5, 12)]
    looks = [line for line in numbers(tmp_path / "run") if line["kind"] == "eval"]
    assert [line["adversary/brightness/version"] for line in looks] == [1, 3, 5]
    for line in looks:
        gap = line["adversary/brightness/reference_mean"] - line["reward/brightness/mean"]
        assert line["adversary/brightness/gap"] == pytest.approx(gap, abs=1e-12)
    assert service.lease == "", "given back"


def test_groups_tie_both_sides_of_a_prompt(service: Refitting, tmp_path: Path) -> None:
    run(config(service.url, {"pictures": 8}, steps=1, group={"prompts": 4, "size": 4}), tmp_path / "run")
    items = service.fits[0]["items"]
    assert len(items["generated"]) == len(items["real"]) == 8
    texts = [item["prompt"] for item in items["generated"]]
    assert sorted(texts.count(text) for text in set(texts)) == [2, 2, 2, 2], "as many of each group"
    groups = {item["group"]: item["prompt"] for item in items["generated"]}
    assert {item["group"]: item["prompt"] for item in items["real"]} == groups and None not in groups


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"use": "every", "steps": 2}, [1, 2, 2, 3]),
        ({"use": "above", "mean": 0.0, "until_accuracy": 0.9}, [2, 3, 4, 5]),
        ({"use": "above", "mean": 9.0, "until_accuracy": 0.9}, [2, 2, 2, 2]),
        ({"use": "above", "mean": 9.0, "warm_up": False}, [1, 1, 1, 1]),
    ],
)
def test_schedules(schedule: dict[str, Any], wanted: list[int], service: Refitting, tmp_path: Path) -> None:
    run(config(service.url, {"schedule": schedule, "rounds": 3}), tmp_path / "run")
    assert [line["adversary/brightness/version"] for line in steps(tmp_path / "run")] == wanted
    assert all(fit["until_accuracy"] == schedule.get("until_accuracy") and fit["rounds"] == 3 for fit in service.fits)


def test_references_below_samples_by_the_same_version(service: Refitting, tmp_path: Path) -> None:
    run(config(service.url, {"schedule": {"use": "reference_below"}}), tmp_path / "run")
    lines = steps(tmp_path / "run")
    gaps = [line["adversary/brightness/gap"] for line in lines]
    for line, gap in zip(lines, gaps, strict=True):
        assert gap == pytest.approx(line["adversary/brightness/reference_mean"] - line["reward/brightness/mean"], abs=1e-12)
    refits = np.diff([0, *[line["adversary/brightness/refits"] for line in lines]])
    assert refits.tolist() == [int(gap < 0) for gap in gaps]


def test_references_below_with_overlap_are_scored_by_the_version_of_the_samples(service: Refitting, tmp_path: Path) -> None:
    """Sandals are darker than the rest, so each step is followed by a refit."""
    references = {"path": "world/photographs", "classes": ["sandal"], "evaluated": 12}
    run(config(service.url, {"schedule": {"use": "reference_below"}, "overlap": True}, references=references), tmp_path / "run")
    lines = steps(tmp_path / "run")
    assert [line["adversary/brightness/refits"] for line in lines] == [0, 1, 2, 3]
    assert all(line["adversary/brightness/gap"] < 0 for line in lines)


@pytest.mark.parametrize(
    ("step", "mean", "gap", "wanted"),
    [(0, 0.1, 1.0, True), (1, 0.61, 1.0, True), (1, 0.6, 1.0, False), (1, float("nan"), None, False)],
)
def test_realgen_refits_first_and_then_above(step: int, mean: float, gap: float | None, wanted: bool) -> None:
    assert due(ScheduleConfig(use="above", mean=0.6), step, mean, gap) is wanted


def test_overlap_begins_with_the_next_step_and_is_served_after_it(service: Refitting, tmp_path: Path) -> None:
    run(config(service.url, {"overlap": True}), tmp_path / "run")
    assert [line["adversary/brightness/version"] for line in steps(tmp_path / "run")] == [1, 2, 3, 4]
    assert len(service.fits) == 3


def test_an_overlapped_refit_that_cannot_begin_is_no_success(service: Refitting, tmp_path: Path) -> None:
    """The service still tells how the refit before went: published."""

    def refuse(service: Refitting) -> None:
        service.fault = "refuse" if service.version == 2 else ""

    service.before_score = refuse
    seen: list[dict[str, Any]] = []
    run(config(service.url, {"overlap": True}), tmp_path / "run", tell=seen.append)
    lines = steps(tmp_path / "run")
    assert [line["adversary/brightness/version"] for line in lines] == [1, 2, 2, 2]
    assert [line["adversary/brightness/refits"] for line in lines] == [0, 1, 1, 1]
    assert [line["adversary/brightness/kept_out"] for line in lines] == [0, 0, 1, 2]
    assert sum("too few real pictures" in line["text"] for line in seen if line["kind"] == "note") == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_killed_and_resumed_both_sides_go_on_in_step(overlap: bool, tmp_path: Path) -> None:
    """The trainer is thrown away after step 3, its checkpoint after it too, and the service has gone on to versions that are forgotten."""
    with serve() as service:
        run(config(service.url, {"overlap": overlap}, steps=6), tmp_path / "whole")
        whole = service.versions
    with serve() as service:
        seen: list[dict[str, Any]] = []
        stop = {"stop": lambda: len([line for line in seen if line["kind"] == "step"]) == 3, "tell": seen.append}
        run(config(service.url, {"overlap": overlap}, steps=6), tmp_path / "halves", **stop)
        shutil.rmtree(checkpoint.folder_of(tmp_path / "halves", 3))  # as if killed after the checkpoint of step 2
        service.sent["real"].append({"image": {"data": b"\xff" * 9}})  # half of what was being sent
        meta = json.loads((checkpoint.folder_of(tmp_path / "halves", 2) / "meta.json").read_text())
        assert meta["reward_versions"]["brightness"] == meta["state"]["adversary"]["brightness"]["version"] in service.snapshots
        assert run(config(service.url, {"overlap": overlap}, steps=6), tmp_path / "halves", resume=True) == "finished"
        assert service.versions == whole, "the same weights and the same replay buffers"
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")


def test_a_service_started_again_in_the_middle_of_a_refit_refits_again_to_the_same_numbers(tmp_path: Path) -> None:
    with serve() as service:
        run(config(service.url), tmp_path / "whole")
        whole = service.versions
    with serve() as service:
        service.fault = "lose"
        run(config(service.url), tmp_path / "lost")
        assert len(service.fits) == 5 and service.versions == whole
    assert numbers(tmp_path / "lost") == numbers(tmp_path / "whole")


def test_a_service_that_shuts_down_is_waited_for_and_the_refit_made_again(tmp_path: Path) -> None:
    with serve() as service:
        run(config(service.url), tmp_path / "whole")
        whole = service.versions

    def shut_down(service: Refitting) -> None:
        if service.version == 2:
            service.away, service.before_score = 3, None

    with serve() as service:
        service.before_score = shut_down
        run(config(service.url, reward_outage_s=30), tmp_path / "away")
        assert service.before_score is None and service.versions == whole
    assert numbers(tmp_path / "away") == numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fault", "words"),
    [("keep_out", "kept out: for the test"), ("fail", "failed: for the test"), ("refuse", "too few real pictures")],
)
def test_a_refit_that_is_kept_out_or_fails_is_told_and_the_old_version_goes_on(
    fault: str, words: str, service: Refitting, tmp_path: Path
) -> None:
    service.fault = fault
    seen: list[dict[str, Any]] = []
    assert run(config(service.url, steps=2), tmp_path / "run", tell=seen.append) == "finished"
    notes = [line["text"] for line in seen if line["kind"] == "note"]
    assert sum(words in text and "Version 1 goes on" in text for text in notes) == 2
    lines = steps(tmp_path / "run")
    assert [line["adversary/brightness/kept_out"] for line in lines] == [1, 2]
    assert [line["adversary/brightness/version"] for line in lines] == [1, 1] and not any(service.sent.values())


def test_a_refit_that_takes_too_long_is_given_up(service: Refitting, tmp_path: Path) -> None:
    service.fault = "slow"
    seen: list[dict[str, Any]] = []
    run(config(service.url, {"wait_s": 0.3}, steps=1), tmp_path / "run", tell=seen.append)
    assert any("wait_s=0.3: raise that" in line["text"] for line in seen if line["kind"] == "note")
    assert service.state.outcome == "idle", "and ended"


def test_a_version_that_is_gone_is_brought_back_and_the_step_drawn_again(tmp_path: Path) -> None:
    with serve() as service:
        run(config(service.url), tmp_path / "whole")

    def elsewhere(service: Refitting) -> None:
        """Somebody else has other weights served, once, under the third step."""
        if service.version == 3 and len(service.asked) == 6:
            service.versions[9], service.version = Kept(99.0), 9

    with serve() as service:
        service.before_score = elsewhere
        seen: list[dict[str, Any]] = []
        run(config(service.url), tmp_path / "moved", tell=seen.append)
    assert any("the step is drawn again" in line["text"] for line in seen if line["kind"] == "note")
    assert numbers(tmp_path / "moved") == numbers(tmp_path / "whole")


def test_a_version_that_never_comes_back_stops_the_run_with_the_fix(service: Refitting, tmp_path: Path) -> None:
    def forgetful(service: Refitting) -> None:
        if service.version == 2:
            service.versions, service.version = {1: Kept()}, 1

    service.before_score = forgetful
    with pytest.raises(
        DetectorGone, match=r"version 2 of brightness cannot be had back .*version 2 is not kept.*fit\.folder.*--resume"
    ):
        run(config(service.url), tmp_path / "run")
    assert service.lease == ""


def test_admin_and_url_that_are_not_one_service(service: Refitting, tmp_path: Path) -> None:
    with serve() as other:
        other.versions[7], other.version = Kept(), 7
        made = config(service.url, {"admin": other.url})
        with pytest.raises(DetectorGone, match="the same service as its reward's `url`"):
            run(made, tmp_path / "run")


def test_two_runs_one_detector(service: Refitting, tmp_path: Path) -> None:
    first = loop.Run(config(service.url, {"lease_s": 30.0}), tmp_path / "first")
    try:
        service.lease_until += 1e6
        second = config(service.url, {"lease_s": 2.0})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(NoService, match=r"refitted by another run: .*first.* has it"):
            patch.setattr("trainer.adversary.PATIENCE_S", -1.9)
            loop.Run(second, tmp_path / "second")
    finally:
        first.close()
    loop.Run(config(service.url), tmp_path / "third").close()


def test_the_lease_of_a_killed_run_is_waited_for(service: Refitting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert service.admin("POST", "lease", {"holder": "the one before", "seconds": 600})[0] == 200
    monkeypatch.setattr("trainer.adversary.time.sleep", lambda seconds: setattr(service, "lease_until", 0.0))  # time passes
    detector = Detector("brightness", AdversaryConfig(admin=service.url, **ADVERSARY), tmp_path, 0.0)  # type: ignore[arg-type]
    try:
        version, told = detector.open()
    finally:
        detector.close()
    assert version == 1 and "waited for the lease of brightness" in told and "the one before" in told


def test_a_lease_that_ran_out_is_taken_again(service: Refitting, tmp_path: Path) -> None:
    def late(service: Refitting) -> None:
        service.lease_until = 0.0  # the machine was asleep

    service.before_score = late
    assert run(config(service.url), tmp_path / "run") == "finished"
    assert service.version == 5


def test_a_service_that_was_started_again_keeps_the_version_of_a_checkpoint(service: Refitting, tmp_path: Path) -> None:
    detector = Detector("brightness", AdversaryConfig(admin=service.url, **ADVERSARY), tmp_path, 0.0)  # type: ignore[arg-type]
    try:
        detector.open()
        service.restart()
        assert detector.snapshot() is None and service.snapshots == {1}
    finally:
        detector.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_env": "NOWHERE_KEY"}, "NOWHERE_KEY holds none here"),
        ({"admin": "127.0.0.1:1"}, r"adversary\.brightness\.admin"),
        ({"admin": "http://127.0.0.1:9"}, "examples/serve/adversary.yaml"),
    ],
)
def test_a_start_that_cannot_be(changes: dict[str, Any], words: str, service: Refitting, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, NoService), match=words):
        loop.Run(config(service.url, changes), tmp_path / "run")


def test_a_wrong_key_and_a_reward_that_is_not_refitted(service: Refitting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = raw(service.url)
    made["adversary"] = {"darkness": made["adversary"]["brightness"]}
    made["checkpoint_best"] = "heldout:brightness"
    made["rewards"] = {"brightness": {"url": service.url, "weight": 0}, "darkness": {"url": service.url}}
    with pytest.raises(NoService, match="darkness cannot be refitted .*has no `fit:`"):
        loop.Run(RunConfig.model_validate(made), tmp_path / "one")
    monkeypatch.setenv("ADVERSARY_KEY", "wrong")
    with pytest.raises(NoService, match="does not take the key in ADVERSARY_KEY"):
        loop.Run(config(service.url), tmp_path / "two")


def test_a_checkpoint_whose_version_is_no_longer_kept(service: Refitting, tmp_path: Path) -> None:
    run(config(service.url, steps=2), tmp_path / "run")
    service.versions, service.version = {1: Kept()}, 1
    with pytest.raises(checkpoint.CheckpointError, match=r"version 3 of brightness.*fit\.folder.*--run-dir"):
        loop.Run(config(service.url), tmp_path / "run", resume=True)


def test_a_detector_that_was_refitted_before_is_told(service: Refitting, tmp_path: Path) -> None:
    service.versions[4], service.version = Kept(), 4
    made = loop.Run(config(service.url), tmp_path / "run")
    made.close()
    assert any("brightness is at version 4" in text for text in made.told)


def test_where_it_is_may_change_on_a_resume_and_what_it_learns_from_not(service: Refitting, tmp_path: Path) -> None:
    run(config(service.url, steps=2), tmp_path / "run")
    run(config(service.url, {"wait_s": 9.0, "lease_s": 3.0}, steps=3), tmp_path / "run", resume=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"adversary\.brightness\.pictures: None -> 8"):
        loop.Run(config(service.url, {"pictures": 8}), tmp_path / "run", resume=True)


def test_going_back_to_the_best_weights_leaves_detectors_as_they_are(service: Refitting, tmp_path: Path) -> None:
    made = loop.Run(config(service.url), tmp_path / "run")
    try:
        made.evaluate()
        made.save()
        start = {name: value.clone() for name, value in made.weights.items()}
        made.step()
        made.roll_back(checkpoint.read(checkpoint.folder_of(tmp_path / "run", 0)))
        assert made.adversary is not None and made.adversary.versions == {"brightness": 2} and service.version == 2
        assert all(torch.equal(start[name], value) for name, value in made.weights.items())
        made.step()
    finally:
        made.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"references": None}, "set references.path"),
        ({"adversary": {}}, "references are what an adversary"),
        ({"rewards": {"brightness": {"url": "http://x"}}, "checkpoint_best": "distance"}, "never learns"),
        ({"checkpoint_best": "total"}, "several versions"),
        ({"checkpoint_best": "distance"}, "several versions"),
        ({"rewards": {"darkness": {"url": "http://x"}}, "checkpoint_best": "total"}, "adversary.brightness is no reward"),
        ({"rewards": {"brightness": {"url": ["http://x", "http://y"]}, "darkness": {"url": "http://x", "weight": 0}}}, "one URL"),
        ({"sampling": {"height": 28, "width": 28, "ahead": True}}, "sampling.ahead"),
        ({"adversary": {"brightness": {"admin": "http://x", "pictures": 9}}}, "a step has 8"),
        ({"adversary": {"brightness": {"admin": "http://x", "schedule": {"use": "above"}}}}, "schedule.mean"),
        (
            {"adversary": {"brightness": {"admin": "http://x", "schedule": {"use": "above", "mean": 1, "steps": 2}}}},
            "schedule.steps",
        ),
        ({"adversary": {"brightness": {"admin": "http://x", "schedule": {"warm_up": False}}}}, "schedule.warm_up"),
        ({"adversary": {"brightness": {"admim": "http://x"}}}, "adversary.brightness.admin"),
    ],
)
def test_configurations_that_cannot_be_meant(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**raw("http://x"), **changes}, "test")


@pytest.mark.parametrize("name", [file.stem for file in sorted(RECIPES.glob("*.yaml")) if "\nadversary:" in file.read_text()])
def test_the_pictures_of_a_step_may_wait_at_the_service_that_a_recipe_describes(name: str) -> None:
    made, said = load(name, []), re.search(r"waiting_bytes: (\d+)", (RECIPES / f"{name}.yaml").read_text())
    limit = FitOptions().waiting_bytes if said is None else int(said[1])
    for one in made.adversary.values():
        count = one.pictures or made.group.prompts * made.group.size
        assert 2 * count * made.sampling.height * made.sampling.width * 3 <= limit, "both sides"


def test_a_rewriter_and_an_adversary() -> None:
    extra = ["adversary.alignment.admin=http://x", "references.path=world/photographs", "eval.monitors=world/monitors"]
    with pytest.raises(ConfigError, match="rewriter"):
        load("realgen_llm_small", extra)
