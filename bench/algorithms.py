"""The algorithms on the small world, after equal numbers of pictures: `make bench-algorithms`, or `python -m bench algorithms --tune`.

Every run is `verism-train world` as a child process, with what `ALGORITHMS` changes in the recipe, in a folder
OUT/ALGORITHM/SETTING/seedN of its own. A finished run is left alone, an interrupted one goes on where it was, so the command may be stopped
and given again. One service process has all rewards. The alarm only warns, so that each run sees the same number of pictures.

    python -m bench algorithms --quick                  one seed, two steps, to see that everything works: two minutes
    python -m bench algorithms --tune --only guard,nft  each setting of the grids at one seed and `--tune-steps`; the best by distance is kept
    python -m bench algorithms                          each at its best setting, seeds 0, 1, 2
    python -m bench algorithms --report                 only the tables and plots of what is there
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import process

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "runs" / "algorithms"
REWARDS = ("detector", "judge", "alignment", "jpeg_size")
# For every run: the service waits as long as it takes (the machine may be busy), the alarm speaks and does not stop.
COMMON = ("alarm.action=warn", "reward_timeout_s=900", "reward_outage_s=3600")
# Pictures of the whole way, drawn from noises of their own: without a window members of one first noise would be one picture.
NO_WINDOW = ("sampling.window=null", "sampling.same_noise=false")
# The hackable reward: few bits per pixel as JPEG, which flat pictures have. Detector and alignment are measured, and GARDO's auxiliaries.
HACKABLE = (
    "rewards={jpeg_size: {url: SERVICE, weight: 1}, detector: {url: SERVICE, weight: 0, part: logit}, "
    "alignment: {url: SERVICE, weight: 0, part: margin}}",
)
GATE = ("gardo.gate=true", "gardo.aux=[detector, alignment]", "kl.reference=adaptive", "kl.reset_every=15")


def _guard(lr: str, kl: str, noise: str, *more: str, clip: str = "2.0e-4") -> tuple[str, ...]:
    return (
        f"loss={{use: guard, clip_low: {clip}, clip_high: {clip}}}",
        "sampling.kind=sde",
        f"sampling.noise_level={noise}",
        f"optim.lr={lr}",
        f"kl.weight={kl}",
        *more,
    )


def _nft(lr: str, kl: str, old: str, beta: str, *more: str) -> tuple[str, ...]:
    return (
        f"loss={{use: nft, beta: {beta}, old: {old}, times: 2}}",
        *NO_WINDOW,
        "sampling.solver=dpm2m",
        f"optim.lr={lr}",
        f"kl.weight={kl}",
        *more,
    )


# What was tried: algorithm -> setting -> changes to recipe `world`. The first setting serves until --tune has found a better one.
ALGORITHMS: dict[str, dict[str, tuple[str, ...]]] = {
    "grpo": {"recipe": ()},
    "guard": {
        "lr-1.2e-3_noise-0.7": _guard("1.2e-3", "0.01", "0.7"),
        "lr-1.2e-3_noise-0.4": _guard("1.2e-3", "0.01", "0.4"),
        "lr-6e-4_noise-0.7": _guard("6.0e-4", "0.01", "0.7"),
        "lr-6e-4_noise-0.7_updates-2": _guard("6.0e-4", "0.01", "0.7", "optim.updates=2"),
    },
    "nft": {
        "lr-6e-4_last_beta-1": _nft("6.0e-4", "0.02", "last", "1.0"),
        "lr-1.2e-3_last_beta-1": _nft("1.2e-3", "0.02", "last", "1.0"),
        "lr-6e-4_ema_beta-1": _nft("6.0e-4", "0.02", "ema", "1.0"),
        "lr-6e-4_last_beta-0.1": _nft("6.0e-4", "0.02", "last", "0.1"),
        "lr-1.2e-3_last_beta-1_euler": _nft("1.2e-3", "0.02", "last", "1.0", "sampling.solver=euler"),
    },
    "jpeg-plain": {"recipe-kl": HACKABLE},
    "jpeg-kl": {"kl-0.04": (*HACKABLE, "kl.weight=0.04")},  # GARDO's weight, on every sample
    "jpeg-gardo": {
        "gate_kl-0.04": (*HACKABLE, *GATE, "kl.weight=0.04"),
        "gate_kl-0.3": (*HACKABLE, *GATE, "kl.weight=0.3"),  # pins the policy, so the least distance would choose it
    },
}
COMPARED = ("grpo", "guard", "nft")
PAIR = ("jpeg-plain", "jpeg-gardo")
HACKED = ("jpeg-plain", "jpeg-kl", "jpeg-gardo")


@dataclass(frozen=True)
class Job:
    """A run: what, with which seed, and how far."""

    algorithm: str
    setting: str
    seed: int
    steps: int

    def folder(self, out: Path) -> Path:
        return out / self.algorithm / self.setting / f"seed{self.seed}"

    def overrides(self, url: str, samples: int, every: int) -> list[str]:
        """What verism-train is told beside the recipe's name."""
        recipe = ("detector", "judge", "alignment")
        mine = ALGORITHMS[self.algorithm][self.setting]
        own = [change.replace("SERVICE", json.dumps(url)) for change in mine]
        urls = [] if any(change.startswith("rewards=") for change in own) else [f"rewards.{name}.url={url}" for name in recipe]
        plan = [f"steps={self.steps}", f"seed={self.seed}", f"eval.samples={samples}", f"eval.every={every}"]
        return [*urls, *COMMON, *own, *plan, f"name={self.algorithm}"]


