#!/usr/bin/env bash
# Starts this node's part of a GPU run. The launch.sh of an example calls it with its configuration.
#
#   launch.sh CONFIG [key=value ...]                  train; again after an interruption: continues
#   launch.sh CONFIG --dry-run [key=value ...]        build layouts, rank mapping and empty models on a CPU
#   launch.sh CONFIG --plan [key=value ...]           memory of every rank and time of a step
#   launch.sh CONFIG --check [key=value ...]          check every input, as a start would
#
# GPUS (default 8) processes on each of NNODES (default 1) nodes. On several nodes start it on each, with NODE_RANK and
# MASTER_ADDR (and MASTER_PORT, default 29500) set; slurm.sbatch does that.
set -euo pipefail

config="${1:?usage: launch.sh CONFIG [--dry-run | --plan | --check] [key=value ...]}"
shift
gpus="${GPUS:-8}"
nodes="${NNODES:-1}"
world=$((gpus * nodes))
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

case "${1:-}" in
  --dry-run)
    shift
    exec python -m sead_megatron dry-run "$config" "$@" --world-size "${WORLD_SIZE:-$world}" --ranks-per-node "$gpus" ;;
  --plan)
    shift
    exec python "$root/tools/plan.py" "$config" "$@" --world-size "${WORLD_SIZE:-$world}" ;;
  --check)
    shift
    exec python -m sead_megatron check "$config" "$@" --world-size "${WORLD_SIZE:-$world}" ;;
esac

# Megatron overlaps its tensor-parallel collectives with GEMMs only when kernels start in the order they were issued.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may be set: vLLM turns it off around its own pool (0.32 and 0.33).
several_nodes=()
if [ "$nodes" -gt 1 ]; then
  : "${NODE_RANK:?NODE_RANK: the number of this node, from 0}" "${MASTER_ADDR:?MASTER_ADDR: the host of node 0}"
  several_nodes=(--nnodes "$nodes" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec python -m sead_megatron train "$config" "$@" --nproc-per-node "$gpus" "${several_nodes[@]}"
