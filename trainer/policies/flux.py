"""FLUX.1 (black-forest-labs) through diffusers' components: packed latents, guidance as an input of the network, dynamic shift.

FLUX.1 [dev] was distilled with its guidance scale as an input (`guidance_embeds`): `guidance` is that number, always one pass, also
at 1. FLUX.1 [schnell] has no such input and knows no guidance but 1.
"""

import torch
from diffusers import FluxPipeline
from pydantic import Field
from torch import Tensor

from trainer.config import ConfigError
from trainer.policies.kit import JOINT_ATTENTION, LoraOptions, Policy, PolicyOptions, pack, unpack
from trainer.policies.texts import Row
from trainer.types import Condition


class FluxLora(LoraOptions):
    """Flow-GRPO's and RealGen's adapter for FLUX.1: rank 64, alpha 128, attention and both feed-forwards."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=128, gt=0)
    targets: tuple[str, ...] = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class FluxOptions(PolicyOptions):
    """`policy:` of a recipe."""

    lora: FluxLora | None = Field(default=FluxLora(), description="null trains every weight of the transformer")


class FluxPolicy(Policy):
    """Latents (B, 16, H, W) outside, tokens of 2x2 patches inside."""

    Options = FluxOptions
    Pipeline = FluxPipeline
    encoders = ("text_encoder", "text_encoder_2")
    two_passes = False

    def _text(self, text: str) -> Row:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.options.max_sequence_length
        )
        return {"embeds": embeds[0], "pooled": pooled[0]}

    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """v = eps - x0, float32 (B, C, H, W), at one sigma () or one per sample (B,); one pass whatever the guidance."""
        batch, _, height, width = latents_BCHW.shape
        scale = None
        if self.transformer.config.guidance_embeds:
            scale = torch.full((batch,), guidance, device=self.device)
        elif guidance != 1.0:
            raise ConfigError(f"this FLUX takes no guidance: set sampling.guidance and eval.guidance to 1.0, not {guidance}")
        embeds = condition.tensors["embeds"]
        out = self._network(
            hidden_states=pack(latents_BCHW).to(self.dtype),
            timestep=(self._sigma_B(sigma, batch) * 1000).to(self.dtype) / 1000,
            guidance=scale,
            pooled_projections=condition.tensors["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=positions(height // 2, width // 2).to(self.device, self.dtype),
        )
        return unpack(out.float(), height, width)

    @property
    def channels(self) -> int:
        return int(self.transformer.config.in_channels) // 4


def positions(rows: int, columns: int) -> Tensor:
    """(rows columns, 3): an unused axis, the row and the column of each token."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()
