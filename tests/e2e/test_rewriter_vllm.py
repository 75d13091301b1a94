"""The true vLLM server, told a rewriter's weights: equal to the policy after every step, broken synchronisations caught, back after kill -9.

Started once for the tests of a LoRA; that takes about a minute. Whole models have a server of their own: `-m slow`.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.trainer.language import tiny
from tests.trainer.language.broken import SAID, move
from trainer.language.policy import RewriterPolicy
from trainer.language.types import Completions
from trainer.language.vllm import SyncFailed, VllmEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.xdist_group("vllm")]
# Largest difference of log-probabilities seen in float32 on a CPU: 1.9e-5; other kernels may round otherwise.
BAND = 2e-4
PROMPTS = ["a photo of a bag", "a red coat", "a photo of a bag", "old boot on dark background", "a dress", "a large leather bag"]
SEEDS = [11, 12, 13, 14, 15, 2**63 + 16]
OPTIONS = {"context": 256, "max_num_seqs": 32}


def made(folder: Path) -> Path:
    """A head of 64, which vLLM's attention takes on a CPU; sampling settings of its own, which are to be ignored."""
    tiny.write(folder, width=256, heads=4, kv_heads=2, tied=False)
    file = folder / "generation_config.json"
    told = json.loads(file.read_text()) | {"do_sample": True, "top_k": 1, "repetition_penalty": 3.0, "temperature": 0.3}
    file.write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> RewriterPolicy:
    return tiny.policy(made(tmp_path_factory.mktemp("model")), lora={"rank": 4, "alpha": 8}, instruction="rewrite the prompt")


@pytest.fixture(scope="module")
def engine(policy: RewriterPolicy, vllm_python: Path) -> Iterator[VllmEngine]:
    one = VllmEngine(policy, python=vllm_python, **OPTIONS)
    yield one
    one.close()


def agrees(policy: RewriterPolicy, drawn: Completions) -> float:
    """The largest difference between the sampler's log-probabilities and the policy's."""
    with torch.no_grad():
        return float((policy.logp(drawn)[0] - drawn.logp_BT)[drawn.mask_BT].abs().max())


def test_ten_steps_stay_in_the_band(engine: VllmEngine, policy: RewriterPolicy) -> None:
    worst = dict.fromkeys(("probe", "drawn", "rollout", "seconds"), 0.0)
    for step in range(10):
        numbers = engine.sync(step)
        assert numbers["tensors"] == len(policy.trainable()) == 28
        assert numbers["moved"] == pytest.approx(numbers["moved_there"], abs=BAND) and (numbers["moved"] > 0.01 or step == 0)
        rollout = agrees(policy, engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24))
        worst = {k: max(v, {**numbers, "rollout": rollout}[k]) for k, v in worst.items()}
        move(policy, step)
    print(f"ten steps: largest differences {worst}")
    assert max(worst["probe"], worst["drawn"], worst["rollout"]) < BAND
    assert engine.server is not None and engine.server.starts == 1
    assert len(engine._remote.models()) == 2 and len(list(engine._folder.iterdir())) == 1


def test_rewrites_are_drawn_from_the_policys_distribution(engine: VllmEngine, policy: RewriterPolicy) -> None:
    move(policy, 20)
    engine.sync(20)
    for temperature in (1.0, 0.7, 1.5):
        drawn = engine.sample(PROMPTS, SEEDS, temperature=temperature, max_new_tokens=40)
        assert agrees(policy, drawn) < BAND / temperature
        for row, mask, ended in zip(drawn.ids_BT, drawn.mask_BT, drawn.ended_B, strict=True):
            ids = row[mask].tolist()
            assert not any(token in policy.end_ids for token in ids[:-1]) and (ids[-1] in policy.end_ids) == bool(ended)
            assert bool(ended) or len(ids) == 40
    greedy = [one.sample(PROMPTS, SEEDS, temperature=0.0, max_new_tokens=12) for one in (engine, policy)]
    assert greedy[0].texts == greedy[1].texts and torch.equal(greedy[0].ids_BT, greedy[1].ids_BT)
    torch.testing.assert_close(greedy[0].logp_BT, greedy[1].logp_BT, rtol=0, atol=BAND)
    # the first token of many draws against its probability: no top-k, no penalty, no temperature of the checkpoint's own
    many, hot = 300, 2.0
    first = engine.sample(PROMPTS[:1] * many, range(many), temperature=hot, max_new_tokens=1).ids_BT[:, 0]
    network = policy.network
    tokens = torch.arange(len(policy.tokenizer))[:, None]
    with torch.no_grad():
        logp = network.logp(policy.prompt_ids(PROMPTS[:1]) * len(tokens), tokens, torch.ones_like(tokens).bool(), hot)[0][:, 0]
    expected, seen = logp.exp() * many, torch.bincount(first, minlength=len(tokens)).float()
    often = expected > 5
    counts = [torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected)]
    chi2, freedom = float(((counts[0] - counts[1]).square() / counts[1]).sum()), int(often.sum())
    assert freedom > 3 and chi2 < freedom + 5 * (2 * freedom) ** 0.5, (chi2, freedom)


