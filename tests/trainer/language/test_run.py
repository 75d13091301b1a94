"""Runs with a rewriter of random weights, the small world's image policy and a real service: who learns, what is asked, faults, resuming."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.language import tiny
from tests.trainer.run.runs import numbers
from tests.trainer.run.service import Service, recipe, serve
from trainer import checkpoint, loop, report
from trainer.advantages.common import Advantages
from trainer.config import ConfigError, validate
from trainer.language import writer
from trainer.language.arms import paired
from trainer.language.config import LanguageConfig, LanguageRunConfig
from trainer.language.learning import TokenLearner
from trainer.language.penalties import painted
from trainer.language.policy import TransformersEngine
from trainer.language.run import EngineGone, LanguageRun
from trainer.language.tree import Tree, paint
from trainer.language.types import Completions, joined
from trainer.language.vllm import ServerGone, SyncFailed
from trainer.learning import Diverged
from trainer.metrics import read
from trainer.scoring import Scorer
from trainer.types import Prompt

Tells = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("rewriter") / "lm")


@pytest.fixture
def service() -> Iterator[Service]:
    with serve() as running:
        yield running


def config(
    url: str, model: Path, mode: str = "language", language: dict[str, Any] | None = None, **changes: Any
) -> LanguageRunConfig:
    """2 prompts, 4 rewrites of 6 tokens at most, 1 picture each (4 where pictures are learned from)."""
    told: dict[str, Any] = {
        "mode": mode,
        "policy": {"path": str(model), "instruction": "rewrite the prompt", "lora": {"rank": 4, "alpha": 8}},
        "rewrites": 4,
        "max_new_tokens": 6,
        "micro_batch": 8,
        "penalties": {"length": {"weight": 0}, "truncated": {"use": "penalise", "weight": 0.1}},
        "optim": {"lr": 1e-2},
        "alternate_every": 1,
        **(language or {}),
    }
    fewer = {
        "group": {"prompts": 2, "size": 1 if mode == "language" else 2, "allow_small": True},
        "sampling": {"steps": 3, "window": 1, "window_first": 0, "window_last": 2, "height": 28, "width": 28, "micro_batch": 16},
        "eval": {"every": 2, "samples": 4, "steps": 3, "grid": 4},
        "steps": 2,
    }
    made = validate(recipe(url, **{**fewer, **changes}, language=told), "recipe")
    assert isinstance(made, LanguageRunConfig)
    return made


def train(made: LanguageRunConfig, folder: Path, resume: bool = False, **options: Any) -> str:
    run = loop.run_of(made, folder, resume)
    try:
        return loop.train(run, **options)
    finally:
        run.close()


def made_run(made: LanguageRunConfig, folder: Path) -> LanguageRun:
    """A run to take single steps of; what it has to say of rewrites of random weights is not heard."""
    run = loop.run_of(made, folder)
    assert isinstance(run, LanguageRun)
    run.metrics.warn = lambda text: None
    return run


def lines(folder: Path, kind: str) -> Tells:
    return [line for line in read(folder / "metrics.jsonl") if line["kind"] == kind]


def weights(run: LanguageRun) -> dict[str, torch.Tensor]:
    assert run.writer is not None
    own = {f"image/{k}": v for k, v in run.weights.items()}
    return {k: v.detach().clone() for k, v in (own | run.writer.policy.trainable()).items()}


@pytest.mark.parametrize(
    ("mode", "learns"),
    [("language", ["language"] * 2), ("images", ["images"] * 2), ("both", ["both"] * 2), ("alternating", ["language", "images"])],
)
def test_who_learns(mode: str, learns: list[str], service: Service, model: Path, tmp_path: Path) -> None:
    made = config(service.url, model, mode)
    run = made_run(made, tmp_path / "run")
    try:
        for step, who in enumerate(learns):
            before = weights(run)
            line = run.step()
            moved = {k.startswith("image/") for k, v in weights(run).items() if not torch.equal(v, before[k])}
            assert moved == {"language": {False}, "images": {True}, "both": {True, False}}[who]
            assert line["mode"] == who and not line["skipped"] and line["step"] == step + 1
            assert ("language/grad_norm" in line) == (who != "images") and ("ratio_dev" in line) == (who != "language")
        assert service.pictures == 2 * made.pictures == 2 * 2 * 4 * made.group.size
        assert set(run.gifts()) == ({"rewriter"} if mode != "images" else set()) | ({"adapter"} if mode != "language" else set())
    finally:
        run.close()


def test_a_whole_run_leaves_what_is_needed(service: Service, model: Path, tmp_path: Path) -> None:
    assert train(config(service.url, model), tmp_path / "run") == "finished"
    first, last = lines(tmp_path / "run", "eval")
    assert first["over_untrained/brightness"] == 0.0 == first["over_untrained/total"]
    assert first["untrained/brightness"] == first["reward/brightness/mean"] and "none/brightness" in first
    difference = last["reward/brightness/mean"] - last["none/brightness"]
    assert last["over_none/brightness"] == pytest.approx(difference, abs=1e-9) and last["over_none/brightness_sem"] > 0
    told = [json.loads(line) for line in (tmp_path / "run" / "rewrites" / "step_000002.jsonl").read_text().splitlines()]
    assert len(told) == 4 and all(row["rewrite"] and row["rewards"]["brightness"] > 0 for row in told)
    best = json.loads((tmp_path / "run" / "done.json").read_text())["best_step"]
    start = {"rank": 4, "alpha": 8, "start": tmp_path / "run" / "rewriter"}
    again = tiny.policy(model, instruction="rewrite the prompt", lora=start)
    told = [json.loads(line) for line in (tmp_path / "run" / "rewrites" / f"step_{best:06d}.jsonl").read_text().splitlines()]
    drawn = again.sample([row["prompt"] for row in told], [0] * 4, temperature=0.0, max_new_tokens=6)
    assert [painted(p, t) for p, t in zip(drawn.prompts, drawn.texts, strict=True)] == [row["rewrite"] for row in told]


def test_without_a_rewriter_the_users_words_are_painted(service: Service, tmp_path: Path) -> None:
    made = config(service.url, Path("unused"), "images", {"policy": None, "rewrites": 1}, steps=1)
    assert train(made, tmp_path / "run") == "finished"
    assert not (tmp_path / "run" / "rewriter").exists() and (tmp_path / "run" / "adapter").is_dir()
    assert "untrained/total" not in lines(tmp_path / "run", "eval")[0]


@pytest.mark.parametrize("mode", ["language", "both"])
def test_killed_and_resumed_equals_uninterrupted(mode: str, service: Service, model: Path, tmp_path: Path) -> None:
    language = {"ema": {"decay": 0.5}, "kl": {"weight": 0.01}, "optim": {"lr": 1e-2, "updates": 2}}
    made = config(service.url, model, mode, language, steps=4)
    assert train(made, tmp_path / "whole") == "finished"
    seen: Tells = []
    stop = {"stop": lambda: len([line for line in seen if line["kind"] == "step"]) == 3, "tell": seen.append}
    assert train(made, tmp_path / "halves", **stop) == "interrupted"
    shutil.rmtree(checkpoint.folder_of(tmp_path / "halves", 3))  # as if killed after the checkpoint of step 2
    (tmp_path / "halves" / "rewrites" / "before.json").unlink()  # measured again, under the reference
    assert train(made, tmp_path / "halves", resume=True) == "finished"
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")
    written = [load_file(tmp_path / n / "rewriter" / "adapter_model.safetensors") for n in ("whole", "halves")]
    assert all(torch.equal(written[0][k], written[1][k]) for k in written[0])
    step = lines(tmp_path / "whole", "step")[-1]
    assert step["language/kl"] > 0 and step["language/ratio_dev"] > 0, "the second update of a step is off-policy"


def test_each_reward_is_asked_with_the_words_that_it_is_to_judge(
    service: Service, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[str, ...], list[str], list[str]]] = []
    submit = Scorer.submit

    def spied(self: Scorer, images: Any, prompts: Any, groups: Any) -> Any:
        asked.append((self.names, list(prompts), list(groups)))
        return submit(self, images, prompts, groups)

    monkeypatch.setattr(Scorer, "submit", spied)
    rewards = {"brightness": {"url": service.url}, "darkness": {"url": service.url, "weight": 0.0}}
    language = {"rewards": {"brightness": {"judged_by": "rewrite", "weight": 0.0}, "darkness": {"weight": 2.0}}}
    run = made_run(config(service.url, model, language=language, rewards=rewards), tmp_path / "run")
    assert run.writer is not None
    try:
        users = run._prompts_of(0)
        written, _ = run.writer.write(0, users)
        line = run.step()
        assert run.services.names == ("brightness", "darkness") and run.services.whole.weights_R.tolist() == [0.0, 1.0]
        assert run.held_out == {"brightness": 1.0}
    finally:
        run.close()
    told = {names: (prompts, groups) for names, prompts, groups in asked}
    own = [user.text for user in users for _ in range(4)]
    assert told[("darkness",)] == (own, ["0/0"] * 4 + ["0/1"] * 4)
    assert told[("brightness",)][0] == [painted(p, t) for p, t in zip(own, written.texts, strict=True)]
    assert line["reward/brightness/mean"] + line["reward/darkness/mean"] == pytest.approx(1.0), "rows in the recipe's order"


def test_rewrites_of_a_prompt_are_painted_from_the_same_noise(service: Service, model: Path, tmp_path: Path) -> None:
    run = made_run(config(service.url, model, "both"), tmp_path / "run")
    try:
        words = [Prompt(7, text) for text in ("a bag", "a bag", "a red coat", "a bag")]
        pictures = {}
        for same, learned in ((True, False), (False, False), (True, True)):
            drawn = paint(run.sampler, 0, words, range(4), Tree(1, 4, 2), same_noise=same, learned=learned)
            pictures[same, learned] = drawn.images_BHWC.reshape(4, 2, 28, 28, 3)
            assert len(drawn.levels_T) == (1 if learned else 0)
        for images in (pictures[True, False], pictures[True, True]):
            assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[3]), "the words are all that differs"
            assert not np.array_equal(images[0], images[2]) and not np.array_equal(images[0, 0], images[0, 1])
        assert not np.array_equal(pictures[False, False][0], pictures[False, False][1])
    finally:
        run.close()


def test_half_of_the_scores_missing(service: Service, model: Path, tmp_path: Path) -> None:
    """Every second picture fails: of two pictures of a rewrite one is left; of one picture every second rewrite has none."""
    service.fault = "some"
    for size, masked in ((2, 0), (1, 4)):
        made = config(service.url, model, group={"prompts": 2, "size": size, "allow_small": True})
        run = made_run(made, tmp_path / str(size))
        line = run.step()
        run.close()
        assert line["failed_scores"] == 4 * size and line["language/masked"] == masked and not line["skipped"]


def test_a_gate_closes_for_rewrites_too(service: Service, model: Path, tmp_path: Path) -> None:
    """No picture is as bright as 2: all are left out of what the rewriter learns, and yet they were scored."""
    rewards = {"brightness": {"url": service.url, "gate": {"min": 2.0, "below": "mask"}}}
    run = made_run(config(service.url, model, rewards=rewards), tmp_path / "run")
    line = run.step()
    run.close()
    assert line["skipped"] and line["language/masked"] == 8 and line["failed_scores"] == 0 and run.unscored_steps == 0


def test_no_score_at_all_stops_with_the_rewriter_as_it_was(model: Path, tmp_path: Path) -> None:
    with serve() as service:
        run = loop.run_of(config(service.url, model, max_unscored_steps=2, steps=9), tmp_path / "run")
        assert isinstance(run, LanguageRun)
        before, seen = weights(run), list[dict[str, Any]]()

        def tell(line: dict[str, Any]) -> None:
            seen.append(line)
            service.fault = "down"

        with pytest.raises(loop.GaveUp, match="--resume"):
            loop.train(run, tell=tell)
        run.close()
        assert all(torch.equal(before[k], v) for k, v in weights(run).items())
        assert [line["skipped"] for line in seen if line["kind"] == "step"] == [True, True]


def test_rewrites_that_all_ran_out_teach_nothing_and_it_is_said(service: Service, model: Path, tmp_path: Path) -> None:
    said: Tells = []
    made = config(service.url, model, language={"max_new_tokens": 1, "penalties": {}}, max_unscored_steps=1)
    assert train(made, tmp_path / "run", tell=said.append) == "finished", "their pictures were scored"
    steps = [line for line in said if line["kind"] == "step"]
    if all(line["rewrites/truncated"] == 1.0 for line in steps):
        assert all(line["skipped"] and line["language/masked"] == 8 for line in steps)
    notes = [line["text"] for line in said if line["kind"] == "note"]
    assert len([text for text in notes if "language.max_new_tokens" in text]) == 1, "once"


class Fragile(TransformersEngine):
    """Draws as the policy's own model does, until it is told to fail; vLLM itself is not here, its errors are."""

    error: Exception | None = None
    at = 0

    def sync(self, step: int) -> Any:
        if isinstance(self.error, SyncFailed):
            raise self.error
        return super().sync(step)

    def sample(self, *arguments: Any, **options: Any) -> Completions:
        Fragile.at += 1
        if self.error is not None and Fragile.at >= 2:
            raise self.error
        return super().sample(*arguments, **options)


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fragile]]:
    monkeypatch.setattr(writer, "engine_of", lambda use, policy, config: Fragile(policy, config.micro_batch))
    yield Fragile
    Fragile.error, Fragile.at = None, 0


