"""A cold start: a rewriter learns from pairs how a rewrite is written, by the likelihood of the rewrite's tokens alone.

python -m trainer.language.sft --help
"""

import argparse
import difflib
import hashlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from trainer import checkpoint
from trainer.config import ConfigError, Frozen, Stopped, apply, fields_at
from trainer.language.data import Pair, read_pairs
from trainer.language.types import Completions, LanguagePolicy, joined
from trainer.metrics import Metrics

HELP = """\
  python -m trainer.language.sft world/rewrites/pairs_train.jsonl --held-out world/rewrites/pairs_eval.jsonl
  python -m trainer.language.sft pairs.jsonl --policy path/to/model --run-dir runs/cold epochs=2 lr=1e-4
  python -m trainer.language.sft pairs.jsonl policy.lora.rank=8       options of the model, dotted; policy.lora=null trains all of it
  python -m trainer.language.sft pairs.jsonl --resume                 go on after Ctrl-C or a crash, to the same numbers

Each line of a pairs file: {"prompt": "what the user typed", "rewrite": "what to paint from"}. A few hundred are enough: they teach the
form, and training by reward finds what pays. With --held-out the epoch of the lowest loss on those is kept, else the last one.
The run folder holds metrics.jsonl, tb/, checkpoints/, sft.json and policy/: the trained adapter (or model), as PEFT and transformers read it.
Full fine-tuning wants a tenth of the learning rate: policy.lora=null lr=2e-5.
Exit status: 0 done, 1 stopped early (the message says why), 2 could not start, 130 interrupted and saved.

keys:
"""


