"""Rewrites drawn by a vLLM server that is told the policy's weights before each rollout, and is never believed to have them.

A LoRA goes over as an adapter folder, under a new name each time; without LoRA the whole model is loaded anew from a folder. Then what the
server holds is compared with what was written (checksum), and its log-probabilities of a fixed text, and of one that it draws, with the
policy's (probe). A fresh LoRA changes nothing, so no probe could miss it: before the first step it is moved far, sent, and taken back
(rehearsal). A server that is away is waited for, given the same weights again, and asked for the whole rollout again.
"""

import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from shared.vllm_server import Server, free_port
from trainer.language.policy import RewriterPolicy
from trainer.language.remote import HELP, Away, NotThere, Remote, ServerGone, VllmError
from trainer.language.serving import LOOPBACK, VllmOptions, command
from trainer.language.synced import Adapter, SyncFailed, Whole
from trainer.language.types import Completions

__all__ = ["ServerGone", "SyncFailed", "VllmEngine", "VllmError", "VllmOptions"]

PROBE = ("a dog on a beach", "A dog on a beach, soft light and fine grain, a photo with natural detail.")
TEMPERATURE, TOKENS = 0.7, 8  # of the probe that the server draws
COLDEST, HOTTEST = 0.01, 2.0  # below, vLLM takes 0.01 in its place; above, it refuses
BANDS = {"float32": 2e-4, "bfloat16": 0.2, "float16": 0.2}
FAR = {"float32": 0.1, "bfloat16": 1.0, "float16": 1.0}  # by how much the rehearsal moves the probe, or five bands
SEEDS = 2**63 - 1
# The whole distribution, whatever the server's own settings; tokens and their log-probabilities told by number.
WHOLE: dict[str, Any] = {
    **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    **{"ignore_eos": True, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
}


@dataclass(frozen=True)
class Sent:
    """Weights under way: `logp_T` are the probe's log-probabilities under them by the policy, `moved` by how much one of them differs from
    the base model's at most (NaN without LoRA)."""

    name: str
    weights: Adapter | Whole
    logp_T: Tensor
    moved: float


class VllmEngine:
    """An `Engine`; `options` are VllmOptions'. ValueError when no server comes up, or the one at `url` is not as it has to be."""

    def __init__(self, policy: RewriterPolicy, **options: Any) -> None:
        self.policy, self.options = policy, (own := VllmOptions.model_validate(options))
        self.lora, self.band = policy.options.lora is not None, own.band or BANDS[policy.options.dtype]
        if not own.checksum and not self.lora:
            raise ValueError("checksum: off is for a LoRA alone; whole models are loaded by what serving.py adds to the server")
        url, key, server = _server(policy, own)
        self._remote = Remote(url, key, server, concurrent=own.concurrent, timeout_s=own.timeout_s, outage_s=own.outage_s)
        self._pool, self._lock = ThreadPoolExecutor(own.concurrent, thread_name_prefix="rewrites"), Lock()
        if own.exchange is not None:
            own.exchange.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="verism-rewriter-", dir=own.exchange)).absolute()
        self._run, self._count, self._rehearsed = secrets.token_hex(4), 0, False
        self._sent: Sent | None = None
        self._probe = _probe(policy)
        try:
            self._remote.start()
        except BaseException:
            self.close()
            raise

    @property
    def server(self) -> Server | None:
        """The server that was started here."""
        return self._remote.server

    def close(self) -> None:
        """Ends a server that was started here; takes the adapter from one that was not."""
        sent, self._sent = self._sent, None
        if sent is not None and self.server is None:
            self._forget(sent)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._remote.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], *, temperature: float, max_new_tokens: int) -> Completions:
        """ValueError: a temperature that vLLM does not take, or more tokens than the server's context. ServerGone after `outage_s`."""
        if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
            raise ValueError(f"vLLM draws at temperature 0, or from {COLDEST} to {HOTTEST}, and not at {temperature}")
        if self._sent is None:
            raise RuntimeError("the server has no weights of this policy yet: call sync(step) before sample")
        asked, sent = self.policy.prompt_ids(prompts), self._sent
        longest = max(map(len, asked), default=0)
        if longest + max_new_tokens > self._remote.context:
            raise ValueError(
                f"{longest} tokens of prompt and {max_new_tokens} new ones are more than the server's {self._remote.context}; lower "
                "max_new_tokens or max_prompt_tokens, or start it with a larger context"
            )
        with self._lock:
            rows = self._remote.patiently(
                lambda: self._rows(sent, asked, seeds, temperature, max_new_tokens), lambda: self._load(sent)
            )
        return self._completions(prompts, asked, rows, temperature)

    def sync(self, step: int) -> Mapping[str, Any]:
        """Numbers for the log: `probe` and `drawn` are the largest differences of log-probabilities from the policy's, `band` what they may be;
        `moved` and `moved_there` how far the probe is from the base model's by the policy and by the server; `tensors` that were compared;
        `starts` of a server here; `seconds`. SyncFailed, ServerGone."""
        began = time.monotonic()
        with self._lock:
            before, self._sent = self._sent, None
            if self.lora and not self._rehearsed:
                with self._far():
                    self._forget(self._give("rehearsal")[0])
                self._rehearsed = True
            self._sent, numbers = self._give(f"step-{step}")
            if before is not None:
                self._forget(before)
        starts = self.server.starts if self.server is not None else 0
        return {**numbers, "starts": starts, "seconds": time.monotonic() - began}

    def _give(self, what: str) -> tuple[Sent, dict[str, float]]:
        """The policy's present weights, held by the server and seen in what it says. SyncFailed, ServerGone."""
        self._count += 1
        name = f"{self._run}-{self._count}-{what}"
        folder, partial = self._folder / name, self._folder / f"{name}.partial"
        self.policy.save(partial)
        partial.rename(folder)  # whole, or not there
        logp_T, moved = self._logp(self._probe), math.nan
        if self.lora:
            with self._other(torch.zeros_like):
                moved = float((self._logp(self._probe) - logp_T).abs().max())
        weights = Adapter(folder) if self.lora else Whole(folder, self.policy.trainable(), self._count)
        sent = Sent(name, weights, logp_T, moved)
        numbers = self._remote.patiently(lambda: self._load(sent))
        numbers["drawn"] = self._remote.patiently(lambda: self._draw(sent), lambda: self._load(sent))
        return sent, numbers

    def _load(self, sent: Sent) -> dict[str, float]:
        """The server takes the weights, holds them, and finds the probe as likely as the policy. SyncFailed."""
        try:
            tensors = sent.weights.load(self._remote, sent.name, self.options.checksum)
            there_T = self._echo(sent)
            numbers = {"tensors": tensors, "band": self.band, "probe": float((there_T - sent.logp_T).abs().max())}
            if self.lora:
                numbers |= {"moved": sent.moved, "moved_there": float((there_T - self._echo(None)).abs().max())}
        except VllmError as error:
            raise error if isinstance(error, SyncFailed) else SyncFailed(str(error)) from error
        if self.lora and sent.moved > 0.25 * self.band and numbers["moved_there"] < 0.25 * sent.moved:
            raise SyncFailed(
                f"the adapter moves the probe by {sent.moved:.1e} in the policy and by {numbers['moved_there']:.1e} in the server, which "
                f"took it and computes without it. Are its names those of the server's model, and was that started with --enable-lora? {HELP}"
            )
        if not numbers["probe"] <= self.band:
            raise SyncFailed(
                f"the server's log-probabilities of the probe differ from the policy's by up to {numbers['probe']:.1e}, more than "
                f"{self.band:.1e}: it has other weights, another scale or a coarser precision. Give both the same base model and dtype; "
                "where that is so, measure the band and set it"
            )
        return numbers

    def _draw(self, sent: Sent) -> float:
        """The largest difference in a short rewrite drawn as rollouts are: warm, and from the prefix cache where that has it."""
        asked = self.policy.prompt_ids(PROBE[:1])
        drawn = self._completions(PROBE[:1], asked, self._rows(sent, asked, [self._count], TEMPERATURE, TOKENS), TEMPERATURE)
        worst = float((self._logp(drawn) - drawn.logp_BT[drawn.mask_BT]).abs().max())
        if not worst <= self.band / TEMPERATURE:
            raise SyncFailed(
                f"what the server says of its own draws at temperature {TEMPERATURE} differs from the policy's log-probabilities by up to "
                f"{worst:.1e}: start it with --logprobs-mode processed_logprobs and --generation-config vllm; {HELP}"
            )
        return worst

    def _rows(
        self, sent: Sent, asked: Sequence[Sequence[int]], seeds: Sequence[int], temperature: float, max_new_tokens: int
    ) -> list[Mapping[str, Any]]:
        """Each row's answer, all of them from these weights. Away."""
        body = {**WHOLE, "max_tokens": max_new_tokens, "temperature": temperature, "stop_token_ids": list(self.policy.end_ids)}

        def row(ids: Sequence[int], seed: int) -> Mapping[str, Any]:
            return self._complete(sent, {**body, "prompt": list(ids), "seed": int(seed) & SEEDS})

        futures = [self._pool.submit(row, ids, seed) for ids, seed in zip(asked, seeds, strict=True)]
        done, left = wait(futures, return_when=FIRST_EXCEPTION)
        for future in left:
            future.cancel()
        wait(left)
        for future in done:
            future.result()
        if not self.lora:
            Whole.still(self._remote, sent.name)
        return [future.result() for future in futures]

    def _complete(self, sent: Sent | None, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer's one choice; None asks the base model. The salt keeps what other weights computed out of the prefix cache."""
        name = sent.name if sent is not None and self.lora else self._remote.name
        told = {"model": name, "cache_salt": sent.name if sent is not None else self._run, **body}
        try:
            choice: Mapping[str, Any] = self._remote.post("/v1/completions", told)["choices"][0]
        except NotThere as error:
            raise Away(f"the server has lost the adapter: {error}") from error
        if choice["finish_reason"] not in ("stop", "length"):
            raise Away(f"a rewrite ended by {choice['finish_reason']}")
        return choice

    def _echo(self, sent: Sent | None) -> Tensor:
        """(T,) of the probe by the server, at temperature 1."""
        ids = self._probe.ids_BT[0].tolist()
        body = {"prompt": [*self._probe.prompt_ids[0], *ids], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        told = self._complete(sent, body)["prompt_logprobs"][-len(ids) :]
        return torch.tensor([row[str(token)]["logprob"] for row, token in zip(told, ids, strict=True)])

    def _logp(self, one: Completions) -> Tensor:
        """(T,) of a single row by the policy."""
        with torch.no_grad():
            return self.policy.logp(one)[0].cpu()[one.mask_BT]

    def _completions(
        self, prompts: Sequence[str], asked: Sequence[tuple[int, ...]], rows: Sequence[Mapping[str, Any]], temperature: float
    ) -> Completions:
        shape = len(rows), max((len(row["token_ids"]) for row in rows), default=1)
        ids_BT, mask_BT, logp_BT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        for b, row in enumerate(rows):
            ids, logps = row["token_ids"], row["logprobs"]["token_logprobs"]
            ids_BT[b, : len(ids)], logp_BT[b, : len(logps)] = torch.tensor(ids, dtype=torch.int64), torch.tensor(logps)
            mask_BT[b, : len(ids)] = True
        ended_B = torch.tensor([row["token_ids"][-1] in self.policy.end_ids for row in rows], dtype=torch.bool)
        texts = tuple(self.policy.text(row["token_ids"]) for row in rows)
        return Completions(tuple(prompts), tuple(asked), texts, ids_BT, mask_BT, logp_BT, ended_B, temperature)

    def _forget(self, sent: Sent) -> None:
        with suppress(Away, VllmError):
            sent.weights.unload(self._remote, sent.name)
        shutil.rmtree(sent.weights.folder, ignore_errors=True)

    @contextmanager
    def _other(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, each B of the LoRA is another."""
        kept = [(p, p.detach().clone()) for name, p in self.policy.trainable().items() if "lora_B" in name]
        try:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(change(value))
            yield
        finally:
            with torch.no_grad():
                for parameter, value in kept:
                    parameter.copy_(value)

    @contextmanager
    def _far(self) -> Iterator[None]:
        """Inside, the LoRA moves the probe by far more than the band. SyncFailed where none does."""
        far = max(5 * self.band, FAR[self.policy.options.dtype])
        with self._other(torch.zeros_like):
            base_T = self._logp(self._probe)
        for power in range(-10, 11):
            generator = torch.Generator().manual_seed(0)
            with self._other(_moved(2.0**power, generator)):
                if float((self._logp(self._probe) - base_T).abs().max()) > far:
                    yield
                    return
        raise SyncFailed("no value of the policy's LoRA changes its log-probabilities: it is not attached to the model")


def _probe(policy: RewriterPolicy) -> Completions:
    """A fixed rewrite, at temperature 1."""
    ids_BT, asked = torch.tensor(policy.answer_ids(PROBE[1:])), tuple(policy.prompt_ids(PROBE[:1]))
    mask_BT, logp_BT = torch.ones_like(ids_BT, dtype=torch.bool), torch.zeros(ids_BT.shape)
    return Completions(PROBE[:1], asked, PROBE[1:], ids_BT, mask_BT, logp_BT, torch.tensor([True]), 1.0)


def _moved(size: float, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda b: b + size * torch.randn(b.shape, generator=generator).to(b)


def _server(policy: RewriterPolicy, own: VllmOptions) -> tuple[str, str, Server | None]:
    """URL, key, and the server where one is to be started. ValueError, FileNotFoundError."""
    if own.url is not None:
        key = os.environ.get(own.key_env, "") if own.key_env is not None else ""
        if own.key_env is not None and not key:
            raise ValueError(f"key_env names {own.key_env}, which is not set; export the server's key in it")
        return own.url.rstrip("/").removesuffix("/v1"), key, None
    if not own.python.is_file():
        raise FileNotFoundError(f"no interpreter {own.python}; `make vllm` builds it, or set python to one that has vLLM")
    key, port = secrets.token_urlsafe(24), own.port or free_port()
    lora, model = policy.options.lora, Path(policy.folder)
    arguments, environment = command(
        own,
        str(model.absolute()) if model.is_dir() else str(model),  # the server has another working directory
        port,
        rank=None if lora is None else lora.rank,
        dtype=policy.options.dtype,
        cpu=policy.device.type == "cpu",
        revision=None if model.is_dir() else policy.options.revision,
    )
    url = f"http://{LOOPBACK}:{port}"
    return url, key, Server(own.python, arguments, url, {**environment, "VLLM_API_KEY": key}, own.log, own.start_s)
