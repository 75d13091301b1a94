"""Random models of the real architectures, a few thousand weights each, saved in the layouts that the real ones are published in."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

TEMPLATE = "Rate this picture of {text_prompt} please: <|Reward|>\n"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_BYTES = sorted(ByteLevel.alphabet())


def spread(module: nn.Module, seed: int) -> None:
    """Weights large enough that pictures and texts matter: transformers' own are all but zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        elif parameter.ndim >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
        elif parameter.ndim == 1 and not ("norm" in name and name.endswith("weight")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def clip(folder: Path, *, positions: int = 24, act: str = "quick_gelu", weights: bool = True, processor: bool = True) -> CLIPModel:
    """A CLIPModel with the byte alphabet of CLIP's tokenizer."""
    vocab = {token: i for i, token in enumerate([*_BYTES, *(b + "</w>" for b in _BYTES), "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(vocab) - 2, len(vocab) - 1
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "hidden_act": act,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": act,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, logit_scale_init_value=4.6052)).eval()
    spread(model, 1)
    if weights:
        model.save_pretrained(folder)
    else:
        model.config.save_pretrained(folder)
    if processor:
        CLIPTokenizer(vocab=vocab, merges=[], model_max_length=positions).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return model


def open_clip_state(model: CLIPModel) -> dict[str, Tensor]:
    """The same weights under the names of OpenAI's and open_clip's code, attention packed."""
    own, out = model.state_dict(), {}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(2):
            here, there = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                packed = [own[f"{here}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{there}.attn.in_proj_{kind}"] = torch.cat(packed)
                for a, b in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    out[f"{there}.{b}.{kind}"] = own[f"{here}.{a}.{kind}"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = own[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = own[f"vision_model.post_layernorm.{kind}"]
        out[f"ln_final.{kind}"] = own[f"text_model.final_layer_norm.{kind}"]
    out["visual.class_embedding"] = own["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = own["vision_model.embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = own["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"] = own["visual_projection.weight"].T
    out["token_embedding.weight"] = own["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = own["text_model.embeddings.position_embedding.weight"]
    out["text_projection"] = own["text_projection.weight"].T
    out["logit_scale"] = own["logit_scale"]
    return {k: v.clone() for k, v in out.items()}


def siglip(folder: Path, *, any_shape: bool = False) -> SiglipModel | Siglip2Model:
    """SiglipModel, or Siglip2Model that keeps a picture's shape; both with SigLIP 2's tokenizer over bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    alphabet = [chr(c) for c in range(33, 127)] + ["▁"] + [f"<0x{b:02X}>" for b in range(256)]
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **common,
        "vocab_size": len(vocab),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    model: SiglipModel | Siglip2Model
    if any_shape:
        vision = {**common, "patch_size": 8, "num_patches": 16}
        model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)).eval()
        Siglip2ImageProcessor(patch_size=8, max_num_patches=20).save_pretrained(folder)
    else:
        vision = {**common, "patch_size": 8, "image_size": 32}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
        SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    spread(model, 2)
    model.logit_scale.data.fill_(2.0)
    model.logit_bias.data.fill_(-1.0)
    model.save_pretrained(folder)
    Siglip2Tokenizer(vocab=vocab, merges=[], model_max_length=64).save_pretrained(folder)
    return model


def head_state(width: int, seed: int = 3) -> dict[str, Tensor]:
    """The five layers of the aesthetic predictor and of ImageReward."""
    generator, out = torch.Generator().manual_seed(seed), {}
    widths = (width, 1024, 128, 64, 16, 1)
    for index, (a, b) in zip((0, 2, 4, 6, 7), zip(widths, widths[1:], strict=False), strict=True):
        out[f"layers.{index}.weight"] = torch.randn(b, a, generator=generator) * a**-0.5
        out[f"layers.{index}.bias"] = torch.randn(b, generator=generator) * 0.1
    return out


def image_reward(folder: Path) -> dict[str, Tensor]:
    """ImageReward.pt in BLIP's layout, med_config.json and a tokenizer of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: i for i, word in enumerate([*words, *(f"##{c}" for c in words[5:]), "[DEC]", "[ENC]"])}
    BertTokenizer(vocab=vocab, model_max_length=64).save_pretrained(folder)
    med = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "architectures": ["BertModel"],
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(med))
    kept = {k: v for k, v in med.items() if k not in ("architectures", "encoder_width", "add_cross_attention")}
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionModel(BlipVisionConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6))
    text = BlipTextModel(BlipTextConfig(**kept, encoder_hidden_size=128), add_pooling_layer=False)
    spread(vision, 4)
    spread(text, 5)
    names = (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("encoder.layers", "blocks"),
        ("layer_norm1", "norm1"),
        ("layer_norm2", "norm2"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("post_layernorm", "norm"),
    )
    state: dict[str, Tensor] = {}
    for name, tensor in vision.state_dict().items():
        for a, b in names:
            name = name.replace(a, b)
        state[f"blip.visual_encoder.{name}"] = tensor
    state |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    state |= {"blip.vision_proj.weight": torch.zeros(4, 128), "blip.text_proj.weight": torch.zeros(4, 32)}
    state |= {f"mlp.{k}": v for k, v in head_state(32).items()}
    torch.save(state, folder / "ImageReward.pt")
    return state


def hpsv3(folder: Path) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL with its files in `folder`, and `HPSv3.safetensors` under the names of transformers 4.45, as published."""
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    vocab = {token: i for i, token in enumerate([*_BYTES, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    text = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": vocab["<|im_end|>"],
        "pad_token_id": vocab["<|endoftext|>"],
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    ids = {"image_token_id": vocab["<|image_pad|>"], "video_token_id": vocab["<|video_pad|>"]}
    ids |= {"vision_start_token_id": vocab["<|vision_start|>"], "vision_end_token_id": vocab["<|vision_end|>"]}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.config.save_pretrained(folder)
    model.resize_token_embeddings(len(vocab) + 1)  # one row for <|Reward|>, as the authors' code does
    spread(model, 6)
    state = {}
    for name, tensor in model.state_dict().items():
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[old] = tensor.clone()
    generator = torch.Generator().manual_seed(7)
    for index, (a, b) in zip((0, 3, 5), ((64, 1024), (1024, 16), (16, 2)), strict=True):
        state[f"rm_head.{index}.weight"] = torch.randn(b, a, generator=generator) * a**-0.5
        state[f"rm_head.{index}.bias"] = torch.randn(b, generator=generator) * 0.1
    save_file(state, folder / "HPSv3.safetensors")
    (folder / "template.txt").write_text(TEMPLATE)
    return model


def _pickscore(folder: Path) -> dict[str, Any]:
    clip(folder, act="gelu")
    return {"folder": folder}


def _hpsv2(folder: Path) -> dict[str, Any]:
    model = clip(folder, act="gelu", weights=False)
    torch.save({"epoch": 1, "state_dict": open_clip_state(model)}, folder / "HPS_v2.1_compressed.pt")
    return {"folder": folder, "weights": str(folder / "HPS_v2.1_compressed.pt")}


def _hpsv3(folder: Path) -> dict[str, Any]:
    hpsv3(folder)
    weights = str(folder / "HPSv3.safetensors")
    return {"folder": folder, "weights": weights, "template": folder / "template.txt", "pixels": 4 * 28 * 28}


def _image_reward(folder: Path) -> dict[str, Any]:
    image_reward(folder)
    return {"folder": folder}


def _aesthetic(folder: Path) -> dict[str, Any]:
    clip(folder)
    torch.save(head_state(16), folder / "head.pth")
    return {"folder": folder, "head": str(folder / "head.pth")}


def _siglip(folder: Path) -> dict[str, Any]:
    siglip(folder)
    return {"folder": folder}


MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
    "hpsv3": _hpsv3,
    "image_reward": _image_reward,
    "aesthetic": _aesthetic,
    "siglip": _siglip,
}


@functools.cache
def made(name: str) -> dict[str, Any]:
    """Options of a tiny random model, made when first asked for and removed at exit."""
    folder = Path(tempfile.mkdtemp(prefix=f"verism-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return MAKERS[name](folder)


class Tiny(Mapping[str, Any]):
    """The options of `made`, without making anything before they are looked at."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, key: str) -> Any:
        return made(self.name)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(made(self.name))

    def __len__(self) -> int:
        return len(made(self.name))
