"""`verism-eval realbench`, `compare` and `detectors`: their command lines, and what is done once they are read."""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from rich.console import Console

from shared.errors import VerismError
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, Stopped
from trainer.realbench.config import Bench, Contestant, checked, load

BENCH_HELP = """\
  verism-eval realbench my_pictures/                           a report on a folder of pictures: runs/realbench/report.html
  verism-eval realbench base=world/policy tuned=runs/world     a model in diffusers format against a run of verism-train
  verism-eval realbench a/ b/ --photographs photos/            against photographs of your own
  verism-eval realbench a/ b/ --prompts prompts.jsonl          files are named by the ids of the prompts
  verism-eval realbench --bench mine.yaml                      everything in a file, like examples/realbench.yaml

Pictures are scored by the detectors of the bench, which it serves itself where no URL is given, meet in an arena, and are held against
photographs. Every figure has an interval. What was painted, asked and answered lies in --out: the same command goes on where it was
stopped, and asks nothing twice. Exit status: 0 done, 1 done as far as the services answered, 2 could not begin, 130 interrupted.
"""
COMPARE_HELP = """\
  verism-eval compare runs/before runs/after     two runs of verism-train; models and folders too

The same prompts, the same noise, the same judges; B less A prompt by prompt, with intervals, and the keys in which two runs differ.
"""
DETECTORS_HELP = """\
  verism-eval detectors --real photos/ --generated fakes/ more_fakes/

For each detector of the bench: AUC, average precision and calibration error on these folders, and what JPEG, resizing, blur and noise at
rising strength do to it. A detector that scores a generated picture higher once it is blurred will teach a generator to blur.
"""
NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9 _.+-]{0,59})=(.+)", re.S)


def realbench(argv: Sequence[str]) -> int:
    parser = _parser(
        "realbench", "How real do pictures look? Folders, models and runs against photographs and one another.", BENCH_HELP
    )
    parser.add_argument(
        "contestants", nargs="*", metavar="[NAME=]PATH", help="a folder of pictures, a diffusers model, or a run folder"
    )
    _common(parser, Path("runs/realbench"))
    args = parser.parse_args(argv)
    return _guarded(lambda: _bench(args, args.contestants))


def compare(argv: Sequence[str]) -> int:
    parser = _parser("compare", "Two runs on the same prompts, noise and judges.", COMPARE_HELP)
    for side in "ab":
        parser.add_argument(side, metavar=f"[NAME=]{side.upper()}", help="a run folder, a diffusers model, or a folder of pictures")
    _common(parser, Path("runs/compare"))
    args = parser.parse_args(argv)
    return _guarded(lambda: _bench(args, [args.a, args.b]))


