"""Pictures, and what nsfwjs under TensorFlow.js says of them: `python -m tests.services.rewards_detectors.nsfwjs_vectors FOLDER`.

FOLDER holds node_modules with nsfwjs@4.4.0 and @tensorflow/tfjs (npm install). The answers are kept in nsfwjs_vectors.json.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from world import photographs

HERE = Path(__file__).parent
ANSWERS = HERE / "nsfwjs_vectors.json"


def pictures() -> list[NDArray[np.uint8]]:
    """Photographs, enlarged ones, and made ones; sizes that are kept, enlarged and reduced. The same on every machine."""
    shown, _ = photographs.load("test")
    y, x = np.mgrid[0:224, 0:224]
    waves = np.stack([(x * y // 37) % 256, (x + 2 * y) % 256, ((x - 112) ** 2 + (y - 112) ** 2) // 64 % 256], -1)
    y, x = np.mgrid[0:300, 0:420]
    discs = np.where((((x % 90) - 45) ** 2 + ((y % 70) - 35) ** 2 < 900)[..., None], [200, 150, 120], [30, 60, 90])
    noise = np.random.default_rng(0).integers(0, 256, (160, 97, 3))
    flat = np.full((224, 224, 3), 128)
    made = [a.astype(np.uint8) for a in (waves, discs, noise, flat)]
    return [*(shown[i] for i in (0, 7, 8)), np.repeat(np.repeat(shown[3], 12, 0), 12, 1), *made]


def main() -> int:
    asked = [{"shape": a.shape, "data": base64.b64encode(a.tobytes()).decode()} for a in pictures()]
    done = subprocess.run(
        ["node", str(HERE / "nsfwjs_reference.cjs")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        cwd=sys.argv[1],
    )
    rows = [{k.lower(): v for k, v in sorted(row.items())} for row in json.loads(done.stdout)]
    ANSWERS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
