"""Everything a run needs to go on, in safetensors and JSON, written whole or not at all.

A checkpoint is a folder `step_000020/`: `state.safetensors` (trained weights, their average, the optimiser's moments) and
`meta.json`, which holds the other's checksum. It is written beside its place, flushed to disk and renamed, so a killed run leaves no half
of one. Noise, windows and prompt order are functions of (seed, step), so the seed and the step are the whole random state.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from blake3 import blake3
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import RunConfig, kind_of
from trainer.sharding import like


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used for this run; the message says what differs."""


class Unreadable(CheckpointError):
    """A checkpoint is damaged, or none."""


class NotSaved(OSError):
    """No room, no right or no disk; what was there before is untouched. The message says how much is missing."""


class Stateful(Protocol):
    """What changes in a run beside the learner, and has to come back with a checkpoint: tensors by name, and a JSON mapping."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Saved:
    """Tensors by `weights/NAME`, `ema/NAME`, `optim/NAME/KEY`, `state/WHOSE/NAME`; `meta` as written."""

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
        optimizer.state[names[name]][key] = value.clone() if key == "step" else like(value, names[name]).clone()


def save(run: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write atomically; an older checkpoint of the same step is replaced. NotSaved leaves everything as it was."""
    final = folder_of(run, step)
    building, old = final.with_name(f".{final.name}.building"), final.with_name(f".{final.name}.old")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        _write(building, {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, {"step": step, **meta})
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            building.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            building.rename(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        recover(run)
        raise NotSaved(_why(error, run, sum(v.numel() * v.element_size() for v in tensors.values()))) from error
    return final


def _write(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    state = folder / "state.safetensors"
    save_file(dict(tensors), state)
    (folder / "meta.json").write_text(json.dumps({**meta, "blake3": checksum(state)}, indent=1))
    for path in (state, folder / "meta.json", folder):
        sync(path)


def _why(error: Exception, run: Path, needed: int) -> str:
    """What happened, how much a checkpoint needs, and how much there is."""
    code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None  # Rust's own words
    number = int(code[1]) if code else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error)
    place = next(path for path in (run, *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    text = f"the checkpoint was not saved ({reason}): it takes {size(needed)}, and {place} has {size(free)} free"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and needed > free:
        return f"{text}, {size(needed - free)} too little"
    return text


def size(count: float) -> str:
    """Bytes for people: 3.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def checksum(path: Path) -> str:
    """BLAKE3 of a file."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return digest.hexdigest()


def recover(run: Path) -> None:
    """After a kill in mid-save: a checkpoint that was about to be replaced comes back, and halves of others go."""
    for old in (run / "checkpoints").glob(".step_*.old"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)
    for building in (run / "checkpoints").glob(".step_*.building"):
        shutil.rmtree(building, ignore_errors=True)


def set_aside(run: Path, step: int) -> Path:
    """Move a damaged checkpoint where nothing takes it for one; returns the place."""
    folder = folder_of(run, step)
    aside = folder.with_name(f"damaged_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def read(folder: Path) -> Saved:
    """The checkpoint in `folder`; Unreadable when it is none, or not what was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        with safe_open(folder / "state.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if meta["step"] < 0 or ("blake3" in meta and meta["blake3"] != checksum(folder / "state.safetensors")):
            raise ValueError("its checksum differs")
    except Exception as error:
        raise Unreadable(f"{folder} is not a readable checkpoint ({error}); remove it to resume from the one before") from error
    return Saved(tensors, meta)


def steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, in order."""
    return sorted(int(p.name.removeprefix("step_")) for p in (run / "checkpoints").glob("step_*") if p.is_dir())


def prune(run: Path, keep: int, best: int | None) -> int:
    """Leave the newest `keep` and the best one; how many went."""
    old = [step for step in steps(run)[:-keep] if step != best]
    for step in old:
        shutil.rmtree(folder_of(run, step), ignore_errors=True)
    return len(old)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.building")
    try:
        beside.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        sync(beside)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A file that `write_json` wrote; CheckpointError when it is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it") from error


UNBOUND = (
    *(
        "name",
        "description",
        "steps",
        "device",
        "eval",
        "alarm",
        "parallel",
        "reward_timeout_s",
        "reward_outage_s",
        "max_unscored_steps",
    ),
    *("checkpoint_every", "checkpoint_keep", "checkpoint_best", "tensorboard", "wandb"),
)
FREE = (
    "sampling.micro_batch",
    "sampling.draw_batch",
    "policy.gradient_checkpointing",
    "policy.compile",
    "policy.onednn",
    "policy.text_encoders",
    "policy.text_cache",
    "policy.text_memory_gb",
    "policy.decode_pixels",
    "language.engine.use",
    "language.micro_batch",
    "language.policy.gradient_checkpointing",
    "language.policy.onednn",
)  # no other task, though other windows and rounding: allowed, and told


ELSEWHERE = ("admin", "key_env", "wait_s", "lease_s")  # of a detector that is refitted: where it is, and patience with it


def training(config: RunConfig) -> dict[str, Any]:
    """What the numbers of a step depend on, which a resumed run must agree in. Not: URLs, the number of steps, the alarm."""
    plain: dict[str, Any] = config.model_dump(mode="json")
    for key in UNBOUND:
        plain.pop(key, None)
    for reward in plain["rewards"].values():
        reward.pop("url")
    for adversary in plain["adversary"].values():
        for key in ELSEWHERE:
            adversary.pop(key)
    if plain["references"] is not None:
        plain["references"].pop("evaluated")
    if "language" in plain:
        plain["language"]["engine"] = {"use": plain["language"]["engine"]["use"]}
        del plain["language"]["shown"], plain["language"]["eval_temperature"]
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


def check(saved: Saved, *, fingerprint: str, config: Mapping[str, Any], sigmas_hash: str) -> list[str]:
    """CheckpointError unless the checkpoint belongs to this model, this configuration and this noise schedule; else what to be told."""
    check_model(saved, fingerprint)
    meta, told = saved.meta, []
    was, now = _flat(_as_now(meta["config"])), _flat(config)
    changes = {
        k: f"{k}: {was.get(k)!r} -> {now.get(k)!r}" for k in sorted(was.keys() | now.keys()) if was.get(k, ...) != now.get(k, ...)
    }
    if bound := [words for key, words in changes.items() if key not in FREE]:
        raise CheckpointError(
            f"the checkpoint belongs to another configuration: {'; '.join(bound)}. Undo that, or take another --run-dir."
        )
    if changes:
        told.append(f"{'; '.join(changes.values())}: from here on the numbers are not those that the run would have had")
    if meta["sigmas_hash"] != sigmas_hash:
        raise CheckpointError("the noise schedule differs from the checkpoint's: another diffusers version or scheduler config?")
    return told


def _as_now(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved configuration with today's defaults for the keys that did not exist when it was written."""
    places: dict[str, Any] = {
        "rewards": {name: {**reward, "url": "-"} for name, reward in config["rewards"].items()},
        "adversary": {name: {**one, "admin": "-"} for name, one in config.get("adversary", {}).items()},
    }
    if config.get("adversary"):
        places["eval"] = {"monitors": "-"}  # some judge was never refitted; which one is none of a checkpoint's business
    try:
        return training(kind_of(config).model_validate({**config, "name": "saved", **places}))
    except ValidationError:
        return config


def check_shapes(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """CheckpointError unless both hold the same weights of the same shapes."""
    if own.keys() != saved.keys():
        missing, more = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
        say = [f"it lacks {len(missing)} such as {missing[0]}"] if missing else []
        say += [f"it has {len(more)} others such as {more[0]}"] if more else []
        raise CheckpointError(
            f"the checkpoint trains other weights than policy.lora names ({', '.join(say)}): use the policy.lora of the run's own "
            "config.yaml (null where it trained all weights)"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"the checkpoint's {name} is {tuple(saved[name].shape)}, the policy's {tuple(tensor.shape)}: another policy.lora.rank? "
                "Use the run's own config.yaml, or take another --run-dir."
            )


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
