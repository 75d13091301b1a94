"""infinity (infinity_emb): its HTTP image path, its batching and its threads, with the benchmark's model where its CLIP would run.

Its own models are CLIP and its kin, so `encode_core` is replaced and nothing else. Pictures go as it takes them, as data URIs; BMP is
the lossless format that it decodes fastest.
"""

import importlib
import json
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench import models
from bench.peers import Peer, arguments, to_file

PEER = Peer(
    name="infinity",
    setting="BMP data URIs in JSON, batch_size 32",
    encode=lambda images: json.dumps(
        {"model": "bench", "modality": "image", "input": [f"data:image/bmp;base64,{to_file(image, 'BMP')}" for image in images]}
    ).encode(),
    decode=lambda body: [entry["embedding"][0] for entry in sorted(json.loads(body)["data"], key=lambda e: e["index"])],
    content_type="application/json",
    module=__name__,
    path="/embeddings",
    environment=".venv-peers-infinity",
)


def serve(model: str, port: int) -> None:
    import uvicorn
    from infinity_emb.args import EngineArgs
    from infinity_emb.infinity_server import create_server
    from infinity_emb.transformer.abstract import BaseTIMM

    class Model(BaseTIMM):
        def __init__(self, *, engine_args: EngineArgs) -> None:
            self.engine_args, self.forward = engine_args, models.load(model)

        def encode_pre(self, sentences_or_images: list[Any]) -> list[Any]:
            return [np.asarray(image.convert("RGB")) for image in sentences_or_images]

        def encode_core(self, features: list[Any]) -> list[float]:
            return self.forward(features)

        def encode_post(self, embedding: list[float], skip_quanitzation: bool = True) -> list[Any]:
            return [np.array([score]) for score in embedding]

        def tokenize_lengths(self, sentences: list[str]) -> list[int]:
            return [len(sentence) for sentence in sentences]

    selection: Any = importlib.import_module("infinity_emb.inference.select_model")  # the package has a function of this name
    selection.get_engine_type_from_config = lambda engine_args: SimpleNamespace(value=Model)
    engine = EngineArgs(
        model_name_or_path="bench",
        served_model_name="bench",
        batch_size=32,
        model_warmup=False,
        device="cpu",
        bettertransformer=False,
    )
    app = create_server(engine_args_list=[engine])
    uvicorn.run(app, port=port, log_level="warning", loop="uvloop", http="httptools")


if __name__ == "__main__":
    serve(*arguments())