class SftOptions(Frozen):
    """How to learn from pairs."""

    epochs: int = Field(default=3, ge=1, le=1000, description="times that every pair is seen")
    batch: int = Field(default=16, ge=1, description="pairs of an optimiser step")
    micro_batch: int = Field(default=8, ge=1, description="pairs of a forward pass; what memory allows")
    lr: float = Field(default=2e-4, gt=0, description="highest learning rate of AdamW")
    warm_up: float = Field(default=0.1, ge=0, le=1, description="share of the steps over which it rises")
    final_lr: float = Field(default=0.1, ge=0, le=1, description="share of it that is left at the end, along a cosine")
    weight_decay: float = Field(default=0.0, ge=0, description="pull of every weight to 0")
    max_grad_norm: float = Field(default=1.0, gt=0, description="a longer gradient is shortened to this")
    longest: int = Field(default=256, ge=2, description="most tokens of a rewrite, with the one that ends it")
    save_every: int | None = Field(default=None, ge=1, description="steps between checkpoints, beside one after each epoch")
    seed: int = Field(default=0, ge=0, description="of the order of the pairs")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step of `steps`, counted from 0."""
        rise = math.ceil(self.warm_up * steps)
        if step < rise:
            return self.lr * (step + 1) / rise
        share = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * share)


@dataclass(frozen=True)
class Outcome:
    """What came out: steps taken of all, held-out losses (nats a token) before training and after each epoch, the epoch whose weights the
    policy has now (0: none was better than what was there)."""

    step: int
    steps: int
    losses: tuple[float, ...]
    epoch: int


def tokenised(policy: LanguagePolicy, pairs: Sequence[Pair], longest: int) -> list[Completions]:
    """Each pair as a completion at temperature 1, as if the model had written it; ConfigError names the line that is too long."""
    rows = []
    for pair in pairs:
        try:
            prompt_ids, answer_ids = policy.prompt_ids([pair.prompt])[0], policy.answer_ids([pair.rewrite])[0]
        except ConfigError as error:
            raise ConfigError(f"line {pair.line} of the pairs: {error}") from error
        if len(answer_ids) > longest:
            raise ConfigError(
                f"line {pair.line} of the pairs: its rewrite has {len(answer_ids)} tokens; shorten it, or raise longest"
            )
        ids_BT = torch.tensor([answer_ids])
        rows.append(
            Completions(
                prompts=(pair.prompt,),
                prompt_ids=(prompt_ids,),
                texts=(pair.rewrite,),
                ids_BT=ids_BT,
                mask_BT=torch.ones_like(ids_BT, dtype=torch.bool),
                logp_BT=torch.zeros(ids_BT.shape),
                ended_B=torch.ones(1, dtype=torch.bool),
                temperature=1.0,
            )
        )
    return rows


def size(row: Completions) -> int:
    """Tokens of a pair, those of its chat included."""
    return len(row.prompt_ids[0]) + row.ids_BT.shape[1]


def tokens(rows: Sequence[Completions]) -> int:
    """Tokens that are learned."""
    return sum(row.ids_BT.shape[1] for row in rows)


@torch.no_grad()
def loss_of(policy: LanguagePolicy, rows: Sequence[Completions], micro_batch: int) -> float:
    """Mean of -log p over all tokens of the rewrites, in nats."""
    by_length = sorted(rows, key=size)
    parts = [joined(by_length[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]
    total = sum(float(-policy.logp(part)[0].double().sum()) for part in parts)
    return total / tokens(rows)


def order(count: int, epoch: int, seed: int) -> list[int]:
    """Which pair comes when in an epoch: a function of (seed, epoch)."""
    digest = hashlib.sha256(f"sft/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return list(torch.randperm(count, generator=generator).tolist())


class FineTuning:
    """A run in memory: `step` until `done` equals `steps`, `evaluate` between epochs, `adopt` the best weights."""

    def __init__(
        self, policy: LanguagePolicy, rows: Sequence[Completions], held_out: Sequence[Completions], options: SftOptions
    ) -> None:
        self.policy, self.rows, self.held_out, self.options = policy, rows, held_out, options
        self.weights = policy.trainable()
        self.optimizer = torch.optim.AdamW(self.weights.values(), options.lr, weight_decay=options.weight_decay)
        self.each = math.ceil(len(rows) / options.batch)  # steps of an epoch
        self.steps, self.done = self.each * options.epochs, 0
        self.losses = list[float]()
        self.best = dict[str, Tensor]()

    def step(self) -> dict[str, float]:
        """An optimiser step over one batch; its loss is that before the step. Stopped where it is no number."""
        o, (epoch, place) = self.options, divmod(self.done, self.each)
        chosen = order(len(self.rows), epoch, o.seed)[place * o.batch : (place + 1) * o.batch]
        batch = sorted((self.rows[n] for n in chosen), key=size)
        count, total = tokens(batch), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(batch), o.micro_batch):
            loss = -self.policy.logp(joined(batch[start : start + o.micro_batch]))[0].sum() / count
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), o.max_grad_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise Stopped(
                f"step {self.done}: the loss is {total}, its gradient {norm}, and nothing was changed by it; lower lr, or take dtype float32"
            )
        rate = o.lr_at(self.done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done += 1
        return {"loss": total, "lr": rate, "grad_norm": norm, "tokens": float(count)}

    def evaluate(self) -> float:
        """The held-out loss now; the weights of the lowest one are kept."""
        now = loss_of(self.policy, self.held_out, self.options.micro_batch)
        if not self.losses or now < min(self.losses):
            self.best = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        self.losses.append(now)
        return now

    def adopt(self) -> Outcome:
        """Give the policy its best weights."""
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.weights[name].copy_(tensor)
        epoch = self.losses.index(min(self.losses)) if self.losses else self.options.epochs
        return Outcome(self.done, self.steps, tuple(self.losses), epoch)

    def save(self, run: Path) -> None:
        """A checkpoint, whole or not at all."""
        tensors: dict[str, Tensor] = {f"weights/{name}": weight for name, weight in self.weights.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"optim/{key}": tensor for key, tensor in checkpoint.flatten(self.optimizer, self.weights).items()}
        checkpoint.save(run, self.done, tensors, {"belongs": self.belongs(), "losses": self.losses})
        checkpoint.prune(run, 1, None)

    def load(self, run: Path) -> bool:
        """Go on from the newest checkpoint, if there is one; CheckpointError where it is of another run."""
        checkpoint.recover(run)
        if not (steps := checkpoint.steps(run)):
            return False
        saved = checkpoint.read(checkpoint.folder_of(run, steps[-1]))
        was, now = saved.meta.get("belongs", {}), self.belongs()
        if changed := [f"{key}: {was.get(key)!r} -> {now[key]!r}" for key in now if was.get(key) != now[key]]:
            raise checkpoint.CheckpointError(
                f"the checkpoint in {run} is of another run ({'; '.join(changed)}); undo that, or take another --run-dir"
            )
        checkpoint.check_shapes(self.weights, saved.under("weights"))
        with torch.no_grad():
            for name, tensor in saved.under("weights").items():
                self.weights[name].copy_(tensor)
        checkpoint.unflatten(self.optimizer, self.weights, saved.under("optim"))
        self.done, self.losses, self.best = int(saved.meta["step"]), list(saved.meta["losses"]), saved.under("best")
        return True

    def belongs(self) -> dict[str, Any]:
        """What the numbers depend on."""
        digest = {name: _digest(rows) for name, rows in (("pairs", self.rows), ("held_out", self.held_out))}
        return {"model": self.policy.fingerprint(), **digest, **self.options.model_dump(exclude={"save_every"})}


def fine_tune(
    policy: LanguagePolicy,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair] = (),
    options: SftOptions | None = None,
    *,
    run: Path | None = None,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str, Mapping[str, float]], None] = lambda kind, numbers: None,
) -> Outcome:
    """Train the policy's weights on pairs; with held-out ones it is left with those of the best epoch, else of the last.

    With a folder `run`, numbers and checkpoints go there, and at the end `policy/`. Where `stop` says so, a checkpoint is written and what
    has been done is returned: `step` below `steps`. `tell` hears of each step and evaluation.
    """
    o = options or SftOptions()
    work = FineTuning(policy, tokenised(policy, pairs, o.longest), tokenised(policy, held_out, o.longest), o)
    metrics = None
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        if checkpoint.steps(run) and not resume:
            raise ConfigError(f"{run} already holds a run: go on with --resume, choose --run-dir, or remove it")
        resumed = work.load(run)
        metrics = Metrics(run, work.done if resumed else None)

    def note(kind: str, numbers: Mapping[str, float]) -> None:
        if metrics is not None:
            metrics.write(kind, work.done, numbers)
        tell(kind, {**numbers, "step": work.done, "steps": work.steps})

    try:
        if work.held_out and not work.losses:
            note("eval", {"held_out_loss": work.evaluate(), "epoch": 0})
        while work.done < work.steps:
            note("step", work.step())
            epoch, place = divmod(work.done, work.each)
            if place == 0 and work.held_out:
                note("eval", {"held_out_loss": work.evaluate(), "epoch": epoch})
            halt = stop()
            if run is not None and (halt or place == 0 or (o.save_every and work.done % o.save_every == 0)):
                work.save(run)
            if halt and work.done < work.steps:
                return Outcome(work.done, work.steps, tuple(work.losses), epoch)
    finally:
        if metrics is not None:
            metrics.close()
    outcome = work.adopt()
    if run is not None:
        _give(policy, run, outcome, o)
    return outcome


def _give(policy: LanguagePolicy, run: Path, outcome: Outcome, options: SftOptions) -> None:
    """`policy/`, which appears whole, and `sft.json`."""
    building, final = run / ".policy.building", run / "policy"
    shutil.rmtree(building, ignore_errors=True)
    policy.save(building)
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    checkpoint.write_json(run / "sft.json", {**asdict(outcome), "options": options.model_dump()})


def _digest(rows: Sequence[Completions]) -> str:
    return hashlib.sha256(json.dumps([(row.prompt_ids, row.ids_BT.tolist()) for row in rows]).encode()).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status as in its help."""
    keys = "\n".join(
        f"  {name:<14} {field.description} (default {field.default})" for name, field in SftOptions.model_fields.items()
    )
    parser = argparse.ArgumentParser(
        "python -m trainer.language.sft",
        description="Fine-tune a rewriter on pairs of prompts and rewrites, before it is trained by reward.",
        epilog=HELP + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pairs", type=Path, help="JSONL to learn from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys below, and policy.OPTION")
    parser.add_argument("--held-out", type=Path, help="JSONL whose loss chooses the epoch; no prompt of it may be among the pairs")
    parser.add_argument(
        "--policy", default="smollm2", help="folder, hub id, or smollm2: SmolLM2-135M-Instruct from its package (default)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s here")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/cold"), help="default: runs/cold")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run folder")
    args = parser.parse_intermixed_args(argv)
    console = Console()
    try:
        return _run(args, console)
    except (ConfigError, checkpoint.CheckpointError, checkpoint.NotSaved, FileNotFoundError, Stopped) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1 if isinstance(error, Stopped) else 2


