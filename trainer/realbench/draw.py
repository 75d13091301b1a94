"""Pictures of a model or a run, for every prompt the same noise whoever paints: PNG files named by the prompt, each written whole.

`about.json` beside them says what painted them; other settings are refused, other weights paint everything anew. A picture holds a mark of
what it was painted from and by: one whose mark fits is not painted again.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from trainer import checkpoint
from trainer.config import ConfigError, RunConfig
from trainer.config import load as load_recipe
from trainer.realbench.config import Contestant, Drawing, found
from trainer.realbench.ledger import digest
from trainer.realbench.prompts import BenchPrompt
from trainer.watch.described import learned

Tell = Callable[[int], None]
_MARK = "verism"  # the text chunk of a PNG that holds its mark


class Painter(Protocol):
    """Pictures (B, H, W, 3) uint8 of texts, row b from seeds[b] alone."""

    batch: int

    def paint(self, texts: Sequence[str], seeds: Sequence[int]) -> Sequence[NDArray[np.uint8]]: ...
    def close(self) -> None: ...


def seed_of(seed: int, prompt: str) -> int:
    """Of a prompt's noise; in [0, 2^63)."""
    return int(digest(seed, prompt), 16) >> 1


def about(one: Contestant, drawing: Drawing, form: str, seed: int) -> dict[str, Any]:
    """What its pictures depend on. Of a run that is still being written the checkpoint is chosen once, here."""
    told: dict[str, Any] = {"form": form, "seed": seed}
    if one.model is not None:
        options = drawing.model_dump(mode="json", exclude={"batch"})
        lora = None if one.lora is None else str(one.lora)
        return told | {"model": one.model, "lora": lora, "drawing": options, "weights": _weights_of_model(one.model, one.lora)}
    assert one.run is not None
    step = step_of(one.run, one.step)
    return told | {"run": str(one.run), "step": step, "weights": _weights_of_run(one.run, step)}


def _weights_of_model(model: str, lora: Path | None) -> str:
    """A digest of what a folder's components hold, or of the hub's revision, and of the LoRA's file."""
    from huggingface_hub import hf_hub_download

    from trainer.policies.kit import read_index

    where = found(Path(model))
    index, there = read_index(str(where) if where.is_dir() else model, None)
    if there:
        files = sorted(path for path in where.glob("*/*") if path.suffix in (".safetensors", ".json") and path.is_file())
        base: Any = [index, *((str(path.relative_to(where)), checkpoint.checksum(path)) for path in files)]
    else:
        base = Path(hf_hub_download(model, "model_index.json")).parent.name  # of a snapshot: its commit
    return digest(base, None if lora is None else checkpoint.checksum(_lora_file(lora)))


def _weights_of_run(run: Path, step: int) -> str:
    """A digest of a checkpoint by its meta.json, which holds the checksum of the rest."""
    return checkpoint.checksum(checkpoint.folder_of(run, step) / "meta.json")[:16]


def _lora_file(lora: Path) -> Path:
    """ConfigError where there is none."""
    path = found(lora)
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ConfigError(f"{lora}: no LoRA there; give a .safetensors file, or its folder as diffusers writes it")
    return file


def step_of(run: Path, wanted: int | None) -> int:
    """The checkpoint that is asked for, else the best, else the newest; ConfigError when there is none yet."""
    known = checkpoint.steps(run)
    if wanted is None:
        best = run / "checkpoints" / "best.json"
        wanted = int(checkpoint.read_json(best)["step"]) if best.is_file() else known[-1] if known else None
    if wanted is None or wanted not in known:
        there = f"there are {known}" if known else "there is none yet: wait for its first evaluation"
        raise ConfigError(f"{run} has no checkpoint{'' if wanted is None else f' after step {wanted}'}; {there}")
    return wanted


