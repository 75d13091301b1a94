"""Qwen-Image (2508.02324) through diffusers' components: packed latents, texts with masks, an autoencoder for video.

Guidance is the pipeline's true CFG: v_neg + guidance (v_pos - v_neg), each token rescaled to the norm it has in v_pos; the negative
prompt is a space, as published.
"""

import torch
from diffusers import QwenImagePipeline
from pydantic import Field
from torch import Tensor

from trainer.policies.kit import JOINT_ATTENTION, LoraOptions, Policy, PolicyOptions, pack, unpack
from trainer.policies.texts import Row
from trainer.types import Condition


class QwenImageLora(LoraOptions):
    """Flow-GRPO trains FLUX and Qwen-Image with rank 64, alpha 128; targets: attention and both streams' feed-forwards."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=128, gt=0)
    targets: tuple[str, ...] = (*JOINT_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class QwenImageOptions(PolicyOptions):
    """`policy:` of a recipe."""

    lora: QwenImageLora | None = Field(default=QwenImageLora(), description="null trains every weight of the transformer")
    max_sequence_length: int = Field(default=512, ge=1, le=1024, description="tokens of a prompt")
    negative_prompt: str = Field(default=" ", description="the text of the second pass")


class QwenImagePolicy(Policy):
    """Latents (B, 16, H, W) outside; inside tokens of 2x2 patches for the network and one frame for the autoencoder."""

    Options = QwenImageOptions
    Pipeline = QwenImagePipeline

    def _text(self, text: str) -> Row:
        embeds, _ = self.pipeline.encode_prompt([text], device=self.device, max_sequence_length=self.options.max_sequence_length)
        return {"embeds": embeds[0], "length": torch.tensor(embeds.shape[1])}

    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """v = eps - x0, float32 (B, C, H, W), at one sigma () or one per sample (B,); guidance 1 costs one pass, others two."""
        batch, _, height, width = latents_BCHW.shape
        x = pack(latents_BCHW).to(self.dtype)
        time = (self._sigma_B(sigma, batch) * 1000).to(self.dtype) / 1000
        embeds, length_B = condition.tensors["embeds"], condition.tensors["length"]
        if guidance == 1.0:
            return unpack(self._tokens(x, time, embeds, length_B, height, width), height, width)
        empty = self._without()
        wide = max(embeds.shape[1], empty["embeds"].shape[1])
        texts = torch.cat([_widened(embeds, wide), _widened(empty["embeds"], wide).expand(batch, -1, -1)])
        lengths = torch.cat([length_B, empty["length"].expand(batch)])
        both = self._tokens(torch.cat([x, x]), time.repeat(2), texts, lengths, height, width)
        with_prompt, without = both.chunk(2)
        guided = without + guidance * (with_prompt - without)
        return unpack(guided * (with_prompt.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), height, width)

    def _tokens(self, x_BTD: Tensor, time_B: Tensor, embeds: Tensor, length_B: Tensor, height: int, width: int) -> Tensor:
        lengths = length_B.tolist()
        longest = max(lengths)
        # a mask rules out the fast attention kernels, so there is one only where texts differ in length
        mask = None if min(lengths) == longest else torch.arange(longest, device=self.device) < length_B[:, None]
        out: Tensor = self._network(
            hidden_states=x_BTD,
            timestep=time_B,
            encoder_hidden_states=embeds[:, :longest],
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_BTD),
        )
        return out.float()

    def _to_pixels(self, latents_BCHW: Tensor) -> Tensor:
        mean, std = self._moments()
        out: Tensor = self.pipeline.vae.decode((latents_BCHW * std + mean).unsqueeze(2), return_dict=False)[0]
        return out[:, :, 0]

    def _to_latents(self, pixels_BCHW: Tensor) -> Tensor:
        mean, std = self._moments()
        out: Tensor = self.pipeline.vae.encode(pixels_BCHW.unsqueeze(2)).latent_dist.mode()
        return (out[:, :, 0] - mean) / std

    def _moments(self) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std

    @property
    def channels(self) -> int:
        return int(self.transformer.config.in_channels) // 4


def _widened(embeds_BLD: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(embeds_BLD, (0, 0, 0, length - embeds_BLD.shape[1]))
