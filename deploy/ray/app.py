"""The same app under Ray Serve: `serve run deploy.ray.app:build config=examples/serve/detector.yaml replicas=2` in the repository.

Each replica is one process with its own rewards, scheduler and limits, as `verism-serve` starts it; Ray's proxy spreads requests over
them. With `max_replicas` above `replicas`, Ray adds replicas while more than `images_per_replica` pictures are being scored in each.
"""

import math
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

METRIC = "inflight_images"


class Options(BaseModel):
    """What `serve run deploy.ray.app:build key=value` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    config: Path = Field(description="YAML of verism-serve; host and port in it are Ray's business here and are not used")
    replicas: int = Field(default=2, ge=1, description="to begin with, and at least")
    max_replicas: int | None = Field(default=None, ge=1, description="scale up to so many; default: never")
    images_per_replica: float = Field(
        default=64, gt=0, description="pictures admitted and not answered that one replica should have"
    )
    cpus: float = Field(default=1, ge=0, description="cores that a replica reserves")
    gpus: float = Field(default=0, ge=0, description="GPUs that a replica reserves; a fraction shares one")
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=120, ge=0)

    @model_validator(mode="after")
    def _order(self) -> "Options":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below replicas={self.replicas}: raise it or leave it away")
        return self


class QueuedImages:
    """As many replicas as bring the pictures being scored down to `images_per_replica` each; Ray applies bounds and delays."""

    def __init__(self, images_per_replica: float) -> None:
        self.images_per_replica = images_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        images = sum((context.aggregated_metrics or {}).get(METRIC, {}).values())
        return math.ceil(images / self.images_per_replica), {}


@serve.ingress()
class Service:
    """One replica. `path` is absolute: Ray's workers run elsewhere."""

    def __init__(self, path: str, threads: int) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from services import config
        from services.app import create_app

        loaded = config.load(Path(path))
        self.service = create_app(loaded if loaded.threads else loaded.model_copy(update={"threads": threads}))

    def __serve_build_asgi_app__(self) -> Any:
        return self.service

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {METRIC: self.service.state.verism.metrics.registry.get_sample_value("verism_inflight_images") or 0.0}

    def check_health(self) -> None:
        """Ray replaces a replica whose device is lost, as a supervisor restarts verism-serve."""
        if any(lane.lost for lane in self.service.state.verism.lanes):
            raise RuntimeError("a reward's device is lost; the replica has to be started again")


def build(options: Options) -> Application:
    """The application that `serve run` starts; ValueError for a configuration that cannot be read."""
    from services import config
    from services.config import ROOT

    path = options.config if options.config.exists() else ROOT / options.config
    loaded = config.load(path)
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        policy = AutoscalingPolicy(
            policy_function="deploy.ray.app:QueuedImages", policy_kwargs={"images_per_replica": options.images_per_replica}
        )
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.replicas,
                max_replicas=options.max_replicas,
                upscale_delay_s=options.upscale_delay_s,
                downscale_delay_s=options.downscale_delay_s,
                metrics_interval_s=min(10.0, max(0.5, options.upscale_delay_s / 2)),
                look_back_period_s=max(1.0, options.upscale_delay_s),
                policy=policy,
            )
        }
    deployment = serve.deployment(
        name="verism",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=512,
        graceful_shutdown_timeout_s=loaded.drain_s + 5,
        **scaling,
    )(Service)
    return deployment.bind(str(path.resolve()), max(1, int(options.cpus)))
