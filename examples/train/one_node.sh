#!/bin/sh
# All GPUs of this machine (GPUS=4: so many; without a GPU, processes over gloo).
set -e
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m trainer "$@"