def settle(folder: Path, told: dict[str, Any], step: int | None) -> dict[str, Any]:
    """`told`, or what was chosen when these pictures were begun; ConfigError when other settings painted them. Its `notes` are for readers."""
    path = folder / "about.json"
    notes: list[str] = []
    if path.is_file():
        known, told = checkpoint.read_json(path), json.loads(json.dumps(told))
        chosen = {"step"} if step is None and "step" in told else set()
        if chosen and told["step"] != known.get("step"):
            told, notes = _begun_with(known, told)  # a run that goes on
        odd = {name for name in known.keys() | told.keys() if known.get(name) != told.get(name)}
        if odd - chosen - {"weights"}:
            raise ConfigError(
                f"{folder} holds pictures painted otherwise ({', '.join(sorted(odd))}): give another --out, or remove it"
            )
        if odd:
            _say(f"{folder}: the weights are others than those that painted these pictures; all are painted again")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, told)
    for note in notes:
        _say(f"{folder}: {note}")
    return told | ({"notes": notes} if notes else {})


def _begun_with(known: dict[str, Any], told: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint that the pictures were begun with, and what to say of that; `told` itself where it now holds other weights."""
    run, step, weights = Path(told["run"]), known.get("step"), known.get("weights")
    gone = step not in checkpoint.steps(run)
    if step is None or (not gone and _weights_of_run(run, step) != weights):
        return told, []
    note = f"painted by the checkpoint after step {step}, with which it was begun{', and which is gone' if gone else ''}"
    note = f"{note}; the one to take is now that after step {told['step']}: another --out paints by it"
    return told | {"step": step, "weights": weights}, [note]


def open_painter(one: Contestant, drawing: Drawing, told: dict[str, Any], device: str) -> Painter:
    """The models load here."""
    if one.model is not None:
        return ModelPainter(one.model, one.lora, drawing, device)
    assert one.run is not None
    return RunPainter(one.run, told["step"], device)


def paint(painter: Painter, prompts: Sequence[BenchPrompt], form: Any, seed: int, folder: Path, tell: Tell) -> None:
    """What is not there yet, into a folder that is settled."""
    told = checkpoint.read_json(folder / "about.json")
    open_ = unpainted(folder, prompts)
    if stale := sum((folder / f"{prompt.id}.png").is_file() for prompt in open_):
        _say(f"{folder}: painted again, since they were of another prompt or by other weights: {stale} pictures")
    for start in range(0, len(open_), painter.batch):
        chunk = open_[start : start + painter.batch]
        images = painter.paint([prompt.form(form) for prompt in chunk], [seed_of(seed, prompt.id) for prompt in chunk])
        for prompt, image in zip(chunk, images, strict=True):
            beside, marks = folder / f".{prompt.id}.building", PngInfo()
            marks.add_text(_MARK, _mark(told, prompt))
            Image.fromarray(image).save(beside, "PNG", pnginfo=marks)
            beside.replace(folder / f"{prompt.id}.png")
        tell(len(chunk))


def unpainted(folder: Path, prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """Prompts without a picture of theirs yet, by the folder's about.json."""
    told = checkpoint.read_json(folder / "about.json")
    return [prompt for prompt in prompts if _marked(folder / f"{prompt.id}.png") != _mark(told, prompt)]


def _mark(told: dict[str, Any], prompt: BenchPrompt) -> str:
    return digest(told, prompt.id, prompt.form(told["form"]))


def _marked(path: Path) -> str | None:
    """None where there is no such picture."""
    try:
        with Image.open(path) as image:
            return image.info.get(_MARK)
    except OSError:
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr)


