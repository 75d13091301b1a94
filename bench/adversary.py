"""Detectors that learn along against one that does not, on the small world: `make bench-adversary`, or `python -m bench adversary`.

Three detectors, each alone and with alignment and KL: the frozen one, RealGen V2's refits, Adv-GRPO's head on patches. The policy is recipe
`world`'s in all of them, at a slower pace (PACE); schedules and references are those of recipes `realgen_v2_small` and
`adv_grpo_dino_small`, services those of examples/serve/adversary.yaml. `transfer` asks for five classes of clothes and gives the head pullovers
alone as references; `transfer_all` gives it all five. The judge is nobody's reward, nor is `frozen` where another detector is trained on.

A run lies in OUT/ARM/WAY/seedN, with a service process and a fit folder of its own, so that both sides go on in step when the command was
stopped and is given again. It is trained from evaluation to evaluation; at each the detector that is served then tells the evaluation's
pictures from held-out photographs, which no refit has seen (looks.jsonl).

    python -m bench adversary --quick                         one seed, two steps, to see that everything works
    python -m bench adversary                                 20 steps, seeds 0, 1, 2: hours
    python -m bench adversary --only frozen/alone --steps 10
    python -m bench adversary --out runs/slow --fit detector.ema=0.9 --train adversary.detector.schedule.mean=-4
    python -m bench adversary --report                        only the tables and plots of what is there
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from bench import algorithms, process
from bench.algorithms import COMMON, ROOT, finished, lines, trained
from bench.two_policies import memory

OUT = ROOT / "runs" / "adversary"
SERVE, RECIPES = ROOT / "examples" / "serve" / "adversary.yaml", ROOT / "trainer" / "recipes"
KEY = "VERISM_ADMIN_KEY"
KIND = "pullover"  # of `transfer`'s references
# What `transfer` asks for: GRPO moves a policy among what it paints, and of these the untrained one paints a third as another of them.
NEIGHBOURS = ("t-shirt", "pullover", "dress", "coat", "shirt")
LOOKED = 500  # pictures of each side that a detector has to tell apart
WAYS = {"alone": "the detector alone", "held": "with alignment and KL"}
# Beside what the recipe says: the service may be paused with everything else on a busy machine, and nobody else wants its lease.
PATIENT = {"wait_s": 7200, "lease_s": 600}
# Half of `world`'s pictures a step, and less than half of its rate: a detector that is refitted after each step follows.
PACE = ["group.prompts=16", "optim.lr=5e-4", "optim.lr_steps=20"]
FASTER = ["optim.lr=1e-3"]  # `transfer`: what the head wants is far away
QUICK = ["group.prompts=8", "group.size=6"]
QUICK_REFITS = ("pictures=48", "rounds=2")


@dataclass(frozen=True)
class Arm:
    """What is trained on, and the recipe whose refits are taken; None is never refitted."""

    label: str
    reward: str
    part: str | None
    recipe: str | None = None
    ways: tuple[str, ...] = tuple(WAYS)
    classes: tuple[str, ...] = ()  # of its references, where NEIGHBOURS alone are asked for


ARMS = {
    "frozen": Arm("frozen detector", "frozen", "logit"),
    "realgen_v2": Arm("RealGen V2 refits", "detector", "logit", "realgen_v2_small"),
    "adv_grpo": Arm("Adv-GRPO head", "dino_head", None, "adv_grpo_dino_small"),
    "transfer": Arm(f"Adv-GRPO head, references {KIND}s", "dino_head", None, "adv_grpo_dino_small", ("alone",), (KIND,)),
    "transfer_all": Arm(
        "Adv-GRPO head, references of five classes", "dino_head", None, "adv_grpo_dino_small", ("alone",), NEIGHBOURS
    ),
}


@dataclass(frozen=True)
class Job:
    """A run: which arm, which way, with which seed, and how far."""

    arm: str
    way: str
    seed: int
    steps: int

    def folder(self, out: Path) -> Path:
        return out / self.arm / self.way / f"seed{self.seed}"

    def overrides(self, url: str, admin: str, samples: int, every: int) -> list[str]:
        """What verism-train is told beside `world`, but for how far."""
        arm, held = ARMS[self.arm], self.way == "held"
        weights = {"alignment": 0.5 if held else 0.0, "judge": 0.0, "frozen": 0.0, arm.reward: 0.5 if held else 1.0}
        parts = {"alignment": "margin", "judge": "margin", "frozen": "logit", arm.reward: arm.part}
        rewards = {name: {"url": url, "weight": weight, "part": parts[name]} for name, weight in weights.items()}
        own = [f"rewards={json.dumps(rewards)}"]
        if arm.recipe is not None:
            raw = yaml.safe_load((RECIPES / f"{arm.recipe}.yaml").read_text())
            refits = {arm.reward: raw["adversary"][arm.reward] | PATIENT | {"admin": admin, "key_env": KEY}}
            some = {"classes": list(arm.classes), "match": "none"} if arm.classes else {}
            own += [f"adversary={json.dumps(refits)}", f"references={json.dumps(raw['references'] | some)}"]
            own += FASTER if arm.classes else []
        own += [] if held else ["kl.weight=0"]
        looks = [f"eval.samples={samples}", f"eval.grid={samples}", f"eval.every={every}", f"checkpoint_every={every}"]
        plan = [f"seed={self.seed}", "checkpoint_best=distance", f"name={self.arm}-{self.way}"]
        return [*COMMON, *PACE, *own, *looks, *plan]


def config_of(job: Job, folder: Path, admin: int, changes: Sequence[str]) -> dict[str, Any]:
    """The service of a run: what it trains on and is measured by, versions in the run's folder. `changes`: NAME.KEY=VALUE of a `fit`."""
    from trainer.config import ConfigError, apply

    raw, reward = yaml.safe_load(SERVE.read_text()), ARMS[job.arm].reward
    rewards = {name: raw["rewards"][name] for name in dict.fromkeys((reward, "alignment", "judge", "frozen"))}
    for change in changes:
        name, _, rest = change.partition(".")
        if "fit" not in raw["rewards"].get(name, {}):
            known = ", ".join(one for one, options in raw["rewards"].items() if "fit" in options)
            raise ConfigError(f"--fit {change!r} does not begin with a reward that is refitted: {known}")
        apply(raw["rewards"][name]["fit"], rest, "detector.ema=0.9")
    if ARMS[job.arm].recipe is not None:
        rewards[reward]["fit"]["folder"] = str(folder / "fitting")
    service = {"threads": 1, "device": "cpu", "rewards": rewards, "default": ["frozen"]}
    return service if ARMS[job.arm].recipe is None else service | {"admin": {"port": admin, "env": KEY}}