def steps_of(folder: Path) -> int:
    """How far the evaluations of a run go; -1 before the first."""
    return max((line["step"] for line in lines(folder) if line["kind"] == "eval"), default=-1)


def lines(folder: Path) -> list[dict[str, Any]]:
    from trainer.metrics import read

    return read(folder / "metrics.jsonl")


def finished(folder: Path, steps: int) -> bool:
    """Whether a run has come to `steps`, or beyond them by an evaluation there."""
    return any(line["kind"] == "eval" and line["step"] == steps for line in lines(folder))


def best_settings(out: Path) -> dict[str, str]:
    """What --tune has chosen, and the first setting of each algorithm that was not tuned."""
    path = out / "best.json"
    chosen = json.loads(path.read_text()) if path.is_file() else {}
    return {name: chosen.get(name, {}).get("setting", next(iter(grid))) for name, grid in ALGORITHMS.items()}


def choose(out: Path, algorithm: str, seed: int, steps: int) -> dict[str, Any] | None:
    """The setting whose distance is the least after `steps`, with all that were tried; None where none has come so far."""
    tried = {}
    for setting in ALGORITHMS[algorithm]:
        found = [line for line in lines(Job(algorithm, setting, seed, steps).folder(out)) if line["kind"] == "eval"]
        at = [line["distance"] for line in found if line["step"] == steps]
        if at:
            tried[setting] = at[0]
    if not tried:
        return None
    return {"setting": min(tried, key=lambda name: tried[name]), "seed": seed, "steps": steps, "distances": tried}


@contextlib.contextmanager
def rewards(place: Path) -> Iterator[tuple[str, int]]:
    """URL and pid of one service with all rewards, on one thread."""
    own = {
        "detector": {"use": "detector", "folder": "world/detector"},
        "judge": {"use": "forensic_chat", "folder": "world/judge", "dtype": "float32"},
        "alignment": {"use": "alignment", "folder": "world/alignment", "against": "world/prompts/against.txt"},
        "jpeg_size": {"use": "jpeg_size"},
    }
    config = place / "rewards.json"
    config.write_text(json.dumps({"threads": 1, "device": "cpu", "rewards": own, "default": ["detector"]}))
    with serving(config) as told:
        yield told


@contextlib.contextmanager
def serving(config: Path) -> Iterator[tuple[str, int]]:
    """URL and pid of `verism-serve CONFIG`, which says what it says into service.log beside it."""
    port = process.free_port()
    url, said = f"http://127.0.0.1:{port}", config.with_name("service.log")
    with said.open("a") as log:
        server = process.start(config, port, log)
        try:
            try:
                process.wait(url, server, 1800)
            except RuntimeError as error:
                raise RuntimeError(f"{error}: {said.read_text()[-2000:]}") from error
            yield url, server.pid
        finally:
            process.end([server], process.tree([server]), 30)


def train(job: Job, out: Path, url: str, samples: int, every: int, threads: int) -> int:
    """`verism-train world` to `job.steps`; its exit status."""
    return trained("world", job.overrides(url, samples, every), job.folder(out), threads)


def trained(recipe: str, overrides: Sequence[str], folder: Path, threads: int) -> int:
    """`verism-train RECIPE` in `folder`, from where it was; its exit status. Wall-clock, CPU and the largest resident set go into costs.jsonl
    there, what it says into said.log."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "trainer", recipe, *overrides, "--resume", "--run-dir", str(folder)]
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    environment = {**os.environ, **process.ENVIRONMENT, **quiet, "OMP_NUM_THREADS": str(threads)}
    before, began = max(steps_of(folder), 0), time.monotonic()
    with (folder / "said.log").open("a") as log:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        status, usage = _wait(child)
    told = {
        "from": before,
        "to": max(steps_of(folder), 0),
        "wall_s": time.monotonic() - began,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1024,
        "threads": threads,
        "load": os.getloadavg()[1],
        "status": status,
    }
    with (folder / "costs.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    return status


def _wait(child: subprocess.Popen[Any]) -> tuple[int, Any]:
    """Exit status and resource usage; Ctrl-C lets the child save, then is raised again by the caller's look at the status."""
    while True:
        try:
            _, raw, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.send_signal(signal.SIGTERM)  # it finishes its step and saves
            os.wait4(child.pid, 0)
            child.returncode = 130
            raise
        child.returncode = os.waitstatus_to_exitcode(raw)
        return child.returncode, usage


