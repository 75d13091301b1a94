"""Everything a run needs to go on, in safetensors and JSON, written whole or not at all.

A checkpoint is a folder `step_000020/`: `state.safetensors` (trained weights, their average, the optimiser's moments) and
`meta.json`. It is written beside its place, flushed to disk and renamed, so a killed run leaves no half of one. Noise, windows and
prompt order are functions of (seed, step), so the seed and the step are the whole random state.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import RunConfig


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used for this run; the message says what differs."""


@dataclass(frozen=True)
class Saved:
    """Tensors by `weights/NAME`, `ema/NAME`, `optim/NAME/KEY`; `meta` as written."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix/`, without it."""
        return {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / "checkpoints" / f"step_{step:06d}"


def flatten(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimiser's state as tensors `NAME/KEY`."""
    by_id = {id(p): name for name, p in names.items()}
    return {f"{by_id[id(p)]}/{key}": torch.as_tensor(value) for p, state in optimizer.state.items() for key, value in state.items()}


def unflatten(optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor], flat: Mapping[str, Tensor]) -> None:
    """Put back what `flatten` took."""
    for path, value in flat.items():
        name, _, key = path.rpartition("/")
        value = value.clone() if key == "step" else value.to(names[name].device).clone()
        optimizer.state[names[name]][key] = value


def save(run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write atomically; an older checkpoint of the same step is replaced."""
    final = folder_of(run, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    building = final.with_name(f".{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, building / "state.safetensors")
    (building / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=1))
    for path in (building / "state.safetensors", building / "meta.json", building):
        sync(path)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        building.rename(final)
        shutil.rmtree(old)
    else:
        building.rename(final)
    sync(final.parent)
    return final


def read(folder: Path) -> Saved:
    """The checkpoint in `folder`; CheckpointError when it is not one."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        with safe_open(folder / "state.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(
            f"{folder} is not a readable checkpoint ({error}); remove it to resume from the one before"
        ) from error
    return Saved(tensors, meta)


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    return sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*") if p.is_dir())


def prune(run: Path, keep: int, best: int | None) -> None:
    """Leave the newest `keep` and the best one."""
    for step in steps(run)[:-keep]:
        if step != best:
            shutil.rmtree(folder_of(run, step))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.building")
    beside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    sync(beside)
    beside.replace(path)


def training(config: RunConfig) -> dict[str, Any]:
    """What the numbers of a step depend on, which a resumed run must agree in. Not: URLs, the number of steps, the alarm."""
    plain: dict[str, Any] = config.model_dump(mode="json")
    for key in ("name", "description", "steps", "reward_timeout_s", "max_unscored_steps", "eval", "alarm", "device"):
        plain.pop(key)
    for key in ("checkpoint_every", "checkpoint_keep"):
        plain.pop(key)
    for reward in plain["rewards"].values():
        reward.pop("url")
    return plain


def config_hash(config: RunConfig) -> str:
    """SHA-256 of `training`."""
    return hashlib.sha256(json.dumps(training(config), sort_keys=True).encode()).hexdigest()


def check_model(saved: Saved, fingerprint: str) -> None:
    """CheckpointError unless the checkpoint was trained on the model with this fingerprint."""
    meta = saved.meta
    if meta["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"the checkpoint after step {meta['step']} was trained on another model: its base weights are {meta['fingerprint'][:12]}, "
            f"those of policy.path are {fingerprint[:12]}. Point policy.path at the model it belongs to, or take another --run-dir."
        )


def check(saved: Saved, *, fingerprint: str, config: Mapping[str, Any], config_hash: str, sigmas_hash: str) -> None:
    """CheckpointError unless the checkpoint belongs to this model, this configuration and this noise schedule."""
    check_model(saved, fingerprint)
    meta = saved.meta
    if meta["config_hash"] != config_hash:
        was, now = _flat(meta["config"]), _flat(config)
        changes = [f"{k}: {was.get(k)!r} -> {now.get(k)!r}" for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
        raise CheckpointError(
            "the checkpoint belongs to another configuration: " + "; ".join(changes) + ". Undo that, or take another --run-dir."
        )
    if meta["sigmas_hash"] != sigmas_hash:
        raise CheckpointError("the noise schedule differs from the checkpoint's: another diffusers version or scheduler config?")


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
