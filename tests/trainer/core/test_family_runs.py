"""Whole runs of the other families against a real HTTP service: killed and resumed to the same numbers, and given away at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import tiny_families
from tests.trainer.core.test_export import loaded
from tests.trainer.core.test_families import LENGTHS, velocity
from tests.trainer.run.service import recipe, serve
from trainer import loop
from trainer.config import RunConfig
from trainer.export import export_adapter
from trainer.metrics import read


def run(config: RunConfig, folder: Path, resume: bool = False, **options: Any) -> torch.Tensor:
    """Velocity through the average of the weights with which a run ends: the best ones, or the last where it was interrupted."""
    made = loop.Run(config, folder, resume=resume)
    try:
        loop.train(made, **options)
        with made.learner.ema.swapped():
            return velocity(made.policy)
    finally:
        made.close()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image"])
def test_a_run_resumes_and_is_given_away(family: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    base = tiny_families.write(family, tmp_path / "base")
    policy = {"use": family, "path": str(base), "max_sequence_length": LENGTHS[family], "lora": {"rank": 2, "alpha": 4}}
    with serve() as service:
        plain = recipe(service.url)
        sampling = {**plain["sampling"], "height": 16, "width": 24, "guidance": 1.5}
        config = RunConfig.model_validate({**plain, "policy": policy, "sampling": sampling, "optim": {"lr": 3e-2}, "steps": 2})
        whole = run(config, tmp_path / "whole")
        seen: list[dict[str, Any]] = []
        stop = {"stop": lambda: len([line for line in seen if line["kind"] == "step"]) == 1, "tell": seen.append}
        run(config, tmp_path / "halves", **stop)
        assert torch.equal(run(config, tmp_path / "halves", resume=True), whole)
    told = [[line.get("reward/total") for line in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "halves")]
    assert told[0] == told[1] and len(told[0]) >= 4
    export_adapter(tmp_path / "whole", tmp_path / "out.safetensors", "comfyui")
    fresh = loop.load_policy(config)
    given = loaded(fresh, family, tmp_path / "out.safetensors")
    torch.testing.assert_close(given, whole, rtol=1e-4, atol=1e-5)
    last = export_adapter(tmp_path / "whole", tmp_path / "last.safetensors", "comfyui", step=2)
    assert (loaded(fresh, family, last) - velocity(fresh)).abs().max() > 1e-3, "the last step's weights are not the first ones"
