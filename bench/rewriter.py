"""Rollouts and training steps of a rewriter against TRL's GRPOTrainer: `make bench-rewriter`, or `python -m bench rewriter --quick`.

Three contestants, each a process of its own, train the same LoRA on the same model with the same prompts, group, lengths, loss (dapo),
optimiser and precision, and a reward that costs nothing: Verism with transformers, Verism with a vLLM server that gets the adapter before each
rollout, and TRL's GRPOTrainer with transformers' generate. First Verism and TRL judge the same rewrites: loss and gradient have to agree.
Then rounds: each takes one step a round, in an order that turns; ratios are taken within a round. Since each draws its own tokens, times are
compared per token; `tokens` says how many there were.

    python -m bench rewriter --quick            a look at a tiny random model, without vLLM: a minute
    python -m bench rewriter                    SmolLM2-135M-Instruct
    python -m bench rewriter --only trl         Verism with transformers against TRL alone
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.process import cpu_seconds

HERE, VLLM, TRL = "Verism", "Verism, vLLM", "TRL"
WAYS = {"verism": HERE, "vllm": VLLM, "trl": TRL}
TOLERANCE = 1e-4
CLIP = (0.2, 0.28)


@dataclass(frozen=True)
class Work:
    """A step: `group` rewrites of each of `prompts` prompts, at most `longest` tokens each, `micro_batch` of them in a training pass."""

    prompts: int
    group: int
    longest: int
    micro_batch: int
    instruction: str
    rank: int = 16
    alpha: float = 32.0
    lr: float = 1e-5
    temperature: float = 1.0

    @property
    def rows(self) -> int:
        return self.prompts * self.group


WORK = {
    "tiny": Work(2, 4, 32, 4, "rewrite the prompt for an image generator . keep the subject ."),
    "smollm2": Work(2, 8, 64, 8, "realism"),
}


def work_of(model: str) -> Work:
    """`tiny`'s, or for any other model the packaged one's."""
    return WORK.get(model, WORK["smollm2"])


def policy_of(told: dict[str, Any]) -> Any:
    """The rewriter with a fresh LoRA."""
    from trainer.language.policy import RewriterPolicy

    w = work_of(told["model"])
    return RewriterPolicy.load(told["path"], lora={"rank": w.rank, "alpha": w.alpha}, instruction=w.instruction)


def reward(texts: Sequence[str]) -> list[float]:
    """Different words; costs nothing, and differs inside a group."""
    return [float(len(set(text.split()))) for text in texts]


Step = Callable[[int], dict[str, float]]
Answer = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def here(told: dict[str, Any], foreign: bool) -> Iterator[Step]:
    """What a run does with its rewriter in a step: weights to the engine, rewrites, rewards, advantages, an update."""
    import torch

    from trainer.advantages.group_relative import group_relative
    from trainer.language.config import LanguageConfig
    from trainer.language.learning import TokenLearner
    from trainer.language.policy import TransformersEngine

    w, policy = work_of(told["model"]), policy_of(told)
    sizes = {"rewrites": w.group, "temperature": w.temperature, "max_new_tokens": w.longest, "micro_batch": w.micro_batch}
    loss = {"use": "dapo", "clip_low": CLIP[0], "clip_high": CLIP[1]}
    config = LanguageConfig.model_validate({**sizes, "loss": loss, "optim": {"lr": w.lr, "weight_decay": 0.0}})
    learner = TokenLearner(policy, config)
    if foreign:
        from trainer.language.vllm import VllmEngine

        engine: Any = VllmEngine(policy, log=Path(told["log"]), context=told["context"])
    else:
        engine = TransformersEngine(policy, w.rows)
    group_B = torch.arange(w.prompts).repeat_interleave(w.group)

    def step(number: int) -> dict[str, float]:
        prompts = [text for text in asked(told["texts"], w, number) for _ in range(w.group)]
        began = time.perf_counter()
        engine.sync(number)
        synced = time.perf_counter()
        drawn = engine.sample(
            prompts, [number * w.rows + n for n in range(w.rows)], temperature=w.temperature, max_new_tokens=w.longest
        )
        sampled = time.perf_counter()
        rewards = torch.tensor([reward(drawn.texts)])
        advantages = group_relative(rewards, torch.ones_like(rewards, dtype=torch.bool), group_B, torch.ones(1), ddof=1)
        learner.learn(drawn, advantages, number, foreign=foreign)
        ended = time.perf_counter()
        seconds = {"step": ended - began, "sync": synced - began, "sample": sampled - synced, "train": ended - sampled}
        return {**seconds, "tokens": float(drawn.mask_BT.sum())}

    try:
        yield step
    finally:
        engine.close()


def asked(texts: Sequence[str], w: Work, number: int) -> list[str]:
    """The prompts of a step."""
    return [texts[(number * w.prompts + n) % len(texts)] for n in range(w.prompts)]


def trl_trainer(told: dict[str, Any], folder: str, callbacks: Sequence[Any]) -> Any:
    """TRL's, with its published defaults but for what is the same for all here; gradient checkpointing and bfloat16 are off for all."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from trainer.language.chat import Chat, read_instruction

    w = work_of(told["model"])
    tokenizer = AutoTokenizer.from_pretrained(told["path"], local_files_only=True)
    chat = Chat(tokenizer, read_instruction(w.instruction))

    def messages(text: str) -> list[dict[str, str]]:
        if chat.in_system:
            return [{"role": "system", "content": chat.instruction}, {"role": "user", "content": text}]
        return [{"role": "user", "content": f"{chat.instruction}\n\n{text}"}]

    texts = [text for number in range(told["steps"]) for text in asked(told["texts"], w, number)]
    config = GRPOConfig(
        output_dir=folder,
        loss_type="dapo",
        epsilon=CLIP[0],
        epsilon_high=CLIP[1],
        temperature=w.temperature,
        num_generations=w.group,
        max_completion_length=w.longest,
        per_device_train_batch_size=w.micro_batch,
        gradient_accumulation_steps=w.rows // w.micro_batch,
        learning_rate=w.lr,
        lr_scheduler_type="constant",
        max_steps=told["steps"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
    )
    lora = LoraConfig(r=w.rank, lora_alpha=w.alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    made = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(told["path"], dtype=torch.float32, local_files_only=True),
        reward_funcs=lambda completions, **_: reward([turns[-1]["content"] for turns in completions]),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": messages(text)} for text in texts]),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=list(callbacks),
    )
    theirs = made._tokenize_prompts([messages(text) for text in texts[:4]])[0]
    if [tuple(ids) for ids in theirs] != [tuple(chat.ids(text)) for text in texts[:4]]:
        raise RuntimeError("TRL and Verism do not make the same tokens of a prompt")
    return made


class Meter:
    """CPU time and most memory of a step: of this process, and of the servers that it started."""

    def __init__(self) -> None:
        import psutil

        from bench.trainer import Peak

        self.process, self.peak, self.before = psutil.Process(), Peak("cpu"), 0.0

    def begin(self) -> None:
        self.peak.reset()
        self.before = cpu_seconds([self.process, *self.process.children(recursive=True)])

    def end(self, row: Mapping[str, float]) -> dict[str, float]:
        """The row, with `cpu` and `peak`."""
        others = self.process.children(recursive=True)
        servers = sum(one.memory_info().rss for one in others) / 2**20
        return {**row, "cpu": cpu_seconds([self.process, *others]) - self.before, "peak": self.peak.read() + servers}


def trl(told: dict[str, Any], answer: Answer, meter: Meter) -> None:
    """TRL's own loop; a step begins when a line is read, and is answered when its optimiser has moved."""
    from transformers import TrainerCallback

    seen = {"sample": 0.0, "tokens": 0.0, "began": 0.0}

    class Turns(TrainerCallback):
        """Between two steps the trainer waits."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            answer({})

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            meter.begin()
            seen.update(sample=0.0, tokens=0.0, began=time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            whole = time.perf_counter() - seen["began"]
            row = {"step": whole, "sync": 0.0, "sample": seen["sample"], "train": whole - seen["sample"], "tokens": seen["tokens"]}
            answer(meter.end(row))

    with tempfile.TemporaryDirectory() as folder:
        made = trl_trainer(told, folder, [Turns()])
        generate = made._generate_single_turn

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            out = generate(*args, **options)
            seen["sample"] += time.perf_counter() - began
            seen["tokens"] += sum(len(ids) for ids in out[0])
            return out

        made._generate_single_turn = timed
        made.train()


def agree(told: dict[str, Any]) -> dict[str, float]:
    """How far Verism and TRL are apart in loss and gradient of one micro-batch, with a LoRA that has moved since it was drawn."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from trainer.losses.tokens import step_normaliser, token_loss

    w, policy = work_of(told["model"]), policy_of(told)
    count = w.micro_batch
    chance = torch.Generator().manual_seed(1)

    def push(scale: float) -> None:
        with torch.no_grad():
            for _, parameter in sorted(policy.trainable().items()):
                parameter += scale * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=chance)

    push(0.1)
    prompts = [text for text in told["texts"][:2] for _ in range(count // 2)]
    drawn = policy.sample(prompts, list(range(count)), temperature=w.temperature, max_new_tokens=min(w.longest, 24))
    push(0.02)
    advantages_B = torch.linspace(-1, 1, count)
    with tempfile.TemporaryDirectory() as folder:
        made = trl_trainer(told, folder, [])
    weights = {name.removeprefix("base_model.model."): p for name, p in made.model.named_parameters() if p.requires_grad}
    if weights.keys() != policy.trainable().keys():
        raise RuntimeError("TRL and Verism do not train the same weights")
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            weights[name].copy_(parameter)
    ids = [torch.tensor(one) for one in drawn.prompt_ids]
    batch = {
        "prompt_ids": pad_sequence(ids, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side="left"),
        "completion_ids": drawn.ids_BT,
        "completion_mask": drawn.mask_BT.long(),
        "advantages": advantages_B,
        "old_per_token_logps": drawn.logp_BT,
        "num_items_in_batch": drawn.mask_BT.sum(),
    }
    made.current_gradient_accumulation_steps = made.args.steps_per_generation
    made.model.train()
    theirs = made.compute_loss(made.model, batch)
    theirs.backward()
    new_BT = policy.logp(drawn)[0]
    whole = step_normaliser("dapo", rows=count, tokens=int(drawn.mask_BT.sum()))
    ours = token_loss(
        new_BT,
        drawn.logp_BT,
        drawn.mask_BT,
        advantages_B,
        use="dapo",
        clip_low=CLIP[0],
        clip_high=CLIP[1],
        normaliser=whole,
    )
    ours.value.backward()
    mine, other = (torch.cat([grads[name].grad.flatten() for name in sorted(weights)]) for grads in (policy.trainable(), weights))
    return {
        "ratio_dev": ours.diagnostics["ratio_dev"],
        "tokens": ours.diagnostics["tokens"],
        "loss": abs(ours.value.item() - theirs.item()),
        "gradient": float((mine - other).norm() / other.norm()),
    }


def write(told: dict[str, Any]) -> dict[str, Any]:
    """Where the model lies, made first where it is `tiny`, with its number of parameters and the tokens of the longest prompt."""
    if told["model"] == "tiny":
        from tests.trainer.language import tiny

        told["path"] = str(tiny.write(Path(told["folder"])))
    policy = policy_of(told)
    longest = max(map(len, policy.prompt_ids(told["texts"])))
    adapter = sum(p.numel() for p in policy.trainable().values())
    return {
        "path": str(policy.model.name_or_path),
        "parameters": sum(p.numel() for p in policy.model.parameters()) - adapter,
        "adapter": adapter,
        "prompt_tokens": longest,
    }


def child(told: dict[str, Any]) -> None:
    """One contestant. Each line, the number of a step, is answered by that step's seconds, tokens, CPU and peak."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(told["threads"])

    def answer(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    if told["way"] in ("write", "agree"):
        answer(write(told) if told["way"] == "write" else agree(told))
        return
    meter = Meter()
    if told["way"] == TRL:
        trl(told, answer, meter)
        return
    with here(told, told["way"] == VLLM) as step:
        answer({})
        for line in sys.stdin:
            meter.begin()
            answer(meter.end(step(int(line))))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench rewriter", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="smollm2 (default), tiny, or a folder as transformers saves it")
    parser.add_argument("--rounds", type=int, help="interleaved rounds, after one that warms up; the median counts (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny, five rounds, without vLLM; a look")
    parser.add_argument("--only", default="", help="contestants beside Verism with transformers, with commas: vllm, trl")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        child(json.loads(chosen.child))
        return 0
    from bench import rewriter_report

    asked_for = chosen.only.split(",") if chosen.only else ["trl"] if chosen.quick else ["vllm", "trl"]
    if wrong := [name for name in asked_for if name not in WAYS]:
        parser.error(f"{wrong[0]!r} is none of: {', '.join(WAYS)}")
    ways = [way for name, way in WAYS.items() if name == "verism" or name in asked_for]
    model = chosen.model or ("tiny" if chosen.quick else "smollm2")
    return rewriter_report.run(model, ways, chosen.rounds or (5 if chosen.quick else 3), chosen.threads, quick=chosen.quick)


if __name__ == "__main__":
    sys.exit(main())
