"""OmniAID's network (2511.08423): a vision transformer whose attention projections carry low-rank experts, a router, a head.

Modules are named as the keys of the authors' checkpoints, CLIP form (`encoder_layers.*.self_attn`) and DINOv3 form
(`layer.*.attention`). A projection is x W' + x V' diag(S) U' summed over experts with the picture's gates; unchosen experts have gate 0,
so all of them are one matrix product each way. The frozen twin that routes (`feature_extractor.*`) is the same tower without experts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.fitting.losses import orthogonality
from services.rewards._detector_kit import fill

UNUSED = (".U_r", ".V_r", ".weight_original_fnorm", ".position_ids", ".inv_freq", ".mask_token")
Routing = Literal["pooler", "patches"]
_TWIN = "feature_extractor."
_TWIN_NAMES = {
    "pre_layrnorm.": "ln_pre.",
    "encoder.layers.": "encoder_layers.",
    "post_layernorm.": "ln_post.",
    "model.layer.": "layer.",
}


@dataclass(frozen=True)
class Shape:
    """The architecture, read from a checkpoint's tensors; `size` is the side in pixels, `experts` and `rank` those of a projection."""

    form: Literal["clip", "dinov3"]
    width: int
    depth: int
    hidden: int
    heads: int
    patch: int
    size: int
    experts: int
    rank: int
    router: int
    routed: int
    registers: int = 0
    gated: bool = False
    biases: tuple[bool, bool, bool, bool] = (True, True, True, True)
    theta: float = 100.0

    @property
    def grid(self) -> int:
        return self.size // self.patch


def shape_of(state: Mapping[str, Tensor], heads: int | None = None, size: int | None = None) -> Shape:
    """Read the architecture from names and shapes; ValueError when these are no OmniAID weights. Heads default to 64 channels each."""
    clip = "encoder_layers.0.self_attn.q_proj.weight_main" in state
    if not clip and "layer.0.attention.q_proj.weight_main" not in state:
        lora = any("lora" in k.lower() for k in state)
        raise ValueError(
            "these are not OmniAID weights with SVD experts: neither encoder_layers.0.self_attn.q_proj.weight_main (CLIP) nor "
            f"layer.0.attention.q_proj.weight_main (DINOv3) is there{'; LoRA forms are not served' if lora else ''}"
        )
    prefix, attention, out = ("encoder_layers", "self_attn", "out_proj") if clip else ("layer", "attention", "o_proj")
    first = f"{prefix}.0.{attention}."
    try:
        width = state[f"{first}q_proj.weight_main"].shape[0]
        rank = state[f"{first}q_proj.U_experts.0"].shape[1]
        patch = state["embeddings.patch_embedding.weight" if clip else "embeddings.patch_embeddings.weight"].shape[-1]
        positions = state["embeddings.position_embedding.weight"].shape[0] - 1 if clip else 0
        common: dict[str, Any] = {
            "width": width,
            "depth": len({k.split(".")[1] for k in state if k.startswith(f"{prefix}.")}),
            "hidden": state[f"{prefix}.0.mlp.{'fc1' if clip else 'up_proj'}.weight"].shape[0],
            "heads": heads or max(1, width // 64),
            "patch": patch,
            "experts": sum(k.startswith(f"{first}q_proj.U_experts.") for k in state),
            "rank": rank,
            "router": state["gating_network.network.0.weight"].shape[0],
            "routed": state["gating_network.network.2.weight"].shape[0],
        }
        if width % (4 * common["heads"]):
            raise ValueError(f"{width} channels do not divide into {common['heads']} heads of a multiple of 4: set `heads`")
        if clip:
            side = math.isqrt(positions)
            if side * side != positions or size not in (None, side * patch):
                raise ValueError(
                    f"a checkpoint with {positions} positions and patches of {patch} sees {side * patch} pixels: drop `size`"
                )
            return Shape("clip", size=side * patch, **common)
        registers = state["embeddings.register_tokens"].shape[1]
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"an OmniAID checkpoint has {error}, and this file has not, or not in that shape; fetch it again"
        ) from error
    if (size or 448) % patch:
        raise ValueError(f"`size` {size or 448} is not a multiple of the patch, {patch}")
    biases: Any = tuple(f"{first}{p}.bias" in state for p in ("q_proj", "k_proj", "v_proj", out))
    gated = f"{prefix}.0.mlp.gate_proj.weight" in state
    return Shape("dinov3", size=size or 448, registers=registers, gated=gated, biases=biases, **common)


