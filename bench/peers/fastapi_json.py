"""FastAPI as people write it: PNG in base64 in JSON, and the forward pass inside `async def`."""

import base64
import io
import json

import numpy as np
from PIL import Image

from bench import models
from bench.peers import Peer, arguments, to_file

PEER = Peer(
    name="FastAPI, as written",
    setting="base64 PNG in JSON, forward inside async def",
    encode=lambda images: json.dumps({"images": [to_file(image, "PNG") for image in images]}).encode(),
    decode=lambda body: json.loads(body)["scores"],
    content_type="application/json",
    module=__name__,
    made_before=True,
)


def serve(model: str, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    class Body(BaseModel):
        images: list[str]

    app, forward = FastAPI(), models.load(model)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    async def predict(body: Body) -> dict[str, list[float]]:
        return {"scores": forward([np.asarray(Image.open(io.BytesIO(base64.b64decode(i))).convert("RGB")) for i in body.images])}

    uvicorn.run(app, port=port, log_level="warning")


if __name__ == "__main__":
    serve(*arguments())
