"""Z-Image (Tongyi-MAI) through diffusers' components: its clock runs from noise 0 to data 1, and it predicts x0 - eps.

The network is asked at time (1000 - t) / 1000 and its output is negated. The pipeline's `guidance_scale` g means
v_pos + g (v_pos - v_neg); here `guidance` is 1 + g as everywhere, so that 1 is no guidance and one pass: the published g = 4 of the
base model is guidance 5, the g = 0 of Turbo is guidance 1.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from pydantic import Field
from torch import Tensor

from trainer.policies.kit import LoraOptions, Policy, PolicyOptions
from trainer.policies.texts import Row
from trainer.types import Condition


class ZImageLora(LoraOptions):
    """RealGen V2's adapter for Z-Image: rank 64, alpha 128, attention and feed-forward."""

    rank: int = Field(default=64, ge=1)
    alpha: float = Field(default=128, gt=0)
    targets: tuple[str, ...] = (
        *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    )


class ZImageOptions(PolicyOptions):
    """`policy:` of a recipe."""

    lora: ZImageLora | None = Field(default=ZImageLora(), description="null trains every weight of the transformer")


class ZImagePolicy(Policy):
    """The network takes lists: a picture and a text of its own length for each sample."""

    Options = ZImageOptions
    Pipeline = ZImagePipeline

    def _text(self, text: str) -> Row:
        (embeds,), _ = self.pipeline.encode_prompt(
            [text],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.options.max_sequence_length,
        )
        return {"embeds": embeds, "length": torch.tensor(len(embeds))}

    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """v = eps - x0, float32 (B, C, H, W), at one sigma () or one per sample (B,); guidance 1 costs one pass, others two."""
        x = latents_BCHW.to(self.dtype).unsqueeze(2)
        time = (1000 - self._sigma_B(sigma, len(x)) * 1000) / 1000
        lengths = condition.tensors["length"].tolist()
        texts = [row[:n] for row, n in zip(condition.tensors["embeds"], lengths, strict=True)]
        if guidance == 1.0:
            return -self._stacked(list(x), time, texts)
        empty = self._without()["embeds"][0]
        both = self._stacked([*x, *x], time.repeat(2), [*texts, *[empty] * len(x)])
        with_prompt, without = both.chunk(2)
        return -(with_prompt + (guidance - 1) * (with_prompt - without))

    def _stacked(self, pictures: list[Tensor], time_B: Tensor, texts: list[Tensor]) -> Tensor:
        return torch.stack([out.float() for out in self._network(pictures, time_B, texts)]).squeeze(2)

    def _space(self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, **shift: float) -> None:
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), **shift)  # float32, as the pipeline has them

    @property
    def largest(self) -> int:
        return int(min(self.transformer.config.axes_lens[1:])) * self.patch * self.scale
