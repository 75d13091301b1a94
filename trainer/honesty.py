"""What was never a reward: held-out detectors, the distance to photographs, the class hit.

>>> monitors = Monitors.load(Path("world/monitors"), "cpu")
>>> monitors.measure(images, classes)["distance"]

Three small networks with nothing in common with the services' detector: a CNN trained end to end on pixels, a linear
classifier of the log-spectrum, and a classifier of the photographs whose features the distances are taken in.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Grey 28x28 pictures (B, 1, 28, 28) in [0, 1] to logits (B, outputs); `features` are the 64 numbers before them."""

    def __init__(self, outputs: int, width: int = 32) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            blocks += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width * 9, 64), nn.ReLU())
        self.head = nn.Linear(64, outputs)

    def features(self, x: Tensor) -> Tensor:
        """(B, 64)."""
        out: Tensor = self.body(x - 0.3)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


def grey(images: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 1, 28, 28) in [0, 1]."""
    pixels = torch.from_numpy(images).float().mean(-1, keepdim=True).permute(0, 3, 1, 2) / 255
    if pixels.shape[-2:] != (28, 28):
        pixels = nn.functional.interpolate(pixels, (28, 28), mode="bilinear", antialias=True)
    return pixels


def log_spectrum(x: Tensor) -> Tensor:
    """(B, 1, 28, 28) to (B, 452): log magnitudes of the windowed 2-d Fourier transform, and a 32-bin histogram."""
    window = torch.hann_window(28, periodic=False)
    spectrum = torch.fft.rfft2(x[:, 0] * window[:, None] * window[None, :]).abs().add(1e-3).log().flatten(1)
    bins = (x[:, 0].flatten(1) * 31.999).long()
    histogram = torch.zeros(len(x), 32).scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float32))
    return torch.cat([spectrum, (histogram + 1).log() - 3], dim=1)


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Frechet distance of two feature sets (N, D), (M, D) as in FID (Heusel, 1706.08500): >= 0, lower is closer.

    Tr((A B)^(1/2)) comes from the eigenvalues of A^(1/2) B A^(1/2), which stay real.
    """
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def unbiased_frechet(a: NDArray[np.float64], b: NDArray[np.float64], splits: int = 8) -> float:
    """`frechet` without what it owes to the number of samples in `a`: about c / N, so 2 d(N) - d(N / 2), never below 0.

    FID at infinity (Chong and Forsyth, 1911.07023), from `splits` random halvings. Below 4 samples a feature half a set has no covariance
    worth the name: then it is `frechet` itself.
    """
    half = len(a) // 2
    whole = frechet(a, b)
    if half < 2 * a.shape[1]:
        return whole
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(a)) for _ in range(splits)]
    halves = [frechet(a[part], b) for order in orders for part in (order[:half], order[half : 2 * half])]
    return max(0.0, 2 * whole - float(np.mean(halves)))


def kernel_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Unbiased squared MMD with the cubic kernel of KID (Binkowski, 1801.01401); about 0 for equal distributions."""

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1) ** 3
        return out

    n, m = len(a), len(b)
    within_a, within_b = kernel(a, a), kernel(b, b)
    first = (within_a.sum() - np.trace(within_a)) / (n * (n - 1))
    second = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    return float(first + second - 2 * kernel(a, b).mean())


class Monitors:
    """The measurements of one evaluation. Nothing here is ever used as a reward."""

    def __init__(self, tensors: dict[str, dict[str, Tensor]], classes: list[str]) -> None:
        self.classes = classes
        self.cnn, self.classifier = SmallCNN(1), SmallCNN(len(classes))
        self.cnn.load_state_dict(tensors["cnn"])
        self.classifier.load_state_dict(tensors["classifier"])
        self.cnn.eval()
        self.classifier.eval()
        self.spectrum = tensors["spectrum"]
        self.photographs = tensors["reference"]["features"].double().numpy()

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> Self:
        """Read `monitors.json` and the four safetensors files beside it. They are so small that they run on the CPU."""
        del device
        if not (folder / "monitors.json").is_file():
            raise FileNotFoundError(f"no monitors in {folder}: set eval.monitors to world/monitors, or to null for none")
        config = json.loads((folder / "monitors.json").read_text())
        parts = ("cnn", "spectrum", "classifier", "reference")
        return cls({part: load_file(folder / f"{part}.safetensors") for part in parts}, config["classes"])

    @torch.inference_mode()
    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Features (N, 64) of the classifier, in which the distances are taken."""
        return torch.cat([self.classifier.features(c) for c in grey(images).split(256)]).double().numpy()

    @torch.inference_mode()
    def logits(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
        """Per picture: log-odds of "photograph" by the held-out detectors."""
        x = grey(images)
        cnn = torch.cat([self.cnn(chunk) for chunk in x.split(256)])[:, 0]
        s = self.spectrum
        spectrum = ((log_spectrum(x) - s["mean"]) / s["std"]) @ s["weight"] + s["bias"]
        return {"heldout_cnn": cnn.double().numpy(), "heldout_spectrum": spectrum.double().numpy()}

    @torch.inference_mode()
    def measure(self, images: NDArray[np.uint8], classes: Sequence[int | None]) -> dict[str, float]:
        """Means over pictures (N, H, W, 3) uint8.

        `heldout_*` are log-odds of "photograph" (higher is better), `distance` and `kernel_distance` compare with the 2,000
        held-out photographs (lower is better; unbiased in N, `distance` from 256 pictures on),
        `class_hit` is the share whose class is the one asked for, over those with a class (NaN when none has).
        """
        if len(images) != len(classes) or len(images) < 2:
            raise ValueError(f"measure needs two or more pictures and a class (or None) for each: {len(images)}, {len(classes)}")
        out = {name: float(values.mean()) for name, values in self.logits(images).items()}
        features = self.features(images)
        out["distance"] = unbiased_frechet(features, self.photographs)
        out["kernel_distance"] = kernel_distance(features, self.photographs)
        guessed = self.classifier.head(torch.from_numpy(features).float()).argmax(1).tolist()
        known = [g == c for g, c in zip(guessed, classes, strict=True) if c is not None]
        out["class_hit"] = float(np.mean(known)) if known else float("nan")
        return out
