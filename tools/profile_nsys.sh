#!/usr/bin/env bash
# Profile steps of a run with NVIDIA Nsight Systems: `tools/profile_nsys.sh --help`, and docs/profiling.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
Profile steps of a run with NVIDIA Nsight Systems.

    tools/profile_nsys.sh --steps A:B --output DIR [options] -- TORCHRUN_OPTION... -- CONFIG [key=value ...]

    tools/profile_nsys.sh --steps 10:12 --output runs/first/profile -- --standalone --nproc-per-node=8 -- config.yaml

starts torchrun, which starts this script once a rank. Ranks that are asked for run under `nsys profile`, each with a
report of its own (DIR/rank_R_steps_A_B.nsys-rep); the others run as always. nsys records between cudaProfilerStart and
cudaProfilerStop only, which the run calls at the steps A and B. One report holds all the steps that were asked for.

  --steps A:B     profile the steps A <= step < B, counted from 1: profile.start_step and profile.stop_step
  --output DIR    directory of the reports; a report of the same name is replaced
  --ranks LIST    ranks of the world, separated by commas (default 0): profile.ranks
  --trace LIST    what nsys traces (default cuda,nvtx,osrt,cublas,cudnn)
  --nsys OPTION   a further option of `nsys profile`, for example --nsys --cuda-graph-trace=node; may be repeated
  --python PATH   the interpreter of the run (default: $PYTHON, or else python)
  -h, --help      this text

Several nodes: give the same command on every node, with torchrun's own options between the two `--`, for example
`--nnodes=2 --node-rank=0 --master-addr=node0 --master-port=29500 --nproc-per-node=8` on the first and --node-rank=1 on
the second. Ranks are those of the whole world (0 and 8 are the first of each node), so the names of the reports differ,
and DIR may be shared by the nodes or local to each. nsys must be installed on every node.
TEXT
}

refuse() {
    echo "error: $1" >&2
    exit 2
}

require_nsys() {
    command -v nsys >/dev/null || refuse "nsys: not found in PATH; install NVIDIA Nsight Systems on every node, or \
profile with device: cpu, which needs no nsys (docs/profiling.md)"
}

# One rank of the torchrun world: --as-rank LIST REPORT TRACE NUMBER_OF_OPTIONS OPTION... COMMAND...
run_rank() {
    local ranks=$1 report=$2 trace=$3 count=$4
    shift 4
    local options=("${@:1:count}") command=("${@:count+1}")
    if [[ ",$ranks," != *",$RANK,"* ]]; then
        exec "${command[@]}"
    fi
    require_nsys
    # capture-range-end: nsys would end the run with the capture, unless told otherwise. No sampling: ranges and
    # kernels are what is looked for, and sampling slows the run down.
    exec nsys profile --trace="$trace" --sample=none --cpuctxsw=none \
        --capture-range=cudaProfilerApi --capture-range-end=stop \
        --output="${report//%RANK%/$RANK}" --force-overwrite=true \
        ${options[@]+"${options[@]}"} "${command[@]}"
}

value_of() {
    [[ $# -ge 2 && $2 != -- ]] || refuse "$1: needs a value; see --help"
}

main() {
    local steps='' output='' ranks=0 trace=cuda,nvtx,osrt,cublas,cudnn python=${PYTHON:-python}
    local nsys=() torchrun=()
    while [[ $# -gt 0 && $1 != -- ]]; do
        case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --steps | --output | --ranks | --trace | --python | --nsys)
            value_of "$@"
            case $1 in
            --steps) steps=$2 ;;
            --output) output=$2 ;;
            --ranks) ranks=$2 ;;
            --trace) trace=$2 ;;
            --python) python=$2 ;;
            --nsys) nsys+=("$2") ;;
            esac
            shift 2
            ;;
        *) refuse "$1: unknown option; see --help" ;;
        esac
    done
    [[ $steps =~ ^[1-9][0-9]{0,8}:[1-9][0-9]{0,8}$ ]] || refuse "--steps = \"$steps\": must be A:B; use for example 10:12"
    local start=${steps%:*} stop=${steps#*:}
    ((start < stop)) || refuse "--steps = \"$steps\": must end after it begins; use $start:$((start + 1)) for one step"
    [[ $ranks =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "--ranks = \"$ranks\": must be numbers and commas; use for example 0,8"
    [[ -n $output ]] || refuse "--output: missing; give the directory of the reports"
    [[ ${1-} == -- ]] || refuse "torchrun's options: missing; add them, and the configuration, each after --"
    shift
    while [[ $# -gt 0 && $1 != -- ]]; do
        torchrun+=("$1")
        shift
    done
    [[ $# -ge 2 ]] || refuse "configuration: missing; add -- CONFIG [key=value ...] after torchrun's options"
    shift
    require_nsys
    mkdir -p "$output" || refuse "--output = \"$output\": cannot be made; choose another directory"
    local self
    self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
    exec "$python" -m torch.distributed.run ${torchrun[@]+"${torchrun[@]}"} --no-python "$self" \
        --as-rank "$ranks" "$output/rank_%RANK%_steps_${start}_$stop" "$trace" "${#nsys[@]}" \
        ${nsys[@]+"${nsys[@]}"} "$python" -m sead_megatron train "$@" \
        "profile.start_step=$start" "profile.stop_step=$stop" "profile.ranks=[$ranks]"
}

if [[ ${1-} == --as-rank ]]; then
    shift
    run_rank "$@"
else
    main "$@"
fi
