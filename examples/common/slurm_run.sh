#!/usr/bin/env bash
# Inside a Slurm allocation: one container on every node, in it the launch.sh of $EXAMPLE. Called by slurm.sbatch.
set -euo pipefail
: "${SLURM_JOB_NUM_NODES:?submit slurm.sbatch instead}" "${EXAMPLE:?set by slurm.sbatch}"
: "${CONTAINER:?CONTAINER: the image, as Pyxis takes it}"
: "${MODELS:?MODELS: directory of the checkpoints}" "${DATA:?DATA: directory of the prompts}"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
MASTER_ADDR="${hosts%%$'\n'*}"
export MASTER_ADDR NNODES="$SLURM_JOB_NUM_NODES" GPUS="${SLURM_GPUS_ON_NODE:-8}"
# A port of the job's own: another job on the same node may use the default.
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# --kill-on-bad-exit: a node that fails ends the others at once instead of leaving them in a collective.
exec srun --kill-on-bad-exit=1 --container-image="$CONTAINER" --container-workdir=/workspace/sead_megatron \
  --container-mounts="$PWD/runs:/workspace/sead_megatron/runs,$MODELS:/workspace/sead_megatron/models,$DATA:/workspace/sead_megatron/data,${CACHE:-$HOME/.cache/sead}:/cache" \
  bash -c 'NODE_RANK="$SLURM_NODEID" "$EXAMPLE/launch.sh" "$@"' launch "$@"
