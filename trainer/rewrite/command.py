"""What `verism-rewrite` does once its command line is read: the search, the table, the files."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from shared.errors import VerismError
from shared.image import encode
from shared.rewriting import FAULTS
from trainer import loop
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, RunConfig, Stopped, load
from trainer.rewrite.budget import Costs, Ledger, Way, stages
from trainer.rewrite.judging import Estimate, Judges, parse_rewards
from trainer.rewrite.painter import Painter
from trainer.rewrite.refine import refine
from trainer.rewrite.search import Candidate, Found, confirm, search
from trainer.rewrite.writers import RemoteWriter, Writer, open_writer
from trainer.scoring import NoService


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()  # what an encoder does not read the table says
    said = Console(stderr=True)
    try:
        found, ledger, judges = _work(args, said)
        result = told(found, ledger, judges.names)
        if args.save is not None:
            save(args.save, found, result)
    except KeyboardInterrupt:
        said.print("interrupted")
        return 130
    except (ConfigError, CheckpointError, NoService, Stopped, VerismError, httpx.HTTPError, OSError) as error:
        said.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        show(Console(width=None if sys.stdout.isatty() else 132), found, ledger, judges)
    if args.save is not None:
        said.print(f"pictures and result.json in {args.save}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _work(args: argparse.Namespace, said: Console) -> tuple[Found, Ledger, Judges]:
    """Cheap things are checked first, services next, models last."""
    if not any(c.isalnum() for c in args.prompt):
        raise ConfigError("the prompt is empty: say in words what the pictures should show")
    if args.temperature < 0 or args.token_cost < 0 or args.look_cost < 0 or (args.budget is not None and args.budget <= 0):
        raise ConfigError("--temperature and the costs are numbers from 0 on, and --budget is above 0")
    if args.refine and args.critic is None:
        raise ConfigError(
            "--refine asks a judge for better prompts: name it by --critic, e.g. --rewards critic=URL ... --critic critic"
        )
    if args.save is not None and args.save.exists() and (not args.save.is_dir() or any(args.save.iterdir())):
        raise ConfigError(f"{args.save} is there already; give another --save, or remove it")
    config = recipe(args)
    rewards = parse_rewards(args.rewards, args.weight)
    ledger = Ledger(Costs(args.token_cost, args.look_cost), args.budget)
    place = stages(args.prune, config.eval.steps) if args.prune else ()
    Way(args.pictures, (1,) * config.eval.steps, place)  # its stages fit
    with _progress(said, ledger, args.budget) as tell:
        tell("asking the services")
        judges = Judges(rewards, args.critic, config.reward_timeout_s)
        try:
            tell("loading the models")
            painter = Painter(loop.load_policy(config), config.sampling, config.eval, ledger)
            way = Way(args.pictures, painter.passes_T, place)
            fresh = Way(args.confirm, painter.passes_T).whole(2)
            ledger.hold(passes=fresh[0], looks=fresh[1])
            writer = _writer(args, loop.device_of(config))
            try:
                found = search(
                    args.prompt,
                    writer,
                    painter,
                    judges,
                    way,
                    ledger,
                    wanted=args.n,
                    seed=args.seed,
                    temperature=args.temperature,
                    tell=tell,
                )
            finally:
                if isinstance(writer, RemoteWriter):
                    writer.close()
            if args.refine:
                refine(found, painter, judges, way, ledger, rounds=args.refine, seed=args.seed, tell=tell)
            ledger.held = 0.0
            tell("confirming the best on fresh pictures")
            confirm(found, painter, judges, args.confirm, args.seed)
        finally:
            judges.close()
    return found, ledger, judges


class _Nobody:
    """Writes nothing: --n 0."""

    name, most = "nobody", 0

    def write(self, prompt: str, n: int, seed: int, temperature: float, first: int = 0) -> list[Any]:
        return []


def _writer(args: argparse.Namespace, device: str) -> Writer:
    if args.n == 0:
        return _Nobody()
    return open_writer(args.rewriter, device=device, most=args.max_new_tokens, base=args.base, instruction=args.instruction)


def recipe(args: argparse.Namespace) -> RunConfig:
    """The recipe, or the run's configuration with the adapter that the run gave, or another policy in the recipe's way."""
    where = Path(args.policy) if args.policy else None
    if where is None or not (where / "config.yaml").is_file():
        return load(args.recipe, [*([f"policy.path={args.policy}"] if args.policy else []), *args.set])
    config, adapter = load(str(where / "config.yaml"), args.set), where / "adapter"
    if not (adapter / "pytorch_lora_weights.safetensors").is_file():
        raise ConfigError(
            f"--policy {where}: this run has given no adapter ({adapter}): let it end, or write one by `verism-train export {where}`"
        )
    lora = {**(config.policy.options().get("lora") or {}), "start": str(adapter)}
    policy = type(config.policy).model_validate({**config.policy.model_dump(), "lora": lora})
    return config.model_copy(update={"policy": policy})


@contextlib.contextmanager
def _progress(said: Console, ledger: Ledger, budget: float | None) -> Iterator[Any]:
    """A line of what is going on, with the passes so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[spent]}"), TimeElapsedColumn())
    with Progress(*columns, console=said, transient=True) as progress:
        task = progress.add_task("", total=budget, spent="")

        def watch(now: Ledger) -> None:
            spent = f"{now.spent:,.0f}" + (f" of {budget:,.0f}" if budget is not None else "") + " passes"
            progress.update(task, completed=now.spent, spent=spent)

        ledger.watch = watch
        yield lambda text: progress.update(task, description=escape(text))
        ledger.watch = lambda now: None


