"""Servers that people use today, each at its best setting, in environments of their own.

One file each: `PEER` says how to start it and how to ask it; `serve(model, port)` is the server, and imports the peer only there.
`python -m bench.peers.NAME MODEL PORT` runs one by hand.
"""

import base64
import importlib
import io
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
Pictures = Sequence[NDArray[np.uint8]]
NAMES = ("litserve_raw", "fastapi_json", "fastapi_raw", "flask_pickle", "infinity_images", "ray_raw")


@dataclass(frozen=True)
class Peer:
    """`encode` makes the body of a group, `decode` its scores of the answer; `health` is what a load balancer would ask.

    Where `encode` is so slow that little else would be seen, `made_before` has its bodies made before the clock starts."""

    name: str
    setting: str
    encode: Callable[[Pictures], bytes]
    decode: Callable[[bytes], list[float]]
    content_type: str
    module: str
    path: str = "/predict"
    health: str = "/health"
    environment: str = ".venv-peers"
    made_before: bool = False

    @property
    def python(self) -> Path:
        return ROOT / self.environment / "bin" / "python"


def find(name: str) -> Peer:
    peer: Peer = importlib.import_module(f"bench.peers.{name}").PEER
    return peer


def pack_raw(images: Pictures) -> bytes:
    """Pictures of one size as n, height, width (uint32, little endian) and their pixels: the cheapest lossless body there is."""
    return b"".join([struct.pack("<III", len(images), *images[0].shape[:2]), *(image.tobytes() for image in images)])


def unpack_raw(body: bytes) -> list[NDArray[np.uint8]]:
    count, height, width = struct.unpack_from("<III", body)
    return list(np.frombuffer(body, np.uint8, offset=12).reshape(count, height, width, 3))


def to_file(image: NDArray[np.uint8], kind: str) -> str:
    """Base64 of a PNG or BMP file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def arguments() -> tuple[str, int]:
    return sys.argv[1], int(sys.argv[2])
