"""One run with a rewriter: prompts -> rewrites -> pictures -> rewards -> advantages -> steps of whoever learns. Read `LanguageRun.step`.

The image side is `trainer.loop.Run` as it is; the rewriter, its engine and its learner are a `Writer`, whose state a checkpoint carries along.
Everything random is a function of (seed, step) here too.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from rich.table import Table
from transformers.utils import logging as transformers_logging

from trainer import checkpoint, plan
from trainer.advantages import transforms
from trainer.advantages.aggregate import aggregate, better
from trainer.advantages.common import Advantages
from trainer.config import ConfigError, Stopped
from trainer.language.arms import Arm, compared, unread, write_rewrites
from trainer.language.config import LanguageRunConfig
from trainer.language.judges import Judges
from trainer.language.penalties import Costs, costs, painted
from trainer.language.policy import TransformersEngine
from trainer.language.remote import VllmError
from trainer.language.tree import Tree, paint, rewrite_advantages
from trainer.language.types import Completions
from trainer.language.writer import Writer
from trainer.loop import Run, read_prompts, summary
from trainer.parallel import ALONE
from trainer.regularizers.gardo import together
from trainer.scoring import Rewards, Scorer
from trainer.types import Prompt, Rollout

COMPLAINTS = {
    "rewrites/truncated": "their length ran out before they ended: raise language.max_new_tokens, or begin with verism-train sft",
    "rewrites/empty": "nothing was written, and the user's own words were painted: begin with verism-train sft, or take another instruction",
    "rewrites/refusal": "the model declined, and the user's own words were painted: take another instruction or another model",
    "rewrites/unread": "they are longer than the image policy reads: lower language.penalties.length.max, or raise its max_sequence_length",
    "penalty/repetition": "they repeat themselves: lower language.temperature or language.optim.lr, or raise language.kl.weight",
    "penalty/subject": "they lose the subject: raise language.penalties.subject.weight or the weight of an alignment reward",
}


class EngineGone(Stopped):
    """No rewrites; the run is saved."""


@dataclass(frozen=True)
class Grown:
    """A step's pictures on their way: rollouts of whole rewrites in their order, what is asked about them, and the words that were painted."""

    rollouts: Sequence[Rollout]
    futures: Sequence[Any]
    texts: Sequence[str]


