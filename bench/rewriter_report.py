"""The parent of bench/rewriter.py: contestants, rounds, and what came out."""

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import random_pipeline, rounds
from bench.process import ROOT
from bench.rewriter import HERE, TOLERANCE, TRL, VLLM, work_of
from bench.rounds import Contestant, Rows, Stamp, console, shown, spread

PYTHON_OF_VLLM = ROOT / ".venv-vllm" / "bin" / "python"


def left_out(ways: Sequence[str]) -> dict[str, str]:
    """Who cannot take part here, and why."""
    out = {}
    if VLLM in ways and not PYTHON_OF_VLLM.is_file():
        out[VLLM] = "no environment of vLLM's: `make vllm` builds it"
    if TRL in ways and importlib.util.find_spec("trl") is None:
        out[TRL] = "TRL is not installed: it is in the extra `dev`"
    return out


def measure(model: str, ways: Sequence[str], count: int, threads: int, place: Path) -> dict[str, Any]:
    """The model, how far Verism and TRL are apart, and a row for each round of each contestant."""
    texts = random_pipeline.prompts((count + 1) * work_of(model).prompts)
    told = {"model": model, "path": model, "folder": str(place / "model"), "log": str(place / "vllm.log")}
    told |= {"threads": threads, "texts": texts, "steps": count + 1}
    made: list[Contestant] = []

    def start(way: str) -> Contestant:
        made.append(Contestant(way, "bench.rewriter", {**told, "way": way}, place / f"{way.replace(', ', '-')}.log"))
        return made[-1]

    try:
        with console.status(f"{model}: weights, and do both compute the same?"):
            size = start("write").answer()
            told["path"] = size.pop("path")
            told["context"] = 16 * -(-(size["prompt_tokens"] + work_of(model).longest) // 16) + 64
            apart = start("agree").answer() if TRL in ways else {}
        if apart and not max(apart["loss"], apart["gradient"]) <= TOLERANCE:
            raise RuntimeError(f"TRL and Verism do not compute the same: {apart}")
        rows = rounds.run(start, ways, count, model)
        return {"size": size, "apart": apart, "rows": rows}
    finally:
        for one in made:
            one.end()


def per_token(row: Mapping[str, float], key: str = "step") -> float:
    """Seconds."""
    return row[key] / max(row["tokens"], 1.0)


def ratios(rows: Rows, a: str, b: str, key: str = "step") -> list[float]:
    """a's time per token over b's, round by round."""
    return [per_token(x, key) / max(per_token(y, key), 1e-9) for x, y in zip(rows[a], rows[b], strict=True)]


def summary(rows: Rows) -> dict[str, Any]:
    """Medians, with ratios as [least, median, most]."""
    out: dict[str, Any] = {}
    for name, told in rows.items():
        out[name] = {
            "seconds_per_step": statistics.median(row["step"] for row in told),
            "tokens_per_step": statistics.median(row["tokens"] for row in told),
            "rollout_tokens_per_second": statistics.median(1 / per_token(row, "sample") for row in told),
            "step_ms_per_token": statistics.median(1000 * per_token(row) for row in told),
            "training_ms_per_token": statistics.median(1000 * per_token(row, "train") for row in told),
            "sync_seconds": statistics.median(row["sync"] for row in told),
            "cpu_seconds_per_step": statistics.median(row["cpu"] for row in told),
            "peak_mb": max(row["peak"] for row in told),
        }
        if TRL in rows:
            for key, what in (("step", "a_step"), ("sample", "rollouts"), ("train", "training"), ("cpu", "cpu")):
                out[name][f"{what}_times_trls_speed"] = spread(ratios(rows, TRL, name, key))
    return out


def run(model: str, ways: Sequence[str], count: int, threads: int, quick: bool) -> int:
    """Measure, print tables, write bench/results/rewriter.json (rewriter-quick.json)."""
    stamp, absent = Stamp(), left_out(ways)
    for way, reason in absent.items():
        print(f"{way} is left out: {reason}", file=sys.stderr)
    taking = [way for way in ways if way not in absent]
    with tempfile.TemporaryDirectory() as place:
        result = measure(model, taking, count, threads, Path(place))
    told = summary(result["rows"])
    show(model, result, told)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", *(["trl"] if TRL in taking else []))}
    body = {**stamp.told(threads=threads, versions=versions, left_out=absent, rounds=count), "model": model}
    rounds.keep("rewriter-quick" if quick else "rewriter", {**body, "work": vars(work_of(model)), **result, "summary": told})
    return 0


def show(model: str, result: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Contestants, and what was wanted."""
    out, rows, work, size = Console(width=150), result["rows"], work_of(model), result["size"]
    sizes = f"{size['parameters'] / 1e6:.1f}M, LoRA of {size['adapter'] / 1e6:.2f}M"
    step = f"{work.prompts} prompts of {size['prompt_tokens']} tokens, {work.group} rewrites each, {work.longest} tokens at most"
    title = f"{model}: {sizes}; {step}"
    table = Table("way", "s a step", "tokens", "rollout tokens/s", "training ms/token", "sync s", "CPU s", "peak MB", title=title)
    for name, row in told.items():
        table.add_row(
            name,
            shown([r["step"] for r in rows[name]]),
            f"{row['tokens_per_step']:.0f}",
            shown([1 / per_token(r, "sample") for r in rows[name]], 1),
            shown([1000 * per_token(r, "train") for r in rows[name]]),
            f"{row['sync_seconds']:.2f}",
            f"{row['cpu_seconds_per_step']:.1f}",
            f"{row['peak_mb']:.0f}",
        )
    out.print(table)
    if TRL not in rows:
        return
    faster = Table("per token, times TRL's speed", "a whole step", "rollouts", "training", "a step in CPU time")
    for name in (way for way in rows if way != TRL):
        faster.add_row(name, *(shown(ratios(rows, TRL, name, key)) for key in ("step", "sample", "train", "cpu")))
    out.print(faster)
    apart, speed = result["apart"], statistics.median(ratios(rows, TRL, HERE))
    wanted = Table("wanted", "seen", "")
    wanted.add_row("a step not slower than TRL's", f"{speed:.2f} times its speed", "yes" if speed >= 1 else "NO")
    worst = max(apart["loss"], apart["gradient"])
    wanted.add_row(f"loss and gradient agree to {TOLERANCE:g}", f"{worst:.0e} at ratios up to 1 +- {apart['ratio_dev']:.2f}", "yes")
    out.print(wanted)
