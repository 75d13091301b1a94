"""Make model.safetensors anew from npm's nsfwjs: `python -m services.weights.nsfwjs.recipe` (needs npm and its registry).

The package carries the weights as base64 inside a JavaScript file, eight bits each: value = min + scale * byte. The bytes are kept
as they are and the ranges written into the header, so nothing is rounded a second time. No JavaScript is run.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

PACKAGE = "nsfwjs@4.4.0"
SHA256 = "585cd178f3b994337c4d10a87b080d342fc52f8b9bf0085c4d1f345a3a1c5382"  # of the package's archive
FOLDER = Path(__file__).parent
_MODEL = "package/dist/models/mobilenet_v2/"
_TENSOR = re.compile(
    r'\{name:"([\w/]+)",shape:\[([\d,]+)\],dtype:"float32",quantization:\{min:([-+.\de]+),scale:([-+.\de]+),dtype:"uint8"\}\}'
)


def archive(folder: Path) -> Path:
    """The package as npm packs it; RuntimeError when its bytes are not the ones that were looked at."""
    subprocess.run(["npm", "pack", PACKAGE, "--pack-destination", str(folder)], check=True, capture_output=True)
    file = next(folder.glob("*.tgz"))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{PACKAGE} has SHA-256 {found}, not {SHA256}: look at what changed before you convert it")
    return file


def tensors(file: Path) -> tuple[dict[str, NDArray[np.uint8]], dict[str, tuple[float, float]]]:
    """Bytes by name in the shape of the manifest, and (min, scale) by name."""
    with tarfile.open(file) as tar:
        texts = []
        for name in ("model.min.js", "group1-shard1of1.min.js"):
            member = tar.extractfile(_MODEL + name)
            if member is None:
                raise RuntimeError(f"{file.name} holds no {_MODEL}{name}")
            texts.append(member.read().decode())
    data = base64.b64decode(max(re.findall(r"[A-Za-z0-9+/]{1000,}={0,2}", texts[1]), key=len))
    out, ranges, at = {}, {}, 0
    for name, shape, low, scale in _TENSOR.findall(texts[0]):
        sides = tuple(int(n) for n in shape.split(","))
        count = int(np.prod(sides))
        out[name] = np.frombuffer(data, np.uint8, count, at).reshape(sides)
        ranges[name], at = (float(low), float(scale)), at + count
    if at != len(data):
        raise RuntimeError(f"the manifest names {at} bytes of weights, the shard holds {len(data)}")
    return out, ranges


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found, ranges = tensors(archive(Path(folder)))
    path = FOLDER / "model.safetensors"
    save_file(found, path, metadata={"source": PACKAGE, "ranges": json.dumps(ranges)})
    print(f"{path.name}: {len(found)} tensors, {path.stat().st_size:,} bytes, {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
