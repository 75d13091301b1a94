"""Operations on their own listener: other weights, drain. Never on the port that callers know.

    admin: {port: 8900, env: VERISM_ADMIN_KEY}

    curl -H "authorization: Bearer $VERISM_ADMIN_KEY" -X POST localhost:8900/admin/rewards/detector/weights \\
      -H 'content-type: application/json' -d '{"folder": "world/detector"}'
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from services.app import Served, State, load_reward
from services.auth import KeyOptions, Keys
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

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield

    app = FastAPI(
        title="Verism admin",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
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
    async def weights(name: str, asked: Weights, request: Request) -> dict[str, Any]:
        """Load beside the live model, warm up, swap between two batches. A failure leaves the live one as it is."""
        served = plain(name)
        assert served.lane is not None
        if loading.locked():
            raise NotReady("other weights are being loaded; try again when they are in place", retry_after_ms=1000)
        async with loading:
            options = {**served.options.options(), **(asked.model_extra or {})}
            version = asked.version or served.info.version + 1
            if version <= served.info.version:
                raise Invalid(f"version: {name} is at {served.info.version}; versions only rise")
            began = time.monotonic()
            try:
                work = await asyncio.to_thread(_load, name, options, served.options.use, state.device, version)
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

    @app.post("/admin/drain")
    async def drain() -> dict[str, str]:
        """Readiness off; what was accepted is finished. The process stays until it gets SIGTERM."""
        await state.drain()
        return {"status": "drained"}

    return app


def _load(name: str, options: dict[str, Any], use: str, device: str, version: int) -> RewardWork:
    for key in ("folder", "path"):
        if key in options and not Path(str(options[key])).exists():
            raise ValueError(f"{key}: nothing at {options[key]}")
    reward = load_reward(name, options, use, device)
    reward.info = reward.info.model_copy(update={"version": version})
    work = RewardWork(reward)
    warm_up(work, 1, device)
    return work
