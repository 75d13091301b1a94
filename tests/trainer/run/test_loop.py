"""A few real steps against a real HTTP service with faults."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.run.runs import config, numbers, run
from tests.trainer.run.service import Service, recipe, serve
from trainer import checkpoint, loop
from trainer.config import ConfigError
from trainer.metrics import read
from trainer.scoring import NoService


@pytest.fixture
def service() -> Iterator[Service]:
    with serve() as running:
        yield running


def test_interrupted_and_resumed_equals_uninterrupted(service: Service, tmp_path: Path) -> None:
    assert run(config(service.url), tmp_path / "whole") == "finished"
    seen: list[dict[str, Any]] = []
    stop = {"stop": lambda: len([line for line in seen if line["kind"] == "step"]) == 3, "tell": seen.append}
    assert run(config(service.url), tmp_path / "halves", **stop) == "interrupted"
    shutil.rmtree(checkpoint.folder_of(tmp_path / "halves", 3))  # as if killed after the checkpoint of step 2
    with (tmp_path / "halves" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert run(config(service.url), tmp_path / "halves", resume=True) == "finished"
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")
    adapters = [load_file(tmp_path / n / "adapter/pytorch_lora_weights.safetensors") for n in ("whole", "halves")]
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])


def test_training_moves_the_weights_and_writes_the_run_folder(service: Service, tmp_path: Path) -> None:
    run(config(service.url, steps=2), tmp_path / "run")
    steps = [line for line in read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [1, 2]
    assert steps[0]["kl"] == 0.0 and steps[1]["kl"] > 0.0
    assert steps[0]["ratio_dev"] < 1e-4
    for name in ("config.yaml", "versions.json", "done.json", "grids/step_00000.png", "checkpoints/best.json"):
        assert (tmp_path / "run" / name).is_file(), name
    assert list((tmp_path / "run" / "tb").iterdir())


def test_half_of_the_scores_missing_masks_and_goes_on(service: Service, tmp_path: Path) -> None:
    service.fault = "some"
    run(config(service.url, steps=1), tmp_path / "run")
    step = next(line for line in read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step")
    assert step["failed_scores"] == 4 and step["masked_samples"] == 4 and not step["skipped"]
    assert step["failures"] == {"urn:verism:broken": 4}


@pytest.mark.parametrize("fault", ["down", "nan", "slow"])
def test_no_score_at_all_skips_steps_then_stops_with_everything_saved(fault: str, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with serve() as service:
        made = loop.Run(config(service.url, max_unscored_steps=2, reward_timeout_s=1.0, steps=9), tmp_path / "run")
        before = {k: v.detach().clone() for k, v in made.weights.items()}

        def tell(line: dict[str, Any]) -> None:
            seen.append(line)
            service.fault = fault

        with pytest.raises(loop.GaveUp, match="--resume"):
            loop.train(made, tell=tell)
        made.close()
        assert all(torch.equal(before[k], v) for k, v in made.weights.items())
        steps = [line for line in seen if line["kind"] == "step"]
        assert [line["skipped"] for line in steps] == [True, True]
        assert steps[0]["failed_scores"] == 8 and steps[0]["reward/brightness/mean"] is None
        service.fault = ""
        assert run(config(service.url, steps=3), tmp_path / "run", resume=True) == "finished"


def test_no_service_says_where_and_how_to_start_one(free_port: int, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port}"
    with pytest.raises(NoService, match="make serve") as error:
        loop.Run(config(url), tmp_path / "run")
    assert url in str(error.value)


def test_a_checkpoint_of_another_model_is_refused(service: Service, tmp_path: Path, root: Path) -> None:
    run(config(service.url, steps=1), tmp_path / "run")
    shutil.copytree(root / "world" / "policy", tmp_path / "other")
    file = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    policy = {**recipe(service.url)["policy"], "path": str(tmp_path / "other")}  # type: ignore[dict-item]
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        loop.Run(config(service.url, policy=policy), tmp_path / "run", resume=True)


def test_another_configuration_is_refused_by_name(service: Service, tmp_path: Path) -> None:
    run(config(service.url, steps=1), tmp_path / "run")
    with pytest.raises(checkpoint.CheckpointError, match=r"optim\.lr: 0\.001 -> 0\.5"):
        loop.Run(config(service.url, optim={"lr": 0.5}), tmp_path / "run", resume=True)


def test_rounding_that_eats_the_clip_range_is_refused(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ratio_deviation", lambda *_: 0.01)
    with pytest.raises(ConfigError, match=r"policy\.dtype=float32"):
        loop.Run(config("http://127.0.0.1:9"), tmp_path / "run")  # before the service is missed


def test_a_misspelt_option_of_the_policy(service: Service, tmp_path: Path) -> None:
    policy = {"use": "sd3", "path": "world/policy", "max_sequence_lenght": 1}
    with pytest.raises(ConfigError, match="max_sequence_lenght"):
        loop.Run(config(service.url, policy=policy), tmp_path / "run")


def test_best_json_names_a_checkpoint_that_exists(service: Service, tmp_path: Path) -> None:
    run(config(service.url), tmp_path / "run")
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["step"]
    assert checkpoint.folder_of(tmp_path / "run", best).is_dir()


def test_one_step_ahead_resumes_to_the_same_numbers_and_is_off_policy(service: Service, tmp_path: Path) -> None:
    changes = {"sampling": {**recipe("")["sampling"], "ahead": True}}  # type: ignore[dict-item]
    run(config(service.url, **changes), tmp_path / "whole")
    seen: list[dict[str, Any]] = []
    stop = {"stop": lambda: len([line for line in seen if line["kind"] == "step"]) == 3, "tell": seen.append}
    run(config(service.url, **changes), tmp_path / "halves", **stop)
    shutil.rmtree(checkpoint.folder_of(tmp_path / "halves", 3))
    run(config(service.url, **changes), tmp_path / "halves", resume=True)
    assert numbers(tmp_path / "halves") == numbers(tmp_path / "whole")
    run(config(service.url), tmp_path / "on")
    ahead, on = ([line for line in numbers(tmp_path / n) if line["kind"] == "step"] for n in ("whole", "on"))
    assert ahead[0] == on[0] and all(line["ratio_dev"] < 1e-4 for line in on)
    assert all(line["ratio_dev"] > 1e-4 for line in ahead[1:]), "drawn with the weights before the last update"


def test_more_pictures_in_a_pass_of_sampling_than_of_training(service: Service, tmp_path: Path) -> None:
    """The same pictures as with large batches in both, learned from in small ones."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for name, changes in (("both", {"micro_batch": 8}), ("drawn", {"micro_batch": 2, "draw_batch": 8})):
        service.requests.clear()
        sampling = {**recipe("")["sampling"], **changes}  # type: ignore[dict-item]
        run(config(service.url, group={"prompts": 2, "size": 4}, sampling=sampling, steps=1), tmp_path / name)
        assert 8 in service.requests, "both groups are one rollout"
        lines[name] = [line for line in numbers(tmp_path / name) if line["kind"] == "step"]
    for both, drawn in zip(lines["both"], lines["drawn"], strict=True):
        assert drawn["ratio_dev"] < 1e-5 and drawn["reward/total"] == pytest.approx(both["reward/total"], abs=1e-5)
        assert drawn["grad_norm"] == pytest.approx(both["grad_norm"], rel=1e-3)


def test_a_step_without_any_score_learns_nothing_not_even_from_real_pictures(service: Service, tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", images=np.full((4, 28, 28, 3), 90, np.uint8), prompts=np.array(["a bag"] * 4))
    loss = {"use": "rft", "keep": 0.5, "times": 1, "real": str(tmp_path / "real.npz"), "real_share": 0.5}
    sampling = {**recipe("")["sampling"], "window": None}  # type: ignore[dict-item]
    kl = {"weight": 0.0}
    made = loop.Run(config(service.url, loss=loss, sampling=sampling, kl=kl, reward_outage_s=0), tmp_path / "run")
    before = {name: weight.detach().clone() for name, weight in made.weights.items()}
    service.fault = "down"
    assert made.step()["skipped"] and made.learner.updates == 0
    assert all(torch.equal(weight, before[name]) for name, weight in made.weights.items())
    service.fault = ""
    line = made.step()
    assert not line["skipped"] and made.learner.updates == 1 and line["real_error"] > 0
    assert any(not torch.equal(weight, before[name]) for name, weight in made.weights.items())
    made.close()