def test_a_row_is_its_seeds_whatever_the_batch(engine: VllmEngine) -> None:
    engine.sync(25)
    together = engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24)
    assert together.texts == engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24).texts
    alone = [engine.sample([p], [s], temperature=1.0, max_new_tokens=24).texts[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert list(together.texts) == alone and together.texts[0] != together.texts[2]


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(("broken", "said"), SAID)
def test_a_broken_synchronisation_is_caught_before_the_first_step(
    engine: VllmEngine,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Path], None],
    said: tuple[str, str],
    checksum: bool,
) -> None:
    """With a fresh adapter, and the server of the others as one at a URL."""
    assert engine.server is not None
    fresh = tiny.policy(Path(engine.policy.folder), lora={"rank": 4, "alpha": 8}, instruction="rewrite the prompt", seed=3)
    save = fresh.save
    monkeypatch.setattr(fresh, "save", lambda folder: (save(folder), broken(folder)))
    monkeypatch.setenv("REWRITER_KEY", engine._remote._http.headers["authorization"].removeprefix("Bearer "))
    other = VllmEngine(fresh, url=engine.server.url, key_env="REWRITER_KEY", checksum=checksum)
    try:
        with pytest.raises(SyncFailed, match=said[not checksum]):
            other.sync(0)
        monkeypatch.setattr(fresh, "save", save)
        assert other.sync(0)["probe"] < BAND
    finally:
        other.close()


def test_a_key_is_wanted_and_a_lost_adapter_is_given_again(engine: VllmEngine, policy: RewriterPolicy) -> None:
    assert engine.server is not None
    for route in ("/collective_rpc", "/v1/completions", "/reset_prefix_cache"):
        assert httpx.post(f"{engine.server.url}{route}", json={"method": "verism_tag"}, trust_env=False).status_code == 401
    engine.sync(30)
    before = engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24)
    assert engine._sent is not None
    engine._sent.weights.unload(engine._remote, engine._sent.name)
    assert engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24).texts == before.texts


def test_killed_in_mid_rollout_the_rollout_is_whole(engine: VllmEngine, policy: RewriterPolicy) -> None:
    """Last, since it leaves another process behind."""
    engine.sync(40)
    prompts, seeds = PROMPTS * 40, list(range(40 * len(PROMPTS)))
    began = time.monotonic()
    wanted = engine.sample(prompts, seeds, temperature=1.0, max_new_tokens=60)
    took = time.monotonic() - began
    drawn: list[Completions] = []
    asking = threading.Thread(target=lambda: drawn.append(engine.sample(prompts, seeds, temperature=1.0, max_new_tokens=60)))
    asking.start()
    time.sleep(took / 2)
    assert engine.server is not None and engine.server.process is not None and asking.is_alive(), "still in mid-rollout"
    os.kill(engine.server.process.pid, signal.SIGKILL)
    asking.join(800)
    assert engine.server.starts == 2 and len(drawn) == 1 and drawn[0].texts == wanted.texts
    assert agrees(policy, drawn[0]) < BAND
    move(policy, 40)
    assert engine.sync(41)["probe"] < BAND


@pytest.mark.slow
def test_whole_models_are_pushed_and_compared(tmp_path: Path, vllm_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.policy(made(tmp_path), lora=None, instruction="rewrite the prompt")
    engine = VllmEngine(policy, python=vllm_python, **OPTIONS)
    try:
        for step in range(4):
            numbers = engine.sync(step)
            rollout = agrees(policy, engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24))
            print(f"step {step}: {dict(numbers)} rollout {rollout:.1e}")
            assert numbers["tensors"] == 8 and max(numbers["probe"], numbers["drawn"], rollout) < BAND
            move(policy, step)
        stale, save = tmp_path / "stale", policy.save
        save(stale)
        move(policy, 9)
        monkeypatch.setattr(policy, "save", lambda folder: stale.rename(folder))
        with pytest.raises(SyncFailed, match="came to the server with other values than the policy has"):
            engine.sync(4)
        monkeypatch.setattr(policy, "save", save)
        engine.sync(5)
        before = engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24)
        assert engine.server is not None and engine.server.process is not None
        os.kill(engine.server.process.pid, signal.SIGKILL)
        again = engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=24)
        assert engine.server.starts == 2 and again.texts == before.texts and agrees(policy, again) < BAND
    finally:
        engine.close()
