"""Tiny random checkpoints in the key layouts of the authors, and backbones saved as transformers saves them."""

import argparse
import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

WIDTH, DEPTH, HIDDEN, EXPERTS, ROUTER = 32, 2, 48, 6, 16
SIDES = {"clip": 42, "dinov3": 48}
PATCH = {"clip": 14, "dinov3": 16}


def _random(generator: torch.Generator, *shape: int, scale: float = 0.2) -> Tensor:
    return torch.randn(shape, generator=generator) * scale


def _norm(state: dict[str, Tensor], name: str, generator: torch.Generator) -> None:
    state[f"{name}.weight"] = 1 + _random(generator, WIDTH)
    state[f"{name}.bias"] = _random(generator, WIDTH)


def _linear(state: dict[str, Tensor], name: str, out: int, inside: int, generator: torch.Generator, bias: bool = True) -> None:
    state[f"{name}.weight"] = _random(generator, out, inside)
    if bias:
        state[f"{name}.bias"] = _random(generator, out)


def _tower(form: str, rank: int | None, g: torch.Generator) -> dict[str, Tensor]:
    """A vision tower as transformers names it (rank None), or with SVD experts as OmniAID's authors do."""
    state: dict[str, Tensor] = {}
    clip, experts = form == "clip", rank is not None
    if clip:
        state["embeddings.class_embedding"] = _random(g, WIDTH)
        state["embeddings.patch_embedding.weight"] = _random(g, WIDTH, 3, PATCH[form], PATCH[form], scale=0.05)
        state["embeddings.position_embedding.weight"] = _random(g, (SIDES[form] // PATCH[form]) ** 2 + 1, WIDTH)
        _norm(state, "ln_pre" if experts else "pre_layrnorm", g)
        _norm(state, "ln_post" if experts else "post_layernorm", g)
    else:
        state["embeddings.cls_token"] = _random(g, 1, 1, WIDTH)
        state["embeddings.mask_token"] = _random(g, 1, 1, WIDTH)
        state["embeddings.register_tokens"] = _random(g, 1, 4, WIDTH)
        state["embeddings.patch_embeddings.weight"] = _random(g, WIDTH, 3, PATCH[form], PATCH[form], scale=0.05)
        state["embeddings.patch_embeddings.bias"] = _random(g, WIDTH)
        _norm(state, "norm", g)
    prefix = ("encoder_layers" if experts else "encoder.layers") if clip else "layer"
    for i in range(DEPTH):
        layer = f"{prefix}.{i}"
        attention = f"{layer}.self_attn" if clip else f"{layer}.attention"
        for p in ("q_proj", "k_proj", "v_proj", "out_proj" if clip else "o_proj"):
            bias = clip or p != "k_proj"
            if rank is None:
                _linear(state, f"{attention}.{p}", WIDTH, WIDTH, g, bias)
                continue
            u, s, v = torch.linalg.svd(_random(g, WIDTH, WIDTH))
            keep = WIDTH - rank
            state[f"{attention}.{p}.weight_main"] = u[:, :keep] @ torch.diag(s[:keep]) @ v[:keep]
            state[f"{attention}.{p}.U_r"], state[f"{attention}.{p}.V_r"] = u[:, :keep].contiguous(), v[:keep].contiguous()
            state[f"{attention}.{p}.weight_original_fnorm"] = s.square().sum().sqrt()
            for e in range(EXPERTS):
                state[f"{attention}.{p}.U_experts.{e}"] = u[:, keep:] + _random(g, WIDTH, rank)
                state[f"{attention}.{p}.S_experts.{e}"] = s[keep:] + _random(g, rank, scale=1.0)
                state[f"{attention}.{p}.V_experts.{e}"] = v[keep:] + _random(g, rank, WIDTH)
            if bias:
                state[f"{attention}.{p}.bias"] = _random(g, WIDTH)
        _norm(state, f"{layer}.layer_norm1" if clip else f"{layer}.norm1", g)
        _norm(state, f"{layer}.layer_norm2" if clip else f"{layer}.norm2", g)
        if not clip:
            state[f"{layer}.layer_scale1.lambda1"] = 1 + _random(g, WIDTH)
            state[f"{layer}.layer_scale2.lambda1"] = 1 + _random(g, WIDTH)
        _linear(state, f"{layer}.mlp.{'fc1' if clip else 'up_proj'}", HIDDEN, WIDTH, g)
        _linear(state, f"{layer}.mlp.{'fc2' if clip else 'down_proj'}", WIDTH, HIDDEN, g)
    return state


def omniaid(form: str = "clip", rank: int = 1, twin: bool = False, hybrid: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """A whole detector: experts, router, head, and with `twin` the frozen tower that routes."""
    g = torch.Generator().manual_seed(seed)
    state = _tower(form, rank, g)
    _linear(state, "gating_network.network.0", ROUTER, WIDTH, g)
    _linear(state, "gating_network.network.2", EXPERTS - hybrid, ROUTER, g)
    _linear(state, "head", 2, WIDTH, g)
    if twin:
        state |= {f"feature_extractor.{k}": v for k, v in _tower(form, None, g).items()}
    return state


def omniaid_file(folder: Path, suffix: str = ".safetensors", **options: Any) -> Path:
    """Saved as safetensors, or as the authors' trainer saves: weights under `model`, beside its optimiser and arguments."""
    path, state = folder / f"checkpoint-0{suffix}", omniaid(**options)
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        arguments = argparse.Namespace(num_experts=EXPERTS, CLIP_path="openai/clip-vit-large-patch14-336", lr=1e-4)
        torch.save(
            {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 0, "args": arguments}, path
        )
    return path


TIMM = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "img_size": 56}
BACKBONES = ("timm", "timm_reg", "dinov2", "dinov2_reg", "dinov3")


def backbone(folder: Path, kind: str = "timm") -> dict[str, Any]:
    """Options of a tiny random DINO backbone that is written to `folder`; the timm ones as a file, the others as transformers saves."""
    torch.manual_seed(5)
    if kind.startswith("timm"):
        name = "vit_small_patch14_reg4_dinov2" if kind == "timm_reg" else "vit_small_patch14_dinov2"
        model = timm.create_model(name, pretrained=False, num_classes=0, **TIMM)
        save_file({k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}, folder / f"{kind}.safetensors")
        return {"timm": name, "weights": {"path": folder / f"{kind}.safetensors"}, "arguments": TIMM}
    common = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "image_size": 56}
    made = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(patch_size=14, mlp_ratio=2, **common)),
        "dinov2_reg": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(patch_size=14, mlp_ratio=2, **common)),
        "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(patch_size=14, intermediate_size=HIDDEN, num_register_tokens=4, **common)),
    }[kind]()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made.save_pretrained(folder / kind)
    return {"folder": folder / kind}


def dino_head(folder: Path, kind: str = "timm", **more: Any) -> dict[str, Any]:
    """Options of a whole tiny dino_head."""
    options = backbone(folder, kind)
    g = torch.Generator().manual_seed(2)
    state: dict[str, Tensor] = {}
    _linear(state, "0", 512, WIDTH, g)
    _linear(state, "2", 1, 512, g)
    save_file(state, folder / "head.safetensors")
    return {"backbone": options, "head": {"path": folder / "head.safetensors"}, "size": 56, **more}


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="verism-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def contract_options(name: str) -> dict[str, Any]:
    """What the contract tests load `name` with."""
    if name == "omniaid":
        return {"path": omniaid_file(_folder(), rank=8, twin=True), "heads": 4}
    return dino_head(_folder(), patches=8)
