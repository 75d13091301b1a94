"""OmniAID at tiny random sizes in the authors' key layout, against a forward written plainly, and towers against transformers'."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, DINOv3ViTConfig, DINOv3ViTModel

from services.reward import Item
from services.rewards._omniaid import Tower, build, shape_of
from services.rewards.omniaid import OmniAID
from tests.services.rewards_detectors import tiny

HEADS = 4
FORMS = [("clip", 1, False), ("clip", 8, True), ("dinov3", 1, True)]


def twin_model(form: str, state: dict[str, Tensor]) -> torch.nn.Module:
    """transformers' own tower with a twin's weights."""
    common = {
        "hidden_size": tiny.WIDTH,
        "intermediate_size": tiny.HIDDEN,
        "num_hidden_layers": tiny.DEPTH,
        "num_attention_heads": HEADS,
    }
    side, patch = tiny.SIDES[form], tiny.PATCH[form]
    if form == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(image_size=side, patch_size=patch, **common))
        model.load_state_dict(
            {k.removeprefix("feature_extractor."): v for k, v in state.items() if k.startswith("feature_extractor.")}
        )
    else:
        model = DINOv3ViTModel(DINOv3ViTConfig(image_size=side, patch_size=patch, num_register_tokens=4, **common))
        theirs = {k.removeprefix("feature_extractor."): v for k, v in state.items() if k.startswith("feature_extractor.")}
        own = model.state_dict()
        model.load_state_dict({k: theirs[k if k in theirs else k.removeprefix("model.")] for k in own})
    return model.eval()


def plain(form: str, state: dict[str, Tensor], pixels: Tensor, top_k: int = 2, hybrid: bool = True) -> tuple[Tensor, Tensor]:
    """One picture (1, 3, side, side) to P(real) and gates, in loops: experts one by one, attention head by head."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    clip, patch, side = form == "clip", tiny.PATCH[form], tiny.SIDES[form]
    grid = side // patch
    name = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings"
    cells = [
        pixels[0, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten() for r in range(grid) for c in range(grid)
    ]
    patches = torch.stack(cells) @ state[f"{name}.weight"].flatten(1).T + (0 if clip else state[f"{name}.bias"])
    if clip:
        x = torch.cat([state["embeddings.class_embedding"][None], patches]) + state["embeddings.position_embedding.weight"]
    else:
        x = torch.cat([state["embeddings.cls_token"][0], state["embeddings.register_tokens"][0], patches])
    if any(k.startswith("feature_extractor.") for k in state):
        seen = twin_model(form, state)(pixel_values=pixels).pooler_output[0]
    else:
        seen = x[1:].mean(0)
    hidden = torch.relu(seen @ state["gating_network.network.0.weight"].T + state["gating_network.network.0.bias"])
    logits = (hidden @ state["gating_network.network.2.weight"].T + state["gating_network.network.2.bias"]).tolist()
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = torch.tensor([logits[i] for i in best]).softmax(0).tolist()
    gates = dict(zip(best, weights, strict=True)) | ({tiny.EXPERTS - 1: 1.0} if hybrid else {})

    def project(x: Tensor, name: str) -> Tensor:
        y = x @ state[f"{name}.weight_main"].T
        for e, gate in gates.items():
            expert = state[f"{name}.U_experts.{e}"] @ torch.diag(state[f"{name}.S_experts.{e}"]) @ state[f"{name}.V_experts.{e}"]
            y = y + gate * (x @ expert.T)
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    def turn(vectors: Tensor) -> Tensor:
        """Rotary: pairs (i, i + d/2) turn by 2 pi y f for the first quarter of frequencies, 2 pi x f for the second."""
        d, out = vectors.shape[1], vectors.clone()
        for t in range(grid * grid):
            y, x_ = ((np.array(divmod(t, grid)) + 0.5) / grid * 2 - 1).tolist()
            for i in range(d // 2):
                frequency = 100.0 ** (-(i % (d // 4)) / (d // 4))
                angle = torch.tensor(2 * np.pi * (y if i < d // 4 else x_) * frequency)
                a, b = vectors[5 + t, i], vectors[5 + t, i + d // 2]
                out[5 + t, i], out[5 + t, i + d // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    if clip:
        x = norm(x, "ln_pre")
    for i in range(tiny.DEPTH):
        layer = f"encoder_layers.{i}" if clip else f"layer.{i}"
        attention = f"{layer}.self_attn" if clip else f"{layer}.attention"
        y = norm(x, f"{layer}.layer_norm1" if clip else f"{layer}.norm1")
        q, k, v = (project(y, f"{attention}.{p}") for p in ("q_proj", "k_proj", "v_proj"))
        parts = []
        for h in range(HEADS):
            cut = slice(h * tiny.WIDTH // HEADS, (h + 1) * tiny.WIDTH // HEADS)
            a, b = (q[:, cut], k[:, cut]) if clip else (turn(q[:, cut]), turn(k[:, cut]))
            parts.append((a @ b.T / (tiny.WIDTH // HEADS) ** 0.5).softmax(-1) @ v[:, cut])
        y = project(torch.cat(parts, 1), f"{attention}.{'out_proj' if clip else 'o_proj'}")
        x = x + (y if clip else y * state[f"{layer}.layer_scale1.lambda1"])
        y = norm(x, f"{layer}.layer_norm2" if clip else f"{layer}.norm2")
        first, last = ("fc1", "fc2") if clip else ("up_proj", "down_proj")
        y = y @ state[f"{layer}.mlp.{first}.weight"].T + state[f"{layer}.mlp.{first}.bias"]
        y = y * torch.sigmoid(1.702 * y) if clip else y * 0.5 * (1 + torch.erf(y / 2**0.5))
        y = y @ state[f"{layer}.mlp.{last}.weight"].T + state[f"{layer}.mlp.{last}.bias"]
        x = x + (y if clip else y * state[f"{layer}.layer_scale2.lambda1"])
    two = norm(x[0], "ln_post" if clip else "norm") @ state["head.weight"].T + state["head.bias"]
    return two.softmax(0)[0], torch.tensor([gates.get(e, 0.0) for e in range(tiny.EXPERTS)])


def pictures(count: int = 5) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    sides = [(600, 500), (512, 512), (40, 33), (512, 512), (28, 28)]
    smooth = [rng.integers(0, 256, (7, 5, 3), dtype=np.uint8) for _ in range(count)]
    return [
        np.asarray(Image.fromarray(a).resize((w, h), Image.Resampling.BICUBIC))
        for a, (h, w) in zip(smooth, sides[:count], strict=True)
    ]


def options(form: str, path: Path, **more: Any) -> dict[str, Any]:
    return {"path": path, "heads": HEADS, **({"size": tiny.SIDES[form]} if form == "dinov3" else {}), **more}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("form", "rank", "twin"), FORMS)
def test_scores_equal_a_plain_forward(form: str, rank: int, twin: bool, suffix: str, tmp_path: Path) -> None:
    path = tiny.omniaid_file(tmp_path, suffix, form=form, rank=rank, twin=twin)
    state = tiny.omniaid(form=form, rank=rank, twin=twin)
    reward = OmniAID.load("omniaid", options(form, path), "cpu")
    assert reward.model.routing == ("pooler" if twin else "patches")
    images = pictures()
    scores = reward.score([Item(i) for i in images])
    values = [s.value for s in scores]
    assert max(v for v in values if v is not None) - min(v for v in values if v is not None) > 1e-3, "the pictures should differ"
    for image, score in zip(images, scores, strict=True):
        expected, gates = plain(form, state, reward.preprocess([image]))
        assert score.value == pytest.approx(float(expected), abs=1e-5)
        assert [score.parts[f"gate_{i}"] for i in range(tiny.EXPERTS)] == pytest.approx(gates.tolist(), abs=1e-5)
        assert score.parts["gate_5"] == 1.0 and sum(g > 0 for g in gates.tolist()) == 3


def test_the_standard_form_has_no_fixed_expert(tmp_path: Path) -> None:
    state = tiny.omniaid(hybrid=False)
    save_file(state, tmp_path / "m.safetensors")
    reward = OmniAID.load("omniaid", options("clip", tmp_path, top_k=3), "cpu")
    image = pictures(1)[0]
    (score,) = reward.score([Item(image)])
    expected, gates = plain("clip", state, reward.preprocess([image]), top_k=3, hybrid=False)
    assert score.value == pytest.approx(float(expected), abs=1e-5)
    assert [score.parts[f"gate_{i}"] for i in range(6)] == pytest.approx(gates.tolist(), abs=1e-5)


@pytest.mark.parametrize("form", ["clip", "dinov3"])
def test_the_tower_without_experts_is_transformers_own(form: str) -> None:
    state = tiny.omniaid(form=form, twin=True)
    model = build(state, "x", "pooler", 2, HEADS, tiny.SIDES[form])
    pixels = torch.randn(3, 3, tiny.SIDES[form], tiny.SIDES[form], generator=torch.Generator().manual_seed(1))
    tower = model.feature_extractor
    assert isinstance(tower, Tower)
    with torch.inference_mode():
        found, expected = tower(tower.embeddings(pixels)), twin_model(form, state)(pixel_values=pixels).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_routing_can_be_told(tmp_path: Path) -> None:
    """A later checkpoint read as RealGen's first code reads it: the twin is left aside."""
    path = tiny.omniaid_file(tmp_path, form="clip", twin=True)
    without = {k: v for k, v in tiny.omniaid(twin=True).items() if not k.startswith("feature_extractor.")}
    reward = OmniAID.load("omniaid", options("clip", path, routing="patches"), "cpu")
    image = pictures(1)[0]
    assert reward.score([Item(image)])[0].value == pytest.approx(
        float(plain("clip", without, reward.preprocess([image]))[0]), abs=1e-5
    )


def test_preprocessing_is_that_of_pillow_within_two_levels(tmp_path: Path) -> None:
    reward = OmniAID.load("omniaid", options("clip", tiny.omniaid_file(tmp_path)), "cpu")
    mean, std = (np.array(x) for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    levels = []
    for image in pictures():
        theirs = Image.fromarray(image).resize((512, 512), Image.Resampling.BILINEAR).resize((42, 42), Image.Resampling.BILINEAR)
        ours = reward.preprocess([image])[0].permute(1, 2, 0).numpy() * std + mean
        levels.append(np.abs(ours * 255 - np.asarray(theirs)))
    assert max(x.max() for x in levels) < 2.01 and np.mean([x.mean() for x in levels]) < 0.2


def test_gradients_reach_experts_and_head() -> None:
    """Refitting trains them: the forward pass is made of the parameters themselves, not of copies."""
    model = build(tiny.omniaid(), "x", "auto", 2, HEADS, None)
    logits, gates = model.logits(torch.randn(2, 3, 42, 42))
    logits.sum().backward()
    used = gates.gt(0).any(0).tolist()
    for expert, on in enumerate(used):
        gradient = model.encoder_layers[0].self_attn.q_proj.U_experts[expert].grad
        assert gradient is not None and bool(gradient.abs().sum() > 0) == on
    assert model.head.weight.grad is not None


def broken(what: str) -> dict[str, Tensor]:
    state = tiny.omniaid()
    if what == "missing":
        del state["encoder_layers.1.mlp.fc2.bias"]
    elif what == "shape":
        state["head.weight"] = torch.zeros(3, tiny.WIDTH)
    elif what == "unknown":
        state["text_model.weight"] = torch.zeros(2)
    elif what == "lora":
        state = {"encoder_layers.0.self_attn.q_proj.lora_A.0": torch.zeros(2, 2)}
    elif what == "router":
        state["gating_network.network.2.weight"] = torch.zeros(3, tiny.ROUTER)
        state["gating_network.network.2.bias"] = torch.zeros(3)
    elif what == "no head of experts":
        del state["gating_network.network.0.weight"]
    return state


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "missing: encoder_layers.1.mlp.fc2.bias"),
        ("shape", r"of another shape: head.weight \(3, 32\), not \(2, 32\)"),
        ("unknown", "unknown: text_model.weight"),
        ("lora", "LoRA forms are not served"),
        ("router", "3 of 6 experts is neither"),
        ("no head of experts", "has 'gating_network.network.0.weight'"),
    ],
)
def test_a_misfit_is_named(what: str, says: str, tmp_path: Path) -> None:
    save_file(broken(what), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=says):
        OmniAID.load("omniaid", options("clip", tmp_path), "cpu")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"heads": 5}, "set `heads`"),
        ({"top_k": 6}, "chooses among 5"),
        ({"size": 224}, "drop `size`"),
        ({"routing": "pooler"}, "missing: feature_extractor."),
        ({"hub": "a/b"}, "either `path`"),
    ],
)
def test_wrong_options_are_named(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tiny.omniaid_file(tmp_path)
    with pytest.raises(ValueError, match=re.escape(says)):
        OmniAID.load("omniaid", options("clip", path, **more), "cpu")


def test_shapes_are_read_from_the_file() -> None:
    clip, dino = shape_of(tiny.omniaid(rank=8), HEADS), shape_of(tiny.omniaid(form="dinov3"), HEADS)
    assert (clip.form, clip.size, clip.patch, clip.depth, clip.rank, clip.experts) == ("clip", 42, 14, 2, 8, 6)
    assert (dino.form, dino.size, dino.registers, dino.biases) == ("dinov3", 448, 4, (True, False, True, True))
