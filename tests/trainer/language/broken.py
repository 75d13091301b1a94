"""What a training step does to a policy's weights, and what must not happen to them on their way to another engine."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trainer.language.policy import RewriterPolicy


def move(policy: RewriterPolicy, seed: int, size: float = 0.02) -> None:
    """As an optimiser does, without a reason."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def renamed(folder: Path) -> None:
    """Names that no layer has."""
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(".layers.", ".blocks."): value for name, value in load_file(file).items()}, file)


def half_renamed(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(".layers.1.", ".layers.9."): value for name, value in load_file(file).items()}, file)


def rescaled(folder: Path) -> None:
    file = folder / "adapter_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"lora_alpha": 2 * told["lora_alpha"]}))


def zeroed(folder: Path) -> None:
    """As it was before training."""
    file = folder / "adapter_model.safetensors"
    save_file({name: value * ("lora_A" in name) for name, value in load_file(file).items()}, file)


# what the engine says of each, with the server's checksum and without
SAID = [
    (renamed, ("0 of the adapter's 28 tensors reached", "took it and computes without it")),
    (half_renamed, ("14 of the adapter's 28 tensors reached", "differ from the policy's by up to")),
    (rescaled, ("differ from the policy's by up to", "differ from the policy's by up to")),
    (zeroed, ("took it and computes without it", "took it and computes without it")),
]
