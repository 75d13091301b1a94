"""Two ranks, one detector: rank 0 refits it on the pictures of both, to the numbers of one rank. By torchrun, as users start them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.trainer.refitting import serve
from tests.trainer.run.test_parallel import lines
from tests.trainer.test_adversary import raw


def train(root: Path, folder: Path, config: dict[str, Any], ranks: int) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *torchrun, "trainer", str(folder / "recipe.yaml"), f"--run-dir={folder / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.e2e
@pytest.mark.timeout(400)
def test_two_ranks_refit_as_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVERSARY_KEY", "secret")
    sent, told = [], []
    for ranks in (1, 2):
        with serve() as service:
            schedule = {"schedule": {"use": "reference_below"}, "pictures": 10, "lease_s": 60}
            references = {"path": "world/photographs", "classes": ["sandal"], "evaluated": 12}  # darker than the rest: always below
            config = raw(service.url, schedule, group={"prompts": 4, "size": 4}, references=references, steps=2)
            config["sampling"]["micro_batch"] = 4
            done = train(root, tmp_path / str(ranks), config, ranks)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
            sent.append([fit["items"] for fit in service.fits])
            assert sent[-1] and all(len(items["generated"]) == 10 for items in sent[-1])
        told.append(
            [{k: v for k, v in line.items() if "seconds" not in k and "/second" not in k} for line in lines(tmp_path / str(ranks))]
        )
    assert [[item["prompt"] for item in items["generated"]] for items in sent[0]] == [
        [item["prompt"] for item in items["generated"]] for items in sent[1]
    ]
    for one, two in zip(*told, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == (pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value), key