class ExpertLinear(nn.Module):
    """y_BTO = x W' + b + sum over experts e of gate_Be (x V_e') diag(S_e) U_e'."""

    def __init__(self, width: int, experts: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("weight_main", torch.zeros(width, width))
        self.U_experts = nn.ParameterList([nn.Parameter(torch.zeros(width, rank)) for _ in range(experts)])
        self.S_experts = nn.ParameterList([nn.Parameter(torch.zeros(rank)) for _ in range(experts)])
        self.V_experts = nn.ParameterList([nn.Parameter(torch.zeros(rank, width)) for _ in range(experts)])
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor, gates_BE: Tensor) -> Tensor:
        u, s, v = torch.cat(list(self.U_experts), 1), torch.cat(list(self.S_experts)), torch.cat(list(self.V_experts))
        gain = s.to(x.dtype) * gates_BE.repeat_interleave(self.rank, 1)
        inner = F.linear(x, v.to(x.dtype)) * gain[:, None]
        return F.linear(x, self.get_buffer("weight_main"), self.bias) + F.linear(inner, u.to(x.dtype))

    def overlap(self, frozen: tuple[Tensor, Tensor]) -> Tensor:
        """How far the experts' spaces overlap each other and the main part's, both sides added; `frozen` as `complements` gives it."""
        columns = [v.T for v in self.V_experts]
        return orthogonality(frozen[0], list(self.U_experts)) + orthogonality(frozen[1], columns)

    @torch.no_grad()
    def complements(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases (width, rank) of what the main part leaves free in its output and in its input, by its singular vectors."""
        u, _, vh = torch.linalg.svd(self.get_buffer("weight_main").float())
        return u[:, -self.rank :].clone(), vh[-self.rank :].T.clone()


def _projection(shape: Shape, experts: bool, bias: bool) -> nn.Module:
    return ExpertLinear(shape.width, shape.experts, shape.rank, bias) if experts else nn.Linear(shape.width, shape.width, bias)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the last tokens (the patches) of x (B, heads, T, d); cos and sin (patches, d)."""
    first, patches = x[:, :, : -len(cos)], x[:, :, -len(cos) :]
    a, b = patches.chunk(2, -1)
    return torch.cat([first, patches * cos + torch.cat([-b, a], -1) * sin], 2)


class _Attention(nn.Module):
    def __init__(self, shape: Shape, experts: bool) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj, self.k_proj, self.v_proj, last = (_projection(shape, experts, bias) for bias in shape.biases)
        self.last = "out_proj" if shape.form == "clip" else "o_proj"
        self.add_module(self.last, last)

    def forward(self, x: Tensor, gates: tuple[Tensor, ...], turn: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            p(x, *gates).view(batch, tokens, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turn is not None:
            q, k = _turned(q, *turn), _turned(k, *turn)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.get_submodule(self.last)(mixed, *gates)
        return out


class _ClipMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        out: Tensor = self.fc2(x * torch.sigmoid(1.702 * x))
        return out


class _DinoMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.hidden) if shape.gated else None
        self.up_proj, self.down_proj = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        out: Tensor = self.down_proj(F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)
        return out


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))


class _ClipLayer(nn.Module):
    def __init__(self, shape: Shape, experts: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(shape, experts), _ClipMlp(shape)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)

    def forward(self, x: Tensor, gates: tuple[Tensor, ...], turn: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), gates, turn)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class _DinoLayer(nn.Module):
    def __init__(self, shape: Shape, experts: bool) -> None:
        super().__init__()
        self.attention, self.mlp = _Attention(shape, experts), _DinoMlp(shape)
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.layer_scale1, self.layer_scale2 = _Scale(shape.width), _Scale(shape.width)

    def forward(self, x: Tensor, gates: tuple[Tensor, ...], turn: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), gates, turn) * self.layer_scale1.lambda1
        return x + self.mlp(self.norm2(x)) * self.layer_scale2.lambda1  # type: ignore[no-any-return]


class _ClipEmbeddings(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(shape.width))
        self.patch_embedding = nn.Conv2d(3, shape.width, shape.patch, shape.patch, bias=False)
        self.position_embedding = nn.Embedding(shape.grid**2 + 1, shape.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], 1) + self.position_embedding.weight