def _run(args: argparse.Namespace, console: Console) -> int:
    options, model = _options(args.overrides)
    pairs = read_pairs(args.pairs)
    held_out = read_pairs(args.held_out, apart_from=pairs) if args.held_out else []
    from trainer.language.policy import RewriterOptions, RewriterPolicy  # transformers loads only once the command line is right

    try:
        policy = RewriterPolicy.load(args.policy, device=args.device, seed=options.seed, **model)
    except ValidationError as error:
        raise _wrong(error, "policy", RewriterOptions) from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, _asked() as stop:
        task = progress.add_task("cold start", total=None)

        def tell(kind: str, numbers: Mapping[str, float]) -> None:
            if kind == "eval":
                progress.console.print(
                    f"after epoch {numbers['epoch']:g}: held-out loss {numbers['held_out_loss']:.4f} nats a token"
                )
            else:
                progress.update(task, completed=numbers["step"], total=numbers["steps"], description=f"loss {numbers['loss']:.3f}")

        outcome = fine_tune(policy, pairs, held_out, options, run=args.run_dir, resume=args.resume, stop=stop, tell=tell)
    if outcome.step < outcome.steps:
        console.print(f"saved in {args.run_dir} after step {outcome.step} of {outcome.steps}; go on with --resume", soft_wrap=True)
        return 130
    if outcome.losses and outcome.epoch == 0:
        console.print("no epoch was better than the model as it came, so it was left as it was: lower lr, or bring more pairs")
    console.print(f"{args.run_dir / 'policy'}: the rewriter after epoch {outcome.epoch}", soft_wrap=True)
    return 0


