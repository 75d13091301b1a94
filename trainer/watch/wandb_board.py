"""A run's numbers, grids and alarms at Weights & Biases too, where a recipe has `wandb: {project: ...}`."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import checkpoint
from trainer.config import ConfigError, RunConfig


class Board:
    """One run there. A resumed run goes on under the id in wandb.json; steps that it repeats are drawn twice."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Of a configuration with `wandb`; no URL of a service is sent. ConfigError when the package is missing, or W&B refuses the run."""
        assert config.wandb is not None
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"wandb.project={config.wandb.project} needs a package ({error}): pip install 'verism[wandb]', or leave wandb away"
            ) from error
        chosen, self._wandb = config.wandb, wandb
        try:
            self._run = wandb.init(
                project=chosen.project,
                entity=chosen.entity,
                group=chosen.group,
                name=chosen.name or config.name,
                tags=chosen.tags,
                id=_id(folder),
                resume="allow",
                reinit="create_new",
                mode=chosen.mode,
                dir=str(folder),
                config=checkpoint.training(config),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, disable_code=True),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"wandb: {error}; run `wandb login`, set wandb.mode=offline, or leave wandb away") from error
        self._run.define_metric("*", step_metric="trainer/step")

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl: numbers of steps and evaluations as KIND/NAME; an alarm as an alert."""
        kind, step = line["kind"], line["step"]
        if kind == "alarm":
            self._run.alert(title=f"{line['action']} after step {step}", text=str(line["reason"]))
            return
        numbers = {f"{kind}/{key}": value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        self._run.log({"trainer/step": step, **numbers})

    def grid(self, step: int, picture_HWC: NDArray[np.uint8]) -> None:
        """The grid of an evaluation."""
        self._run.log({"trainer/step": step, "grid": self._wandb.Image(picture_HWC, caption=f"after step {step}")})

    def close(self) -> None:
        """Sends what waits; online that can take a while."""
        self._run.finish()


def _id(folder: Path) -> str:
    path = folder / "wandb.json"
    if path.is_file():
        return str(json.loads(path.read_text())["id"])
    made = secrets.token_hex(4)
    path.write_text(json.dumps({"id": made}))
    return made