class LanguageRun(Run):
    """A run whose prompts are rewritten before they are painted; `language.mode` says who learns."""

    config: LanguageRunConfig

    def __init__(self, config: LanguageRunConfig, folder: Path, resume: bool = False, **options: Any) -> None:
        """As Run, on one rank."""
        if options.get("world", ALONE).size > 1:
            raise ConfigError(
                "a run with `language` is of one process: start it without torchrun (an engine may have GPUs of its own)"
            )
        diffusers_logging.set_verbosity_error()  # each text that an encoder cuts off; `rewrites/unread` counts them
        transformers_logging.set_verbosity_error()
        self.tree = Tree(config.group.prompts, config.language.rewrites, config.group.size)
        self.writer = Writer(config, read_prompts(config.prompts)) if config.language.policy is not None else None
        self._arms: dict[str, Arm] | None = None
        self._said: set[str] = set()
        self._fresh = True  # both policies are what they were before training
        try:
            super().__init__(config, folder, resume, **options)
        except BaseException:
            if self.writer is not None:
                self.writer.close()
            raise
        if self.writer is not None and options.get("services", True) and options.get("accept", True):
            try:
                self.writer.start()
            except BaseException:
                self.close()
                raise

    def parts(self) -> dict[str, checkpoint.Stateful]:
        """The rewriter's too."""
        return super().parts() | ({"language": self.writer} if self.writer is not None else {})

    def judges(self) -> Scorer:
        """Services that are asked with the user's words, or the painted ones."""
        return cast(Scorer, Judges(self.config))

    @property
    def services(self) -> Judges:
        return cast(Judges, self.scorer)

    @property
    def held_out(self) -> dict[str, float]:
        """Sign of each reward on which neither policy is trained."""
        whole = self.services.whole
        rows = zip(whole.names, whole.signs_R.tolist(), whole.weights_R.tolist(), strict=True)
        return {name: sign for name, sign, weight in rows if weight == 0}

    def accept(self) -> float:
        """Nothing to look at where no picture is learned from."""
        return super().accept() if self.config.paints else 0.0

    def step(self) -> dict[str, Any]:
        """One step: the tree grows, its pictures are scored while others are painted, and who learns at this step learns."""
        start, c, step = time.monotonic(), self.config, self.done
        mode = c.language.mode_at(step)
        users = self._prompts_of(step)
        written, told = self._written(step, users)
        rewritten = time.monotonic()
        self.profile.start()
        grown = self._grow(step, users, written, learned=mode != "language")
        sampled = time.monotonic()
        rewards = self.services.collect(cast(Any, grown.futures))
        waited = time.monotonic() - sampled
        self.versions.update(rewards.versions)
        numbers, usable, samples = dict(told), False, {"masked_samples": 0, "zero_std_groups": 0, "dropped_groups": 0}
        if mode != "language":
            advantages = self._of_pictures(grown, rewards)
            useful = bool(advantages.weights_B.any())
            learned = self.learner.learn(grown.rollouts, advantages, step) if useful else {}
            usable, numbers = useful, {**numbers, **learned, **advantages.numbers}
            samples["masked_samples"] = int((advantages.weights_B == 0).sum())
            samples |= {"zero_std_groups": advantages.zero_variance_groups, "dropped_groups": advantages.dropped_groups}
        if written is not None:
            judged = self._costs(users, written)
            numbers |= {
                **judged.numbers,
                **_written_numbers(written, self.tree),
                "rewrites/unread": unread(self.policy, grown.texts),
            }
            if mode != "images":
                advantages = self._of_rewrites(rewards, judged, written)
                useful = bool(advantages.weights_B.any())
                usable = usable or useful
                numbers |= {f"language/{key}": value for key, value in self._learn(written, advantages, step, useful).items()}
            self._complain(numbers)
        self.unscored_steps = 0 if bool(rewards.mask_RB.any()) else self.unscored_steps + 1
        self.done, self._fresh = self.done + 1, False
        end = time.monotonic()
        return self.metrics.write(
            "step",
            self.done,
            {
                **summary(cast(Scorer, self.services.whole), rewards, self.first, "mean", "std"),
                **numbers,
                "mode": mode,
                "skipped": not usable,
                "failed_scores": rewards.missing,
                **samples,
                "failures": dict(rewards.failures),
                "seconds/rewrite": rewritten - start,
                **self.profile.split(sampled - rewritten),
                "seconds/wait": waited,
                "seconds/train": end - sampled - waited,
                "pictures/second": c.pictures / (end - start),
            },
        )

    def measure(self) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """The fixed prompts and noise: the rewriter as it is against no rewriting, and against the rewriter before training, both painted by
        the image policy before training.

        `over_none/NAME` and `over_untrained/NAME` are means over prompts of the paired differences, `..._sem` their standard errors.
        """
        with self.learner.ema.swapped():
            images, arm = self._arm(self._now())
        values = compared(self.services.whole, arm, self._before(arm), self.first)
        if not self.quiet:
            write_rewrites(self.folder, self.done, self.prompts[1], arm, self.services.names)
        return values, images

    def plan(self, services: Mapping[str, str]) -> Table:
        """The image side as if all rewrites were prompts of their own (where it does not learn, its training is in the figures all the same),
        and one prompt's rewrites timed."""
        c, tree = self.config, self.tree
        self.config = self.sampler.config = c.model_copy(
            update={"group": c.group.model_copy(update={"prompts": tree.prompts * tree.rewrites})}
        )
        try:
            out = plan.table(self, services)
        finally:
            self.config = self.sampler.config = c
        out.add_section()
        out.add_row("who learns", c.language.mode)
        out.add_row("tree", f"{tree.prompts} prompts x {tree.rewrites} rewrites x {tree.pictures} pictures = {c.pictures} a step")
        if self.writer is not None:
            writer, start = self.writer, time.monotonic()
            learned = sum(p.numel() for p in writer.policy.trainable().values()) if c.writes else 0
            out.add_row("rewriter", f"{c.language.policy.path if c.language.policy else ''}, {learned:,} numbers trained")
            drawn = TransformersEngine(writer.policy, c.language.micro_batch).sample(
                [self.prompts[0][0].text] * tree.rewrites,
                [*range(tree.rewrites)],
                temperature=c.language.temperature,
                max_new_tokens=c.language.max_new_tokens,
            )
            taken = time.monotonic() - start
            out.add_row(
                "rewrites",
                f"{taken * tree.prompts:.2g} s a step by transformers, {int(drawn.mask_BT.sum()) / taken:.0f} tokens a second",
            )
        return out

    def gifts(self) -> dict[str, Callable[[Path], None]]:
        """Of whoever learned."""
        out = super().gifts() if self.config.paints else {}
        writer = self.writer
        if writer is None or writer.learner is None:
            return out
        learner = writer.learner

        def rewriter(folder: Path) -> None:
            with learner.averaged():
                writer.policy.save(folder, quiet=self.quiet)

        return {**out, "rewriter": rewriter}

    def wear(self, saved: checkpoint.Saved) -> None:
        """Of both."""
        super().wear(saved)
        self._fresh = False
        if self.writer is not None and self.writer.learner is not None:
            self.writer.forget()
            self.writer.learner.adopt(saved.under("state/language"), saved.meta["state"]["language"])

    def close(self) -> None:
        """And the engine."""
        super().close()
        if self.writer is not None:
            self.writer.close()

    def _written(self, step: int, users: Sequence[Prompt]) -> tuple[Completions | None, dict[str, float]]:
        """The step's rewrites; none where nobody rewrites. EngineGone, with the run saved."""
        if self.writer is None:
            return None, {}
        try:
            return self.writer.write(step, users)
        except VllmError as error:
            with contextlib.suppress(OSError):
                self.save()
            raise EngineGone(f"step {step + 1} has no rewrites: {error}. Mend that, and go on with --resume.") from error

    def _grow(self, step: int, users: Sequence[Prompt], written: Completions | None, learned: bool) -> Grown:
        """The pictures of all rewrites; each tree's leave for the services as soon as they are painted."""
        tree, same = self.tree, self.config.language.same_noise
        owners = [users[n] for n in tree.prompt_N.tolist()]
        texts = [p.text for p in owners]
        if written is not None:
            texts = [painted(prompt.text, answer) for prompt, answer in zip(owners, written.texts, strict=True)]
        rewrites = [Prompt(prompt.id, text, prompt.meta) for prompt, text in zip(owners, texts, strict=True)]
        rollouts: list[Rollout] = []
        futures: list[Any] = []
        self._encode(texts)
        with self.learner.sampling_weights():
            for parts in tree.passes(self.config.sampling.batch):
                mine = [
                    paint(self.sampler, step, rewrites[part.start : part.stop], part, tree, same_noise=same, learned=learned)
                    for part in parts
                ]
                rollouts += mine
                places = [n for part in parts for n in part for _ in range(tree.pictures)]
                groups = [f"{step}/{n // tree.rewrites}" for n in places]
                images = np.concatenate([rollout.images_BHWC for rollout in mine])
                asked = [owners[n].text for n in places], [texts[n] for n in places]
                futures.append(self.services.submit(images, *asked, groups))
        return Grown(rollouts, futures, texts)

    def _costs(self, users: Sequence[Prompt], written: Completions) -> Costs:
        owners = [users[n].text for n in self.tree.prompt_N.tolist()]
        penalties = self.config.language.penalties
        assert self.writer is not None
        return costs(owners, written.texts, written.mask_BT.sum(1), written.ended_B, penalties, self.writer.instruction)

    def _complain(self, numbers: Mapping[str, float]) -> None:
        """Once in a run, where most rewrites of a step teach nothing."""
        for key, fix in COMPLAINTS.items():
            if numbers.get(key, 0.0) > 0.5 and key not in self._said:
                self._said.add(key)
                self.metrics.warn(f"{key.removeprefix('rewrites/')}: {100 * numbers[key]:.0f} % of the step's rewrites; {fix}")

    def _of_pictures(self, grown: Grown, rewards: Rewards) -> Advantages:
        """Each picture against the others of its rewrite."""
        features_BD = None
        if self.features is not None:
            features_BD = together(self.features, [r.images_BHWC for r in grown.rollouts])
        return aggregate(self.config, self.scorer, rewards, self.tree.rewrite_B, features_BD, self.gate)

    def _of_rewrites(self, rewards: Rewards, judged: Costs, written: Completions) -> Advantages:
        """Each rewrite against the others of its prompt."""
        c = self.config.language
        values = torch.stack([better(self.config, self.scorer, row, rewards) for row in range(len(self.services.names))])
        mask = rewards.mask_RB
        for row, name in enumerate(self.services.names):
            condition = self.config.rewards[name].gate
            if condition is not None:
                raw, known = rewards.values_RB[row], rewards.mask_RB[row]
                low, high = (
                    (-math.inf if condition.min is None else condition.min),
                    (math.inf if condition.max is None else condition.max),
                )
                values, mask = transforms.gate(
                    values, mask, self.tree.prompt_B, known & (raw >= low) & (raw <= high), known, condition.below
                )
        masked_N = ~written.ended_B if c.penalties.truncated.use == "mask" else torch.zeros_like(written.ended_B)
        return rewrite_advantages(
            values,
            mask,
            self.services.language_R,
            judged.total_B,
            masked_N,
            self.tree,
            use=c.advantages.use,
            options=c.advantages.options(),
            same_noise=c.same_noise,
            names=self.services.names,
        )

    def _learn(self, written: Completions, advantages: Advantages, step: int, useful: bool) -> dict[str, float]:
        """The rewriter's step."""
        assert self.writer is not None and self.writer.learner is not None
        numbers = {
            "masked": float((advantages.weights_B == 0).sum()),
            "flat_groups": float(advantages.zero_variance_groups),
            "dropped_groups": float(advantages.dropped_groups),
            **advantages.numbers,
        }
        if not useful:
            return numbers
        scale = self.learner.lr_scale
        return numbers | self.writer.learner.learn(written, advantages, step, lr_scale=scale, foreign=self.writer.foreign)

    def _put(self, saved: checkpoint.Saved, but: str = "") -> None:
        super()._put(saved, but)
        self._fresh = False

    def _now(self) -> list[str]:
        """What is painted of the evaluation's prompts, each once, as the rewriter is, through its average."""
        if self.writer is None or self.writer.learner is None:
            return self._answers()
        with self.writer.learner.averaged():
            return self._answers()

    def _answers(self) -> list[str]:
        known = self.prompts[1][: self.config.eval.samples]
        if self.writer is None:
            return [prompt.text for prompt in known]
        answers = self.writer.rewritten(known, self.config.eval.seed)
        return [painted(prompt.text, answer) for prompt, answer in zip(known, answers, strict=True)]

    def _arm(self, texts: Sequence[str]) -> tuple[NDArray[np.uint8], Arm]:
        """The evaluation's pictures of these words, one text for each prompt in turn, scored."""
        size, count, known = self.config.sampling.batch, self.config.eval.samples, self.prompts[1]
        prompts = [known[i % len(known)] for i in range(count)]
        words = [Prompt(p.id, texts[i % len(texts)], p.meta) for i, p in enumerate(prompts)]
        self._encode(texts)
        images = np.concatenate([self.sampler.pictures(words[n : n + size], n) for n in range(0, count, size)])
        futures = [self.services.submit(images, [p.text for p in prompts], [w.text for w in words], [""] * count)]
        rewards = self.services.collect(cast(Any, futures))
        monitors = self.monitors.measure(images, [p.meta.get("class") for p in prompts]) if self.monitors is not None else {}
        return images, Arm(rewards.values_RB, monitors, list(texts), rewards.missing)

    def _encode(self, texts: Sequence[str]) -> None:
        """All at once, where the encoders are fetched for it."""
        if self.policy.device.type != "cpu":
            self.policy.prepare(list(texts))

    def _before(self, now: Arm) -> dict[str, Arm]:
        """No rewriting, and the rewriter before training, both painted by the image policy before training: measured once, and kept in the
        run's folder under a digest of what they depend on."""
        if self._arms is not None:
            return self._arms
        path, key = self.folder / "rewrites" / "before.json", self._key()
        if path.is_file() and (told := checkpoint.read_json(path)).get("key") == key:
            self._arms = {name: Arm.of(arm) for name, arm in told["arms"].items()}
            return self._arms
        plain, arms = [prompt.text for prompt in self.prompts[1][: self.config.eval.samples]], dict[str, Arm]()
        with contextlib.nullcontext() if self._fresh else self.policy.reference():
            if self.writer is not None and self._fresh:
                arms["untrained"] = now
            elif self.writer is not None:
                with self.writer.policy.reference():
                    arms["untrained"] = self._arm(self._answers())[1]
            arms["none"] = now if self._fresh and now.texts == plain else self._arm(plain)[1]
        self._arms = arms
        if not self.quiet and not any(arm.missing for arm in arms.values()):
            path.parent.mkdir(exist_ok=True)
            checkpoint.write_json(path, {"key": key, "arms": {name: arm.plain() for name, arm in arms.items()}})
        return arms

    def _key(self) -> str:
        """Of what an evaluation before training depends on."""
        c, language = self.config, self.config.language
        about = [
            self.policy.fingerprint(),
            self.writer.policy.fingerprint() if self.writer is not None else "",
            self.writer.instruction if self.writer is not None else "",
            c.eval.model_dump(mode="json", exclude={"every", "grid"}),
            [language.eval_temperature, language.max_new_tokens, c.sampling.height, c.sampling.width],
            [prompt.text for prompt in self.prompts[1]],
            [*c.rewards],
        ]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _written_numbers(written: Completions, tree: Tree) -> dict[str, float]:
    """Tokens of a rewrite, the share whose length ran out, and how many of a prompt's rewrites differ."""
    count = tree.rewrites
    groups = [set(written.texts[n * count : (n + 1) * count]) for n in range(tree.prompts)]
    return {
        "rewrites/tokens": float(written.mask_BT.sum(1).double().mean()),
        "rewrites/truncated": float((~written.ended_B).double().mean()),
        "rewrites/distinct": sum(len(group) for group in groups) / (count * len(groups)),
    }
