"""The head after Adv-GRPO on tiny random DINO backbones: one path for fitting and scoring, normalised in both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from services.fitting.losses import hinge
from services.reward import Item
from services.rewards.dino_head import Backbone, BackboneOptions, DinoHead, head
from tests.services.rewards_detectors import tiny


def pictures(count: int = 4, seed: int = 0) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((56, 56), (80, 40), (20, 31), (56, 56))[:count]]


def h(path: Path, x: torch.Tensor) -> torch.Tensor:
    """The head, written out."""
    t = load_file(path)
    y = x @ t["0.weight"].T + t["0.bias"]
    return (y * 0.5 * (1 + torch.erf(y / 2**0.5))) @ t["2.weight"][0] + t["2.bias"]


@pytest.mark.parametrize("kind", tiny.BACKBONES)
def test_scores_are_the_formula_on_normalised_tokens(kind: str, tmp_path: Path) -> None:
    reward = DinoHead.load("dino_head", tiny.dino_head(tmp_path, kind), "cpu")
    images = pictures()
    scores = reward.score([Item(i) for i in images])
    assert len({round(s.value or 0, 4) for s in scores}) == 4
    for image, score in zip(images, scores, strict=True):
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        pixels = torch.nn.functional.interpolate(pixels, (56, 56), mode="bicubic", antialias=True).clamp(0, 255) / 255
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.inference_mode():
            model = reward.backbone.model
            raw = model.forward_features(pixels) if kind.startswith("timm") else model(pixel_values=pixels).last_hidden_state
        tokens = raw[0] / raw[0].norm(dim=1, keepdim=True)
        registers = 4 if kind in ("timm_reg", "dinov2_reg", "dinov3") else 0
        assert len(tokens) == 1 + registers + 16
        cls, patch = h(tmp_path / "head.safetensors", tokens[0]), h(tmp_path / "head.safetensors", tokens[1 + registers :]).mean()
        assert score.value == pytest.approx(float(0.7 * cls + 0.3 * patch), abs=1e-4)
        assert score.parts == pytest.approx({"cls": float(cls), "patch": float(patch)}, abs=1e-4)


def test_features_have_norm_one_in_the_order_of_the_pictures(tmp_path: Path) -> None:
    backbone = Backbone(BackboneOptions(**tiny.backbone(tmp_path)), 56, "cpu")
    images = pictures()
    together = backbone.features(images)
    assert together.cls_BD.shape == (4, tiny.WIDTH) and together.patches_BND.shape == (4, 16, tiny.WIDTH)
    torch.testing.assert_close(together.patches_BND.norm(dim=-1), torch.ones(4, 16))
    for i, image in enumerate(images):
        torch.testing.assert_close(backbone.features([image]).cls_BD[0], together.cls_BD[i], atol=1e-5, rtol=1e-5)


def test_what_is_fitted_is_what_is_scored(tmp_path: Path) -> None:
    """Fit h on features(), save it, serve it: served scores have the fitted logits, and tell the two kinds apart."""
    options = tiny.dino_head(tmp_path)
    backbone = Backbone(BackboneOptions(**options["backbone"]), 56, "cpu")
    rng = np.random.default_rng(1)
    real = [np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), 14, 0), 14, 1) for _ in range(12)]
    made = [rng.integers(90, 160, (56, 56, 3), dtype=np.uint8) for _ in range(12)]
    a, b = backbone.features(real), backbone.features(made)
    torch.manual_seed(0)
    module = head(tiny.WIDTH)
    optimiser = torch.optim.Adam(module.parameters(), 1e-3, betas=(0.5, 0.999))
    losses = []
    for _ in range(200):
        loss = hinge(module(a.cls_BD), module(b.cls_BD)) + 0.3 * hinge(module(a.patches_BND), module(b.patches_BND))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 1 < losses[0]
    save_file({k: v.detach() for k, v in module.state_dict().items()}, tmp_path / "head.safetensors")
    scores = DinoHead.load("dino_head", options, "cpu").score([Item(i) for i in real + made])
    fitted = torch.cat([module(a.cls_BD), module(b.cls_BD)])[:, 0].tolist()
    assert [s.parts["cls"] for s in scores] == pytest.approx(fitted, abs=1e-4)
    assert min(s.value or 0 for s in scores[:12]) > max(s.value or 0 for s in scores[12:])


def test_the_hinge_is_adv_grpos(tmp_path: Path) -> None:
    class Lookup(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :1]

    one = DinoHead.load("dino_head", tiny.dino_head(tmp_path), "cpu").fitter({})
    cls = torch.tensor([[2.0], [0.5], [-2.0], [0.0]])
    patches = torch.tensor([[[0.0], [3.0]], [[1.0], [-1.0]], [[-1.0], [0.5]], [[-3.0], [-0.5]]])
    one._head, one._features = Lookup(), lambda items: (cls, patches)  # type: ignore[assignment]
    items = [Item(np.zeros((16, 16, 3), np.uint8))] * 4
    on_cls = 0.5 * ((0 + 0.5) / 2 + (0 + 1) / 2)
    on_patches = 0.5 * ((1 + 0 + 0 + 2) / 4 + (0 + 1.5 + 0 + 0.5) / 4)
    total = one.losses(items[:2], items[2:], torch.Generator())["total"]
    assert total.item() == pytest.approx(on_cls + 0.3 * on_patches)


def test_drawn_patches_repeat_and_belong_to_the_picture(tmp_path: Path) -> None:
    options = tiny.dino_head(tmp_path)
    every, some = (DinoHead.load("d", {**options, "patches": n}, "cpu") for n in (None, 4))
    batch = [Item(i) for i in pictures()]
    first = [s.parts["patch"] for s in some.score(batch)]
    assert [s.parts["patch"] for s in some.score(batch[::-1])][::-1] == pytest.approx(first, abs=1e-5)
    means = [s.parts["patch"] for s in every.score(batch)]
    assert first != pytest.approx(means, abs=1e-4)
    many = DinoHead.load("d", {**options, "patches": 20_000}, "cpu")
    assert [s.parts["patch"] for s in many.score(batch)] == pytest.approx(means, abs=0.05)


def test_the_map_is_the_patches_own_score(tmp_path: Path) -> None:
    reward = DinoHead.load("d", tiny.dino_head(tmp_path), "cpu")
    image = pictures(2)[1]
    found = reward.patch_map(image)
    assert found.shape == (4, 4) and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    scores = np.log(1 / found.astype(np.float64) - 1)
    assert scores.mean() == pytest.approx(reward.score([Item(image)])[0].parts["patch"], abs=1e-4)


def test_another_size_than_the_checkpoints(tmp_path: Path) -> None:
    """Positions are interpolated; the score stays near that of the fitted size, and the map gets more cells."""
    reward = DinoHead.load("d", tiny.dino_head(tmp_path, size=84), "cpu")
    assert reward.patch_map(pictures(1)[0]).shape == (6, 6)


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"size": 60}, ValueError, "not a multiple of the backbone's patch, 14: try 56"),
        ({"head": {"path": "nowhere"}}, FileNotFoundError, "one weight file at nowhere"),
        ({"backbone": {"timm": "vit_nothing", "weights": {"path": "x"}}}, ValueError, "knows no 'vit_nothing'"),
        ({"backbone": {"timm": "vit_small_patch14_dinov2"}}, ValueError, "go together"),
        ({"backbone": {"model": "facebook/dinov2-base"}}, ValueError, "needs its `revision`"),
        ({"backbone": {"folder": "nowhere"}}, FileNotFoundError, "config.json is missing"),
        ({"backbone": {}}, ValueError, "one of `timm`"),
    ],
)
def test_wrong_options_are_named(more: dict[str, Any], error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        DinoHead.load("d", {**tiny.dino_head(tmp_path), **more}, "cpu")


def test_a_head_of_another_width_or_depth_is_named(tmp_path: Path) -> None:
    options = tiny.dino_head(tmp_path)
    state = {k: v.detach().clone() for k, v in head(48).state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: 0.weight \(512, 48\), not \(512, 32\)"):
        DinoHead.load("d", options, "cpu")
    save_file({**state, "4.weight": torch.zeros(1, 1), "4.bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="not a head of two linear layers"):
        DinoHead.load("d", options, "cpu")


def test_a_head_inside_a_module_is_read(tmp_path: Path) -> None:
    options = tiny.dino_head(tmp_path)
    before = DinoHead.load("d", options, "cpu").score([Item(pictures(1)[0])])[0].value
    inside = {f"net.{k}": v for k, v in load_file(tmp_path / "head.safetensors").items()}
    torch.save({"state_dict": inside}, tmp_path / "head.pth")
    after = DinoHead.load("d", {**options, "head": {"path": tmp_path / "head.pth"}}, "cpu").score([Item(pictures(1)[0])])[0].value
    assert before == after