def _options(overrides: Sequence[str]) -> tuple[SftOptions, dict[str, Any]]:
    """Options of the training, and of the model (`policy.NAME`); ConfigError names the wrong key and the nearest right one."""
    raw = dict[str, Any]()
    for override in overrides:
        apply(raw, override, "epochs=2 or policy.lora.rank=8")
    model = raw.pop("policy", {})
    if not isinstance(model, dict):
        raise ConfigError("give the model with --policy, and its options as policy.NAME=value")
    try:
        return SftOptions.model_validate(raw), model
    except ValidationError as error:
        raise _wrong(error, "", SftOptions) from error


def _wrong(error: ValidationError, section: str, options: type[BaseModel]) -> ConfigError:
    """The first of what is wrong, in words."""
    first = error.errors(include_url=False)[0]
    where = ".".join((section, *map(str, first["loc"]))).lstrip(".")
    if first["type"] != "extra_forbidden":
        return ConfigError(f"{where}: {first['msg']}")
    known = fields_at(options, first["loc"][:-1])
    near = difflib.get_close_matches(str(first["loc"][-1]), known, 1)
    return ConfigError(f"unknown key {where!r}; " + (f"did you mean {near[0]!r}?" if near else f"known there: {', '.join(known)}"))


@contextmanager
def _asked() -> Iterator[Callable[[], bool]]:
    """A function that is True once Ctrl-C (or SIGTERM) came; the second one interrupts at once."""
    came = list[int]()

    def ask(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
