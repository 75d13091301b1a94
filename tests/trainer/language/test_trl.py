"""One step of TRL's GRPOTrainer beside ours: the same model, the same rewrites in two micro-batches, value and gradient of each loss."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.trainer.language import tiny
from trainer.language.policy import RewriterPolicy
from trainer.language.types import Completions
from trainer.losses.tokens import importance, step_normaliser, token_loss, without_truncated

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("trl")]
PROMPTS = ["a photo of a red bag", "a boot", "an old leather coat on a dark background", "a small blue sneaker"]
TEMPERATURE, LONGEST, ROWS = 1.5, 12, 4
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"beta": 0.04},
    "kl as it was": {"beta": 0.04, "unbiased_kl": False},
    "another engine, tokens": {"correction": "token_truncate"},
    "another engine, sequences": {"correction": "sequence_mask"},
    "overlong filter": {"truncated": True},
}
LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.05, "clip_high": 0.08},
    "bnpo": {"clip_low": 0.05, "clip_high": 0.08},
    "dr_grpo": {"clip_low": 0.05, "clip_high": 0.08},
    "dapo": {"clip_low": 0.05, "clip_high": 0.08, "delta": 1.1},
    "cispo": {"clip_high": 1.05},
    "sapo": {},
    "vespo": {},
    "gspo": {"clip_low": 0.01, "clip_high": 0.02},
    "luspo": {"clip_low": 0.01, "clip_high": 0.02},
}


@dataclass(frozen=True)
class Step:
    """Rewrites that a policy drew before its weights moved, with what TRL asks for beside them."""

    policy: RewriterPolicy
    theirs: Any  # the same weights, as transformers loads them
    drawn: Completions
    sampler_BT: Tensor
    reference_BT: Tensor
    advantages_B: Tensor


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Step]:
    folder = tiny.write(tmp_path_factory.mktemp("rewriter"), words=tiny.WORDS[:24])  # few words: some turns end soon
    policy = RewriterPolicy.load(folder, lora=None, onednn=False)
    drawn = policy.sample(PROMPTS * 2, list(range(8)), temperature=TEMPERATURE, max_new_tokens=LONGEST)
    assert len(set(drawn.mask_BT.sum(1).tolist())) > 2 and 0 < int(drawn.ended_B.sum()) < 8, (
        "rewrites of several lengths, some cut off"
    )
    chance = torch.Generator().manual_seed(3)
    noise = 0.15 * torch.randn(drawn.logp_BT.shape, generator=chance)
    with torch.no_grad():
        reference_BT = policy.logp(drawn)[0] + noise
        for _, parameter in sorted(policy.trainable().items()):
            parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=chance)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.load_state_dict(policy.model.state_dict())
    advantages_B = torch.randn(8, generator=chance)
    yield Step(policy, theirs, drawn, drawn.logp_BT + 0.4 * torch.roll(noise, 1, 0), reference_BT, advantages_B)


def trainer(step: Step, folder: Path, use: str, **options: Any) -> Any:
    """TRL's, told to use `use` with our names' settings; its own vLLM is never started."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        low, high = options.get("clip_low", 0.2), options.get("clip_high")
        config = GRPOConfig(
            output_dir=str(folder),
            loss_type="grpo" if use == "gspo" else use,
            importance_sampling_level="sequence" if use in ("gspo", "luspo") else "token",
            epsilon=low,
            epsilon_high=high,
            delta=options.get("delta"),
            beta=options.get("beta", 0.0),
            use_bias_correction_kl=options.get("unbiased_kl", True),
            temperature=TEMPERATURE,
            max_completion_length=LONGEST,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=2,
            num_generations=2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        )
        made = GRPOTrainer(
            model=step.theirs,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in PROMPTS]),
            processing_class=step.policy.tokenizer,
        )
    made.use_vllm = "correction" in options  # read by its loss alone here
    made.current_gradient_accumulation_steps = 2
    made.model.train()
    return made


def told(step: Step, rows: slice, mask_BT: Tensor, total: int, share: Tensor | None) -> dict[str, Tensor]:
    """A micro-batch as TRL's loss reads it: prompts padded on the left, completions on the right."""
    drawn = step.drawn
    prompts = [torch.tensor(ids) for ids in drawn.prompt_ids[rows]]
    ones = [torch.ones_like(ids) for ids in prompts]
    out = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence(ones, batch_first=True, padding_side="left"),
        "completion_ids": drawn.ids_BT[rows],
        "completion_mask": mask_BT[rows].long(),
        "advantages": step.advantages_B[rows],
        "old_per_token_logps": drawn.logp_BT[rows],
        "ref_per_token_logps": step.reference_BT[rows],
        "num_items_in_batch": torch.tensor(total),
    }
    return out if share is None else {**out, "importance_sampling_ratio": share[rows]}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("use", sorted(LOSSES))
def test_a_step_is_trls(step: Step, tmp_path: Path, use: Any, case: str) -> None:
    options = {**LOSSES[use], **CASES[case]}
    policy, drawn, halves = step.policy, step.drawn, (slice(0, ROWS), slice(ROWS, 2 * ROWS))
    mask_BT = without_truncated(drawn.mask_BT, drawn.ended_B) if options.pop("truncated", False) else drawn.mask_BT
    total, share = int(mask_BT.sum()), None
    if "correction" in options:
        share = importance(drawn.logp_BT, step.sampler_BT, mask_BT, mode=options["correction"], high=1.05)
        assert 0 < float((share == (0 if "mask" in options["correction"] else 1.05)).float().mean()) < 1
    theirs = trainer(step, tmp_path, use, **options)
    if use == "vespo":
        share = None if share is None else share.clamp(min=1e-3)  # a logarithm of it is taken
    expected = torch.zeros(())
    for rows in halves:
        value = theirs.compute_loss(theirs.model, told(step, rows, mask_BT, total, share))
        value.backward()
        expected = expected + value.detach()
    wanted = {name: p.grad.clone() for name, p in theirs.model.named_parameters()}
    theirs.model.zero_grad()
    options.pop("correction", None)
    whole = step_normaliser(use, rows=len(drawn), tokens=total, batches=2, longest=LONGEST)
    found, clipped = torch.zeros(()), 0.0
    for rows in halves:
        new_BT = policy.logp(drawn.rows(rows))[0]
        width = new_BT.shape[1]
        parts = (drawn.logp_BT, mask_BT, step.reference_BT)
        old_BT, m_BT, ref_BT = (part[rows, :width] for part in parts)
        own = {**options, "is_ratio_BT": None if share is None else share[rows, :width], "ref_BT": ref_BT, "normaliser": whole}
        loss = token_loss(new_BT, old_BT, m_BT, step.advantages_B[rows], use=use, **own)
        loss.value.backward()
        found = found + loss.value.detach()
        clipped += sum(number for key, number in loss.diagnostics.items() if key.startswith("clipfrac"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    got = {name: p.grad for name, p in policy.trainable().items()}
    assert got.keys() == wanted.keys()
    flat, theirs_flat = (torch.cat([grads[name].flatten() for name in sorted(wanted)]) for grads in (got, wanted))
    policy.model.zero_grad()
    assert float(theirs_flat.norm()) > 1e-3 and float((flat - theirs_flat).norm() / theirs_flat.norm()) < 1e-5
    assert clipped > 0 or use in ("sapo", "vespo"), "some of the ratios are beyond the range"