class ModelPainter:
    """Any text-to-image pipeline of diffusers, by its own call; weights are safetensors."""

    def __init__(self, model: str, lora: Path | None, drawing: Drawing, device: str) -> None:
        """ConfigError when it is none."""
        import torch
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging

        from trainer.policies.kit import read_index

        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        where = str(local) if (local := found(Path(model))).is_dir() else model
        index, there = read_index(where, None)
        without = {name: None for name, part in index.items() if part == [None, None]}
        try:
            self._pipe = DiffusionPipeline.from_pretrained(
                where, dtype=getattr(torch, drawing.dtype), use_safetensors=True, local_files_only=there, **without
            )
            if lora is not None:
                file = _lora_file(lora)
                self._pipe.load_lora_weights(str(file.parent), weight_name=file.name, use_safetensors=True)
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{model} cannot be painted with: {error}") from error
        self._pipe.set_progress_bar_config(disable=True)
        self._pipe.to(device)
        given = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
        given |= {"height": drawing.height, "width": drawing.width}
        self._given = {name: value for name, value in given.items() if value is not None} | drawing.options
        self.batch = drawing.batch

    def paint(self, texts: Sequence[str], seeds: Sequence[int]) -> Sequence[NDArray[np.uint8]]:
        import torch

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = self._pipe(prompt=list(texts), generator=generators, output_type="pil", **self._given).images
        return [np.asarray(image.convert("RGB")) for image in images]

    def close(self) -> None:
        del self._pipe


class RunPainter:
    """A checkpoint of a run as its evaluations see it: averaged weights, its own steps, size and guidance, its rewriter if it has one."""

    def __init__(self, run: Path, step: int, device: str) -> None:
        import tempfile

        from trainer import loop
        from trainer.config import ParallelConfig

        config = run_config(run)
        if step not in checkpoint.steps(run):
            raise ConfigError(
                f"{run} has no checkpoint after step {step} any more, by which some of its pictures were painted: remove these, or give "
                "another --out, and all are painted by the one to take now"
            )
        changes = {"parallel": ParallelConfig(), "device": device, "tensorboard": False}
        self._scratch = tempfile.TemporaryDirectory()
        self._run = loop.run_of(config.model_copy(update=changes), Path(self._scratch.name), services=False, accept=False)
        self._run.adopt(checkpoint.folder_of(run, step))
        self.batch = min(config.sampling.batch, 32)

    def paint(self, texts: Sequence[str], seeds: Sequence[int]) -> Sequence[NDArray[np.uint8]]:
        from trainer.sampling.rollout import sample
        from trainer.types import Prompt

        run, e = self._run, self._run.config.eval
        prompts = [Prompt(i, text) for i, text in enumerate(self._written(texts, seeds))]
        with run.learner.ema.swapped():
            return list(
                sample(
                    run.policy,
                    prompts,
                    seeds,
                    sigmas=run.sampler.eval_sigmas,
                    shape=run.sampler.eval_shape,
                    window=None,
                    guidance=e.guidance,
                    guided=e.guided_steps,
                    solver=e.solver,
                    micro_batch=run.config.sampling.batch,
                ).images_BHWC
            )

    def _written(self, texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """What the rewriter makes of them, each by itself."""
        writer: Any = getattr(self._run, "writer", None)
        if writer is None:
            return list(texts)
        import contextlib

        from trainer.language.penalties import painted
        from trainer.types import Prompt

        with writer.learner.averaged() if writer.learner is not None else contextlib.nullcontext():
            answers = writer.rewritten(
                [Prompt(seed, text) for text, seed in zip(texts, seeds, strict=True)], self._run.config.eval.seed
            )
        return [painted(text, answer) for text, answer in zip(texts, answers, strict=True)]

    def close(self) -> None:
        self._run.close()
        self._scratch.cleanup()


def run_config(run: Path) -> RunConfig:
    """ConfigError when the folder is no run."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder: config.yaml is missing; give the folder that verism-train wrote")
    return load_recipe(str(run / "config.yaml"))


def trained(run: Path) -> dict[str, str | None]:
    """The rewards that a run learns from, painter or rewriter, by name, with the sha256 of their weights where it noted one."""
    known: dict[str, Any] = {}
    if (run / "versions.json").is_file():
        told = checkpoint.read_json(run / "versions.json").get("rewards")
        known = told if isinstance(told, dict) else {}
    out: dict[str, str | None] = {}
    for name, weights in learned(run_config(run).model_dump(mode="json")).items():
        if any(weights):
            info = known.get(name)
            out[name] = info.get("weights_sha256") if isinstance(info, dict) else None
    return out
