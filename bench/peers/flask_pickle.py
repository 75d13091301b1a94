"""Flask under gunicorn with pickles both ways and one sync worker, as the reward servers of the diffusion-RL repositories do.

Two things are better here than there: a request is one forward pass, not one for each picture, and the body is only read on loopback
from this benchmark. Nothing else in the repository may unpickle: whoever reaches such a port can run code on the machine.
"""

import os
import pickle  # noqa: TID251
import sys
from typing import Any

import numpy as np
from PIL import Image

from bench import models
from bench.peers import Peer, arguments

PEER = Peer(
    name="Flask + gunicorn + pickle",
    setting="a pickled list of PIL pictures, one sync worker, one forward pass a request",
    encode=lambda images: pickle.dumps([Image.fromarray(image) for image in images]),
    decode=pickle.loads,
    content_type="application/octet-stream",
    module=__name__,
    path="/",
)


def create_app() -> Any:
    from flask import Flask, request

    app, forward = Flask(__name__), models.load(os.environ["BENCH_MODEL"])

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/")
    def score() -> bytes:
        return pickle.dumps(forward([np.asarray(image) for image in pickle.loads(request.get_data())]))

    return app


def serve(model: str, port: int) -> None:
    os.environ["BENCH_MODEL"] = model
    place = ["-b", f"127.0.0.1:{port}", "-w", "1", "--timeout", "3600", "--log-level", "warning", "--no-control-socket"]
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *place, "bench.peers.flask_pickle:create_app()"])


if __name__ == "__main__":
    serve(*arguments())
