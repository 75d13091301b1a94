"""Ray Serve: one replica, its own batching over requests, raw pixels as the body."""

import json
import signal
from typing import Any

from bench import models
from bench.peers import Peer, arguments, pack_raw, unpack_raw

PEER = Peer(
    name="Ray Serve",
    setting="raw pixels, serve.batch of up to 32 requests, wait 5 ms",
    encode=pack_raw,
    decode=lambda body: json.loads(body)["scores"],
    content_type="application/octet-stream",
    module=__name__,
    health="/-/healthz",
)


def serve(model: str, port: int) -> None:
    import ray
    from ray import serve as ray_serve
    from starlette.requests import Request

    @ray_serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
    class Scores:
        def __init__(self) -> None:
            self.forward = models.load(model)

        @ray_serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
        async def scores(self, bodies: list[bytes]) -> list[list[float]]:
            import asyncio

            groups = [unpack_raw(body) for body in bodies]
            flat: list[Any] = [image for group in groups for image in group]
            scores = iter(await asyncio.to_thread(self.forward, flat))
            return [[next(scores) for _ in group] for group in groups]

        async def __call__(self, request: Request) -> dict[str, list[float]]:
            return {"scores": await self.scores(await request.body())}

    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=2**30, log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(Scores.bind(), route_prefix="/predict")
    try:
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    finally:
        ray_serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    serve(*arguments())
