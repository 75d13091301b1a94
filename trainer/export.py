"""The LoRA of a run as a file for other programs; neither the model nor its weights are loaded.

`diffusers` is what `load_lora_weights` reads, with alpha in the file's metadata. `comfyui` is one file whose names ComfyUI's loaders know
(`comfy/lora.py`: `transformer.` for SD3 and FLUX, `diffusion_model.` for Z-Image and Qwen-Image) and diffusers reads as well. It holds no
alpha: alpha / rank is multiplied into lora_B, since both take a missing alpha for rank.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import checkpoint
from trainer.config import ConfigError, RunConfig, load
from trainer.registry import resolve

FORMATS = ("diffusers", "comfyui")
PREFIXES = {"flux": "transformer", "qwen_image": "diffusion_model", "sd3": "transformer", "z_image": "diffusion_model"}
NAME = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A trained LoRA: tensors by `LAYER.lora_A.weight` (rank, in) and `LAYER.lora_B.weight` (out, rank)."""

    family: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    targets: tuple[str, ...]


def export_adapter(run: Path, out: Path, format: str = "diffusers", step: int | None = None) -> Path:
    """Write the adapter of a run folder and return the file.

    It is that in `adapter/` where the run is finished, otherwise (or with `step`) that of a checkpoint, the best one if known, through the
    average of the weights as evaluations see it. `out` is a .safetensors file, or a folder, in which it gets diffusers' usual name.
    ConfigError: unknown format, no LoRA, nothing to export.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    adapter = read_adapter(run, step)
    file = out if out.suffix == ".safetensors" else out / NAME
    file.parent.mkdir(parents=True, exist_ok=True)
    if format == "comfyui":
        save_file(to_comfyui(adapter), file, metadata={"format": "pt", "verism": adapter.family})
        return file
    resolve("policy", adapter.family).Pipeline.save_lora_weights(
        file.parent,
        transformer_lora_layers=dict(adapter.tensors),
        transformer_lora_adapter_metadata=LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian", target_modules=list(adapter.targets)
        ).to_dict(),
        weight_name=file.name,
    )
    return file


def to_comfyui(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors under ComfyUI's names, float32, alpha / rank in lora_B."""
    prefix, scale = PREFIXES[adapter.family], adapter.alpha / adapter.rank
    return {
        f"{prefix}.{name}": (tensor.float() * scale if ".lora_B." in name else tensor.float()).contiguous()
        for name, tensor in adapter.tensors.items()
    }


def read_adapter(run: Path, step: int | None = None) -> Adapter:
    """The LoRA of a run folder, as `export_adapter` chooses it."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder: config.yaml is missing; give the folder that verism-train wrote")
    config = load(str(run / "config.yaml"))
    family = config.policy.use
    lora = resolve("policy", family).Options(path=config.policy.path, **config.policy.options()).lora
    if lora is None:
        raise ConfigError(f"{run} trained every weight: its whole transformer is in {run / 'adapter' / 'transformer'}")
    file = run / "adapter" / NAME
    if step is None and file.is_file():
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
                tensors = {key.removeprefix("transformer."): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read ({error}); remove it to export from a checkpoint") from error
        known: dict[str, Any] = {key.removeprefix("transformer."): value for key, value in about.items()}
        return Adapter(family, tensors, int(known.get("r", lora.rank)), float(known.get("lora_alpha", lora.alpha)), lora.targets)
    saved = checkpoint.read(checkpoint.folder_of(run, _step(run, config, step)))
    average = {name.replace(".default.", "."): tensor for name, tensor in saved.under("ema").items()}
    if not average or not all(".lora_" in name for name in average):
        raise ConfigError(f"the checkpoint in {run} holds no LoRA: it was trained with policy.lora=null, or is damaged")
    return Adapter(family, average, lora.rank, lora.alpha, lora.targets)


def _step(run: Path, config: RunConfig, step: int | None) -> int:
    known = checkpoint.steps(run)
    if step is None:
        best = run / "checkpoints" / "best.json"
        step = int(json.loads(best.read_text())["step"]) if best.is_file() else (known[-1] if known else None)
    if step not in known:
        there = f"there are {', '.join(map(str, known))}" if known else f"run `verism-train {run / 'config.yaml'}` first"
        raise ConfigError(f"{config.name}: no checkpoint{'' if step is None else f' after step {step}'} in {run}; {there}")
    return step
