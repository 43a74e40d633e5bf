#!/usr/bin/env bash
# Trains on two CPU processes. Further arguments override the configuration:
#   examples/smollm2/launch.sh teacher.parallel.pipeline=2 run_dir=runs/smollm2_pp2
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -f examples/smollm2/models/student/config.json ] || { echo "run examples/smollm2/prepare.sh first" >&2; exit 2; }
exec python -m sead_megatron train examples/smollm2/config.yaml --nproc-per-node 2 "$@"