def told(found: Found, ledger: Ledger, names: Sequence[str]) -> dict[str, Any]:
    """Everything that was tried, as JSON."""

    def number(estimate: Estimate | None) -> dict[str, float | None] | None:
        return None if estimate is None else {"mean": estimate.mean, "standard_error": estimate.error}

    def one(index: int, candidate: Candidate) -> dict[str, Any]:
        values = candidate.values_RK
        written = candidate.written
        return {
            "index": index,
            "text": candidate.text,
            "origin": candidate.origin,
            "round": candidate.round,
            "parent": candidate.parent,
            "said": None if written is None else written.said,
            "logp": None if written is None else written.logp,
            "tokens": None if written is None else written.tokens,
            "rewards": None
            if values is None
            else {name: number(Estimate.of(row)) for name, row in zip(names, values, strict=True)},
            "total": number(candidate.total),
            "gain": number(candidate.gain),
            "subject_lost": number(candidate.lost),
            "unread": candidate.unread,
            "dropped_after": candidate.dropped_after,
            "previews": [
                {"after": after, "rewards": dict(zip(names, values, strict=True))} for after, values in candidate.previews
            ],
        }

    limit = ledger.limit
    return {
        "prompt": found.prompt,
        "best": found.best,
        "rewrite": found.candidates[found.best].text,
        "candidates": [one(i, candidate) for i, candidate in enumerate(found.candidates)],
        "confirmed_gain": number(found.confirmed),
        "left_out": found.left_out,
        "failures": found.failures,
        "notes": found.notes,
        "forwards": {
            **{"tokens": ledger.tokens, "passes": ledger.passes, "looks": ledger.looks, "spent": ledger.spent, "budget": limit},
            **{"token_cost": ledger.costs.token, "look_cost": ledger.costs.look},
        },
    }


def save(folder: Path, found: Found, result: dict[str, Any]) -> None:
    """`NUMBER_PICTURE.png` of each candidate that was finished, and result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, candidate in enumerate(found.candidates):
        for k, image in enumerate(candidate.images if candidate.images is not None else ()):
            (folder / f"{index:03d}_{k:02d}.png").write_bytes(encode(image, "png").data)
    (folder / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))


def show(console: Console, found: Found, ledger: Ledger, judges: Judges) -> None:
    """The table, then what there is to say about it."""
    table = Table("", "prompt", *judges.titles, "gain", "", title=f"{escape(found.prompt)}")
    order = sorted(range(1, len(found.candidates)), key=lambda i: -(_number(found.candidates[i].gain.mean)))
    for index in [0, *order]:
        one = found.candidates[index]
        values = one.values_RK
        rewards = [""] * len(judges.names) if values is None else [str(Estimate.of(row)) for row in values]
        mark = "[bold green]best[/]" if index == found.best else ""
        gain = "" if index == 0 or one.gain.mean is None else str(one.gain)
        table.add_row(str(index), escape(one.text), *rewards, gain, " ".join(part for part in (mark, _remark(one)) if part))
    console.print(table)
    left = ", ".join(f"{count} {FAULTS.get(why, 'said it again')}" for why, count in found.left_out.items())
    lines = [f"left out: {left}"] if left else []
    lines += found.notes
    if found.failures:
        lines.append("not scored: " + ", ".join(f"{count} {kind}" for kind, count in found.failures.items()))
    if judges.alignment is None:
        lines.append("no reward compares pictures with the prompt: a rewrite that lost the subject is not told; add alignment=URL")
    of = "" if ledger.limit is None else f" of {ledger.limit:,.0f}"
    lines.append(
        f"{ledger.spent:,.0f}{of} passes: {ledger.tokens:,} tokens, {ledger.passes:,} of the image model, {ledger.looks:,} pictures looked at"
    )
    if found.best == 0:
        lines.append("nothing was better than your own prompt")
    if found.confirmed is not None:
        lines.append(f"on fresh pictures number {found.best} gains {found.confirmed}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _remark(one: Candidate) -> str:
    said = []
    if one.origin == "own":
        said.append("your own")
    if one.round:
        said.append(f"round {one.round}, from {one.parent}")
    if one.dropped_after is not None:
        said.append(f"dropped after step {one.dropped_after}")
    elif one.gain.mean is None:
        said.append("[red]not scored[/]")
    if one.lost is not None:
        said.append(f"[yellow]lost the subject ({one.lost})[/]")
    if one.written is not None and not one.written.ended:
        said.append("cut")
    if one.unread:
        said.append("longer than is read")
    return ", ".join(said)


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value
