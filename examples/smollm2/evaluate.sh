#!/usr/bin/env bash
# Greedy pass@1 of the teacher (SmolLM2-135M-Instruct) on benchmarks, on two CPU processes. Options of `evaluate` may follow --:
#   examples/smollm2/evaluate.sh MATH-500.parquet AMC23.parquet -- --limit 4
set -euo pipefail
benchmarks=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do benchmarks+=("$(realpath "$1")"); shift; done
shift || true
[ ${#benchmarks[@]} -gt 0 ] || { echo "usage: $0 BENCHMARK ... [-- OPTION ...]" >&2; exit 2; }
cd "$(dirname "$0")/../.."
[ -f examples/smollm2/models/teacher/config.json ] || { echo "run examples/smollm2/prepare.sh first" >&2; exit 2; }
exec python -m sead_megatron evaluate examples/smollm2/models/teacher --benchmarks "${benchmarks[@]}" \
  --output runs/smollm2_evaluation --device cpu --max-new-tokens 512 --max-num-seqs 64 --batch 128 --nproc-per-node 2 \
  --instruction 'Please reason step by step, and put your final answer within \boxed{}.' "$@"
