"""The cold start on a tiny model: it learns, it goes on where it was killed, and it says what is wrong."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.trainer.language import tiny
from trainer import checkpoint
from trainer.config import ConfigError, Stopped
from trainer.language import sft
from trainer.language.data import Pair
from trainer.language.policy import RewriterPolicy
from trainer.language.sft import SftOptions, fine_tune, loss_of, order, tokenised

NOUNS = ("bag", "boot", "coat", "dress", "shirt", "sneaker", "trouser", "sandal", "pullover")
LOOKS = ("soft light", "natural grain", "sharp detail", "close up")
FAST = SftOptions(epochs=6, batch=8, micro_batch=3, lr=1e-2)


def pairs(nouns: tuple[str, ...]) -> list[Pair]:
    return [
        Pair(f"{look} {noun}", f"a real photo of a {noun} on dark background , {look}", n)
        for n, (noun, look) in enumerate(((noun, look) for noun in nouns for look in LOOKS), 1)
    ]


TRAIN, HELD_OUT = pairs(NOUNS[:7]), pairs(NOUNS[7:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def policy(folder: Path, **options: object) -> RewriterPolicy:
    return tiny.policy(folder, instruction="rewrite the prompt", **options)


def weights(of: RewriterPolicy) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in of.trainable().items()}


@pytest.mark.parametrize("lora", [{"rank": 8, "alpha": 16}, None], ids=["lora", "full"])
def test_the_held_out_loss_falls_and_what_it_writes_has_the_form(folder: Path, lora: dict[str, float] | None) -> None:
    own = policy(folder, lora=lora)
    outcome = fine_tune(own, TRAIN, HELD_OUT, FAST)
    assert outcome.step == outcome.steps == 6 * 4 and len(outcome.losses) == 7
    assert min(outcome.losses) == outcome.losses[outcome.epoch] < 0.4 * outcome.losses[0]
    assert loss_of(own, tokenised(own, HELD_OUT, 64), 5) == pytest.approx(outcome.losses[outcome.epoch], abs=1e-4)
    drawn = own.sample([pair.prompt for pair in TRAIN[:8]], range(8), temperature=0, max_new_tokens=20)
    assert bool(drawn.ended_B.all()) and all(text.startswith("a real photo of a ") for text in drawn.texts)
    with own.reference():  # what training by reward is held to is the model before, until it starts from what was saved
        assert loss_of(own, tokenised(own, HELD_OUT, 64), 5) == pytest.approx(outcome.losses[0], abs=1e-4)


def test_the_loss_counts_the_tokens_of_the_rewrite_and_its_end_alone(folder: Path) -> None:
    own = policy(folder)
    rows = tokenised(own, TRAIN[:2], 64)
    assert [sft.tokens([row]) for row in rows] == [len(pair.rewrite.split()) + 1 for pair in TRAIN[:2]]
    assert all(row.ids_BT[0, -1] in own.end_ids and row.prompts == (pair.prompt,) for row, pair in zip(rows, TRAIN, strict=False))
    by_hand, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids[0], *row.ids_BT[0].tolist()]])
        with torch.no_grad():
            logq = own.model(ids).logits[0, len(row.prompt_ids[0]) - 1 : -1].log_softmax(-1)
        by_hand -= float(logq.gather(1, row.ids_BT[0][:, None]).sum())
        count += row.ids_BT.shape[1]
    assert loss_of(own, rows, 1) == pytest.approx(by_hand / count, rel=1e-5)
    assert loss_of(own, rows, 2) == pytest.approx(by_hand / count, rel=1e-5)


def test_a_step_does_not_depend_on_how_many_pairs_fit_a_pass(folder: Path) -> None:
    out = []
    for micro_batch in (1, 8):
        own = policy(folder)
        work = sft.FineTuning(own, tokenised(own, TRAIN, 64), (), FAST.model_copy(update={"micro_batch": micro_batch}))
        numbers = work.step()
        out.append((numbers, {name: weight.grad.clone() for name, weight in own.trainable().items() if weight.grad is not None}))
    assert out[0][0] == pytest.approx(out[1][0], rel=1e-4)
    for name, gradient in out[0][1].items():
        torch.testing.assert_close(gradient, out[1][1][name], rtol=1e-3, atol=1e-5)


def test_order_and_rates_are_functions_of_seed_and_step() -> None:
    assert order(50, 3, 7) == order(50, 3, 7) != order(50, 4, 7) != order(50, 4, 8)
    assert sorted(order(50, 3, 7)) == list(range(50))
    o = SftOptions(lr=1.0, warm_up=0.2, final_lr=0.1)
    rates = [o.lr_at(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and rates[4] == 1.0
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and 0.1 < rates[-1] < 0.12
    assert SftOptions(warm_up=0, final_lr=1, lr=1.0).lr_at(9, 10) == 1.0 and SftOptions(warm_up=1, lr=1.0).lr_at(0, 1) == 1.0


@pytest.mark.parametrize("at", [3, 4, 9])
def test_a_run_that_was_stopped_comes_to_the_same_weights(folder: Path, tmp_path: Path, at: int) -> None:
    whole = policy(folder)
    outcome = fine_tune(whole, TRAIN, HELD_OUT, FAST, run=tmp_path / "whole")
    seen = list[float]()

    def count(kind: str, numbers: Mapping[str, float]) -> None:
        seen.append(numbers["step"])

    half = fine_tune(policy(folder), TRAIN, HELD_OUT, FAST, run=tmp_path / "half", tell=count, stop=lambda: max(seen) == at)
    assert (half.step, half.steps) == (at, 24) and not (tmp_path / "half" / "policy").exists()
    with pytest.raises(ConfigError, match="already holds a run: go on with --resume"):
        fine_tune(policy(folder), TRAIN, HELD_OUT, FAST, run=tmp_path / "half")
    with pytest.raises(checkpoint.CheckpointError, match=r"another run \(lr: 0.01 -> 0.02\)"):
        fine_tune(policy(folder), TRAIN, HELD_OUT, FAST.model_copy(update={"lr": 0.02}), run=tmp_path / "half", resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="another run.*pairs"):
        fine_tune(policy(folder), TRAIN[1:], HELD_OUT, FAST, run=tmp_path / "half", resume=True)
    resumed = policy(folder)
    assert fine_tune(resumed, TRAIN, HELD_OUT, FAST, run=tmp_path / "half", resume=True) == outcome
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("whole", "half")
    ]
    assert lines[0] == lines[1] and [line["kind"] for line in lines[0]].count("eval") == 7
    assert (
        fine_tune(policy(folder), TRAIN, HELD_OUT, FAST, run=tmp_path / "half", resume=True) == outcome
    )  # finished: nothing to do


def test_what_is_saved_is_what_training_by_reward_starts_from(folder: Path, tmp_path: Path) -> None:
    own = policy(folder)
    outcome = fine_tune(own, TRAIN, HELD_OUT, FAST, run=tmp_path)
    again = policy(folder, lora={"start": tmp_path / "policy"})
    rows = tokenised(again, HELD_OUT, 64)
    assert loss_of(again, rows, 4) == pytest.approx(outcome.losses[outcome.epoch], abs=1e-4)
    with again.reference():
        assert loss_of(again, rows, 4) == pytest.approx(outcome.losses[outcome.epoch], abs=1e-4)
    assert json.loads((tmp_path / "sft.json").read_text())["losses"] == list(outcome.losses)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000024"]


def test_epochs_that_made_it_worse_are_not_kept(folder: Path) -> None:
    own = policy(folder)
    untrained = weights(own)
    last = fine_tune(own, TRAIN, (), FAST)
    assert last.epoch == 6 and last.losses == () and any(not torch.equal(untrained[n], w) for n, w in weights(own).items())
    good = weights(own)
    outcome = fine_tune(own, [Pair(pair.prompt, "dust dust dust", pair.line) for pair in TRAIN], HELD_OUT, FAST)
    assert outcome.epoch == 0 and outcome.losses[0] == min(outcome.losses) < outcome.losses[-1]
    assert all(torch.equal(good[name], weight) for name, weight in weights(own).items())


def test_a_loss_that_is_no_number_stops_before_it_does_harm(folder: Path) -> None:
    own = policy(folder)
    name, weight = next(iter(own.trainable().items()))
    with torch.no_grad():
        weight[0, 0] = float("nan")
    before = weights(own)
    with pytest.raises(Stopped, match=r"step 0: the loss is nan.*lower lr"):
        fine_tune(own, TRAIN, (), FAST)
    assert all(
        torch.equal(
            before[n],
            w,
        )
        for n, w in weights(own).items()
        if n != name
    )


def test_pairs_that_do_not_fit_are_named_by_their_line(folder: Path) -> None:
    own = policy(folder)
    with pytest.raises(ConfigError, match="line 12 of the pairs: its rewrite has 11 tokens; shorten it, or raise longest"):
        tokenised(own, [Pair("a bag", "bag " * 10, 12)], 10)
    with pytest.raises(ConfigError, match="line 3 of the pairs: the prompt.*shorten it"):
        tokenised(own, [Pair("bag " * 600, "a bag", 3)], 10)
    ends = tokenised(own, [Pair("a bag", "a bag <|im_end|> <|im_start|> system", 1)], 64)[0]
    assert sum(int(token) in (*own.end_ids, 1) for token in ends.ids_BT[0]) == 1, "control tokens in a text are none"


def written(path: Path, rows: list[Pair]) -> str:
    path.write_text("".join(json.dumps({"prompt": pair.prompt, "rewrite": pair.rewrite}) + "\n" for pair in rows))
    return str(path)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, held_out = written(tmp_path / "train.jsonl", TRAIN), written(tmp_path / "held.jsonl", HELD_OUT)
    line = [train, "--policy", str(folder), "--run-dir", str(tmp_path / "run"), "--device", "cpu", "epochs=2", "batch=8", "lr=0.01"]
    line += ["policy.instruction=rewrite the prompt", "policy.lora.rank=4"]
    assert sft.main([*line, "--held-out", held_out]) == 0
    said = capsys.readouterr().out
    assert said.count("held-out loss") == 3 and f"{tmp_path / 'run' / 'policy'}: the rewriter after epoch" in said.replace("\n", "")
    assert json.loads((tmp_path / "run" / "policy" / "adapter_config.json").read_text())["r"] == 4
    for more, message in (
        (["epoch=3"], "did you mean 'epochs'"),
        (["epochs=0"], "epochs: Input should be greater than or equal to 1"),
        (["quick"], "is not key=value"),
        (["policy.lora.rang=3"], "unknown key 'policy.lora.rang'; did you mean 'rank'?"),
        (["policy.instructions=x y"], "unknown key 'policy.instructions'; did you mean 'instruction'?"),
        (["policy=3"], "give the model with --policy"),
        (["--held-out", train], "is line 1 of the training pairs too"),
        ([], "already holds a run"),
        (["--resume", "epochs=3", "--held-out", held_out], "another run"),
    ):
        assert sft.main([*line, *more]) == 2, more
        assert message in capsys.readouterr().out.replace("\n", " "), more
    assert sft.main([str(tmp_path / "none.jsonl")]) == 2 and "no file" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        sft.main(["--help"])
    assert stopped.value.code == 0 and all(f"  {key} " in capsys.readouterr().out for key in [*SftOptions.model_fields][:1])
