"""Stable Diffusion 3 pipelines of the real classes with random weights, in diffusers' format: for the trainer's benchmark. They draw noise.

No T5: two CLIP encoders of a size that suits the transformer, as in SD3 without its third encoder. One token a word, 77 tokens a prompt.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = 77
WORDS = (
    "a",
    "photo",
    "of",
    "on",
    "the",
    "bag",
    "boot",
    "coat",
    "dress",
    "shirt",
    "red",
    "blue",
    "small",
    "large",
    "table",
    "street",
)


@dataclass(frozen=True)
class Size:
    """`side` in pixels; `vae` are the autoencoder's channels per level, which halves the sides from the second on."""

    side: int
    layers: int
    heads: int
    head_dim: int
    channels: int
    text_widths: tuple[int, int]
    text_layers: tuple[int, int]
    text_heads: tuple[int, int]
    vae: tuple[int, ...]
    dual_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    dtype: str = "float32"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SIZES = {
    "tiny": Size(32, 4, 4, 32, 4, (64, 64), (2, 2), (2, 2), (8, 16)),
    "100m": Size(128, 11, 8, 64, 16, (384, 512), (6, 6), (6, 8), (16, 32, 32, 32)),
    # The published SD3.5 Medium's transformer, autoencoder and CLIP encoders in size, at 1024 pixels.
    "sd35-medium": Size(
        1024,
        24,
        24,
        64,
        16,
        (768, 1280),
        (12, 32),
        (12, 20),
        (128, 256, 512, 512),
        dual_layers=tuple(range(13)),
        qk_norm="rms_norm",
        dtype="bfloat16",
    ),
}


def prompts(count: int) -> list[str]:
    """Different ones, of WORDS."""
    nouns, colours = WORDS[5:10], WORDS[10:14]
    base = [f"a {c} {d} {n} on the {p}" for n in nouns for c in colours for d in colours if c != d for p in WORDS[14:]]
    return [base[i % len(base)] + " photo" * (i // len(base)) for i in range(count)]


def tokenizer() -> Any:
    """One token per word of WORDS, begin and end around them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: n for n, word in enumerate(["<begin>", "<end>", "<unknown>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)])
    names = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unknown>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=TOKENS, **names)


def write(folder: Path, size: Size, *, seed: int = 0, device: str = "cpu") -> dict[str, int]:
    """A pipeline in `folder`; parameters of its parts. The weights are drawn on `device` and stored in `size.dtype`."""
    import torch

    torch.manual_seed(seed)
    with torch.device(device):
        parts = _parts(size)
    counts, index = {}, {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.36.0"} | dict[str, Any]()
    index |= {name: [None, None] for name in ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")}
    for name, (library, part) in parts.items():
        if isinstance(part, torch.nn.Module):
            counts[name] = sum(p.numel() for p in part.parameters())
            part = part.to("cpu", torch.float32 if name == "vae" else getattr(torch, size.dtype))
        part.save_pretrained(folder / name)
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return counts


def _parts(size: Size) -> dict[str, tuple[str, Any]]:
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    joint = max(sum(size.text_widths), 64)
    transformer = SD3Transformer2DModel(
        sample_size=size.side // 2 ** (len(size.vae) - 1),
        patch_size=2,
        in_channels=size.channels,
        out_channels=size.channels,
        num_layers=size.layers,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.heads,
        joint_attention_dim=joint,
        caption_projection_dim=size.width,
        pooled_projection_dim=sum(size.text_widths),
        pos_embed_max_size=max(16, size.side // 2 ** len(size.vae)),
        dual_attention_layers=size.dual_layers,
        qk_norm=size.qk_norm,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.startswith("proj_out") or "norm" in name:  # new ones start at zero, and hide what lies before
                parameter.add_(0.3 / max(parameter.shape[-1], 16) ** 0.5 * torch.randn_like(parameter))
    levels = len(size.vae)
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2 if size.vae[0] >= 64 else 1,
        latent_channels=size.channels,
        norm_num_groups=min(32, size.vae[0] // 2),
        sample_size=size.side,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        mid_block_add_attention=size.vae[0] >= 64,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    parts: dict[str, tuple[str, Any]] = {
        "transformer": ("diffusers", transformer),
        "vae": ("diffusers", vae),
        "scheduler": ("diffusers", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    }
    for n, (width, layers, heads) in enumerate(zip(size.text_widths, size.text_layers, size.text_heads, strict=True)):
        config = CLIPTextConfig(
            vocab_size=3 + len(WORDS),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        suffix = "_2" if n else ""
        parts[f"text_encoder{suffix}"] = ("transformers", CLIPTextModelWithProjection(config))
        parts[f"tokenizer{suffix}"] = ("transformers", tokenizer())
    return parts
