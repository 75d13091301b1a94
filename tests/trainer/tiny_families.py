"""Random pipelines of the real classes of FLUX.1, Z-Image and Qwen-Image, written in diffusers' format in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from tests.trainer import tiny

LENGTH, WIDTH = tiny.LENGTH, tiny.WIDTH
FAMILIES = ("flux", "qwen_image", "sd3", "z_image")
SHIFT = {"base_image_seq_len": 4, "max_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.15}
CHAT = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}{% if add_generation_prompt %} small{% endif %}"


def write(family: str, folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A pipeline of `sd3`, `flux`, `z_image` or `qwen_image` in `folder`: 4 latent channels, sizes in multiples of 4 pixels."""
    if family == "sd3":
        return tiny.write(folder, seed=seed, **options)
    torch.manual_seed(seed)
    name, parts = BUILDERS[family](**options)
    return tiny.save(folder, name, parts)


def paint(policy: Any, texts: list[str], start_BCHW: torch.Tensor, steps: int, guidance: float, output: str = "latent") -> Any:
    """The library's own sampler from the same first noise: latents (B, C, H, W), or pictures (B, H, W, 3) in [0, 1] (`np`)."""
    pipeline, (_, _, height, width) = policy.pipeline, start_BCHW.shape
    pipeline.set_progress_bar_config(disable=True)
    name, start, call = type(pipeline).__name__, start_BCHW.clone(), {}
    if name in ("FluxPipeline", "QwenImagePipeline"):
        start = pipeline._pack_latents(start, len(start), start.shape[1], height, width)
    if name == "QwenImagePipeline":
        call = {"true_cfg_scale": guidance, "negative_prompt": " "} if guidance > 1 else {"true_cfg_scale": 1.0}
    else:
        call["guidance_scale"] = guidance - 1 if name == "ZImagePipeline" else guidance
    size = {"height": height * policy.scale, "width": width * policy.scale}
    out = pipeline(
        list(texts),
        latents=start,
        output_type=output,
        num_inference_steps=steps,
        max_sequence_length=policy.options.max_sequence_length,
        **size,
        **call,
    ).images
    if output == "latent" and out.ndim == 3:
        out = pipeline._unpack_latents(out, size["height"], size["width"], policy.scale)
        out = out[:, :, 0] if out.ndim == 5 else out
    return out


def flux(guidance_embeds: bool = True) -> tuple[str, tiny.Parts]:
    """Two blocks; `guidance_embeds` as [dev] has them, without as [schnell], which shifts not at all."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    return "FluxPipeline", {
        "transformer": ("diffusers", _lively(transformer)),
        "vae": ("diffusers", _vae()),
        "scheduler": ("diffusers", FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=guidance_embeds, **SHIFT)),
        "text_encoder": ("transformers", CLIPTextModel(tiny.clip())),
        "text_encoder_2": ("transformers", tiny.t5_encoder(WIDTH)),
        "tokenizer": ("transformers", tiny.tokenizer()),
        "tokenizer_2": ("transformers", tiny.tokenizer()),
    }


def z_image() -> tuple[str, tiny.Parts]:
    """One layer and one refiner of each kind; static shift 3."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_(std=0.5)
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=3 + len(tiny.WORDS),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
        )
    )
    tokenizer = _right_padded()
    tokenizer.chat_template = CHAT
    return "ZImagePipeline", {
        "transformer": ("diffusers", _lively(transformer)),
        "vae": ("diffusers", _vae()),
        "scheduler": ("diffusers", FlowMatchEulerDiscreteScheduler(shift=3.0)),
        "text_encoder": ("transformers", encoder),
        "tokenizer": ("transformers", tokenizer),
    }


def qwen_image() -> tuple[str, tiny.Parts]:
    """One block, an autoencoder of factor 2 with moments of its own, a Qwen2.5-VL of two layers; dynamic shift with a last sigma."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.3, 0.2, 0.1, -0.1],
        latents_std=[1.5, 0.8, 2.0, 1.2],
    )
    text = {
        "vocab_size": 3 + len(tiny.WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14}
    special = {"image_token_id": 2, "video_token_id": 2, "vision_start_token_id": 0, "vision_end_token_id": 1}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02, **SHIFT)
    return "QwenImagePipeline", {
        "transformer": ("diffusers", _lively(transformer)),
        "vae": ("diffusers", vae),
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", encoder),
        "tokenizer": ("transformers", _right_padded()),
    }


BUILDERS: dict[str, Callable[..., tuple[str, tiny.Parts]]] = {
    "flux": flux,
    "z_image": z_image,
    "qwen_image": qwen_image,
}


def _vae() -> AutoencoderKL:
    return tiny.vae(use_quant_conv=False, use_post_quant_conv=False)


def _right_padded() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 4096
    return tokenizer


def _lively(transformer: torch.nn.Module) -> torch.nn.Module:
    """New networks start near zero in their last layers, norms and modulations, and hide what lies before."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if any(part in name for part in ("proj_out", "norm", "final_layer", "modulation", "mod.")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return transformer
