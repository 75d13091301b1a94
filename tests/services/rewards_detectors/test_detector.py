"""The detector's map, and that a batch in two halves scores as before."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from services.config import ROOT
from services.reward import Item
from services.rewards.detector import Backbone, Detector, DetectorConfig
from world import photographs

FOLDER = ROOT / "world" / "detector"


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.load("detector", {"folder": FOLDER}, "cpu")


def pictures() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    shown = photographs.load("test")[0]
    return [*shown[:6], *(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((28, 28), (60, 100), (128, 16)))]


def test_scores_are_head_on_features(detector: Detector) -> None:
    """The published formula, from the folder's tensors: no way through the model may change a score."""
    tensors, images = load_file(FOLDER / "model.safetensors"), pictures()
    features = Backbone(DetectorConfig(**json.loads((FOLDER / "config.json").read_text())), "cpu").features(images)
    logits = features @ tensors["head.weight"] + tensors["head.bias"]
    scores = detector.score([Item(i) for i in images])
    assert [s.parts["logit"] for s in scores] == pytest.approx(logits.tolist(), abs=3e-4)
    assert [s.value for s in scores] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert all(s.in_domain for s in scores[:6]) and not all(s.in_domain for s in scores[6:])


def test_the_maps_mean_is_the_pictures_logit(detector: Detector) -> None:
    for image, score in zip(pictures(), detector.score([Item(i) for i in pictures()]), strict=True):
        found = detector.patch_map(image)
        assert found.dtype == np.float32 and found.shape == (3, 3) and found.min() >= 0 and found.max() <= 1
        clear = found.astype(np.float64).clip(1e-12, 1 - 1e-7)
        if (found == clear).all():  # where no cell is rounded to 0 or 1, the log-odds can be taken back
            assert -np.log(clear / (1 - clear)).mean() == pytest.approx(score.parts["logit"], abs=0.02)


def test_each_cell_is_the_head_on_its_own_features(detector: Detector) -> None:
    tensors, image = load_file(FOLDER / "model.safetensors"), pictures()[7]
    with torch.inference_mode():
        cells = detector.backbone.model.forward_features(detector.backbone.preprocess([image]))[0]
    found = detector.patch_map(image)
    for row in range(3):
        for column in range(3):
            logit = float(cells[:, row, column] @ tensors["head.weight"] + tensors["head.bias"])
            assert found[row, column] == pytest.approx(1 / (1 + np.exp(logit)), abs=1e-5)


def vit(folder: Path) -> Path:
    """A detector on a backbone that has tokens and no feature map: random weights, as a file."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    save_file(model.state_dict(), folder / "vit.safetensors")
    width, config = model.num_features, json.loads((FOLDER / "config.json").read_text())
    config |= {"backbone": "vit_tiny_patch16_224", "backbone_weights": str(folder / "vit.safetensors"), "size": 224}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"head.weight": torch.randn(width), "head.bias": torch.zeros(()), "domain.mean": torch.zeros(width)}
    save_file({**tensors, "domain.axes": torch.eye(width), "domain.scale": torch.ones(width)}, folder / "model.safetensors")
    return folder


def test_a_backbone_without_a_feature_map_has_no_map(detector: Detector, tmp_path: Path) -> None:
    other = Detector.load("vit", {"folder": vit(tmp_path)}, "cpu")
    assert not hasattr(other, "patch_map") and hasattr(detector, "patch_map")
    assert other.score([Item(pictures()[0])])[0].status == "ok"
