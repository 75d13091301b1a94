#!/bin/sh
# The same on each of two machines: MASTER is the first one's name, RANK_OF_NODE 0 there and 1 on the other.
set -e
exec torchrun --nnodes 2 --node-rank "${RANK_OF_NODE:?0 on the first machine, 1 on the second}" --nproc-per-node "${GPUS:-gpu}" \
  --master-addr "${MASTER:?the name of the first machine}" --master-port "${PORT:-29500}" -m trainer "$@"
