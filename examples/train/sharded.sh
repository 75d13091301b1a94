#!/bin/sh
# FSDP2: each GPU holds its part of the network's weights. For grpo and guard.
set -e
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" -m trainer "$@" parallel.shard=true
