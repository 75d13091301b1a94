"""What moves between the rewriter, its engines, its losses and the pipeline. B completions, T tokens of the longest one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """B rewrites as they were drawn, on the CPU.

    `prompts` are the users' own texts, `prompt_ids` what the model was given for each (chat template and instruction included), `texts` what
    it wrote, decoded and stripped. `ids_BT` (B, T) int64 is padded on the right; `mask_BT` (B, T) bool is True up to and including the token
    that ends the turn. `logp_BT` (B, T) float32 are the sampler's own log-probabilities at its temperature over the whole vocabulary, 0 where
    masked. `ended_B` (B,) bool is False where the length ran out before the turn ended. `temperature` is the one they were drawn at.
    """

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    ids_BT: Tensor
    mask_BT: Tensor
    logp_BT: Tensor
    ended_B: Tensor
    temperature: float

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, rows: slice) -> "Completions":
        """Some of them, cut to their own longest."""
        longest = max(1, int(self.mask_BT[rows].sum(1).max()))
        ids_BT, mask_BT, logp_BT = (tensor[rows, :longest] for tensor in (self.ids_BT, self.mask_BT, self.logp_BT))
        prompts, prompt_ids, texts = self.prompts[rows], self.prompt_ids[rows], self.texts[rows]
        return Completions(prompts, prompt_ids, texts, ids_BT, mask_BT, logp_BT, self.ended_B[rows], self.temperature)


def joined(parts: Sequence[Completions]) -> Completions:
    """One after the other, padded to the longest; ValueError for different temperatures."""
    if len({part.temperature for part in parts}) != 1:
        raise ValueError("completions drawn at different temperatures cannot be joined")
    longest = max(part.ids_BT.shape[1] for part in parts)

    def padded(tensors: Iterator[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors])

    return Completions(
        tuple(text for part in parts for text in part.prompts),
        tuple(ids for part in parts for ids in part.prompt_ids),
        tuple(text for part in parts for text in part.texts),
        padded(part.ids_BT for part in parts),
        padded(part.mask_BT for part in parts),
        padded(part.logp_BT for part in parts),
        torch.cat([part.ended_B for part in parts]),
        parts[0].temperature,
    )


class LanguagePolicy(Protocol):
    """A causal language model that rewrites. Trained weights are float32 whatever the network runs in."""

    device: torch.device

    def prompt_ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Instruction and user's prompt by the chat template, with what opens the answer; PromptTooLong names the prompt and the limit."""

    def answer_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The tokens with which the model would write each text after `prompt_ids`, and the one that ends the turn; what looks like a special
        token in a text is written out in plain ones."""

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], *, temperature: float, max_new_tokens: int, micro_batch: int = 64
    ) -> Completions:
        """One rewrite for each prompt, from the whole distribution (no top-p, no top-k); row b is a function of seeds[b], whatever the batch.
        Temperature 0 takes the likeliest token, and its log-probabilities are those at temperature 1."""

    def logp(self, completions: Completions) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T) float32 of the completions' tokens at their temperature, and the entropy (B, T) of what could have followed,
        under the present weights, with gradient where grad is on; both 0 where masked."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser may change, by name."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the policy is what it was before training."""

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of the base weights."""

    def save(self, folder: Path, quiet: bool = False) -> None:
        """A PEFT adapter folder, which transformers, peft and vLLM read; the whole model in transformers' format without LoRA.
        `quiet` writes nothing."""


class Engine(Protocol):
    """Who draws the rewrites: the policy's own model, or a server that is told its weights."""

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], *, temperature: float, max_new_tokens: int) -> Completions:
        """As the policy's."""

    def sync(self, step: int) -> Mapping[str, Any]:
        """Give it the policy's present weights and see that they took: numbers for the log. SyncFailed says what did not."""

    def close(self) -> None:
        """Stop what was started."""
