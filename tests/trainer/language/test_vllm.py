"""The engine that samples by vLLM, on a stand-in that runs here: what it notices, what it waits for, and how the true server is started."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from tests.trainer.language import tiny
from tests.trainer.language.broken import SAID, move
from tests.trainer.language.standin import StandIn
from trainer.language import serving
from trainer.language.inside_vllm import verism_weights
from trainer.language.inside_vllm.verism_weights import Guard, held
from trainer.language.policy import RewriterPolicy
from trainer.language.serving import HERE, VllmOptions, command
from trainer.language.synced import digest
from trainer.language.vllm import ServerGone, SyncFailed, VllmEngine, VllmError

PROMPTS = ["a photo of a bag", "a red coat", "a photo of a bag", "old boot on dark background", "a dress"]
SEEDS = [11, 12, 13, 14, 15]
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def policy(model: Path) -> RewriterPolicy:
    return tiny.policy(model, lora=LORA, instruction="rewrite the prompt")


@pytest.fixture
def server(model: Path) -> Iterator[StandIn]:
    made = StandIn(tiny.policy(model, lora=LORA, instruction="rewrite the prompt", seed=7))
    yield made
    made.end()


@pytest.fixture
def engine(policy: RewriterPolicy, server: StandIn, tmp_path: Path) -> Iterator[VllmEngine]:
    made = VllmEngine(policy, url=server.url, exchange=tmp_path / "exchange", outage_s=20)
    yield made
    made.close()


def test_rewrites_are_those_of_the_policy(engine: VllmEngine, policy: RewriterPolicy, server: StandIn) -> None:
    move(policy, 0)
    engine.sync(0)
    for temperature in (1.0, 0.6, 0.0):
        there = engine.sample(PROMPTS, SEEDS, temperature=temperature, max_new_tokens=12)
        here = policy.sample(PROMPTS, SEEDS, temperature=temperature, max_new_tokens=12)
        assert (there.prompts, there.prompt_ids, there.texts, there.temperature) == (
            here.prompts,
            here.prompt_ids,
            here.texts,
            temperature,
        )
        assert torch.equal(there.ids_BT, here.ids_BT) and torch.equal(there.mask_BT, here.mask_BT)
        assert torch.equal(there.ended_B, here.ended_B) and there.logp_BT.dtype == torch.float32
        torch.testing.assert_close(there.logp_BT, here.logp_BT, rtol=0, atol=1e-5)
    body = server.asked[-1]
    assert [body[key] for key in ("top_p", "top_k", "min_p", "repetition_penalty")] == [1.0, -1, 0.0, 1.0]
    assert body["stop_token_ids"] == list(policy.end_ids) and body["ignore_eos"] and "n" not in body


def test_ten_steps_stay_in_the_band_and_leave_one_folder(engine: VllmEngine, policy: RewriterPolicy, server: StandIn) -> None:
    for step in range(10):
        numbers = engine.sync(step)
        assert numbers["probe"] < engine.band and numbers["drawn"] < engine.band and numbers["tensors"] == len(policy.trainable())
        assert numbers["moved"] == pytest.approx(numbers["moved_there"], abs=engine.band)
        assert len(server.adapters) == 1 and len(list(engine._folder.iterdir())) == 1
        move(policy, step)
    folder = engine._folder
    engine.close()
    assert not server.adapters and not folder.exists()


def test_the_rehearsal_leaves_no_trace(engine: VllmEngine, policy: RewriterPolicy, server: StandIn) -> None:
    before = {name: value.detach().clone() for name, value in policy.trainable().items()}
    numbers = engine.sync(0)
    assert numbers["moved"] == 0.0 and len(server.adapters) == 1
    server.faults.add("ignores")
    engine._rehearsed = False
    with pytest.raises(SyncFailed):
        engine.sync(1)
    assert all(torch.equal(before[name], value) for name, value in policy.trainable().items())
    with pytest.raises(RuntimeError, match=r"call sync\(step\) before sample"):
        engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=4)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(("broken", "said"), SAID)
def test_a_fresh_adapter_that_would_not_arrive_is_caught_before_the_first_step(
    policy: RewriterPolicy,
    server: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[Path], None],
    said: tuple[str, str],
    checksum: bool,
) -> None:
    save = policy.save
    monkeypatch.setattr(policy, "save", lambda folder: (save(folder), broken(folder)))
    engine = VllmEngine(policy, url=server.url, checksum=checksum)
    with pytest.raises(SyncFailed, match=said[not checksum]):
        engine.sync(0)
    engine.close()


def test_a_server_that_is_not_as_it_has_to_be_is_caught(
    policy: RewriterPolicy, server: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sync() -> None:
        engine = VllmEngine(policy, url=server.url)
        try:
            engine.sync(0)
        finally:
            engine.close()

    server.faults = {"ignores"}
    with pytest.raises(SyncFailed, match="--enable-lora"):
        sync()
    server.faults = {"raw"}
    with pytest.raises(SyncFailed, match="--logprobs-mode processed_logprobs"):
        sync()
    server.faults = {"no checksum"}
    with pytest.raises(SyncFailed, match="trainer.language.serving"):
        sync()
    server.faults, server.scale = set(), 0.5
    with pytest.raises(SyncFailed, match="another scale"):
        sync()
    server.scale = 1.0
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(server, "policy", tiny.policy(tiny.write(other, seed=1), lora=LORA, instruction="rewrite the prompt"))
    with pytest.raises(SyncFailed, match="the same base model"):
        sync()


def test_later_steps_are_looked_at_as_closely(engine: VllmEngine, policy: RewriterPolicy, server: StandIn) -> None:
    engine.sync(0)
    move(policy, 1, 1e-3)
    engine.sync(1)
    server.faults.add("ignores")
    with pytest.raises(SyncFailed, match="computes without it"):
        engine.sync(2)
    with pytest.raises(RuntimeError, match="before sample"):
        engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=4)


@pytest.mark.parametrize("fault", ["drops", "forgets", "stops early"])
def test_a_server_that_is_away_in_a_rollout_is_given_the_weights_and_asked_again(
    engine: VllmEngine, policy: RewriterPolicy, server: StandIn, fault: str
) -> None:
    move(policy, 2)
    engine.sync(0)
    wanted = engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=12)
    move(policy, 3)  # as a trainer that is ahead of its rollouts: those of the synchronisation count
    server.faults.add(fault)
    again = engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=12)
    assert not server.faults and again.texts == wanted.texts
    torch.testing.assert_close(again.logp_BT, wanted.logp_BT, rtol=0, atol=1e-5)


def test_a_synchronisation_waits_too(engine: VllmEngine, policy: RewriterPolicy, server: StandIn) -> None:
    engine.sync(0)
    move(policy, 4)
    server.away = True
    timer = threading.Timer(1.0, lambda: setattr(server, "away", False))
    timer.start()
    began = time.monotonic()
    assert engine.sync(1)["probe"] < engine.band and time.monotonic() - began > 0.9
    timer.join()


def test_every_wait_has_an_end(policy: RewriterPolicy, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VllmEngine(policy, url=server.url, outage_s=1.0, timeout_s=5.0)
    engine.sync(0)
    server.away = True
    began = time.monotonic()
    with pytest.raises(ServerGone, match=r"away for 1 s .* start it again and resume the run, or raise outage_s"):
        engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=4)
    assert time.monotonic() - began < 10
    with pytest.raises(ServerGone):
        engine.sync(1)
    server.away = False
    engine.sync(1)
    engine._remote._http.timeout = httpx.Timeout(0.5)
    server.faults.add("hangs")
    with pytest.raises(ServerGone, match="ReadTimeout"):
        engine.sample(PROMPTS[:1], SEEDS[:1], temperature=1.0, max_new_tokens=4)
    engine.close()


def test_what_is_asked_wrongly_is_not_asked_again(engine: VllmEngine, server: StandIn) -> None:
    with pytest.raises(RuntimeError, match="before sample"):
        engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=4)
    engine.sync(0)
    for temperature in (0.001, 2.5, -1.0):
        with pytest.raises(ValueError, match=f"temperature 0, or from 0.01 to 2.0, and not at {temperature}"):
            engine.sample(PROMPTS, SEEDS, temperature=temperature, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"9000 new ones are more than the server's \d+"):
        engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=9000)
    server.faults.add("refuses")
    with pytest.raises(VllmError, match="max_tokens must be at least 1"):
        engine.sample(PROMPTS, SEEDS, temperature=1.0, max_new_tokens=4)


def test_options_say_what_does_not_go_together(policy: RewriterPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="with a `url` no server is started: leave eager, start_s away"):
        VllmOptions(url="http://a:1", eager=True, start_s=3)
    with pytest.raises(ValidationError, match="checksum: for a server at a `url`"):
        VllmOptions(checksum=False)
    with pytest.raises(ValidationError, match="extra"):
        VllmOptions.model_validate({"top_p": 0.9})
    monkeypatch.delenv("REWRITER_KEY", raising=False)
    with pytest.raises(ValueError, match="REWRITER_KEY, which is not set"):
        VllmEngine(policy, url="http://127.0.0.1:9", key_env="REWRITER_KEY")
    with pytest.raises(FileNotFoundError, match="make vllm"):
        VllmEngine(policy, python=tmp_path / "none")
    with pytest.raises(ValueError, match="does not answer as a vLLM server does"):
        VllmEngine(policy, url="http://127.0.0.1:9")


def test_a_server_is_started_so_that_it_samples_from_the_whole_distribution() -> None:
    arguments, environment = command(VllmOptions(), "/models/m", 8010, rank=12, dtype="float32", cpu=True)
    said = " ".join(arguments)
    for part in (
        "--model /models/m --host 127.0.0.1 --port 8010",
        "--generation-config vllm",
        "--logprobs-mode processed_logprobs",
        "--enable-lora --max-lora-rank 16 --max-loras 1",
        "--enforce-eager",
    ):
        assert part in said
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert (Path(environment["PYTHONPATH"]) / "verism_weights.py").is_file() and environment["PYTHONPATH"] == str(
        HERE / "inside_vllm"
    )
    arguments, environment = command(
        VllmOptions(context=512, memory=0.3), "a/b", 1, rank=None, dtype="bfloat16", cpu=False, revision="f" * 40
    )
    said = " ".join(arguments)
    assert "--enable-lora" not in said and "--enforce-eager" not in said and "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert "--max-model-len 512" in said and "--gpu-memory-utilization 0.3" in said and "--revision ffff" in said
    with pytest.raises(ValueError, match="up to rank 512"):
        command(VllmOptions(), "m", 1, rank=513, dtype="auto", cpu=True)


def test_the_guard_wants_the_key_for_all_but_health(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    monkeypatch.setenv("VLLM_API_KEY", "right")

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Guard(app)), base_url="http://test") as client:
            keys: list[dict[str, str]] = [{}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer right"}]
            told = [await client.post("/collective_rpc", headers=key) for key in keys]
            return [one.status_code for one in (*told, await client.get("/health"))]

    assert asyncio.run(ask()) == [401, 401, 200, 200]
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(RuntimeError, match="there has to be one"):
        Guard(app)


def test_parameters_are_found_in_fused_ones() -> None:
    """As vLLM's models have them; packed for a CPU they cannot be read."""
    rows = torch.arange(24.0).reshape(12, 2)
    layer = torch.nn.Linear(2, 12, bias=False)
    layer.weight.data, layer.output_partition_sizes = rows.clone(), [6, 3, 3]  # type: ignore[assignment]
    attention = torch.nn.Module()
    attention.qkv_proj, attention.norm, attention.o_proj = layer, torch.nn.LayerNorm(2), torch.nn.Linear(2, 2, bias=False)
    attention.o_proj.weight = torch.nn.Parameter(torch.empty(0))
    model = torch.nn.Module()
    model.attn, model.packed_modules_mapping = attention, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # type: ignore[assignment]
    for name, wanted in (("q_proj", rows[:6]), ("k_proj", rows[6:9]), ("v_proj", rows[9:])):
        found = held(model, f"attn.{name}.weight")
        assert torch.equal(found, wanted) and verism_weights.digest(found) == digest(wanted)
    assert torch.equal(held(model, "attn.norm.weight"), torch.ones(2))
    assert held(model, "attn.o_proj.weight") is None and held(model, "attn.other.weight") is None
    assert verism_weights.digest(rows) != verism_weights.digest(rows + 1e-3)


