"""A run whose disk is full, whose checkpoints are damaged or another's, whose memory ends: nothing is corrupted, messages have the fix."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.client import ScoreTable
from shared.schema import Problem, Score
from tests.trainer.run.runs import config, numbers, run
from tests.trainer.run.service import Service, recipe, serve
from trainer import checkpoint, loop, memory, outage
from trainer.config import ConfigError
from trainer.metrics import Metrics, read
from trainer.parallel import World

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def whole(service: Service, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, undisturbed run."""
    with contextlib.chdir(root):
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert run(config(service.url, checkpoint_every=1), folder) == "finished"
    return folder


@contextlib.contextmanager
def largest_file(count: int) -> Iterator[None]:
    """Files of this process may not grow beyond `count` bytes: the system's own error, as from a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def halves(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.name.endswith((".building", ".old"))]


def test_a_full_disk_for_two_saves_is_waited_out(service: Service, whole: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with contextlib.ExitStack() as full:

        def tell(line: dict[str, Any]) -> None:
            seen.append(line)
            if line["kind"] == "step" and line["step"] == 1:
                full.enter_context(largest_file(100_000))
            if line["kind"] == "step" and line["step"] == 3:
                full.close()
                assert checkpoint.steps(tmp_path / "run") == [0], "the last good one stands"
                assert not halves(tmp_path / "run")

        assert run(config(service.url, checkpoint_every=1), tmp_path / "run", tell=tell) == "finished"
    notes = [line["text"] for line in seen if line["kind"] == "note"]
    assert len(notes) == 2 and all("the one after step 0 stands" in text and "takes 508 kB" in text for text in notes)
    assert numbers(tmp_path / "run") == numbers(whole)


def test_the_third_failure_in_a_row_stops_with_the_fix_and_the_run_goes_on_later(
    service: Service, whole: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as full:

        def tell(line: dict[str, Any]) -> None:
            if line["kind"] == "step" and line["step"] == 1:
                full.enter_context(largest_file(100_000))

        with pytest.raises(loop.DiskFull, match=r"the one after step 0 stands.*checkpoint_keep=1.*--resume"):
            run(config(service.url, checkpoint_every=1), tmp_path / "run", tell=tell)
    assert checkpoint.steps(tmp_path / "run") == [0] and not halves(tmp_path / "run")
    assert run(config(service.url, checkpoint_every=1), tmp_path / "run", resume=True) == "finished"
    assert numbers(tmp_path / "run") == numbers(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(place)], capture_output=True).returncode
    ):
        pytest.skip("this machine lets us mount no file system: the limit on file sizes is tested alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread has no room either
def test_a_disk_without_a_byte_left(service: Service, whole: Path, small_disk: Path) -> None:
    """Older checkpoints make room first; lines of metrics wait in memory for room."""
    filler, seen = small_disk / "filler", list[dict[str, Any]]()

    def tell(line: dict[str, Any]) -> None:
        seen.append(line)
        if line["kind"] == "step" and line["step"] == 2:
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for _ in itertools.count():
                    file.write(bytes(4096))
        if line["kind"] == "note" and "takes" in line["text"]:
            filler.unlink(missing_ok=True)

    assert run(config(service.url, checkpoint_every=1, checkpoint_keep=1), small_disk / "run", tell=tell) == "finished"
    notes = [line["text"] for line in seen if line["kind"] == "note"]
    assert any("No space left on device" in text and "too little" in text and "stands" in text for text in notes), notes
    assert numbers(small_disk / "run") == numbers(whole) and not halves(small_disk / "run")


def test_older_checkpoints_make_room(tmp_path: Path) -> None:
    tensors = {"weights/a": torch.zeros(3)}
    for step in range(4):
        checkpoint.save(tmp_path, step, tensors, {})
    assert checkpoint.prune(tmp_path, 1, best=1) == 2 and checkpoint.steps(tmp_path) == [1, 3]


def damage(folder: Path, how: str) -> None:
    state = folder / "state.safetensors"
    if how == "cut":
        os.truncate(state, state.stat().st_size // 2)
    elif how == "flipped":
        data = bytearray(state.read_bytes())
        data[-5] ^= 1
        state.write_bytes(data)
    elif how == "empty":
        (folder / "meta.json").write_text("")
    else:
        state.unlink()


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how: str, service: Service, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    assert checkpoint.steps(tmp_path / "run")[-2:] == [3, 4]
    damage(checkpoint.folder_of(tmp_path / "run", 4), how)
    seen: list[dict[str, Any]] = []
    assert run(config(service.url, checkpoint_every=1), tmp_path / "run", resume=True, tell=seen.append) == "finished"
    assert "after step 4 is damaged" in seen[0]["text"] and seen[0]["step"] == 3
    assert numbers(tmp_path / "run") == numbers(whole)


def test_when_all_are_damaged_nothing_is_overwritten(service: Service, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for step in checkpoint.steps(tmp_path / "run"):
        damage(checkpoint.folder_of(tmp_path / "run", step), "cut")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"another --run-dir"):
        loop.Run(config(service.url), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    final = checkpoint.save(tmp_path, 7, {"weights/a": torch.ones(2)}, {})
    final.rename(final.with_name(".step_000007.old"))
    final.with_name(".step_000007.building").mkdir()
    checkpoint.recover(tmp_path)
    assert checkpoint.read(final).meta["step"] == 7 and not halves(tmp_path)


class Counter:
    """Something that changes with every save."""

    def __init__(self) -> None:
        self.total_D, self.calls = torch.zeros(2), 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.total_D, self.calls = self.total_D + 1, self.calls + 1
        return {"total": self.total_D}, {"calls": self.calls}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.total_D, self.calls = tensors["total"], values["calls"]


class Counting(loop.Run):
    def parts(self) -> dict[str, checkpoint.Stateful]:
        return {"counter": Counter()}


def test_whatever_registers_comes_back_with_the_checkpoint(service: Service, whole: Path, tmp_path: Path) -> None:
    made = Counting(config(service.url, steps=2), tmp_path / "run")
    loop.train(made)
    made.close()
    again = Counting(config(service.url, steps=2), tmp_path / "run", resume=True)
    counter = again.stateful["counter"]
    assert isinstance(counter, Counter) and counter.calls == 2 and counter.total_D.tolist() == [2.0, 2.0]
    again.close()
    with pytest.raises(checkpoint.CheckpointError, match="without 'counter'"):
        Counting(config(service.url, checkpoint_every=1), whole, resume=True)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 8, "alpha": 8}, r"policy\.lora\.rank: 4 -> 8"),
        ({**LORA, "targets": ["attn.to_q"]}, r"policy\.lora\.targets"),
        (None, r"policy\.lora"),
    ],
)
def test_another_adapter_is_refused_in_words(lora: Any, said: str, service: Service, whole: Path, tmp_path: Path) -> None:
    """For training by the configuration, for a look by the weights themselves."""
    policy = {**recipe("x")["policy"], "lora": lora}  # type: ignore[dict-item]
    with pytest.raises(checkpoint.CheckpointError, match=said):
        loop.Run(config(service.url, policy=policy), whole, resume=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"policy\.lora"):
        loop.look(config(service.url, policy=policy), whole, 4)


def test_another_architecture_is_refused_in_words(service: Service, whole: Path, tmp_path: Path) -> None:
    from tests.trainer.tiny import write

    other = {"use": "sd3", "path": str(write(tmp_path / "other")), "max_sequence_length": 8, "lora": LORA}
    sampling = recipe("x")["sampling"]
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        loop.Run(config(service.url, policy=other, sampling=sampling), whole, resume=True)


def test_keys_that_came_later_do_not_refuse_an_old_checkpoint(whole: Path, service: Service) -> None:
    saved = checkpoint.read(checkpoint.folder_of(whole, 4))
    old = json.loads(json.dumps(saved.meta))
    del old["config"]["kl"], old["config"]["optim"]["max_grad_norm"]
    own = checkpoint.training(config(service.url, checkpoint_every=1, kl={}))
    args = {"fingerprint": old["fingerprint"], "sigmas_hash": old["sigmas_hash"]}
    assert checkpoint.check(checkpoint.Saved({}, old), config=own, **args) == []
    own["optim"]["max_grad_norm"] = 9.0
    with pytest.raises(checkpoint.CheckpointError, match=r"max_grad_norm: 1\.0 -> 9\.0"):
        checkpoint.check(checkpoint.Saved({}, old), config=own, **args)


def test_memory_that_ends_says_what_to_set_and_the_smaller_size_resumes(
    service: Service, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hungry(loop.Run):
        def step(self) -> dict[str, Any]:
            if self.done == 1:
                torch.empty(10**15)  # the allocator's own refusal
            return super().step()

    made = Hungry(config(service.url, checkpoint_every=1), tmp_path / "run")
    with pytest.raises(memory.OutOfMemory, match=r"in step 2 with sampling\.micro_batch=8.*sampling\.micro_batch=4 --resume"):
        loop.train(made)
    made.close()
    smaller = {**recipe("x")["sampling"], "micro_batch": 4}  # type: ignore[dict-item]
    seen: list[dict[str, Any]] = []
    assert run(config(service.url, checkpoint_every=1, sampling=smaller), tmp_path / "run", True, tell=seen.append) == "finished"
    assert "sampling.micro_batch: 8 -> 4" in seen[0]["text"]
    a, b = (numbers(folder)[:3] for folder in (tmp_path / "run", whole))
    assert a[:2] == b[:2] and a[2]["step"] == b[2]["step"] == 2, "what was there stays"


def test_who_is_asked_again() -> None:
    """A service that was away, and one of which nothing came that may come later; not one picture that fails for itself."""

    def error(kind: str, retryable: bool = False) -> Score:
        return Score(status="error", error=Problem(type=f"urn:verism:{kind}", title="for the test", retryable=retryable))

    def table(*row: Score) -> ScoreTable:
        values = np.array([[np.nan if score.value is None else score.value for score in row]])
        kinds = [score.error.type for score in row if score.error is not None]
        return ScoreTable(("a",), values, np.isfinite(values), (row,), {"a": 1}, {kind: kinds.count(kind) for kind in kinds})

    good = Score(status="ok", value=0.5)
    assert outage.gone(table(good, error("unreachable"))) == outage.gone(table(error("gone", True), error("gone", True))) == ["a"]
    assert outage.gone(table(good, error("gone", True))) == outage.gone(table(good, error("nan"))) == outage.gone(table()) == []
    mended = outage.merged(table(good, error("unreachable")), table(good, good))
    assert mended.values_RB.tolist() == [[0.5, 0.5]] and mended.mask_RB.all() and mended.failures == {}


def test_a_service_that_does_not_answer_for_a_while_costs_no_score(whole: Path, tmp_path: Path) -> None:
    """Asked again are all pictures of the request; the numbers are those of a run that never waited."""
    with serve() as service:
        notes: list[str] = []

        def tell(line: dict[str, Any]) -> None:
            if line["kind"] == "step" and line["step"] == 1:
                service.fault = "slow"
            if line["kind"] == "note":
                notes.append(line["text"])
                service.fault = ""

        patient = {"reward_timeout_s": 1.0, "reward_outage_s": 120.0, "checkpoint_every": 1}
        assert run(config(service.url, **patient), tmp_path / "run", tell=tell) == "finished"
    assert any("no answer from brightness (urn:verism:deadline-exceeded)" in text for text in notes), notes
    assert numbers(tmp_path / "run") == numbers(whole)


def test_what_is_wrong_with_the_geometry_is_said_before_a_service_is_missed(tmp_path: Path) -> None:
    sampling = {**recipe("x")["sampling"], "height": 29}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"sampling\.height.*multiple"):
        loop.Run(config("http://127.0.0.1:9", sampling=sampling), tmp_path / "run")


class Second(World):
    """The second rank of two that both have all groups."""

    def __init__(self) -> None:
        super().__init__(rank=1)

    def rows(self, count: int) -> slice:
        return slice(0, count)

    def same(self, value: Any) -> Any:
        return value


def test_a_second_rank_writes_nothing_and_computes_the_same(
    service: Service, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loop.Run(config(service.url, checkpoint_every=1), tmp_path / "run", world=Second())
    lines = [made.evaluate(), made.step()]
    made.save()
    monkeypatch.setattr(made.world, "same", lambda value: "the disk of rank 0 is full")
    with pytest.raises(checkpoint.NotSaved, match="of rank 0"):
        made.save()
    made.close()
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []
    assert [made.metrics.evaluations[0]["reward/total"], lines[1]["loss"]] == [
        numbers(whole)[0]["reward/total"],
        numbers(whole)[1]["loss"],
    ]


def test_events_for_tensorboard_are_a_choice(tmp_path: Path) -> None:
    for name, wanted in (("with", True), ("without", False)):
        folder = tmp_path / name
        folder.mkdir()
        metrics = Metrics(folder, tensorboard=wanted)
        metrics.write("step", 1, {"loss": 1.0})
        metrics.close()
        assert (folder / "tb").exists() == wanted and len(read(metrics.path)) == 1


def test_metrics_of_a_quiet_rank_know_the_evaluations(whole: Path) -> None:
    quiet = Metrics(whole, resume_at=2, quiet=True)
    assert [e["step"] for e in quiet.evaluations] == [0, 2]
    quiet.close()
