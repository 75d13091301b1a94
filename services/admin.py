"""Operations on their own listener: other weights, refits, drain. Never on the port that callers know.

    admin: {port: 8900, env: VERISM_ADMIN_KEY}

    curl -H "authorization: Bearer $VERISM_ADMIN_KEY" -X POST localhost:8900/admin/rewards/detector/weights \\
      -H 'content-type: application/json' -d '{"folder": "world/detector"}'
"""

import asyncio
import importlib
import time
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from services.app import Served, State, load_reward
from services.auth import KeyOptions, Keys
from services.config import RewardConfig
from services.http import Door, not_a_page
from services.worker import RewardWork, warm_up
from shared.errors import Invalid, NotReady, UnknownReward


class Weights(BaseModel):
    """Body of `weights`: options that replace those of the configuration (`folder`, as a rule)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    version: int | None = Field(default=None, ge=1, description="default: the next one")


def create_admin(state: State, keys: dict[str, KeyOptions]) -> FastAPI:
    """The admin app over a running service's state; it refuses to exist without a key."""
    if not keys:
        raise ValueError("admin: give `env` (a variable that holds the admin key) or `sha256`")
    loading = asyncio.Lock()

    app = FastAPI(
        title="Verism admin",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers={HTTPException: not_a_page},
    )
    app.add_middleware(Door, metrics=state.metrics, keys=Keys(keys), scope="admin")

    def plain(name: str) -> Served:
        served = state.rewards.get(name)
        if served is None or served.lane is None:
            known = [n for n, one in state.rewards.items() if one.lane is not None]
            raise UnknownReward(f"no reward {name!r} with weights of its own; there are {', '.join(known)}")
        return served

    @app.get("/admin/rewards")
    async def rewards() -> dict[str, Any]:
        return {n: {"version": one.info.version, "weights_sha256": one.info.weights_sha256} for n, one in state.rewards.items()}

    @app.post("/admin/rewards/{name}/weights")
    async def weights(name: str, asked: Weights) -> dict[str, Any]:
        """Load beside the live model, warm up, swap between two batches. A failure leaves the live one as it is."""
        served = plain(name)
        assert served.lane is not None
        if served.room is not None:
            raise Invalid(
                f"{name} is refitted here: its versions come from `fit` and `rollback`; serve other weights under another name"
            )
        if loading.locked():
            raise NotReady("other weights are being loaded; try again when they are in place", retry_after_ms=1000)
        async with loading:
            version = asked.version or served.info.version + 1
            if version <= served.info.version:
                raise Invalid(f"version: {name} is at {served.info.version}; versions only rise")
            began, changes = time.monotonic(), asked.model_extra or {}
            if "use" in changes:
                raise Invalid("use: weights change, not the kind of reward; configure another reward for that")
            try:
                options = RewardConfig.model_validate({**served.options.model_dump(), **changes})
                work = await asyncio.to_thread(_load, name, options, state.device, version)
            except ValueError as error:
                raise Invalid(str(error)) from error
            await served.lane.swap(work)
            state.metrics.version.labels(name).set(version)
            return {
                "reward": name,
                "version": version,
                "weights_sha256": work.info.weights_sha256,
                "seconds": round(time.monotonic() - began, 3),
            }

    if any(served.room is not None for served in state.rewards.values()):
        app.include_router(importlib.import_module("services.fitting.http").router(state))

    @app.post("/admin/drain")
    async def drain() -> dict[str, str]:
        """Readiness off; what was accepted is finished. The process stays until it gets SIGTERM."""
        await state.drain()
        return {"status": "drained"}

    return app


def _load(name: str, options: RewardConfig, device: str, version: int) -> RewardWork:
    reward = load_reward(name, options.options(), options.use, device)
    reward.info = reward.info.model_copy(update={"version": version})
    work = RewardWork(reward)
    warm_up(work, 1, device)
    return work
