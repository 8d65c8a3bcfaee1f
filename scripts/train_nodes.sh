#!/bin/sh
# A training on several machines without a scheduler. Run the same line on every machine, the first of them named:
#
#   scripts/train_nodes.sh FIRST_HOST NODES PROCESSES CONFIG [key=value ...]
#   scripts/train_nodes.sh gpu-a 2 8 configs/coco_fcos_r50_1x.yaml output_dir=/shared/runs/fcos
#
# PROCESSES: of each machine, one a GPU. FIRST_HOST must be reachable on port ${PORT:-29500}; it keeps the membership, so
# the run ends with it. Any other machine may be lost: when the same line runs there again, all start again from the
# newest checkpoint. `output_dir` and the data must be on storage that all machines share.
set -eu
[ $# -ge 4 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
host=$1 nodes=$2 processes=$3 config=$4
shift 4
# Each start gets an address of its own; else a machine that comes back waits for one that was given out before it came.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes="$nodes" \
    --nproc-per-node="$processes" \
    --rdzv-id="$(basename "$config")" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$host:${PORT:-29500}" \
    --max-restarts=2 \
    "$(dirname "$0")/../tools/train.py" --config "$config" --resume "$@"