def test_an_adapter_that_reached_no_slot_counts_nothing() -> None:
    manager = SimpleNamespace(list_adapters=lambda: {}, lora_index_to_id=[None])
    worker = verism_weights.Weights()
    worker.model_runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=manager))
    assert worker.verism_adapter("/nowhere") == {"sha256": "", "tensors": 0, "squares": [0.0, 0.0]}


def test_a_server_is_started_by_hand_with_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = list[tuple[str, list[str], dict[str, str]]]()
    monkeypatch.setattr(serving.os, "execve", lambda *told: ran.append(told))
    monkeypatch.setattr(serving, "VllmOptions", lambda **told: VllmOptions(python=Path(sys.executable), **told))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        serving.main([str(tmp_path)])
    assert "set VLLM_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    serving.main([str(tmp_path), "--rank", "4", "--port", "8719", "--", "--max-model-len", "256"])
    python, arguments, environment = ran[0]
    assert python == Path(sys.executable) and arguments[-2:] == ["--max-model-len", "256"] and "8719" in arguments
    assert environment["VLLM_API_KEY"] == "secret" and environment["VLLM_SERVER_DEV_MODE"] == "1"


def test_a_whole_model_is_compared_where_its_vocabulary_is_padded(tmp_path: Path) -> None:
    given = {"embed.weight": torch.randn(5, 2), "norm.weight": torch.randn(2)}
    save_file(given, tmp_path / "model.safetensors")
    model = torch.nn.Module()
    model.embed, model.norm = torch.nn.Embedding(8, 2), torch.nn.LayerNorm(2)
    worker = verism_weights.Weights()
    worker.model_runner = SimpleNamespace(get_model=lambda: model, dtype=torch.float32)
    worker.reload_weights = lambda weights_iterator: [
        model.get_parameter(name).data[: len(value)].copy_(value) for name, value in weights_iterator
    ]
    told = worker.verism_load(str(tmp_path), "step-3", [*given, "missing.weight"])
    wanted = {name: digest(value) for name, value in given.items()}
    assert told == {"passed": wanted, "held": wanted, "dtype": "float32"} and worker.verism_tag() == ["step-3"]
    worker.reload_weights = lambda weights_iterator: list(weights_iterator)  # reads, and forgets
    save_file({name: value + 1 for name, value in given.items()}, tmp_path / "model.safetensors")
    told = worker.verism_load(str(tmp_path), "step-4", list(given))
    assert told["held"] == wanted and told["passed"] == {name: digest(value + 1) for name, value in given.items()}