class _DinoEmbeddings(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        self.patch_embeddings = nn.Conv2d(3, shape.width, shape.patch, shape.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        first = torch.cat([self.cls_token, self.register_tokens], 1).expand(len(patches), -1, -1)
        return torch.cat([first, patches], 1)


class Tower(nn.Module):
    """Pictures (B, 3, size, size), normalised, to the CLS token (B, width) after the last norm; with or without experts."""

    def __init__(self, shape: Shape, experts: bool) -> None:
        super().__init__()
        self.shape = shape
        if shape.form == "clip":
            self.embeddings: nn.Module = _ClipEmbeddings(shape)
            self.ln_pre, self.ln_post = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
            self.encoder_layers = nn.ModuleList([_ClipLayer(shape, experts) for _ in range(shape.depth)])
        else:
            self.embeddings = _DinoEmbeddings(shape)
            self.layer = nn.ModuleList([_DinoLayer(shape, experts) for _ in range(shape.depth)])
            self.norm = nn.LayerNorm(shape.width)

    def rotary(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (patches, d) of the patch centres in [-1, 1]: rows first, columns second, both halves alike (2508.10104)."""
        quarter = self.shape.width // self.shape.heads // 4
        frequency = self.shape.theta ** -(torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter)
        centre = (torch.arange(self.shape.grid, device=like.device, dtype=torch.float32) + 0.5) * (2 / self.shape.grid) - 1
        at = torch.cartesian_prod(centre, centre)
        angles = (2 * math.pi * at[:, :, None] * frequency).flatten(1).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, embedded: Tensor, *gates: Tensor) -> Tensor:
        """From `self.embeddings(pixels)`, so that a router may look at the patches first."""
        if self.shape.form == "clip":
            x = self.ln_pre(embedded)
            for layer in self.encoder_layers:
                x = layer(x, gates, None)
            return self.ln_post(x[:, 0])  # type: ignore[no-any-return]
        x, turn = embedded, self.rotary(embedded)
        for layer in self.layer:
            x = layer(x, gates, turn)
        return self.norm(x[:, 0])  # type: ignore[no-any-return]


def _linear(x: Tensor, layer: nn.Module) -> Tensor:
    """A linear layer whose weights may be kept in float32 while they are fitted, computed in the type of x."""
    return F.linear(x, layer.get_parameter("weight").to(x.dtype), layer.get_parameter("bias").to(x.dtype))


class _Router(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(shape.width, shape.router), nn.ReLU(), nn.Linear(shape.router, shape.routed))

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.network
        return _linear(torch.relu(_linear(x, first)), last)


class OmniAid(Tower):
    """Pictures to logits (B, 2), real first, and gates (B, experts).

    The router chooses `top_k` experts and shares a softmax among them. Where there is one expert more than the router knows (hybrid),
    that last one, the artifact expert, is always on with gate 1. It looks at the frozen twin's CLS token (`pooler`, the later
    checkpoints) or at the mean of the patch embeddings before the first norm (`patches`, RealGen's first).
    """

    def __init__(self, shape: Shape, routing: Routing, top_k: int) -> None:
        super().__init__(shape, experts=True)
        if shape.experts - shape.routed not in (0, 1):
            raise ValueError(f"a router over {shape.routed} of {shape.experts} experts is neither the hybrid nor the standard form")
        if not 1 <= top_k <= shape.routed:
            raise ValueError(f"`top_k` is {top_k}, but the router chooses among {shape.routed} experts")
        self.top_k, self.routing = top_k, routing
        self.gating_network, self.head = _Router(shape), nn.Linear(shape.width, 2)
        self.feature_extractor = Tower(shape, experts=False) if routing == "pooler" else None

    def gates(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """(B, experts): zero for experts that are not chosen."""
        if self.feature_extractor is not None:
            seen = self.feature_extractor(self.feature_extractor.embeddings(pixels))
        else:
            seen = embedded[:, 1 + self.shape.registers :].mean(1)
        logits = self.gating_network(seen)
        chosen, index = logits.topk(self.top_k, -1)
        gates = torch.zeros_like(logits).scatter(1, index, chosen.softmax(-1))
        return F.pad(gates, (0, self.shape.experts - self.shape.routed), value=1.0)

    def logits(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embeddings(pixels)
        gates = self.gates(pixels, embedded)
        return _linear(self(embedded, gates), self.head), gates


def build(
    state: Mapping[str, Tensor], source: str, routing: Routing | Literal["auto"], top_k: int, heads: int | None, size: int | None
) -> OmniAid:
    """The network with a checkpoint's weights; `auto` routes by the twin where the checkpoint has one. ValueError names what differs."""
    if routing == "auto":
        routing = "pooler" if any(k.startswith(_TWIN) for k in state) else "patches"
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_TWIN):
            if routing == "patches":
                continue
            for theirs, ours in _TWIN_NAMES.items():
                key = _TWIN + key.removeprefix(_TWIN).replace(theirs, ours, 1)
        named[key] = value
    model = OmniAid(shape_of(state, heads, size), routing, top_k)
    fill(model, named, source, UNUSED)
    return model
