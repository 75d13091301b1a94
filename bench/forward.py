"""What a forward pass of the detector's backbone costs on this CPU, and what makes it cheaper: `python -m bench.forward`.

EfficientNet-Lite0 with its ImageNet weights, at the sides and batches asked for, in each way: as timm builds it, channels last, batch
norms folded into the convolutions, bfloat16, torch.compile. Rounds are interleaved; the quickest call counts, since other work
on the same cores only ever adds. CPU is what the process used, over all its threads. `change` is the largest change of a feature, relative
to the largest feature (or to 255), against the first way. Preparing a picture (512x512 to the side, antialiased) has rows of its own: in
float32 by torch's own call and as the detectors do it, and in whole levels as pillow does.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from services.config import ROOT
from services.rewards._detector_kit import folded
from services.rewards._resize import resized
from services.rewards.detector import Backbone, DetectorConfig

Way = Callable[[Tensor], Tensor]


def ways(compiled: bool) -> dict[str, Way]:
    """Name to a function of pixels (B, 3, side, side) float32."""
    config = DetectorConfig.model_validate_json((ROOT / "world" / "detector" / "config.json").read_text())

    def fresh() -> nn.Module:
        return Backbone(config, "cpu").model.to(memory_format=torch.contiguous_format)

    def last(model: nn.Module, dtype: torch.dtype = torch.float32) -> Way:
        model.to(dtype, memory_format=torch.channels_last)
        return lambda x: model(x.to(dtype, memory_format=torch.channels_last)).float()

    plain, trial = fresh(), torch.randn(2, 3, 84, 84)
    out: dict[str, Way] = {
        "as built": plain,
        "channels last": last(fresh()),
        "channels last, folded": last(folded(fresh(), trial)),
        "channels last, folded, bfloat16": last(folded(fresh(), trial), torch.bfloat16),
    }
    if compiled:
        out["channels last, folded, compiled"] = torch.compile(last(folded(fresh(), trial)), dynamic=False)
    return out


def preparing(side: int) -> dict[str, Way]:
    """Name to a function of pictures (B, 3, H, W) uint8, channels last, to the side."""

    def whole(x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)

    def banded(x: Tensor) -> Tensor:
        return resized(list(x.permute(0, 2, 3, 1).numpy()), (side, side), "bicubic", x.device)

    return {"prepared by interpolate": lambda x: whole(x.float()), "prepared by banded products": banded, "in whole levels": whole}


def measure(names: dict[str, Way], x: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds per picture: wall, CPU; the quickest of `rounds`."""
    best = {name: (float("inf"), float("inf")) for name in names}
    for turn in range(rounds + 1):
        for name, way in names.items():
            for _ in range(max(2, 16 // len(x))):
                wall, cpu = time.perf_counter(), time.process_time()
                way(x)
                each = ((time.perf_counter() - wall) * 1e3 / len(x), (time.process_time() - cpu) * 1e3 / len(x))
                if turn:
                    best[name] = (min(best[name][0], each[0]), min(best[name][1], each[1]))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.forward", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[84, 224])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    asked = parser.parse_args()
    load, line = os.getloadavg()[0], "{:>5}{:>6}{:>8}  {:32}{:>9}{:>9}{:>9}{:>9}{:>9}"
    print(line.format("side", "batch", "threads", "way", "ms each", "CPU ms", "x", "x CPU", "change"), flush=True)

    def rows(names: dict[str, Way], x: Tensor, side: int, changes: dict[str, float]) -> None:
        for threads in dict.fromkeys(asked.threads):
            torch.set_num_threads(threads)
            found = measure(names, x, asked.rounds)
            first = next(iter(found.values()))
            for name, (wall, cpu) in found.items():
                gains = (f"{first[0] / wall:.2f}", f"{first[1] / cpu:.2f}", f"{changes[name]:.0e}" if name in changes else "")
                print(line.format(side, len(x), threads, name, f"{wall:.2f}", f"{cpu:.2f}", *gains), flush=True)

    with torch.inference_mode():
        names = ways(asked.compile)
        for side in asked.sides:
            for size in asked.batches:
                x = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(0))
                truth = names["as built"](x)
                changes = {name: ((way(x) - truth).abs().max() / truth.abs().max()).item() for name, way in names.items()}
                rows(names, x, side, changes)
            pictures = torch.randint(0, 256, (8, 512, 512, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            prepared = preparing(side)
            truth = prepared["prepared by interpolate"](pictures)
            rows(prepared, pictures, side, {n: ((way(pictures) - truth).abs().max() / 255).item() for n, way in prepared.items()})
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {load:.1f} before and {os.getloadavg()[0]:.1f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
