"""A random Stable Diffusion 3 pipeline of the real classes, written in diffusers' format in a second. It draws noise, and says so."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["a", "photo", "of", "bag", "boot", "coat", "dress", "shirt", "red", "blue", "small"]
LENGTH = 8
WIDTH = 16
Parts = dict[str, tuple[str, Any]]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of WORDS, begin and end around them."""
    vocabulary = {word: n for n, word in enumerate(["<begin>", "<end>", "<unknown>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<begin>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unknown>",
        model_max_length=LENGTH,
    )


def write(folder: Path, *, t5: bool = False, seed: int = 0, dynamic_shift: bool = False) -> Path:
    """4 latent channels, pictures of any multiple of 4 pixels up to 32, autoencoder factor 2; returns `folder`."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.startswith("proj_out") or "norm" in name:  # new ones start at zero, and hide what lies before
                parameter.add_(0.3 * torch.randn_like(parameter))
    parts: Parts = {
        "transformer": ("diffusers", transformer),
        "vae": ("diffusers", vae()),
        "scheduler": (
            "diffusers",
            FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=dynamic_shift, base_image_seq_len=4, max_image_seq_len=64
            ),
        ),
        "text_encoder": ("transformers", CLIPTextModelWithProjection(clip())),
        "text_encoder_2": ("transformers", CLIPTextModelWithProjection(clip())),
        "tokenizer": ("transformers", tokenizer()),
        "tokenizer_2": ("transformers", tokenizer()),
    }
    if t5:
        parts |= {"text_encoder_3": ("transformers", t5_encoder(2 * WIDTH)), "tokenizer_3": ("transformers", tokenizer())}
    left_out = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")
    return save(folder, "StableDiffusion3Pipeline", parts, left_out)


def vae(**more: bool) -> AutoencoderKL:
    """Of factor 2, random."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        scaling_factor=1.5,
        shift_factor=0.06,
        mid_block_add_attention=False,
        **more,
    )


def clip() -> CLIPTextConfig:
    """Of `tokenizer`'s words."""
    return CLIPTextConfig(
        vocab_size=3 + len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_encoder(width: int) -> T5EncoderModel:
    """Of `tokenizer`'s words, random."""
    words = {"vocab_size": 3 + len(WORDS), "pad_token_id": 1, "eos_token_id": 1}
    return T5EncoderModel(T5Config(**words, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def save(folder: Path, name: str, parts: Parts, left_out: Sequence[str] = ()) -> Path:
    """A folder as diffusers writes pipelines: parts as (library, part), those left out named."""
    index: dict[str, object] = {"_class_name": name, "_diffusers_version": "0.36.0", **{part: [None, None] for part in left_out}}
    for key, (library, part) in parts.items():
        part.save_pretrained(folder / key)
        index[key] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