def jobs(chosen: argparse.Namespace, out: Path) -> list[Job]:
    """In the order in which they run."""
    best, asked = best_settings(out), chosen.only.split(",") if chosen.only else list(ALGORITHMS)
    pairs: list[tuple[str, str]] = []
    for name, _, setting in (one.partition("/") for one in asked):
        if chosen.tune and not setting:
            pairs += [(name, each) for each in ALGORITHMS[name] if len(ALGORITHMS[name]) > 1]
        else:
            pairs.append((name, setting or best[name]))
    seeds, steps = ([0], chosen.tune_steps) if chosen.tune else (chosen.seeds, chosen.steps)
    return [Job(name, setting, seed, steps) for seed in seeds for name, setting in pairs]


def known(asked: str) -> bool:
    """Whether it is the name of an algorithm, or ALGORITHM/SETTING."""
    name, _, setting = asked.partition("/")
    return name in ALGORITHMS and (not setting or setting in ALGORITHMS[name])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench algorithms", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="run folders (default runs/algorithms)")
    parser.add_argument("--only", default="", help=", ".join(ALGORITHMS) + ", or ALGORITHM/SETTING, with commas; default all")
    parser.add_argument("--tune", action="store_true", help="the grids, at seed 0; writes OUT/best.json")
    parser.add_argument("--steps", type=int, default=30, help="of a run (default 30, of 384 pictures each)")
    parser.add_argument(
        "--tune-steps", type=int, default=10, help="of a run of the grids (default 10); the full run goes on from there"
    )
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations (default 10)")
    parser.add_argument("--samples", type=int, default=1000, help="pictures of an evaluation (default 1000)")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2], help="default 0,1,2")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the trainer (default: all cores)")
    parser.add_argument("--report", action="store_true", help="train nothing; write what is there")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two steps, 64 pictures an evaluation, OUT-quick; no documentation"
    )
    chosen = parser.parse_args(arguments)
    if unknown := [one for one in filter(None, chosen.only.split(",")) if not known(one)]:
        settings = [f"{name}/{setting}" for name, grid in ALGORITHMS.items() for setting in grid]
        parser.error(f"--only {unknown[0]!r} is none of {', '.join((*ALGORITHMS, *settings))}")
    if chosen.quick:
        chosen.steps, chosen.tune_steps, chosen.every, chosen.samples, chosen.seeds = 2, 2, 1, 64, [0]
        chosen.out = chosen.out.with_name(chosen.out.name + "-quick")
    out: Path = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service and the run are stopped then too
    failed = [] if chosen.report else run(jobs(chosen, out), chosen, out)
    for name in COMPARED:  # with a reward that can be hacked, the least distance would choose who learns nothing
        if chosen.tune and len(ALGORITHMS[name]) > 1 and (found := choose(out, name, 0, chosen.tune_steps)):
            path = out / "best.json"
            earlier = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(earlier | {name: found}, indent=1) + "\n")
    from bench import algorithms_report

    algorithms_report.write(out, chosen.steps, quick=chosen.quick)
    for job, status in failed:
        print(f"{job.folder(out)} ended with {status}; see said.log there", file=sys.stderr)
    return 1 if failed else 0


def run(todo: Sequence[Job], chosen: argparse.Namespace, out: Path) -> list[tuple[Job, int]]:
    """Train what is not done; those that failed."""
    left = [job for job in todo if not finished(job.folder(out), job.steps)]
    failed: list[tuple[Job, int]] = []
    if not left:
        return failed
    with tempfile.TemporaryDirectory() as place, rewards(Path(place)) as (url, _):
        for number, job in enumerate(left, 1):
            print(f"{number} of {len(left)}: {job.algorithm}, {job.setting}, seed {job.seed}, to step {job.steps}", flush=True)
            status = train(job, out, url, chosen.samples, chosen.every, chosen.threads)
            if status == 130:
                raise KeyboardInterrupt
            if status:
                failed.append((job, status))
    return failed


if __name__ == "__main__":
    sys.exit(main())
