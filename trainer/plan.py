"""What a run will cost, before it starts: geometry, memory, time and disk, from the policy itself and one rehearsed micro-batch."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from trainer import memory
from trainer.advantages.group_relative import Advantages
from trainer.checkpoint import size
from trainer.config import RewardConfig
from trainer.scoring import NoService, Scorer


@dataclass
class Rehearsal:
    """One rollout, sampled and learned from without a change: `calls` and `pictures` of forward passes by kind, seconds, latent shape."""

    count: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    latent: tuple[int, ...] = ()
    window: tuple[int, int] = (0, 0)


def rehearse(run: Any) -> Rehearsal:
    """The first micro-batch of the next step, with made-up advantages; the weights stay as they are."""
    out, policy, velocity = Rehearsal(), run.policy, run.policy.velocity
    stage = ["sampling"]

    def counted(latents: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        kind = stage[0] if stage[0] == "sampling" else "training" if torch.is_grad_enabled() else "reference"
        guidance = arguments[2] if len(arguments) > 2 else more.get("guidance", 1.0)
        for key in (kind, "guided") if guidance != 1.0 else (kind,):
            out.calls[key] += 1
            out.pictures[key] += len(latents)
        return velocity(latents, *arguments, **more)

    policy.velocity = counted
    try:
        run.profile.start()
        start = time.monotonic()
        first, prompts = next(run._together(run._prompts_of(run.done)))
        with run.learner.sampling_weights():
            rollout = run.sampler.groups(run.done, prompts, first)
        out.seconds = run.profile.split(time.monotonic() - start)
        out.count = len(rollout.prompts)
        stage[0], start = "training", time.monotonic()
        signs_B = torch.tensor([1.0, -1.0] * out.count)[: out.count].double()
        run.learner.begin(float(out.count), run.done)
        each_RB = signs_B.expand(sum(reward.weight > 0 for reward in run.config.rewards.values()), -1)
        run.learner.accumulate(rollout, Advantages(signs_B, torch.ones_like(signs_B), 0, 0, each_RB))
        out.seconds["seconds/train"] = time.monotonic() - start
    finally:
        del policy.velocity
        run.learner.optimizer.zero_grad(set_to_none=True)
    out.latent = tuple(rollout.latents_BCHW.shape[1:])
    out.window = rollout.window.start, rollout.window.length
    return out


def table(run: Any, services: Mapping[str, str]) -> Table:
    """Everything, one line each."""
    c, policy = run.config, run.policy
    s, pictures = c.sampling, c.group.prompts * c.group.size
    seen = rehearse(run)
    times = math.ceil(pictures / seen.count)
    drawn = f", {s.draw_batch} in sampling" if s.draw_batch else ""
    out = Table("what", "figure", title=f"{c.name}: {c.steps} steps", title_justify="left")

    def row(what: str, figure: str) -> None:
        out.add_row(what, figure)

    row("policy", f"{c.policy.use}, {c.policy.path} on {policy.device}")
    row("picture", f"{s.height}x{s.width}; latents {'x'.join(map(str, seen.latent))}, {math.prod(seen.latent):,} numbers")
    row("pictures a step", f"{c.group.prompts} prompts x {c.group.size} = {pictures}")
    row(
        "micro-batch",
        f"{s.micro_batch} pictures a pass at most{drawn}; {times} rollout{'s' * (times > 1)} a step, {seen.count} pictures in the first",
    )
    start, length = seen.window
    if length:
        row(
            "window",
            f"{length} of {s.steps} steps, in [{s.window_first}, {s.window_last}); steps {start} to {start + length - 1} at first",
        )
    else:
        row("window", f"none: all {s.steps} steps are the ODE")
    for kind in ("sampling", "training", "reference", "guided"):
        if seen.calls[kind]:
            calls, each = seen.calls[kind] * times, seen.pictures[kind] / seen.count
            more = ", counted above, cost twice" if kind == "guided" else ""
            more = ", with backward" if kind == "training" else more
            row(f"forward passes a step: {kind}", f"{calls} ({each:.3g} for each picture{more})")
    out.add_section()
    needed = _memory(run, row)
    out.add_section()
    _time(run, seen, row)
    out.add_section()
    _disk(run, needed, row)
    out.add_section()
    for name, state in services.items():
        row(f"reward {name}", state)
    return out


def _memory(run: Any, row: Any) -> int:
    """Rows of memory; returns bytes of the trained weights."""
    c, policy = run.config, run.policy
    trained, count = memory.weigh(run.weights.values()), sum(p.numel() for p in run.weights.values())
    networks = {name: memory.weigh(network.parameters()) for name, network in memory.networks(policy).items()}
    whole = sum(p.numel() for network in memory.networks(policy).values() for p in network.parameters())
    row("weights", ", ".join(f"{name} {size(taken)}" for name, taken in networks.items()))
    row("trained", f"{count:,} of {whole:,} numbers in {len(run.weights)} tensors")
    row("gradient, optimiser, average", size(4 * trained))
    micro = min(c.sampling.micro_batch, c.group.prompts * c.group.size)
    texts = [prompt.text for prompt in run.prompts[0]]
    latent = policy.latent_shape(c.sampling.height, c.sampling.width)
    with memory.peak(policy) as taken:
        memory.one_pass(policy, texts, latent, c.sampling.guidance, micro)
    row("activations", f"{size(taken.bytes or 0)}, measured: forward, backward and decoding of {micro} pictures")
    paths = memory.reserved(policy, c, latent) - 4 * trained
    row("paths of a step", size(paths))
    total, free = sum(networks.values()) + 4 * trained + (taken.bytes or 0) + paths, memory.free(policy.device)
    row("memory in all", f"{size(total)} without what Python and libraries take; now free: {size(free)} on {policy.device}")
    return trained


def _time(run: Any, seen: Rehearsal, row: Any) -> None:
    c, pictures = run.config, run.config.group.prompts * run.config.group.size
    sampled = sum(v for k, v in seen.seconds.items() if k != "seconds/train")
    step = (sampled + c.optim.updates * seen.seconds["seconds/train"]) * pictures / seen.count
    one = seen.seconds["seconds/sample"] / max(
        1, seen.pictures["sampling"] + (seen.pictures["guided"] if c.sampling.guidance != 1 else 0)
    )
    passes = c.eval.steps * (1 if c.eval.guidance == 1 else 2)
    evaluation = c.eval.samples * (one * passes + seen.seconds["seconds/decode"] / seen.count)
    left = c.steps - run.done
    whole = step * left + evaluation * (left / c.eval.every + 1)
    row(
        "time",
        f"{step:.2g} s a step, {evaluation:.2g} s an evaluation, {whole / 60:.2g} min for {left} steps: one rollout was timed",
    )
    row("not in that time", f"waiting for {pictures * left * len(c.rewards):,} scores, beside those of evaluations")


def _disk(run: Any, trained: int, row: Any) -> None:
    c = run.config
    kept = c.checkpoint_keep + 2  # the best, and one being written
    place = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    row(
        "disk",
        f"{size(4 * trained)} a checkpoint, {size(4 * trained * kept)} for {kept} at once; free: {size(shutil.disk_usage(place).free)}",
    )


def answering(rewards: Mapping[str, RewardConfig], timeout_s: float = 5.0) -> dict[str, str]:
    """What each reward's service says of itself, or why it cannot."""
    out = {}
    for name, reward in rewards.items():
        try:
            with Scorer({name: reward}, timeout_s) as scorer:
                info = scorer.infos[name]
                out[name] = (
                    f"answers at {reward.url}: version {info.version}, {'higher' if info.higher_is_better else 'lower'} is better"
                )
        except NoService as error:
            out[name] = f"MISSING: {str(error).splitlines()[0]}"
    return out
