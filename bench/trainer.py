"""A training step of Verism against the loop of the published scripts: `make bench-trainer`, or `python -m bench trainer --quick`.

Both train a LoRA on the same random SD3 pipelines with the same recipe, the same number of pictures and three reward services that take
20 ms a forward pass without using a core. First both judge the same trajectories: losses and gradients have to agree. Then rounds: each
contestant, a process of its own, takes one step a round, in an order that turns; ratios are taken within a round. Each measure is told apart
by switching it off in Verism, or on. Peak memory is a process's own during steps (resident set; on a GPU what torch has allocated).

    python -m bench trainer --quick                     a look at the tiny one: one minute
    python -m bench trainer --sizes tiny,100m           15 minutes on two cores
    python -m bench trainer --device cuda               SD3.5 Medium's size at 1024 pixels in bfloat16; --sizes adds others
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import random_pipeline

REWARDS = ("detector", "alignment", "judge")  # names of services that only sleep
SLEEP_MS = 20.0
LOOP, HERE = "loop", "Verism"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Work:
    """A step: `prompts` groups of `group` pictures, `micro_batch` in a pass (RealGen's 3), `drawn` in one of sampling, `large` where
    training's are larger."""

    prompts: int
    group: int
    drawn: int
    large: int
    micro_batch: int = 3
    checkpointing: bool = False


WORK = {
    "tiny": Work(prompts=4, group=9, drawn=9, large=18),
    "100m": Work(prompts=2, group=6, drawn=6, large=6),
    "sd35-medium": Work(prompts=2, group=6, drawn=3, large=6, checkpointing=True),  # bfloat16 rounds differently in other batches
}
ON_CUDA = "sd35-medium"
# What is switched off in Verism, or switched on: keys of `sampling` or `policy`, or what `_without` does where there is no key.
VARIANTS: dict[str, dict[str, Any]] = {
    HERE: {},
    "without kept texts": {},
    "without shared prefix": {"prefix": "own"},
    "without overlap": {},
    "without oneDNN": {"onednn": False},
    "without larger sampling batches": {"draw_batch": None},
    "with larger training batches": {"micro_batch": "large"},
    "with fewer guided passes": {"guided_steps": [0, 6]},  # other pictures: not the loop's arithmetic any more
    "with one step ahead": {"ahead": True},  # off-policy by a step
    "with torch.compile": {"compile": True},
}
ON_A_CPU = ("without oneDNN",)
ASKED_FOR = ("with one step ahead", "with torch.compile")  # the latter on a CPU: minutes until it is warm


def recipe(size: str, folder: Path, prompts: Path, urls: dict[str, str], device: str = "cpu", **changes: Any) -> Any:
    """RunConfig. RealGen V1's shares of a path (28 steps, 7 before the window, 7 in it), Flow-GRPO's loss, KL and guidance."""
    from trainer import config

    work, side = WORK[size], random_pipeline.SIZES[size].side
    policy = {key: changes.pop(key) for key in ("compile", "onednn") if key in changes}
    sampling = {
        "steps": 12,
        "window": 3,
        "window_first": 3,
        "window_last": 6,
        "kind": "sde",
        "noise_level": 0.7,
        "prefix": "shared",
        "guidance": 4.5,
        "height": side,
        "width": side,
        "micro_batch": work.micro_batch,
        "draw_batch": work.drawn,
        **{key: work.large if value == "large" else value for key, value in changes.items()},
    }
    raw: dict[str, Any] = {
        "name": "bench",
        "device": device,
        "policy": {
            "use": "sd3",
            "path": str(folder),
            "max_sequence_length": 1,
            "dtype": random_pipeline.SIZES[size].dtype,
            "lora": {"rank": 32, "alpha": 64},
            "gradient_checkpointing": work.checkpointing,
            **policy,
        },
        "prompts": {"train": str(prompts), "eval": str(prompts)},
        "sampling": sampling,
        "group": {"prompts": work.prompts, "size": work.group},
        "rewards": {name: {"url": url} for name, url in urls.items()},
        "loss": {"use": "grpo", "clip_low": 1e-4, "clip_high": 1e-4},
        "kl": {"use": "x_kl", "weight": 0.04},
        "tensorboard": False,  # the loop writes no logs
    }
    return config.validate(raw, "the benchmark's recipe")


def settings(c: Any, micro_batch: int) -> Any:
    """The loop's, from the same recipe."""
    from bench.peers.trainer_loop import Settings

    s, lora = c.sampling, c.policy.options()["lora"]
    return Settings(
        folder=c.policy.path,
        side=s.height,
        steps=s.steps,
        first=s.window_first,
        window=s.window,
        noise_level=s.noise_level,
        guidance=s.guidance,
        group=c.group.size,
        micro_batch=micro_batch,
        clip=c.loss.clip_low,
        beta=c.kl.weight,
        lr=c.optim.lr,
        weight_decay=c.optim.weight_decay,
        max_grad_norm=c.optim.max_grad_norm,
        decay=c.ema.decay,
        rank=lora["rank"],
        alpha=lora["alpha"],
        dtype=c.policy.options()["dtype"],
        checkpointing=c.policy.options()["gradient_checkpointing"],
        device=c.device,
        seed=c.seed,
    )


class Peak:
    """Most MB since `reset`: resident (Linux keeps the mark, and lets it be reset), or what torch had allocated on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def reset(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.empty_cache()  # the others' turn comes on the same GPU
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        import torch

        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024


Step = Callable[[int], dict[str, float]]


@contextlib.contextmanager
def loop(c: Any, size: str, texts: Sequence[str], urls: dict[str, str]) -> Iterator[Step]:
    """The peer, asking each service by a client of its own."""
    from bench.peers.trainer_loop import Loop
    from shared.client import RewardClientSync

    def service(client: RewardClientSync) -> Any:
        def ask(images: Any, prompts: Sequence[str]) -> list[float]:
            table = client.score(list(images), list(prompts))
            assert table.mask_RB.all(), table.failures
            return [float(value) for value in table.values_RB[0]]

        return ask

    count = WORK[size].prompts
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RewardClientSync({name: url}, timeout_s=120)) for name, url in urls.items()]
        made = Loop(settings(c, WORK[size].micro_batch), [service(client) for client in clients])
        yield lambda number: made.step([texts[(number * count + n) % len(texts)] for n in range(count)], number)


@contextlib.contextmanager
def here(c: Any, variant: str, folder: Path) -> Iterator[Step]:
    """The run that `verism-train` takes its steps with."""
    from trainer.loop import Run

    run = Run(c, folder)
    blocked = _without(run, variant)

    def step(number: int) -> dict[str, float]:
        del number  # the run counts its own
        began, blocked[0] = time.perf_counter(), 0.0
        line = run.step()
        seconds = time.perf_counter() - began
        assert not line["skipped"] and not line["failed_scores"], line
        told = {"wait": line["seconds/wait"] + blocked[0], "train": line["seconds/train"]}
        return {"step": seconds, "sample": seconds - sum(told.values()), **told, "loss": line["loss"]}

    try:
        yield step
    finally:
        run.close()


def _without(run: Any, variant: str) -> list[float]:
    """Take away a measure that no key of the recipe switches off; seconds that were waited for rewards while sampling go into the list."""
    blocked = [0.0]
    if variant == "without kept texts":
        encode, count, size = run.policy.encode, [0], run.config.sampling.micro_batch  # the loop's

        def anew(prompts: list[str]) -> Any:
            """Spaces behind a text, as many as never before, and again for every micro-batch: the same tokens, and no text that is known."""
            start = count[0]
            count[0] += -(-len(prompts) // size)
            return encode([text + " " * (1 + start + n // size) if text else text for n, text in enumerate(prompts)])

        run.policy.encode = anew
    if variant == "without overlap":
        submit = run.scorer.submit

        def waited(*args: Any) -> Any:
            answer, began = submit(*args), time.perf_counter()
            run.scorer.collect([answer])
            blocked[0] += time.perf_counter() - began
            return answer

        run.scorer.submit = waited
    return blocked


def agree(c: Any, micro_batch: int) -> dict[str, float]:
    """How far the two are apart in states, log-probabilities, loss and gradient of one group, with a LoRA that is not new any more."""
    import torch

    from bench.peers.trainer_loop import Loop, Trajectory
    from trainer.advantages.group_relative import Advantages
    from trainer.learning import Learner
    from trainer.loop import load_policy
    from trainer.sampling.rollout import ratio_deviation, sample
    from trainer.types import Prompt, Window

    policy, peer, s = load_policy(c), Loop(settings(c, micro_batch), []), c.sampling
    learner = Learner(policy, c)
    weights = policy.trainable()

    def push(scale: float, seed: int) -> None:
        """Move both along the same random direction."""
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.add_((scale * torch.randn(parameter.shape, generator=chance)).to(parameter))
                peer.weights[name].copy_(parameter)

    push(0.4 / (peer.transformer.config.num_attention_heads * peer.transformer.config.attention_head_dim) ** 0.5, 1)
    text, seeds, first = "a photo of the bag", list(range(10, 10 + micro_batch)), 7
    shape = policy.latent_shape(s.height, s.width)
    rollout = sample(
        policy,
        [Prompt(0, text)] * micro_batch,
        seeds,
        sigmas=policy.sigmas(s.steps, s.height, s.width),
        shape=shape,
        window=Window(s.window_first, s.window),
        noise_level=s.noise_level,
        kind=s.kind,
        guidance=s.guidance,
        start_seeds=[first] * micro_batch,
        micro_batch=micro_batch,
    )
    noise = torch.stack([torch.randn((1 + s.window, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise[:, 0] = torch.randn((1, *shape), generator=torch.Generator().manual_seed(first))[0]
    theirs = peer.sample(text, noise.to(peer.device))
    out = {
        "states": float((theirs.states_BT - rollout.states_BT).abs().max()),
        "logp": float((theirs.logp_BT - rollout.logp_old_BT).abs().max()),
    }
    scale, moved, seen = 1e-5, 0.0, 0.0
    while seen < 0.2 * c.loss.clip_low:  # what rounding alone does is far below
        push(scale - moved, 2)
        seen, moved, scale = ratio_deviation(policy, rollout, micro_batch), scale, 4 * scale
    push(moved * (1.5 * c.loss.clip_low / seen - 1), 2)  # some of the ratios are beyond the clip range, some are not
    told = Trajectory(text, theirs.embeds, theirs.pooled, rollout.states_BT, rollout.logp_old_BT, rollout.images_BHWC)
    advantages_B = torch.linspace(-1, 1, micro_batch)
    got: dict[str, list[torch.Tensor]] = {}
    for name, one in (("ours", learner), ("theirs", peer)):
        one.optimizer.register_step_pre_hook(
            lambda optimizer, *_, name=name: got.update(
                {name: [p.grad.clone() for g in optimizer.param_groups for p in g["params"]]}
            )
        )
    mine = learner.learn([rollout], Advantages(advantages_B, torch.ones(micro_batch), 0, 0), 0)
    loss = peer.learn([told], [advantages_B])
    whole = mine["loss"] + c.kl.weight * mine["kl"]
    flat = {name: torch.cat([g.flatten() for g in parts]) for name, parts in got.items()}
    return {
        **out,
        "ratio_dev": mine["ratio_dev"],
        "clipfrac": mine["clipfrac"],
        "kl": mine["kl"],
        "loss": abs(whole - loss),
        "gradient": float((flat["ours"] - flat["theirs"]).norm() / flat["ours"].norm()),
    }


def child(told: dict[str, Any]) -> None:
    """One contestant. Each line, the number of a step, is answered by that step's seconds and peak."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints
    import psutil
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(told["threads"])
    size, variant, device, prompts = told["size"], told["variant"], told["device"], Path(told["prompts"])
    if variant == "write":
        print(
            json.dumps(random_pipeline.write(Path(told["folder"]), random_pipeline.SIZES[size], device=device)),
            file=out,
            flush=True,
        )
        return
    c = recipe(size, Path(told["folder"]), prompts, told["urls"], device, **VARIANTS.get(variant, {}))
    if variant == "agree":
        print(json.dumps(agree(c, WORK[size].micro_batch)), file=out, flush=True)
        return
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    with (
        tempfile.TemporaryDirectory() as own,
        loop(c, size, texts, told["urls"]) if variant == LOOP else here(c, variant, Path(own)) as step,
    ):
        peak, process = Peak(device), psutil.Process()
        print(json.dumps({}), file=out, flush=True)
        for line in sys.stdin:
            peak.reset()
            cpu = sum(process.cpu_times()[:2])
            seconds = step(int(line))
            told = {**seconds, "cpu": sum(process.cpu_times()[:2]) - cpu, "peak": peak.read()}
            print(json.dumps(told), file=out, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench trainer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = ", ".join(random_pipeline.SIZES)
    parser.add_argument("--sizes", help=f"of {sizes}; default tiny,100m, on a GPU {ON_CUDA}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help="interleaved rounds, after one that warms up; the median counts (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny, two rounds; a look")
    parser.add_argument("--only", default="", help="contestants beside the loop and Verism, with commas: " + ", ".join(VARIANTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        child(json.loads(chosen.child))
        return 0
    from bench import trainer_report

    default = "tiny" if chosen.quick else ON_CUDA if chosen.device == "cuda" else "tiny,100m"
    names = (chosen.sizes or default).split(",")
    wrong = [name for name in names if name not in random_pipeline.SIZES]
    wrong += [name for name in filter(None, chosen.only.split(",")) if name not in VARIANTS]
    if wrong:
        parser.error(f"{wrong[0]!r} is none of: {sizes}, {', '.join(VARIANTS)}")
    if reason := refused(chosen.device, names):
        print(reason, file=sys.stderr)
        return 2
    left_out = ON_A_CPU if chosen.device == "cuda" else ASKED_FOR
    asked = chosen.only.split(",") if chosen.only else [v for v in VARIANTS if v not in left_out]
    variants = [LOOP, HERE] + [v for v in VARIANTS if v != HERE and v in asked]
    rounds = chosen.rounds or (2 if chosen.quick else 3)
    return trainer_report.run(names, chosen.device, rounds, variants, chosen.threads, quick=chosen.quick)


def refused(device: str, sizes: Sequence[str]) -> str:
    """Why this cannot run here, or nothing."""
    if device == "cuda":
        import torch

        if torch.cuda.is_available():
            return ""
        return "--device cuda: torch sees no GPU here. Without one, leave --device away: tiny and 100m run on the CPU."
    large = [name for name in sizes if random_pipeline.SIZES[name].dtype == "bfloat16"]
    if device == "cpu" and large:
        return (
            f"--sizes {large[0]}: two and a half billion parameters at 1024 pixels take hours a step on a CPU. Add --device cuda."
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
