"""Micro-batches chosen to fit, what a dry run says, and where the seconds of a step went."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.run.runs import numbers, run
from tests.trainer.run.service import recipe, serve
from trainer import checkpoint, loop, memory, plan
from trainer.__main__ import train
from trainer.config import ConfigError, RunConfig
from trainer.metrics import read
from trainer.profile import words


def auto(url: str, **changes: Any) -> RunConfig:
    sampling = {**recipe("x")["sampling"], "micro_batch": "auto"}  # type: ignore[dict-item]
    return RunConfig.model_validate(recipe(url, sampling=sampling, **changes))


@settings(deadline=None)
@given(
    st.integers(1, 1000),
    st.integers(0, 10**6),
    st.integers(1, 10**5),
    st.integers(1, 512),
    st.integers(1, 24),
    st.integers(0, 10**7),
)
def test_the_chosen_size_fits_and_is_made_of_whole_groups(
    base: int, fixed: int, each: int, most: int, group: int, room: int
) -> None:
    budget, asked = fixed + room, list[int]()

    def measure(count: int) -> int | None:
        asked.append(count)
        taken = base + fixed + each * count
        return taken if taken <= budget * 1.2 else None  # beyond that the allocator refuses

    size, took = memory.choose(measure, budget, most, group)
    fits = max(0, (budget - base - fixed) // each)
    if size == 0:
        assert fits == 0
        return
    assert 1 <= size <= most and base + fixed + each * size <= budget
    assert size % group == 0 or group % size == 0 or size in took
    assert len(asked) == len(set(asked)) <= math.log2(most) + 4
    assert 2 * size > min(fits, most) - group, "no more than half is given away beyond the groups"


@given(st.integers(1, 600), st.integers(1, 64), st.integers(2, 24))
@settings(deadline=None)
def test_passes_of_a_step_are_about_equal(size: int, groups: int, group: int) -> None:
    out = memory.even(size, groups, group)
    assert out <= size and (size < group or (out % group == 0 and -(-groups // (out // group)) == -(-groups // (size // group))))
    assert memory.even(252, 32, 12) == 192


def test_a_machine_too_small_for_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=true"):
        loop.Run(auto("http://127.0.0.1:9"), tmp_path / "run")


def test_the_size_is_chosen_once_and_kept_by_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak", SixAtMost)
    monkeypatch.setattr(memory, "free", lambda device: 2 * (6_000_000 + 1_000_000))
    with serve() as service:
        assert run(auto(service.url), tmp_path / "run") == "finished"
        chosen = json.loads((tmp_path / "run" / "micro_batch.json").read_text())
        assert chosen["micro_batch"] == 4 and chosen["bytes"]["4"] == 4_000_000, "whole groups of 4, of 6 that fit"
        fixed = {**recipe("x")["sampling"], "micro_batch": 4}  # type: ignore[dict-item]
        assert run(RunConfig.model_validate(recipe(service.url, sampling=fixed)), tmp_path / "fixed") == "finished"
        assert numbers(tmp_path / "run") == numbers(tmp_path / "fixed")
        monkeypatch.setattr(memory, "free", lambda device: 10**12)
        again = loop.Run(auto(service.url), tmp_path / "run", resume=True)
        assert again.config.sampling.micro_batch == 4 and not again.told, "as it was chosen on the smaller machine"
        again.close()
    assert "micro_batch: 4" in (tmp_path / "run" / "config.yaml").read_text()


class SixAtMost:
    """In place of the measurement: a megabyte a picture."""

    count = 0

    def __init__(self, policy: Any) -> None:
        self.before = policy.encode
        self.policy = policy

    def __enter__(self) -> memory.Peak:
        taken = memory.Peak()

        def encode(prompts: list[str]) -> Any:
            taken.bytes = 1_000_000 * len(prompts)
            return self.before(prompts)

        self.policy.encode = encode
        return taken

    def __exit__(self, *_: Any) -> None:
        self.policy.encode = self.before


def test_more_pictures_take_more_and_nothing_stays(tmp_path: Path) -> None:
    made = loop.Run(RunConfig.model_validate(recipe("http://127.0.0.1:9")), tmp_path / "run", services=False)
    taken = []
    for count in (2, 8, 32):
        with memory.peak(made.policy) as peak:
            memory.one_pass(made.policy, ["a bag"], (1, 28, 28), 1.0, count)
        assert peak.bytes is not None
        taken.append(peak.bytes)
    made.close()
    assert 2 * taken[0] < taken[1] and 2 * taken[1] < taken[2] < 100 * taken[0]  # the allocator may round up
    assert all(parameter.grad is None for parameter in made.weights.values())


def test_what_counts_as_memory_that_ended() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    assert memory.exhausted(error.value) and memory.exhausted(torch.OutOfMemoryError()) and memory.exhausted(MemoryError())
    assert not memory.exhausted(RuntimeError("shapes differ")) and not memory.exhausted(ValueError("can't allocate memory"))
    assert checkpoint.size(999) == "999 bytes" and checkpoint.size(3_214_000) == "3.21 MB"


def test_a_dry_run_needs_no_service_and_says_what_a_step_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve() as service:
        rewards = {"brightness": {"url": service.url}, "absent": {"url": "http://127.0.0.1:9"}}
        planned = recipe("x", rewards=rewards, sampling={**recipe("x")["sampling"], "micro_batch": 4})  # type: ignore[dict-item]
        (tmp_path / "tiny.yaml").write_text(json.dumps(planned))
        assert train([str(tmp_path / "tiny.yaml"), "--dry-run", "--run-dir", str(tmp_path / "run"), "steps=7"]) == 0
        assert service.requests == [], "nothing was scored"
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for figure in (
        "steps: 7",
        "28x28; latents 1x28x28, 784 numbers",
        "2 prompts x 4 = 8",
        "4 pictures a pass at most; 2 rollouts a step",
        "2 of 4 steps, in [0, 3)",
        "a step: sampling 8 (4 for each picture)",
        "a step: training 4 (2 for each picture, with backward)",
        "a step: reference 4 (2 for each picture)",
        "31,744 of",
        "508 kB a checkpoint",
        "answers at",
        "MISSING: no reward service answers",
        "start the services of absent",
    ):
        assert figure in said, figure
    assert not (tmp_path / "run").exists()


def test_every_kind_of_learning_can_be_rehearsed(tmp_path: Path) -> None:
    """With two rewards whose gradients are mixed, and with a reference; the weights stay as they are, and nothing is left behind."""
    url = {"url": "http://127.0.0.1:9"}
    sampling = {"steps": 6, "window": None, "height": 28, "width": 28, "micro_batch": 4}
    options: dict[str, Any] = {"sampling": sampling, "group": {"prompts": 1, "size": 4}, "kl": {"weight": 0.0}}
    mixed = {"loss": {"use": "nft", "marble_every": 1}, "rewards": {"a": url, "b": url}, "advantages": {"per_reward": True}}
    for name, more in (("mixed", mixed), ("pairs", {"loss": {"use": "dpo"}})):
        made = loop.Run(RunConfig.model_validate(recipe("x", **options, **more)), tmp_path / name, services=False)
        before = {key: weight.detach().clone() for key, weight in made.weights.items()}
        seen = plan.rehearse(made)
        assert (seen.calls["sampling"], seen.pictures["sampling"], seen.window) == (6, 24, (0, 0))
        assert seen.calls["training"] >= 4 and bool(seen.calls["reference"]) == (name == "pairs")
        assert all(torch.equal(before[key], weight) and weight.grad is None for key, weight in made.weights.items())
        made.close()


def test_a_dry_run_of_a_recipe_that_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe("http://127.0.0.1:9")))
    assert train([str(tmp_path / "tiny.yaml"), "--dry-run", "sampling.width=30"]) == 2
    assert "multiple" in capsys.readouterr().out


def test_the_seconds_of_a_step_are_told_apart(tmp_path: Path) -> None:
    with serve() as service:
        run(RunConfig.model_validate(recipe(service.url, steps=1)), tmp_path / "run")
    step = next(line for line in read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step")
    parts = [step[f"seconds/{name}"] for name in ("sample", "decode", "encode", "wait", "train")]
    assert all(part >= 0 for part in parts) and step["seconds/decode"] > 0
    assert sum(parts) == pytest.approx(8 / step["pictures/second"], rel=0.02)
    said = words(step)
    assert said.startswith("step 1 took") and "waiting for rewards" in said and "text encoding" in said