def test_an_engine_that_is_gone_ends_the_run_saved_and_it_goes_on_to_the_same_numbers(
    service: Service, model: Path, tmp_path: Path, fragile: type[Fragile]
) -> None:
    made = config(service.url, model, steps=3)
    assert train(made, tmp_path / "whole") == "finished"
    fragile.at, fragile.error = 0, ServerGone("no answer for 60 s")
    with pytest.raises(EngineGone, match="step 2 has no rewrites: no answer for 60 s.*--resume"):
        train(made, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run")[-1] == 1, "saved where it stood, not at the last evaluation"
    fragile.error = None
    assert train(made, tmp_path / "run", resume=True) == "finished"
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_synchronisation_that_bound_nothing_ends_the_first_step(
    service: Service, model: Path, tmp_path: Path, fragile: type[Fragile]
) -> None:
    fragile.error = SyncFailed("it was taken, and binds nothing")
    with pytest.raises(EngineGone, match="step 1 has no rewrites: it was taken, and binds nothing"):
        train(config(service.url, model), tmp_path / "run")
    assert not lines(tmp_path / "run", "step")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": {"path": "nowhere/at/all"}}, r"language\.policy\.path"),
        ({"policy": {"path": "MODEL", "loar": {}}}, r"language\.policy\.loar"),
        ({"policy": {"path": "MODEL", "max_prompt_tokens": 4}}, r"prompts\.train, id 0.*max_prompt_tokens"),
        ({"max_new_tokens": 5000}, r"prompts\.train, id \d+.*language\.max_new_tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    change: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    told = json.loads(json.dumps(change).replace("MODEL", str(model)))
    with pytest.raises(ConfigError, match=words):
        loop.run_of(config("http://127.0.0.1:9", model, language=told), tmp_path / "run")


def test_a_checkpoint_of_another_rewriter_is_refused(service: Service, model: Path, tmp_path: Path) -> None:
    train(config(service.url, model, steps=1), tmp_path / "run")
    other = tiny.write(tmp_path / "other", seed=1)
    shutil.rmtree(tmp_path / "same", ignore_errors=True)
    held = tmp_path / "held"
    shutil.copytree(model, held)
    try:
        shutil.rmtree(model)
        shutil.copytree(other, model)
        with pytest.raises(checkpoint.CheckpointError, match=r"another model.*language\.policy\.path"):
            loop.run_of(config(service.url, model, steps=1), tmp_path / "run", True)
    finally:
        shutil.rmtree(model)
        shutil.copytree(held, model)


def test_the_report_prints_rewrites_before_and_after_and_believes_no_text(service: Service, model: Path, tmp_path: Path) -> None:
    train(config(service.url, model), tmp_path / "run")
    path = tmp_path / "run" / "rewrites" / "step_000002.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["rewrite"] = "<script>alert(1)</script>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tmp_path / "run" / "done.json"
    done.write_text(json.dumps({"best_step": 2, "reason": "finished"}))
    page = report.write_report(tmp_path / "run").read_text()
    assert "What rewriting does" in page and "4 rewrites, before and after" in page and "step 2" in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    before = json.loads((tmp_path / "run" / "rewrites" / "before.json").read_text())["arms"]["untrained"]["texts"]
    assert all(text.replace("'", "&#39;") in page for text in before)
    path.write_text("damaged")
    assert "What rewriting does" in report.write_report(tmp_path / "run").read_text()


def test_an_evaluation_of_a_checkpoint_is_that_of_the_run(service: Service, model: Path, tmp_path: Path) -> None:
    made = config(service.url, model)
    train(made, tmp_path / "run")
    line, images = loop.look(made, tmp_path / "run", 2)
    last = lines(tmp_path / "run", "eval")[-1]
    assert len(images) == 4 and all(line[key] == pytest.approx(last[key]) for key in line)


# ---------------------------------------------------------------- the token learner


def drawn(policy: Any, prompts: int, rewrites: int, seed: int) -> Completions:
    texts = [text for text in ("a bag", "a red coat", "boot", "dress")[:prompts] for _ in range(rewrites)]
    seeds = [seed * 1000 + n for n in range(len(texts))]
    out: Completions = policy.sample(texts, seeds, temperature=1.0, max_new_tokens=6)
    return out


def valued(score: Callable[[str], float], completions: Completions, rewrites: int) -> tuple[Advantages, float]:
    values = torch.tensor([score(text) for text in completions.texts])
    groups = values.view(-1, rewrites)
    centred = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    return Advantages(centred, torch.ones(len(values)), 0, 0), float(values.mean())


@pytest.mark.parametrize("use", ["grpo", "dapo", "dr_grpo", "cispo", "sapo", "gspo"])
def test_the_rewriter_learns_what_is_rewarded(use: str, model: Path) -> None:
    """Rewards for a word: the mean over 24 rewrites rises, whatever the loss."""
    policy = tiny.policy(model, lora={"rank": 4, "alpha": 8})
    given = {"loss": {"use": use}, "optim": {"lr": 3e-2, "weight_decay": 0.0}, "max_new_tokens": 6, "micro_batch": 8}
    learner, means = TokenLearner(policy, LanguageConfig.model_validate(given)), []
    for step in range(12):
        completions = drawn(policy, 3, 8, step)
        advantages, mean = valued(lambda text: float(text.split().count("coat")), completions, 8)
        means.append(mean)
        told = learner.learn(completions, advantages, step)
        assert told["grad_norm"] >= 0 and told["tokens"] == float(completions.mask_BT.sum())
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.2, means


def test_micro_batches_change_nothing_and_masked_rows_count_nowhere(model: Path) -> None:
    found = []
    for micro, masked in ((12, False), (5, False), (12, True)):
        policy = tiny.policy(model, lora={"rank": 4, "alpha": 8})
        learner = TokenLearner(
            policy, LanguageConfig.model_validate({"micro_batch": micro, "max_new_tokens": 6, "optim": {"lr": 1e-2}})
        )
        completions = drawn(policy, 3, 4, 0)
        advantages, _ = valued(lambda text: float(len(text)), completions, 4)
        if masked:  # three rows more, with wild advantages that must not matter
            more = dataclasses.replace(completions.rows(slice(0, 3)), ids_BT=completions.ids_BT[:3])
            wide = dataclasses.replace(more, mask_BT=completions.mask_BT[:3], logp_BT=completions.logp_BT[:3])
            completions = joined([completions, wide])
            advantages = Advantages(
                torch.cat([advantages.values_B, torch.full((3,), 99.0)]), torch.tensor([1.0] * 12 + [0.0] * 3), 0, 0
            )
        learner.learn(completions, advantages, 0)
        found.append({k: v.detach().clone() for k, v in learner.weights.items()})
    for other in found[1:]:
        assert all(torch.allclose(found[0][k], other[k], atol=2e-5) for k in other)


def test_what_another_engine_drew_counts_by_how_likely_it_is_here(model: Path) -> None:
    """Log-probabilities told 0.5 too high for one row: its ratio beyond the bound is dropped, and the gap is told."""
    told = {}
    for foreign in (False, True):
        policy = tiny.policy(model, lora={"rank": 4, "alpha": 8})
        loss = {"correction": "sequence_mask", "correction_high": 2.0}
        learner = TokenLearner(policy, LanguageConfig.model_validate({"loss": loss, "max_new_tokens": 6}))
        completions = drawn(policy, 1, 4, 0)
        off = completions.logp_BT.clone()
        off[0] -= 2.0 * completions.mask_BT[0] / completions.mask_BT[0].sum()
        advantages, _ = valued(lambda text: float(len(text)), completions, 4)
        told[foreign] = learner.learn(dataclasses.replace(completions, logp_BT=off), advantages, 0, foreign=foreign)
    assert told[True]["importance_dropped"] == pytest.approx(0.25) and "importance" not in told[False]
    assert told[True]["engine_gap"] == pytest.approx(told[False]["engine_gap"]) and told[True]["engine_gap"] > 0.05


def test_gradients_that_are_no_number_are_skipped_and_then_end_the_run(model: Path) -> None:
    policy = tiny.policy(model, lora={"rank": 4, "alpha": 8})
    learner = TokenLearner(policy, LanguageConfig.model_validate({"max_new_tokens": 6, "optim": {"max_bad_updates": 2}}))
    before = {k: v.detach().clone() for k, v in learner.weights.items()}
    completions = drawn(policy, 1, 4, 0)
    bad = Advantages(torch.full((4,), float("nan")), torch.ones(4), 0, 0)
    assert learner.learn(completions, bad, 0)["skipped_updates"] == 1.0
    with pytest.raises(Diverged, match=r"language\.optim\.max_bad_updates"):
        learner.learn(completions, bad, 1)
    assert all(torch.equal(before[k], v) for k, v in learner.weights.items())


def test_the_error_of_paired_differences_is_over_prompts() -> None:
    """Two pictures of each of three prompts; a NaN is left out, a prompt without any too."""
    nan = float("nan")
    mean, sem = paired(torch.tensor([1.0, 3.0, 5.0, 3.0, nan, 1.0], dtype=torch.float64), [0, 1, 2, 0, 1, 2])
    assert mean == pytest.approx((2 + 3 + 3) / 3) and sem == pytest.approx(torch.tensor([2.0, 3, 3]).std().item() / 3**0.5)
    assert paired(torch.tensor([nan]), [0]) == (None, None) and paired(torch.tensor([2.0]), [0]) == (2.0, None)
