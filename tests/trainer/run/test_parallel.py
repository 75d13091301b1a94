"""Two processes and one: the same groups, the same advantages, the same loss curve; over gloo, with a real service."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from shared.vllm_server import free_port
from tests.forks import Forks
from tests.trainer.run.service import Service, recipe
from trainer import parallel
from trainer.config import ConfigError, RunConfig
from trainer.metrics import read
from trainer.parallel import ALONE, World

pytestmark = [pytest.mark.timeout(240), pytest.mark.xdist_group("parallel")]
# What every rank's own clock and rounding may differ in.
TIMES = ("seconds/", "pictures/")


@pytest.fixture(scope="module")
def two(root: Path) -> Iterator[tuple[Forks, Forks]]:
    """Processes that have loaded the libraries, one for each rank."""
    with Forks(root) as first, Forks(root) as second:
        yield first, second


def train(two: tuple[Forks, Forks], folder: Path, config: dict[str, Any], ranks: int, *more: str) -> None:
    """Run to its end by `ranks` processes with the variables that torchrun sets."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    arguments = [str(folder / "recipe.yaml"), f"--run-dir={folder / 'run'}", *more]
    open_ = dict[int, tuple[Forks, int]]()
    for rank in range(ranks):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in told.items()}} if ranks > 1 else {}
        open_[rank] = (two[rank], two[rank].start(arguments, folder / f"{rank}.log", environment))
    failed, end = list[str](), time.monotonic() + 200
    while open_:
        for rank, (fork, process) in list(open_.items()):
            status = fork.ended()
            if status is not None:
                del open_[rank]
                failed += [f"rank {rank} ended with {status}: {(folder / f'{rank}.log').read_text()[-3000:]}"] if status else []
            elif failed or time.monotonic() > end:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    assert not failed, "\n".join(failed)


def lines(folder: Path) -> list[dict[str, Any]]:
    return read(folder / "run" / "metrics.jsonl")


def same(one: Path, two: Path) -> None:
    assert [(a["kind"], a["step"]) for a in lines(one)] == [(b["kind"], b["step"]) for b in lines(two)]
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(TIMES):
                assert b[key] == (pytest.approx(a[key], abs=1e-5, rel=1e-5) if isinstance(a[key], float) else a[key]), key


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "nft": {"loss": {"use": "nft", "times": 2}},
    "dgpo": {"loss": {"use": "dgpo", "times": 2}},
}


@pytest.mark.e2e
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_learn_what_one_learns(two: tuple[Forks, Forks], service: Service, tmp_path: Path, name: str) -> None:
    config = recipe(service.url, group={"prompts": 4, "size": 4}, steps=3, **LOSSES[name])
    config["sampling"] = {**config["sampling"], "micro_batch": 4}  # type: ignore[dict-item]
    for ranks in (1, 2):
        train(two, tmp_path / str(ranks), config, ranks)
    same(tmp_path / "1", tmp_path / "2")
    adapters(tmp_path / "1", tmp_path / "2")


def adapters(a: Path, b: Path) -> None:
    """Equal, but for what the order of sums does."""
    one, two = (load_file(next((folder / "run" / "adapter").rglob("*.safetensors"))) for folder in (a, b))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None], ids=["adapter", "all weights"])
def test_weights_in_parts_learn_the_same_and_resume_as_a_whole(
    two: tuple[Forks, Forks], service: Service, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    config = recipe(service.url, group={"prompts": 2, "size": 4}, steps=2, optim={"lr": 1e-4})
    config["sampling"] = {**config["sampling"], "micro_batch": 4}  # type: ignore[dict-item]
    config["policy"] = {**config["policy"], "lora": lora}  # type: ignore[dict-item]
    parts = config | {"parallel": {"shard": True}}
    for name, ranks, own in (("whole", 1, config), ("parts", 2, parts)):
        train(two, tmp_path / name, own, ranks)
    same(tmp_path / "whole", tmp_path / "parts")
    adapters(tmp_path / "whole", tmp_path / "parts")
    for name, ranks, own in (("whole", 2, parts), ("parts", 1, config)):  # each goes on as the other
        train(two, tmp_path / name, own | {"steps": 3}, ranks, "--resume")
    same(tmp_path / "whole", tmp_path / "parts")


def test_alone_nothing_is_said() -> None:
    values = [torch.ones(2)]
    ALONE.add(values)
    assert ALONE.tell({"a": 1}) == [{"a": 1}] and ALONE.same(3) == 3 and ALONE.total(2.5) == 2.5
    assert torch.equal(values[0], torch.ones(2)) and list(ALONE.part([1, 2, 3])) == [1, 2, 3]


def test_every_row_belongs_to_one_rank() -> None:
    for count in (0, 1, 5, 8):
        parts = [World(rank, 3).part(list(range(count))) for rank in range(3)]
        assert [row for part in parts for row in part] == list(range(count))


def test_arrays_come_back_as_they_were_told() -> None:
    told = {"x": np.array([[1.5, np.nan]]), "names": ["a"], "none": None, "yes": np.array([True, False])}
    back = parallel._unpack(parallel._pack(told))
    np.testing.assert_array_equal(back["x"], told["x"])
    assert back["yes"].dtype == bool and back["names"] == ["a"] and back["none"] is None
    with pytest.raises(TypeError, match="tell each other no PosixPath"):
        parallel._pack(Path("x"))


class Two(World):
    """Two ranks that say the same."""

    def tell(self, value: Any) -> list[Any]:
        return [value, value]


@pytest.mark.parametrize(
    ("prompts", "micro_batch", "fix"),
    [(4, 16, "sampling.micro_batch=8"), (3, 4, "group.prompts=4"), (6, 8, "sampling.micro_batch=4")],
)
def test_groups_that_cannot_be_dealt_out_are_refused(prompts: int, micro_batch: int, fix: str) -> None:
    raw: dict[str, Any] = recipe("http://x", group={"prompts": prompts, "size": 4})
    raw["sampling"]["micro_batch"] = micro_batch
    with pytest.raises(ConfigError, match=fix):
        parallel.agreed(Two(0, 2), RunConfig.model_validate(raw))
    raw["sampling"] |= {"micro_batch": 1, "draw_batch": micro_batch}
    with pytest.raises(ConfigError, match=fix.replace("micro", "draw")):
        parallel.agreed(Two(0, 2), RunConfig.model_validate(raw))
