"""What `make bench-trainer` compares: the loop as others write it and Verism's trainer compute the same, and its ways do what they say."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from bench import random_pipeline, trainer, trainer_report
from bench.peers.trainer_loop import Loop, advantages
from trainer.advantages.group_relative import group_relative

SMALL = random_pipeline.Size(16, 2, 2, 16, 4, (16, 16), (1, 1), (2, 2), (4, 8))
URLS = {"detector": "http://127.0.0.1:1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    made = tmp_path_factory.mktemp("bench")
    counts = random_pipeline.write(made / "tiny", SMALL)
    assert counts["transformer"] > 10_000
    texts = [json.dumps({"id": n, "prompt": text}) for n, text in enumerate(random_pipeline.prompts(4))]
    (made / "prompts.jsonl").write_text("\n".join(texts))
    return made


def config(folder: Path, **changes: Any) -> Any:
    return trainer.recipe("tiny", folder / "tiny", folder / "prompts.jsonl", URLS, **{"height": 16, "width": 16, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"guidance": 1.0}, {"window_first": 0, "window_last": 3}], ids=["recipe", "no guidance", "first steps"]
)
def test_both_compute_the_same(folder: Path, changes: dict[str, Any]) -> None:
    apart = trainer.agree(config(folder, **changes), 3)
    assert apart["states"] < 1e-4 and apart["logp"] < 1e-4, apart
    assert apart["loss"] < 1e-5 and apart["gradient"] < trainer.TOLERANCE, apart
    assert apart["kl"] > 1e-7 and apart["ratio_dev"] > 1e-4 and 0 < apart["clipfrac"] < 1, apart  # something to disagree about


def test_another_arithmetic_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = trainer.settings
    for change in ({"clip": 1e-5}, {"beta": 0.4}, {"guidance": 4.6}):
        monkeypatch.setattr(trainer, "settings", lambda c, micro_batch, change=change: replace(same(c, micro_batch), **change))
        apart = trainer.agree(config(folder), 3)
        assert apart["gradient"] > trainer.TOLERANCE, (change, apart)


def test_the_loop_takes_a_step(folder: Path) -> None:
    c, asked = config(folder), []

    def grey(images: Any, prompts: Any) -> list[float]:
        asked.append((len(images), len(set(prompts))))
        return [float(image.mean()) for image in images]

    loop = Loop(trainer.settings(c, 4), [grey, grey])
    before = {k: v.detach().clone() for k, v in loop.weights.items()}
    row = loop.step(["a red bag", "a blue boot"], 0)
    assert asked == [(9, 1)] * 4  # whole groups, one service after another
    assert row["step"] >= row["sample"] + row["wait"] + row["train"] - 1e-6
    assert any(bool((v != before[k]).any()) for k, v in loop.weights.items())


def test_advantages_are_those_of_the_trainer() -> None:
    rewards_RB = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 18)))
    group_B = torch.arange(2).repeat_interleave(9)
    wanted = group_relative(rewards_RB, torch.ones(3, 18, dtype=torch.bool), group_B, torch.ones(3))
    torch.testing.assert_close(advantages(rewards_RB, 9), wanted.values_B)


def test_texts_that_nobody_keeps() -> None:
    seen: list[list[str]] = []
    run = SimpleNamespace(
        policy=SimpleNamespace(encode=seen.append), config=SimpleNamespace(sampling=SimpleNamespace(micro_batch=2))
    )
    trainer._without(run, "without kept texts")
    run.policy.encode(["a bag", "a bag", "a bag"])
    run.policy.encode(["a bag", ""])
    new = [text for texts in seen for text in texts]
    assert [text.strip() for text in new] == ["a bag"] * 4 + [""]
    assert len(set(new)) == 4  # the two of one micro-batch are one text


def test_rewards_that_are_waited_for() -> None:
    done: list[Any] = []
    scorer = SimpleNamespace(submit=lambda pictures: (pictures, "asked"), collect=done.extend)
    blocked = trainer._without(SimpleNamespace(scorer=scorer), "without overlap")
    assert scorer.submit("pictures") == ("pictures", "asked") and done == [("pictures", "asked")] and blocked[0] > 0


def test_what_is_switched_is_said() -> None:
    assert trainer_report.WHAT.keys() == trainer.VARIANTS.keys() - {trainer.HERE}


def test_prompts_differ() -> None:
    assert len(set(random_pipeline.prompts(300))) == 300


def test_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in trainer.refused("cuda", ["sd35-medium"])
    assert "--device cuda" in trainer.refused("cpu", ["sd35-medium"])
    assert not trainer.refused("cpu", ["tiny", "100m"])


def test_ratios_within_a_round() -> None:
    rows = {trainer.LOOP: [{"step": 4.0}, {"step": 6.0}], trainer.HERE: [{"step": 2.0}, {"step": 2.0}]}
    assert trainer_report.ratios(rows, trainer.LOOP, trainer.HERE) == [2.0, 3.0]
    assert trainer_report.shown([2.0, 3.0, 4.0]) == "3.00 (2.00-4.00)"


@pytest.mark.e2e
def test_every_way_takes_a_step(folder: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    peak = trainer.Peak("cpu")
    with trainer_report.services(tmp_path) as urls:
        ways = [trainer.LOOP, *(name for name in trainer.VARIANTS if name != "with torch.compile")]
        rows: trainer_report.Rows = {}
        for name in ways:
            changes = {"height": 16, "width": 16, **trainer.VARIANTS.get(name, {})}
            c = trainer.recipe("tiny", folder / "tiny", folder / "prompts.jsonl", urls, **changes)
            way = trainer.loop(c, "tiny", texts, urls) if name == trainer.LOOP else trainer.here(c, name, tmp_path / name)
            with way as step:
                peak.reset()
                rows[name] = [{**step(0), "cpu": 0.0, "peak": peak.read()}]
            assert rows[name][0]["step"] > 0 and rows[name][0]["wait"] >= 0 and rows[name][0]["peak"] > 100
    assert rows[trainer.LOOP][0]["wait"] > 12 * trainer.SLEEP_MS / 1000  # four groups, three services, one after another
    told = trainer_report.summary("tiny", rows)
    assert told[trainer.LOOP]["faster_than_the_loop"] == [1.0, 1.0, 1.0]
    parts = {"transformer": 1}
    trainer_report.show(
        "tiny", "cpu", {"rows": rows, "summary": told, "parameters": parts, "apart": {"loss": 0.0, "gradient": 0.0}}
    )
