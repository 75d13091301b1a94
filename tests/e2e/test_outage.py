"""A reward service that dies in mid-run and comes back: the step waits for it, and nobody can tell from the numbers."""

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.process import free_port, start, wait
from tests.trainer.run.runs import numbers
from tests.trainer.run.service import recipe
from trainer import loop
from trainer.config import RunConfig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


class Server:
    """verism-serve at one address, which is killed and started again."""

    def __init__(self, config: Path) -> None:
        self.config, self.port = config, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def begin(self) -> None:
        self.process = start(self.config, self.port, stderr=subprocess.DEVNULL)

    def ready(self) -> None:
        wait(self.url, self.process, 300)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_service_that_dies_is_waited_for_and_none_of_its_scores_is_missing(root: Path, tmp_path: Path) -> None:
    server, told = Server(root / "examples" / "serve" / "minimal.yaml"), list[dict[str, Any]]()
    plain = {"rewards": {"jpeg_size": {"url": server.url}}}
    server.begin()
    server.ready()

    def tell(line: dict[str, Any]) -> None:
        told.append(line)
        if line["kind"] == "step" and line["step"] == 1:
            server.kill()
        if line["kind"] == "note" and "no answer from jpeg_size" in line["text"]:
            threading.Thread(target=server.begin).start()

    try:
        for name, hear in (("whole", lambda line: None), ("outage", tell)):
            config = RunConfig.model_validate(recipe("x", **plain, reward_timeout_s=1.0, reward_outage_s=300.0, steps=3))
            run = loop.Run(config, tmp_path / name)
            assert loop.train(run, tell=hear) == "finished"
            run.close()
        assert any(line["kind"] == "note" for line in told), "it was not waited for"
        assert numbers(tmp_path / "outage") == numbers(tmp_path / "whole")
        assert all(line["failed_scores"] == 0 and not line["skipped"] for line in told if line["kind"] == "step")

        server.kill()  # and now it stays away
        config = RunConfig.model_validate(recipe("x", **plain, reward_timeout_s=0.5, reward_outage_s=2.0, max_unscored_steps=1))
        server.begin()
        server.ready()
        run = loop.Run(config, tmp_path / "gone")
        before = {name: weight.detach().clone() for name, weight in run.weights.items()}
        with pytest.raises(loop.GaveUp, match="--resume"):
            loop.train(run, tell=lambda line: server.kill())
        assert all(torch.equal(before[name], weight) for name, weight in run.weights.items()), "no update without a score"
        run.close()
        server.begin()
        server.ready()
        run = loop.Run(config, tmp_path / "never")
        server.kill()
        with pytest.raises(loop.GaveUp, match="first evaluation got no score at all from jpeg_size"):
            loop.train(run)
        run.close()
    finally:
        server.kill()
