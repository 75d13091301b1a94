#!/usr/bin/env bash
# Builds both container images and runs a command in each; with a Docker engine where one answers, else with buildah
# over a Debian base made by debootstrap. Needs root for the latter.
#
# VERISM_IMAGES_WORK  where buildah keeps its layers and the base (default: a temporary folder, removed at the end)
# VERISM_BASE         another base image that the engine can pull (default with Docker: python:3.11-slim)
# VERISM_MIRROR       the Debian mirror for debootstrap (default: debootstrap's own)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
say() { printf 'images: %s\n' "$*" >&2; }
minutes() { awk -v s="$(($(date +%s) - $1))" 'BEGIN { printf "%.1f min", s / 60 }'; }
begin=$(date +%s)

work=${VERISM_IMAGES_WORK:-}
if [ -z "$work" ]; then
    work=$(mktemp -d "${TMPDIR:-/tmp}/verism-images.XXXXXX")
    trap 'rm -rf -- "$work"' EXIT
else
    mkdir -p "$work"
fi

# The builder's pip configuration becomes a build secret; folders and files it names are mounted, read-only, for the build only.
secret=$work/pip.conf
mounts=()
(umask 077 && : >"$secret")
while IFS= read -r path; do mounts+=(--volume "$path:$path:ro"); done < <(
    python3 -m pip config list 2>/dev/null | python3 -c '
import ast, os, pathlib, sys
values = {}
for line in sys.stdin:
    key, _, value = line.strip().partition("=")
    section, _, name = key.rpartition(".")
    if section in ("global", "install", ":env:") and (name not in values or section == ":env:"):
        values[name] = ast.literal_eval(value)
pathlib.Path(sys.argv[1]).write_text("[global]\n" + "".join(
    f"{name} = " + "\n    ".join(value.split()) + "\n" for name, value in values.items()))
for value in values.values():
    for word in value.split():
        path = word.removeprefix("file://").removesuffix("/simple") if word.startswith("file://") else word
        if path.startswith("/") and os.path.exists(path):
            print(path)
' "$secret"
)

check_reward='import services, shared, torch, torchvision, timm, transformers, os; assert services.__file__.startswith("/app/"); assert os.getuid() == 10001'
check_trainer='import trainer, shared, torch, torchvision, diffusers, peft, transformers, os; assert trainer.__file__.startswith("/app/"); assert os.getuid() == 10001'

if docker info >/dev/null 2>&1; then
    for name in reward trainer; do
        start=$(date +%s)
        say "verism-$name: building with Docker"
        DOCKER_BUILDKIT=1 docker build -q -f "Dockerfile.$name" -t "verism-$name" --secret "id=pip,src=$secret" \
            --build-arg "BASE=${VERISM_BASE:-python:3.11-slim}" ${VERISM_TORCH:+--build-arg "VERISM_TORCH=$VERISM_TORCH"} .
        command=verism-serve check=$check_reward
        [ "$name" = reward ] || command=verism-train check=$check_trainer
        docker run --rm --read-only --tmpfs /tmp "verism-$name" "$command" --help
        docker run --rm --read-only --tmpfs /tmp "verism-$name" python -c "$check"
        say "verism-$name: $(docker image inspect -f '{{.Size}}' "verism-$name" | awk '{ printf "%.2f GB", $1 / 1e9 }'), $(minutes "$start")"
    done
    exit 0
fi

[ "$(id -u)" = 0 ] || { say "no Docker engine answers, and buildah's chroot needs root: start Docker, or run as root"; exit 1; }
for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null && continue
    say "installing $tool"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$tool" >/dev/null; } ||
        { say "cannot install $tool; do it by hand: apt-get install $tool"; exit 1; }
done

export BUILDAH_ISOLATION=chroot
# vfs mounts nothing, so the folder can go at the end; with --root given, buildah reads no STORAGE_DRIVER.
store=(--storage-driver vfs --root "$work/store" --runroot "$work/run")
free=$(df -Pk "$work" | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free" -ge 20 ] || { say "$work has $free GiB free and the build takes up to 20; name another place in VERISM_IMAGES_WORK"; exit 1; }

base=${VERISM_BASE:-localhost/verism-base}
if [ -z "${VERISM_BASE:-}" ] && ! buildah "${store[@]}" inspect --type image "$base" >/dev/null 2>&1; then
    start=$(date +%s)
    say "making a Debian 12 base"
    rm -rf "$work/base"
    debootstrap --variant=minbase --include=python3,python3-venv bookworm "$work/base" ${VERISM_MIRROR:+"$VERISM_MIRROR"} >"$work/debootstrap.log" 2>&1 ||
        { tail -n 20 "$work/debootstrap.log" >&2; exit 1; }
    rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/* "$work"/base/usr/share/doc/*
    container=$(buildah "${store[@]}" from scratch)
    buildah "${store[@]}" add -q "$container" "$work/base" / >/dev/null
    buildah "${store[@]}" commit -q --rm "$container" "$base" >/dev/null
    rm -rf "$work/base"
    say "base: $(minutes "$start")"
fi

for name in reward trainer; do
    start=$(date +%s)
    say "verism-$name: building with buildah"
    buildah "${store[@]}" bud --quiet --layers=false --network host --pull-never "${mounts[@]}" --secret "id=pip,src=$secret" \
        --build-arg "BASE=$base" ${VERISM_TORCH:+--build-arg "VERISM_TORCH=$VERISM_TORCH"} \
        -f "Dockerfile.$name" -t "verism-$name" . >/dev/null
    command=verism-serve check=$check_reward
    [ "$name" = reward ] || command=verism-train check=$check_trainer
    container=$(buildah "${store[@]}" from --pull-never "localhost/verism-$name")
    buildah "${store[@]}" run "$container" -- "$command" --help
    buildah "${store[@]}" run "$container" -- python -c "$check"
    size=$(du -sm "$(buildah "${store[@]}" mount "$container")" | cut -f1)
    buildah "${store[@]}" umount "$container" >/dev/null
    buildah "${store[@]}" rm "$container" >/dev/null
    [ -n "${VERISM_IMAGES_WORK:-}" ] || buildah "${store[@]}" rmi "localhost/verism-$name" >/dev/null
    say "verism-$name: $size MB, $(minutes "$start")"
done
say "both images built and tried in $(minutes "$begin")"
