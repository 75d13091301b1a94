"""The monitors: a classifier of the photographs, two held-out detectors, and the features of the held-out photographs."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from trainer.honesty import SmallCNN, grey, log_spectrum
from world import photographs
from world.recipes.progress import track

FOLDER = Path(__file__).parents[1] / "monitors"


def fit_cnn(x: Tensor, y: Tensor, outputs: int, steps: int, title: str, seed: int = 0) -> SmallCNN:
    """Train on (N, 1, 28, 28) with mirroring and shifts of up to 2 pixels; y is a class index, or 0/1 when outputs == 1."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallCNN(outputs).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in track(range(steps), title):
        chosen = torch.randint(len(x), (128,), generator=generator)
        batch = x[chosen]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        logits = model(batch.roll((dy, dx), (-2, -1)))
        if outputs == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y[chosen].float())
        else:
            loss = torch.nn.functional.cross_entropy(logits, y[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def logistic(features: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """L2-regularised logistic regression of y in {0, 1} on (N, D): weight (D,), bias (). Deterministic (L-BFGS)."""
    x, target = features.double(), y.double()
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, target)
        value = value + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach().float(), bias.detach().float()


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Probability that a positive scores above a negative."""
    scores = np.concatenate([positive, negative])
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def make(fakes: NDArray[np.uint8], folder: Path = FOLDER) -> None:
    """Fit everything on the training photographs and on `fakes` (N, 28, 28, 3) that no served detector has seen."""
    images, classes = photographs.load("train")
    real, fake = grey(images), grey(fakes)
    folder.mkdir(parents=True, exist_ok=True)
    classifier = fit_cnn(real, torch.from_numpy(classes), 10, 1500, "classifier")
    x, y = torch.cat([real, fake]), torch.cat([torch.ones(len(real)), torch.zeros(len(fake))])
    cnn = fit_cnn(x, y, 1, 1500, "held-out CNN", seed=1)
    features = log_spectrum(x)
    mean, std = features.mean(0), features.std(0) + 1e-3
    weight, bias = logistic((features - mean) / std, y, 1e-4)
    held_out, _ = photographs.load("test")
    with torch.inference_mode():
        reference = classifier.features(grey(held_out))
    save_file(cnn.state_dict(), folder / "cnn.safetensors")
    save_file(classifier.state_dict(), folder / "classifier.safetensors")
    save_file({"weight": weight, "bias": bias, "mean": mean, "std": std}, folder / "spectrum.safetensors")
    save_file({"features": reference.contiguous()}, folder / "reference.safetensors")
    (folder / "monitors.json").write_text(json.dumps({"classes": list(photographs.CLASS_NAMES)}, indent=1) + "\n")
