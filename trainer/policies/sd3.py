"""Stable Diffusion 3 and 3.5 (2403.03206) through diffusers' components, with a LoRA through peft.

The tiny pipeline of `world/policy` and the published checkpoints take the same path:

>>> policy = SD3Policy.load("world/policy", max_sequence_length=1)
>>> condition = policy.encode(["a photo of a bag"])
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from trainer.types import Condition

TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)


class LoraOptions(BaseModel):
    """Published defaults for SD3 (Flow-GRPO, RealGen): rank 32, alpha 64, all attention projections."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64, gt=0)
    targets: tuple[str, ...] = TARGETS


class SD3Options(BaseModel):
    """`policy:` of a recipe, without `use`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str = Field(description="folder in diffusers format, or a hub id")
    revision: str | None = Field(default=None, description="commit of a hub id")
    lora: LoraOptions | None = Field(default=LoraOptions(), description="null trains every weight of the transformer")
    max_sequence_length: int = Field(default=256, ge=1, description="tokens of the T5 prompt")
    text_encoder_3: bool = Field(default=True, description="false leaves the T5 out, which saves most of the memory")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False


class SD3Policy:
    """encode, velocity, decode; the adapter's weights are float32 whatever the network runs in."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, options: SD3Options, device: str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.options, self.pipeline = options, pipeline
        self.transformer = pipeline.transformer
        self.transformer.requires_grad_(False)
        for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if module is not None:
                module.requires_grad_(False).eval().to(self.device)
        pipeline.vae.float()  # half precision loses the decoder's last bits, and detectors see them
        self._fingerprint = _fingerprint(self.transformer)
        if options.lora is None:
            self.transformer.float().requires_grad_(True)
            self._frozen = {k: v.detach().clone() for k, v in self.transformer.named_parameters()}
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.transformer.add_adapter(
                    LoraConfig(
                        r=options.lora.rank,
                        lora_alpha=options.lora.alpha,
                        init_lora_weights="gaussian",
                        target_modules=list(options.lora.targets),
                    )
                )
        for parameter in self.trainable().values():
            parameter.data = parameter.data.float()
        self.transformer.to(self.device).eval()
        if options.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._cache: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu", seed: int = 0, **options: Any) -> Self:
        """Read a pipeline from a diffusers folder or the hub; `options` as in SD3Options. FileNotFoundError for a missing folder."""
        chosen = SD3Options(path=str(path), **options)
        folder = Path(chosen.path)
        local = folder.is_dir()
        if not local and (chosen.path.startswith((".", "/", "world")) or chosen.path.count("/") != 1):
            raise FileNotFoundError(f"no policy at {chosen.path}: give a diffusers folder (model_index.json inside) or a hub id")
        if local and not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder} is not a diffusers pipeline: model_index.json is missing")
        leave_out: dict[str, Any] = {}
        if not chosen.text_encoder_3 or (local and _lacks(folder, "text_encoder_3")):
            leave_out = {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            chosen.path,
            revision=chosen.revision,
            dtype=getattr(torch, chosen.dtype),
            use_safetensors=True,
            local_files_only=local,
            **leave_out,
        )
        return cls(pipeline, chosen, device, seed)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """Embeddings (B, L, D) and pooled (B, E); each text is encoded once and kept in main memory."""
        for text in dict.fromkeys(["", *prompts]):
            if text not in self._cache:
                embeds, _, pooled, _ = self.pipeline.encode_prompt(
                    text,
                    None,
                    None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.options.max_sequence_length,
                )
                self._cache[text] = {"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu()}
        rows = [self._cache[text] for text in prompts]
        to = {"device": self.device, "dtype": self.transformer.dtype}
        return Condition({k: torch.stack([row[k] for row in rows]).to(**to) for k in ("embeds", "pooled")})

    def velocity(self, latents_BCHW: Tensor, sigma: Tensor, condition: Condition, guidance: float = 1.0) -> Tensor:
        """v = eps - x0, float32 (B, C, H, W), at one sigma () or one per sample (B,); guidance 1 costs one pass, others two."""
        x = latents_BCHW.to(self.transformer.dtype)
        time = (sigma.to(self.device, torch.float32) * 1000).expand(len(x))
        embeds, pooled = condition.tensors["embeds"], condition.tensors["pooled"]
        if guidance == 1.0:
            out: Tensor = self.transformer(x, embeds, pooled, time, return_dict=False)[0].float()
            return out
        empty = self.encode([""])
        both_embeds = torch.cat([empty.tensors["embeds"].expand_as(embeds), embeds])
        both_pooled = torch.cat([empty.tensors["pooled"].expand_as(pooled), pooled])
        both = self.transformer(torch.cat([x, x]), both_embeds, both_pooled, time.repeat(2), return_dict=False)[0].float()
        without, with_prompt = both.chunk(2)
        return without + guidance * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> NDArray[np.uint8]:
        """Pictures (B, H, W, 3) uint8; the autoencoder runs in float32."""
        vae = self.pipeline.vae
        latents = latents_BCHW.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pixels = vae.decode(latents, return_dict=False)[0]
        grey = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        out: NDArray[np.uint8] = grey.permute(0, 2, 3, 1).cpu().numpy()
        return out

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """The schedule, (steps + 1,) float32 from 1 to 0, as the pipeline's own scheduler spaces it."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        extra = {}
        if scheduler.config.use_dynamic_shifting:
            _, latent_height, latent_width = self.latent_shape(height, width)
            tokens = (latent_height // self.transformer.config.patch_size) * (latent_width // self.transformer.config.patch_size)
            c = scheduler.config
            slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
            extra["mu"] = c.base_shift + slope * (tokens - c.base_image_seq_len)
        scheduler.set_timesteps(steps, **extra)
        return scheduler.sigmas.float().to(self.device)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents; ValueError when the size does not divide into patches."""
        unit = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        if height % unit or width % unit:
            raise ValueError(f"height and width must be multiples of {unit} for this policy, not {height}x{width}")
        scale = self.pipeline.vae_scale_factor
        return self.transformer.config.in_channels, height // scale, width // scale

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """What the optimiser may change, by name."""
        return {k: p for k, p in self.transformer.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is what it was before training."""
        if self.options.lora is not None:
            self.transformer.disable_adapters()
            try:
                yield
            finally:
                self.transformer.enable_adapters()
            return
        own = self.trainable()
        held = {k: p.data for k, p in own.items()}
        try:
            for k, p in own.items():
                p.data = self._frozen[k]
            yield
        finally:
            for k, p in own.items():
                p.data = held[k]

    def save_adapter(self, folder: Path) -> None:
        """`pytorch_lora_weights.safetensors`, which diffusers' load_lora_weights reads; the whole transformer without LoRA."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.options.lora is None:
            self.transformer.save_pretrained(folder / "transformer")
            return
        # diffusers' own writer: it keeps alpha beside the weights, without which they would be scaled by rank / alpha
        config = self.transformer.peft_config["default"].to_dict()
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer),
            transformer_lora_adapter_metadata=config,
        )

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of values of the base weights: two policies differ in it."""
        return self._fingerprint


def _lacks(folder: Path, component: str) -> bool:
    index = json.loads((folder / "model_index.json").read_text())
    return index.get(component, [None, None])[0] is None


def _fingerprint(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
