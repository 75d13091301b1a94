"""`verism-train RECIPE key=value ...` trains a policy, `verism-train export RUN` gives it away; `verism-eval RUN` looks at what came out,
`verism-eval arena` at two folders, `verism-eval realbench` at how real pictures look.
"""

import argparse
import errno
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from shared import arena
from shared.errors import VerismError
from trainer import checkpoint
from trainer.config import FORWARD, ConfigError, RunConfig, Stopped, dump, load, recipe_names

TRAIN_HELP = """\
start the services first (`make serve`), then:
  verism-train world                                        the small world, minutes on a CPU
  verism-train world steps=40 optim.lr=1e-4                 any key of the recipe, dotted
  verism-train world rewards.detector.url=http://gpu3:8001  a service somewhere else
  verism-train world --resume                               go on after Ctrl-C, a crash or an alarm
  verism-train my.yaml --dry-run                            what it will cost; no service has to be there
  verism-train world --watch                                a live page of the run; verism-watch runs shows all of them
  verism-train realgen_llm_small                            a language model that rewrites prompts; dual_grpo_small trains both
  verism-train export runs/world --format diffusers --out F the adapter for others' tools
  verism-train sft world/rewrites/pairs_train.jsonl         a cold start for the language model (verism-train sft --help)

The run folder (runs/NAME) holds config.yaml, metrics.jsonl, grids/, checkpoints/, adapter/ (diffusers LoRA) and tb/
(`tensorboard --logdir runs`). Ctrl-C finishes the step, saves and exits; twice exits at once.

Killed at any moment, a run goes on with --resume to the same numbers. Keys worth knowing:
  sampling.micro_batch=auto            as many pictures a pass as memory takes, found at the start
  checkpoint_best=heldout:NAME         the best checkpoint by a reward of weight 0 or a monitor, instead of the distance
  alarm.action=rollback                when the reward is hacked: back to the best weights, at half the learning rate
  reward_outage_s=600                  how long a step waits for services that do not answer
Exit status: 0 done, 1 stopped early and saved (the message says why), 2 could not start, 130 interrupted and saved.
"""
EXPORT_HELP = """\
  verism-train export runs/world --out world.safetensors --format comfyui   for ComfyUI's LoRA loader
  verism-train export runs/world --out world/ --format diffusers            a folder for load_lora_weights
  verism-train export runs/world --out step20/ --step 20                    another checkpoint than the best

Takes the average of the weights, as evaluations do. No service has to be there, and for an adapter no model. A run that trained all
weights has none: diffusers format then is its whole transformer.
"""
EVAL_HELP = """\
  verism-eval runs/world                  the run's best checkpoint
  verism-eval runs/world --step 20        another one
  verism-eval world/policy                a policy that no run has touched, by recipe `world`
  verism-eval runs/world eval.samples=32  any key of the configuration, dotted
  verism-eval arena FOLDER_A FOLDER_B     which folder a judge prefers (verism-eval arena --help)
  verism-eval realbench FOLDER            how real pictures look, as a report (verism-eval realbench --help)
  verism-eval compare RUN_A RUN_B         two runs on the same prompts and noise
  verism-eval detectors --real F --generated F   which detector can be trusted

Prints rewards and, where eval.monitors names them, what was never a reward: held-out detectors, distance, class hit.
Writes evaluations/NAME.json and .png into the run folder (for a policy: into --out).
"""

ARENA_HELP = """\
start a service whose reward compares pairs, then let two folders of pictures meet:
  verism-serve examples/serve/judge.yaml
  verism-eval arena samples/ photographs/ --url http://localhost:8004 --reward pairs --prompt "a photo of a bag"
  verism-eval arena before/ after/ --pairs 200 --out runs/arena.jsonl

Pictures of the same name meet, where both folders have the same names (before and after training); else each meets others at random
(--seed). Every pair is asked in both orders, since judges lean to a place: who wins in both has won, anything else is half a win for each.
Says the win rate of FOLDER_A with its standard error, and how often what is shown first is preferred: far from 50 %, take another judge.
A reward served with `template: services/arena.yaml` asks which picture is more realistic, and needs no --prompt. A service that wants a key
gets the one in VERISM_API_KEY. A judge without a service, or a remote one with its key: python -m services.arena --help
"""


