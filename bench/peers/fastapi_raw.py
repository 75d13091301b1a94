"""FastAPI at its best: raw pixels as the body, the forward pass in a thread under a lock; batching it has none."""

import json
import threading

from bench import models
from bench.peers import Peer, arguments, pack_raw, unpack_raw

PEER = Peer(
    name="FastAPI, best",
    setting="raw pixels, forward in the thread pool, uvloop and httptools",
    encode=pack_raw,
    decode=lambda body: json.loads(body)["scores"],
    content_type="application/octet-stream",
    module=__name__,
)


def serve(model: str, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, Request
    from starlette.concurrency import run_in_threadpool

    app, forward, device = FastAPI(), models.load(model), threading.Lock()

    def work(body: bytes) -> list[float]:
        with device:
            return forward(unpack_raw(body))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def predict(request: Request) -> dict[str, list[float]]:
        return {"scores": await run_in_threadpool(work, await request.body())}

    app.post("/predict")(predict)
    uvicorn.run(app, port=port, log_level="warning", loop="uvloop", http="httptools")


if __name__ == "__main__":
    serve(*arguments())
