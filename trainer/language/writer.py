"""The rewriter of a run, who draws for it, and its learner: loaded, checked against the prompts, and part of a checkpoint."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from trainer import checkpoint
from trainer.config import ConfigError
from trainer.language.config import LanguageRunConfig
from trainer.language.learning import TokenLearner
from trainer.language.policy import PromptTooLong, RewriterPolicy, TransformersEngine
from trainer.language.remote import VllmError
from trainer.language.types import Completions, Engine
from trainer.loop import device_of
from trainer.types import Prompt


class Writer:
    """The rewriter, who draws for it, and, where it learns, its learner. A part of a checkpoint."""

    def __init__(self, config: LanguageRunConfig, prompts: Sequence[Sequence[Prompt]]) -> None:
        """ConfigError names what cannot be loaded, and the prompt that the model cannot read."""
        self.config = c = config.language
        self.policy = load_rewriter(config)
        self.instruction = str(self.policy.chat.instruction)
        _readable(self.policy, prompts, c.max_new_tokens)
        self.learner = TokenLearner(self.policy, c) if config.writes else None
        self.seed, self.foreign = config.seed, c.engine.use != "transformers"
        self._engine: Engine | None = None
        self._synced = -1  # the optimiser step whose weights the engine has

    def start(self) -> Engine:
        """The engine, which a dry run and an evaluation do without."""
        if self._engine is None:
            self._engine = engine_of(self.config.engine.use, self.policy, self.config)
        return self._engine

    def write(self, step: int, prompts: Sequence[Prompt]) -> tuple[Completions, dict[str, float]]:
        """`rewrites` of each prompt in turn, and numbers; from an engine that has the present weights, or SyncFailed."""
        numbers: dict[str, float] = {}
        updates = self.learner.updates if self.learner is not None else 0
        if self._synced != updates:
            told = self.start().sync(step)
            numbers = {f"sync/{key}": float(value) for key, value in told.items() if isinstance(value, int | float)}
            self._synced = updates
        count = self.config.rewrites
        texts = [prompt.text for prompt in prompts for _ in range(count)]
        seeds = [rewrite_seed(self.seed, step, p.id, place * count + j) for place, p in enumerate(prompts) for j in range(count)]
        c = self.config
        return self.start().sample(texts, seeds, temperature=c.temperature, max_new_tokens=c.max_new_tokens), numbers

    def rewritten(self, prompts: Sequence[Prompt], seed: int) -> list[str]:
        """One answer to each prompt as evaluations ask, by the policy's own model as it stands."""
        c = self.config
        seeds = [rewrite_seed(seed, -1, prompt.id, 0) for prompt in prompts]
        texts, most = [prompt.text for prompt in prompts], c.max_new_tokens
        with torch.no_grad():
            drawn = self.policy.sample(texts, seeds, temperature=c.eval_temperature, max_new_tokens=most, micro_batch=c.micro_batch)
        return list(drawn.texts)

    def forget(self) -> None:
        """The weights were changed from outside: the engine has to be told."""
        self._synced = -1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.learner.state() if self.learner is not None else ({}, {"fingerprint": self.policy.fingerprint()})

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.forget()
        if self.learner is not None:
            self.learner.load_state(tensors, values)
        elif values["fingerprint"] != self.policy.fingerprint():
            raise checkpoint.CheckpointError(
                "the checkpoint's run had another rewriter than language.policy.path: give it, or take another --run-dir"
            )

    def close(self) -> None:
        """Stop the engine."""
        if self._engine is not None:
            self._engine.close()


def rewrite_seed(run: int, step: int, prompt: int, copy: int) -> int:
    """Seed of one rewrite: a hash of its own, beside those of pictures."""
    digest = hashlib.sha256(f"rewrite/{run}/{step}/{prompt}/{copy}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def load_rewriter(config: LanguageRunConfig) -> RewriterPolicy:
    """ConfigError for an option it does not have."""
    chosen = config.language.policy
    assert chosen is not None
    try:
        return RewriterPolicy.load(chosen.path, device=device_of(config), seed=config.seed, **chosen.options())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["language.policy", *map(str, first["loc"])])
        raise ConfigError(f"{where}: {first['msg']}; see {error.title} in trainer/language/policy.py for the options") from error
    except FileNotFoundError as error:
        raise ConfigError(f"language.policy.path: {error}") from error


def engine_of(use: str, policy: RewriterPolicy, config: Any) -> Engine:
    """ConfigError for an option it does not have, or a server that does not come up."""
    if use == "transformers":
        options = {"micro_batch": config.micro_batch, **config.engine.options()}
        if options.keys() > {"micro_batch"}:
            raise ConfigError(f"language.engine: {', '.join(options.keys() - {'micro_batch'})} is nothing that transformers takes")
        return TransformersEngine(policy, options["micro_batch"])
    from trainer.language.vllm import VllmEngine  # only runs with a server need it

    try:
        return cast(Engine, VllmEngine(cast(Any, policy), **config.engine.options()))
    except (ValueError, FileNotFoundError, VllmError) as error:
        raise ConfigError(f"language.engine: {error}") from error


def _readable(policy: RewriterPolicy, prompts: Sequence[Sequence[Prompt]], new: int) -> None:
    """ConfigError names the first prompt that leaves no room for a rewrite."""
    context = policy.network.context
    for key, part in zip(("train", "eval"), prompts, strict=True):
        for prompt in part:
            try:
                length = len(policy.prompt_ids([prompt.text])[0])
            except PromptTooLong as error:
                raise ConfigError(f"prompts.{key}, id {prompt.id}: {error}") from error
            if context is not None and length + new > context:
                raise ConfigError(
                    f"prompts.{key}, id {prompt.id}: {length} tokens with its instruction and {new} of a rewrite are more than the {context} "
                    "that the model reads: shorten the prompt, or lower language.max_new_tokens"
                )