def train(argv: Sequence[str] | None = None) -> int:
    """`verism-train`, `verism-train export` and `sft`; exit status 0 done, 1 stopped early, 2 cannot start, 130 interrupted and saved."""
    told = list(sys.argv[1:] if argv is None else argv)
    if told[:1] == ["export"]:  # a recipe of that name is ./export.yaml
        return _export(told[1:])
    if told[:1] == ["sft"]:
        from trainer.language import sft

        return sft.main(told[1:])
    parser = _parser("verism-train", "Train an image policy by GRPO against reward services.", TRAIN_HELP)
    parser.add_argument("recipe", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and what it will cost, and stop")
    parser.add_argument("--watch", action="store_true", help="a live page of the run, on this machine; see verism-watch")
    args = parser.parse_intermixed_args(told)
    console = Console(quiet=int(os.environ.get("RANK", "0")) > 0)
    return _guarded(console, lambda: _train(args, console))


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`verism-eval`, and `verism-eval arena`, `realbench`, `compare`, `detectors`; exit status 0 done, 2 cannot."""
    told = list(sys.argv[1:] if argv is None else argv)
    if told[:1] == ["arena"]:  # a run folder of that name is ./arena
        return _arena(told[1:])
    if told and told[0] in ("realbench", "compare", "detectors"):
        from trainer.realbench import command

        return int(getattr(command, told[0])(told[1:]))
    parser = _parser("verism-eval", "Evaluate a run's checkpoint, or a policy.", EVAL_HELP)
    parser.add_argument("what", type=Path, help="a run folder, or a policy in diffusers format")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the best")
    parser.add_argument(
        "--recipe",
        default="world",
        help="whose prompts, sampling and services judge a policy (default: world)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evaluations"), help="folder for a policy's evaluation")
    args = parser.parse_intermixed_args(told)
    console = Console()
    return _guarded(console, lambda: _evaluate(args, console))


def _export(argv: Sequence[str]) -> int:
    """Exit status 0 done, 2 cannot."""
    parser = _parser("verism-train export", "Write a run's adapter in a format that other tools read.", EXPORT_HELP)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--format", choices=("diffusers", "comfyui"), default="diffusers", help="default: diffusers")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a folder; must be new")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the best")
    args = parser.parse_args(argv)
    console = Console()

    def work() -> int:
        if not (args.run / "config.yaml").is_file():
            raise ConfigError(f"{args.run} is no run folder: config.yaml is missing; give the folder that verism-train wrote")
        if args.out.exists():
            raise ConfigError(f"{args.out} is there already; give another --out, or remove it")
        step = args.step if args.step is not None else _best(args.run)
        if step not in checkpoint.steps(args.run):
            raise ConfigError(f"no checkpoint after step {step} in {args.run}; there are {checkpoint.steps(args.run)}")
        config = load(str(args.run / "config.yaml"))
        if config.policy.options().get("lora", ...) is None:
            from trainer import loop

            if args.format != "diffusers":
                raise ConfigError(f"{args.run} trained all weights: there is no adapter for {args.format}; take --format diffusers")
            loop.export_whole(config, args.run, step, args.out)
        else:
            from trainer.export import export_adapter

            export_adapter(args.run, args.out, args.format, step)
        console.print(f"{args.out}: {args.format}, step {step}", soft_wrap=True)
        return 0

    return _guarded(console, work)


def _arena(argv: Sequence[str]) -> int:
    """Exit status 0 when every pair has a verdict, 1 when some are missing, 2 when it cannot begin, 130 when interrupted."""
    parser = _parser("verism-eval arena", "Which of two folders of pictures does a judge prefer?", ARENA_HELP)
    parser.add_argument("a", type=Path, help="a folder of pictures")
    parser.add_argument("b", type=Path, help="the other folder")
    parser.add_argument("--url", default="http://localhost:8004", help="the reward service (default: http://localhost:8004)")
    parser.add_argument("--reward", default="pairs", help="its reward that compares (default: pairs)")
    parser.add_argument("--prompt", help="what the pictures should show, where the reward's question asks for it")
    parser.add_argument("--pairs", type=_count, help="how many (default: as many as the larger folder has pictures)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs (default: 0)")
    parser.add_argument("--batch", type=_count, default=16, help="pairs of one request (default: 16)")
    parser.add_argument("--timeout", type=float, default=120.0, help="longest wait for one request, in seconds (default: 120)")
    parser.add_argument("--out", type=Path, help="a new file: a line of JSON for each pair as soon as it is judged")
    args = parser.parse_args(argv)
    console = Console()
    try:
        wanted = arena.matches(arena.names(args.a), arena.names(args.b), args.pairs, args.seed)
        if args.out is not None and args.out.exists():
            raise ValueError(f"{args.out} is there already; give another --out, or remove it")
        service = arena.Service(args.url, args.reward, args.prompt, args.timeout)
    except (OSError, ValueError, VerismError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    try:
        rows = _met(args, service, wanted)
    except KeyboardInterrupt:
        console.print("interrupted" + (f"; what was judged is in {args.out}" if args.out is not None else ""), soft_wrap=True)
        return 130
    finally:
        service.close()
    return _told(console, args, rows)


def _count(text: str) -> int:
    """At least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few; give 1 or more")
    return number


def _met(args: argparse.Namespace, service: arena.Service, wanted: Sequence[arena.Match]) -> list[arena.Row]:
    """All rows, with progress on the error stream, and each batch into the file when it is judged."""
    rows: list[arena.Row] = []
    columns = (
        TextColumn("pairs"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(wanted))
        for start in range(0, len(wanted), args.batch):
            new = service.meet(args.a, args.b, wanted[start : start + args.batch])
            rows += new
            progress.update(task, completed=len(rows))
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    return rows


def _told(console: Console, args: argparse.Namespace, rows: Sequence[arena.Row]) -> int:
    result = arena.standing(rows)
    table = Table("preferred", "pairs", title=f"{args.reward} at {args.url}")
    for name, count in ((str(args.a), result.wins), (str(args.b), result.losses), ("neither in both orders", result.ties)):
        table.add_row(name, str(count))
    table.add_row("without a verdict", str(result.missing))
    console.print(table)
    for kind, count in Counter(row["error"] for row in rows if row["error"]).items():
        console.print(f"{count} without a verdict: {kind}", markup=False, highlight=False, soft_wrap=True)
    if result.rate is None:
        console.print("no pair has a verdict; the service's log says why", soft_wrap=True)
    else:
        rate = f"{args.a} wins {result.rate:.3f} +- {result.error:.3f} of its pairs, ties as half"
        console.print(f"{rate}; what is shown first is preferred {result.shown_first:.1%}", highlight=False, soft_wrap=True)
    return 1 if result.missing else 0


def _parser(name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(name, description=what, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def _guarded(console: Console, work: Callable[[], int]) -> int:
    """Known errors become their message; all else is a bug and keeps its traceback."""
    try:
        return work()
    except (ConfigError, checkpoint.CheckpointError, FileNotFoundError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        console.print(
            f"error: {error}: make room, or choose another folder", style="red", markup=False, highlight=False, soft_wrap=True
        )
        return 2
    except RuntimeError as error:
        if not isinstance(error, Stopped) and type(error).__name__ != "NoService":
            raise
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1 if isinstance(error, Stopped) else 2


def _train(args: argparse.Namespace, console: Console) -> int:
    config = load(args.recipe, args.overrides)
    folder: Path = args.run_dir or Path("runs") / config.name
    first = int(os.environ.get("RANK", "0")) == 0  # of several ranks: the others would see what it has just written
    if first and (folder / "metrics.jsonl").exists() and not args.resume and not args.dry_run:
        raise ConfigError(f"{folder} already holds a run: go on with --resume, choose --run-dir, or remove it")
    if args.resume and not args.dry_run and (folder / "done.json").exists():
        done = json.loads((folder / "done.json").read_text())
        if done["reason"] == "finished" and checkpoint.steps(folder)[-1] >= config.steps:
            console.print(f"{folder} is finished; best step {done['best_step']}. More: steps=N --resume", soft_wrap=True)
            return 0
    if args.dry_run:
        return _dry_run(console, config, folder)
    if args.watch and first:
        from trainer.watch.__main__ import beside

        with beside(folder) as told:
            console.print(told, soft_wrap=True)
            return _trained(args, config, folder, console)
    return _trained(args, config, folder, console)


def _trained(args: argparse.Namespace, config: RunConfig, folder: Path, console: Console) -> int:
    from trainer import loop, parallel  # torch loads only once the command line is right
    from trainer.watch.notes import kept

    world = parallel.start(config.parallel.timeout_s, config.device)
    run = loop.run_of(config, folder, args.resume, world=world)
    try:
        console.print(
            f"{folder}: {'resumed after' if run.done else 'starting at'} step {run.done} of {config.steps}",
            soft_wrap=True,
        )
        with _Stop() as stop, _Screen(console, config, run.done) as screen:
            screen.estimate(_estimate(run))
            reason = loop.train(run, stop=stop, tell=screen if run.quiet else kept(folder, screen))
    finally:
        run.close()
        world.close()
    if reason == "interrupted":
        console.print(f"saved in {folder}; go on with --resume", soft_wrap=True)
        return 130
    done = json.loads((folder / "done.json").read_text())
    given = ", ".join(f"{name} in {folder / name}" for name in run.gifts())
    console.print(f"{reason}; best step {done['best_step']}; {given}", soft_wrap=True)
    return 0


def _dry_run(console: Console, config: RunConfig, folder: Path) -> int:
    console.print(dump(config), markup=False, highlight=False, soft_wrap=True)
    from trainer import loop, memory, plan

    services = plan.answering(config.rewards)
    with tempfile.TemporaryDirectory() as scratch:
        run = loop.run_of(config, Path(scratch), services=False)
        run.folder = folder  # whose disk counts
        try:
            with memory.explained(run.config, lambda: "the rehearsal of a step"):
                console.print(run.plan(services), markup=False, highlight=False)
        finally:
            run.close()
    if missing := [name for name, state in services.items() if state.startswith("MISSING")]:
        console.print(f"start the services of {', '.join(missing)} before training, e.g. `make serve`", soft_wrap=True)
    return 0


def _estimate(run: Any) -> str:
    """Cost of the whole run, from the trajectory that was checked at the start: sampled steps, about three times as much per trained one."""
    c = run.config
    s, w = c.sampling, c.sampling.window or 0
    if not run.accepted_s or c.clip_range() is None or c.loss.use in FORWARD or c.pictures > c.group.size * c.group.prompts:
        return f"{c.pictures * (c.steps - run.done) * len(c.rewards)} scores; --dry-run estimates the time"  # no trajectory, or not of all
    groups = max(1, min(c.group.prompts, s.batch // c.group.size))
    unit = run.accepted_s / (groups * c.group.size * (s.steps + w))  # one forward pass of one picture
    passes = s.steps + w * (4 if c.kl.weight > 0 else 3)
    step = unit * passes * c.group.size * c.group.prompts
    evaluation = unit * c.eval.steps * c.eval.samples * (1 if c.eval.guidance == 1 else 2)
    left = c.steps - run.done
    seconds = step * left + evaluation * (left / c.eval.every + 1)
    return (
        f"estimate: {step:.1f} s a step, {evaluation:.1f} s an evaluation, {seconds / 60:.1f} min in all, waiting for rewards not included; "
        f"{c.group.size * c.group.prompts * left * len(c.rewards)} scores"
    )


class _Stop:
    """True once Ctrl-C (or SIGTERM) came; the second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class _Screen:
    """Progress with ETA, a line per evaluation, a profile after the first step."""

    def __init__(self, console: Console, config: RunConfig, done: int) -> None:
        self.config, self.profiled = config, False
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("", total=config.steps, completed=done)

    def estimate(self, text: str) -> None:
        """Print it above the bar."""
        self._print(text)

    def __call__(self, line: dict[str, Any]) -> None:
        if line["kind"] == "step":
            self.progress.update(
                self.task,
                completed=line["step"],
                description=_short(line, ("reward/total", "kl", "language/kl", "failed_scores")),
            )
            if not self.profiled:
                self.profiled = True
                from trainer.profile import words  # loaded with the loop

                self._print(words(line))
            if line["skipped"]:
                self._print(f"step {line['step']}: nothing was scored, the policy stays as it is: {line['failures']}")
        elif line["kind"] == "note":
            self._print(f"after step {line['step']}: {line['text']}")
        elif line["kind"] == "eval":
            self._print(f"evaluation after step {line['step']}: {_short(line, _shown(line))}")
        else:
            self._print(
                f"ALARM after step {line['step']}: {line['reason']}; best step {line['best_step']}; action: {line['action']}"
            )

    def __enter__(self) -> "_Screen":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()

    def _print(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(line: dict[str, Any]) -> list[str]:
    plain = ("heldout_cnn", "heldout_spectrum", "distance", "class_hit", "over_none/total", "over_untrained/total")
    return [k for k in line if k.endswith("/mean") or k in plain]


def _short(line: dict[str, Any], keys: Sequence[str]) -> str:
    return "  ".join(f"{key.removesuffix('/mean')} {line[key]:.3g}" for key in keys if line.get(key) is not None)


def _evaluate(args: argparse.Namespace, console: Console) -> int:
    what: Path = args.what
    from trainer import loop

    if (what / "model_index.json").is_file():
        config = load(args.recipe, [f"policy.path={what}", *args.overrides])
        run_folder, step = None, 0
    elif (what / "config.yaml").is_file():
        config = load(str(what / "config.yaml"), args.overrides)
        run_folder = what
        step = args.step if args.step is not None else _best(what)
        if step not in checkpoint.steps(what):
            raise ConfigError(f"no checkpoint after step {step} in {what}; there are {checkpoint.steps(what)}")
    else:
        raise ConfigError(f"{what} is neither a run folder (config.yaml) nor a policy (model_index.json)")
    out: Path = args.out if run_folder is None else run_folder / "evaluations"
    name = f"step_{step:06d}" if run_folder is not None else what.name
    line, images = loop.look(config, run_folder, step)
    out.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    from trainer.metrics import grid

    Image.fromarray(grid(images[: config.eval.grid])).save(out / f"{name}.png")
    checkpoint.write_json(out / f"{name}.json", line)
    table = Table("measure", "value", title=f"{what}, step {step}, {line['n']} prompts")
    for key, value in line.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    console.print(f"{out / name}.json, {out / name}.png", soft_wrap=True)
    return 0


def _best(run: Path) -> int:
    path = run / "checkpoints" / "best.json"
    if not path.is_file():
        raise ConfigError(f"{run} has no best checkpoint yet: train it first, or name one with --step")
    return int(json.loads(path.read_text())["step"])


if __name__ == "__main__":
    sys.exit(train())
