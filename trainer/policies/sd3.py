"""Stable Diffusion 3 and 3.5 (2403.03206) through diffusers' components, with a LoRA through peft.

The tiny pipeline of `world/policy` and the published checkpoints take the same path:

>>> policy = SD3Policy.load("world/policy", max_sequence_length=1)
>>> condition = policy.encode(["a photo of a bag"])
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pydantic import Field
from torch import Tensor

from trainer.policies.kit import LoraOptions, Policy, PolicyOptions
from trainer.policies.texts import Row
from trainer.types import Condition


class SD3Options(PolicyOptions):
    """`policy:` of a recipe. LoRA as Flow-GRPO and RealGen published it: rank 32, alpha 64, all attention projections."""

    lora: LoraOptions | None = Field(default=LoraOptions(), description="null trains every weight of the transformer")
    max_sequence_length: int = Field(default=256, ge=1, description="tokens of the T5 prompt")
    text_encoder_3: bool = Field(default=True, description="false leaves the T5 out, which saves most of the memory")


class SD3Policy(Policy):
    """Latents are never packed; guidance is v_neg + guidance (v_pos - v_neg) in one forward pass of twice the batch."""

    Options = SD3Options
    Pipeline = StableDiffusion3Pipeline
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @classmethod
    def _leave_out(cls, options: SD3Options, index: Mapping[str, Any]) -> dict[str, None]:
        lacks = index.get("text_encoder_3", [None, None])[0] is None
        return {"text_encoder_3": None, "tokenizer_3": None} if lacks or not options.text_encoder_3 else {}

    def _text(self, text: str) -> Row:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.options.max_sequence_length,
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """v = eps - x0, float32 (B, C, H, W), at one sigma () or one per sample (B,); guidance 1 costs one pass, others two."""
        x = latents_BCHW.to(self.dtype)
        time = self._sigma_B(sigma, len(x)) * 1000
        embeds, pooled = condition.tensors["embeds"], condition.tensors["pooled"]
        if guidance == 1.0:
            out: Tensor = self._network(x, embeds, pooled, time).float()
            return out
        empty = self._without()
        both_embeds = torch.cat([empty["embeds"].expand_as(embeds), embeds])
        both_pooled = torch.cat([empty["pooled"].expand_as(pooled), pooled])
        both = self._network(torch.cat([x, x]), both_embeds, both_pooled, time.repeat(2)).float()
        without, with_prompt = both.chunk(2)
        return without + guidance * (with_prompt - without)

    def _space(self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, **shift: float) -> None:
        scheduler.set_timesteps(steps, **shift)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.transformer.config.patch_size)

    @property
    def largest(self) -> int:
        return int(self.transformer.config.pos_embed_max_size) * self.patch * self.scale