@contextlib.contextmanager
def served(job: Job, folder: Path, changes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """URLs of the run's own service and of its admin listener."""
    admin, config = process.free_port(), folder / "service.json"
    config.write_text(json.dumps(config_of(job, folder, admin, changes), indent=1) + "\n")
    with algorithms.serving(config) as (url, _):
        yield url, f"http://127.0.0.1:{admin}"


def tiles(path: Path, count: int, size: int = 28, gap: int = 2) -> NDArray[np.uint8]:
    """(count, size, size, 3) uint8 out of a grid that the trainer wrote (trainer/metrics.py), which is lossless."""
    from PIL import Image

    picture = np.asarray(Image.open(path).convert("RGB"))
    columns, rows = ((length - gap) // (size + gap) for length in (picture.shape[1], picture.shape[0]))
    if not 0 < count <= rows * columns:
        raise ValueError(f"{path} has {rows * columns} places, and {count} pictures were asked for: the run had another eval.grid")
    places = [(gap + n // columns * (size + gap), gap + n % columns * (size + gap)) for n in range(count)]
    return np.stack([picture[top : top + size, left : left + size] for top, left in places])


def told_apart(real: NDArray[np.float64], generated: NDArray[np.float64]) -> dict[str, float]:
    """Of log-odds or margins of both sides: the share on the right side of 0 (the mean of both sides' shares), and the area under the curve."""
    above = (real[:, None] > generated[None, :]).mean() + 0.5 * (real[:, None] == generated[None, :]).mean()
    shares = {"real_right": float((real > 0).mean()), "generated_right": float((generated < 0).mean())}
    return {"accuracy": (shares["real_right"] + shares["generated_right"]) / 2, "auc": float(above), **shares}


def look(folder: Path, step: int, url: str, reward: str | None, part: str | None) -> dict[str, Any]:
    """How well the served version of `reward` tells the pictures of the evaluation at `step` from photographs that nothing is fitted on, and
    which class the monitors' classifier gives each; a line of looks.jsonl. Without `reward` the classes alone."""
    from shared.client import RewardClientSync
    from trainer.honesty import Monitors
    from world import photographs

    count = next(line["n"] for line in lines(folder) if line["kind"] == "eval" and line["step"] == step)
    images = tiles(folder / "grids" / f"step_{step:05d}.png", count)
    told: dict[str, Any] = {"step": step, "classes": shares_of(Monitors.load(ROOT / "world" / "monitors"), images)}
    if reward is not None:
        generated, real = images[:LOOKED], photographs.load("test")[0][: min(LOOKED, count)]
        with RewardClientSync({reward: url}, timeout_s=900) as client:
            table = client.score([*real, *generated])
        values = table.values_RB[0] if part is None else table.part(reward, part)
        if not np.isfinite(values).all():
            raise RuntimeError(
                f"{reward} left pictures without a score: {table.failures}; see {folder}/service.log, and give the command again"
            )
        told |= {"reward": reward, "version": table.versions[reward], **told_apart(values[: len(real)], values[len(real) :])}
    with (folder / "looks.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    return told


def shares_of(monitors: Any, images: NDArray[np.uint8]) -> dict[str, float]:
    """By class: the share of pictures that the independent classifier calls so."""
    import torch

    with torch.inference_mode():
        guessed = monitors.classifier.head(torch.from_numpy(monitors.features(images)).float()).argmax(1).numpy()
    return {name: float((guessed == n).mean()) for n, name in enumerate(monitors.classes)}


def looks(folder: Path) -> dict[int, dict[str, Any]]:
    """What `look` has written, by step; the last of each."""
    path = folder / "looks.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["step"]: line for line in told}


def neighbours(folder: Path) -> Path:
    """A file in `folder` with the training prompts of NEIGHBOURS."""
    told = [
        line
        for line in (ROOT / "world" / "prompts" / "train.jsonl").read_text().splitlines()
        if json.loads(line)["class_name"] in NEIGHBOURS
    ]
    path = folder / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in told))
    return path


def targets(steps: int, every: int) -> list[int]:
    """Where a run is evaluated, but for step 0."""
    return [*range(every, steps, every), steps]


def train(job: Job, chosen: argparse.Namespace, out: Path) -> int:
    """A run to `job.steps`, from where it was; the exit status of what failed, or 0."""
    folder, arm = job.folder(out), ARMS[job.arm]
    folder.mkdir(parents=True, exist_ok=True)
    with served(job, folder, chosen.fit) as (url, admin):
        asked = [f"prompts.train={neighbours(folder)}"] if arm.classes else []
        told = [*job.overrides(url, admin, chosen.samples, chosen.every), *asked, *chosen.train]
        if chosen.quick:
            told += QUICK + ([f"adversary.{arm.reward}.{each}" for each in QUICK_REFITS] if arm.recipe is not None else [])
        for target in targets(job.steps, chosen.every):
            if not finished(folder, target) and (status := trained("world", [*told, f"steps={target}"], folder, chosen.threads)):
                return status
            if 0 not in looks(
                folder
            ):  # the detector's first version is the frozen one; that of a head that begins at random is past
                look(folder, 0, url, None if arm.reward == "dino_head" else "frozen", arm.part)
            if target not in looks(folder):
                seen = look(folder, target, url, arm.reward, arm.part)
                line = next(line for line in lines(folder) if line["kind"] == "eval" and line["step"] == target)
                print(
                    f"  step {target}: {arm.reward} {line[f'reward/{arm.reward}/mean']:+.2f} (version {seen['version']}, accuracy "
                    f"{seen['accuracy']:.2f}), distance {line['distance']:.1f}, class hit {line['class_hit']:.2f}",
                    flush=True,
                )
    return 0


def done(job: Job, out: Path) -> bool:
    """Whether nothing is left to do of a run."""
    return finished(job.folder(out), job.steps) and job.steps in looks(job.folder(out))


def run(todo: Sequence[Job], chosen: argparse.Namespace, out: Path) -> list[tuple[Job, int]]:
    """Train what is not done; those that failed."""
    left, failed = [job for job in todo if not done(job, out)], list[tuple[Job, int]]()
    for number, job in enumerate(left, 1):
        label = f"{ARMS[job.arm].label}, {WAYS[job.way]}"
        print(f"{number} of {len(left)}: {label}, seed {job.seed}, to step {job.steps}", flush=True)
        seen: dict[str, float] = {}
        with memory([], seen):  # the service and the trainer are this process's children
            status = train(job, chosen, out)
        with (job.folder(out) / "memory.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        if status == 130:
            raise KeyboardInterrupt
        if status:
            failed.append((job, status))
    return failed


def pairs(only: str) -> list[tuple[str, str]]:
    """(arm, way) that are asked for as ARM or ARM/WAY, with commas; ValueError for what is none."""
    out: list[tuple[str, str]] = []
    for one in only.split(",") if only else ARMS:
        name, _, way = one.partition("/")
        if name not in ARMS or (way and way not in ARMS[name].ways):
            known = [*ARMS, *(f"{arm}/{each}" for arm, told in ARMS.items() for each in told.ways)]
            raise ValueError(f"--only {one!r} is none of {', '.join(known)}")
        out += [(name, each) for each in ARMS[name].ways if way in ("", each)]
    return list(dict.fromkeys(out))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench adversary", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="run folders (default runs/adversary)")
    parser.add_argument("--only", default="", help=", ".join(ARMS) + ", or ARM/WAY (alone, held), with commas; default all")
    parser.add_argument("--steps", type=int, default=20, help="of a run (default 20, of 192 pictures each)")
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations (default 5)")
    parser.add_argument("--samples", type=int, default=500, help="pictures of an evaluation (default 500)")
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2], help="default 0,1,2")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the trainer (default: all cores)")
    parser.add_argument("--fit", action="append", default=[], metavar="NAME.KEY=VALUE", help="of a service's `fit`; needs --out")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE", help="for verism-train; needs --out")
    parser.add_argument("--report", action="store_true", help="train nothing; write what is there")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, two steps of 48 pictures, 64 an evaluation, OUT-quick; no documentation"
    )
    chosen = parser.parse_args(arguments)
    try:
        asked = pairs(chosen.only)
    except ValueError as error:
        parser.error(str(error))
    if (chosen.fit or chosen.train) and chosen.out == OUT:
        parser.error("--fit and --train make other runs: give them an --out of their own")
    if chosen.quick:
        chosen.steps, chosen.every, chosen.samples, chosen.seeds = 2, 1, 64, [0]
        chosen.out = chosen.out.with_name(chosen.out.name + "-quick")
    out: Path = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ[KEY] = secrets.token_hex(16)  # services and trainers are children
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service and the run are stopped then too
    todo = [Job(arm, way, seed, chosen.steps) for seed in chosen.seeds for arm, way in asked]
    failed = [] if chosen.report else run(todo, chosen, out)
    from bench import adversary_report

    adversary_report.write(out, chosen.steps, document=chosen.out.resolve() == OUT)
    for job, status in failed:
        print(f"{job.folder(out)} ended with {status}; see said.log there", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