def detectors(argv: Sequence[str]) -> int:
    parser = _parser("detectors", "Which detector can be trusted as a reward?", DETECTORS_HELP)
    parser.add_argument("--real", type=Path, nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--generated", type=Path, nargs="+", required=True, help="folders of generated pictures")
    parser.add_argument("--altered", type=_count, default=200, help="pictures of each side that are altered (default: 200)")
    _common(parser, Path("runs/detectors"), photographs=False)
    args = parser.parse_args(argv)

    def work() -> int:
        from trainer.realbench import detectors as judging

        return judging.run(_load(args, {}, detectors_only=True), args.real, args.generated, args.altered, args.out, _console())

    return _guarded(work)


def _parser(name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"verism-eval {name}", description=what, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is too few; give 2 or more")
    return number


def _common(parser: argparse.ArgumentParser, out: Path, photographs: bool = True) -> None:
    parser.add_argument("--bench", type=Path, help="what is measured, a YAML file (default: examples/realbench.yaml)")
    if photographs:
        parser.add_argument("--photographs", type=Path, help="folder of true photographs, instead of the bench's")
    parser.add_argument("--prompts", type=Path, help="JSONL or text, instead of the bench's")
    parser.add_argument("--pictures", type=_count, help="at most so many of each")
    parser.add_argument("--out", type=Path, default=out, help=f"where everything lies (default: {out})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a change to the bench, e.g. arena.pairs=50"
    )


def _load(args: argparse.Namespace, contestants: dict[str, Contestant], detectors_only: bool = False) -> Bench:
    more: dict[str, Any] = {}
    for name in ("photographs", "prompts", "pictures"):
        if (value := getattr(args, name, None)) is not None:
            more[name] = value if isinstance(value, int) else str(value)
    changes = list(args.set)
    if detectors_only:
        changes += ["arena=null", "rewards={}", "prompts=null", "features=null"]
    bench = load(args.bench, changes, **more)
    if twice := contestants.keys() & bench.contestants.keys():
        raise ConfigError(f"{min(twice)!r} is a contestant of the bench too: give this one another name, NAME=PATH")
    return checked({**bench.model_dump(), "contestants": {**bench.contestants, **contestants}})


def named(texts: Sequence[str]) -> dict[str, Contestant]:
    """Contestants as the command line has them; ConfigError for what is none."""
    out: dict[str, Contestant] = {}
    for text in texts:
        found = None if Path(text).exists() else NAMED.fullmatch(text)
        path = Path(found[2] if found else text)
        name = found[1] if found else _name(path)
        number = 2
        while name in out and not found:
            name, number = f"{_name(path)}-{number}", number + 1
        if name in out:
            raise ConfigError(f"{name!r} is given twice: give each its own name, NAME=PATH")
        out[name] = _kind(path)
    return out


def _name(path: Path) -> str:
    """Of a contestant without one: its folder's, in letters that a file name takes."""
    clean = re.sub(r"[^A-Za-z0-9 _.+-]", "_", path.resolve().name).lstrip(" _.+-")[:50]
    return {"": "pictures", "photographs": "photographs-2"}.get(clean, clean)


def _kind(path: Path) -> Contestant:
    from trainer.realbench.config import found

    where = found(path)
    if (where / "model_index.json").is_file():
        return Contestant(model=str(path))
    if (where / "config.yaml").is_file():
        return Contestant(run=path)
    if where.is_dir():
        return Contestant(folder=path)
    raise ConfigError(
        f"{path} is no folder; give a folder of pictures, a model in diffusers format, or a run of verism-train (a hub id goes into a bench: "
        "contestants: {NAME: {model: ID}})"
    )


def _bench(args: argparse.Namespace, texts: Sequence[str]) -> int:
    bench = _load(args, named(texts))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from trainer.realbench.bench import judge, locked  # torch loads only once the command line is right
    from trainer.realbench.report import write as write_report
    from trainer.realbench.results import figures, write
    from trainer.realbench.screen import Screen, tables

    console, screen = _console(), Screen()
    with locked(args.out):
        told = judge(bench, args.out, screen)
        with screen("figures", 1) as tell:
            found = figures(told) | {"changes": _changes(bench)}
            tell(1)
        (args.out / "bench.yaml").write_text(yaml.safe_dump(bench.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        write(told, found, args.out)
        page = write_report(told, found, args.out)
    for part in tables(found):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    console.print(
        f"\n{page} (a page for a browser), results.json, figures.csv and pictures.csv beside it", highlight=False, soft_wrap=True
    )
    return 0 if told.complete else 1


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 132)


def _changes(bench: Bench) -> list[dict[str, Any]]:
    """Of a bench of two runs."""
    from trainer.realbench.changes import changes
    from trainer.realbench.config import found

    runs = [(name, found(one.run)) for name, one in bench.contestants.items() if one.run is not None]
    return changes((runs[0][0], runs[1][0]), (runs[0][1], runs[1][1])) if len(runs) == len(bench.contestants) == 2 else []


def _guarded(work: Callable[[], int]) -> int:
    """Known errors become their message; all else is a bug and keeps its traceback. SIGTERM and SIGHUP end the work as Ctrl-C does, so that
    services it started end too.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    console = Console(stderr=True)
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for one, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup
                signal.signal(one, stop)
        return work()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return 130
    except (ConfigError, CheckpointError, VerismError, FileNotFoundError, Stopped, PermissionError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
