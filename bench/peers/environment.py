"""Make the peers' environments beside Verism's: `python -m bench.peers.environment`; a second call with nothing changed does nothing."""

import hashlib
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from bench.peers import ROOT

WANTED = {".venv-peers": "requirements.txt", ".venv-peers-infinity": "requirements-infinity.txt"}


def make(folder: Path, requirements: Path) -> None:
    """A virtual environment over this one: what a peer does not pin otherwise is Verism's. CalledProcessError when pip fails."""
    here = sysconfig.get_path("purelib")
    print_now = hashlib.sha256(f"{here}\n{requirements.read_text()}".encode()).hexdigest()
    stamp = folder / ".bench"
    if stamp.is_file() and stamp.read_text() == print_now:
        return
    print(f"making {folder.name} from {requirements.relative_to(ROOT)}", file=sys.stderr)
    venv.create(folder, symlinks=True, with_pip=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    (site / "verism_main.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", requirements], check=True)
    stamp.write_text(print_now)


def main() -> int:
    failed = 0
    for name, requirements in WANTED.items():
        try:
            make(ROOT / name, ROOT / "bench" / "peers" / requirements)
        except subprocess.CalledProcessError as error:
            print(f"{name} could not be made ({error}); its peers will be left out", file=sys.stderr)
            failed += 1
    return 0 if failed < len(WANTED) else 1


if __name__ == "__main__":
    sys.exit(main())
