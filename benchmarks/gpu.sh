#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under nine minutes on one H100: the kernels' tests, the training step
# against its peers, scoring, kernels, a real 7B-shape NF4 run, and the slower tests. No network is used; weights are
# random. A step that fails or runs out of time does not stop the others; its .json has what it measured until then.
# usage: [PYTHON=python3] [PEERS=python] [OUT=benchmarks/results/gpu] bash benchmarks/gpu.sh [--dry_run] [STEP...]
#   PYTHON     an interpreter with this package's libraries; benchmarks/README.md says what a bare machine lacks
#   PEERS      an interpreter with TRL, Unsloth or LLaMA-Factory (benchmarks/peers.txt); else they are left to PYTHON
#   OUT        takes one .json a benchmark, log.txt with everything printed, summary.txt with exit codes and seconds
#   --dry_run  the same steps at tiny sizes on the CPU: shows that each starts
#   STEP...    only these, with the inputs that they need; log and summary are named after them
#
# All steps together have the deadline below, and come in the order of what they are worth. The limits of those up to
# lora add up to it, so that none takes another's time; those after lora get what is left. Named steps get all there is,
# in the same order: with them a second run makes up for what the first had no time for.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${OUT:-$root/benchmarks/results/gpu}")
cd "$root"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
case ${1:-} in
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "$root/benchmarks/gpu.sh"
        exit 0
        ;;
esac
dry=
[ "${1:-}" = "--dry_run" ] && dry=1 && shift
steps="hardware inputs test_kernels train_step scoring projector attention lora"
steps+=" train test_host_syncs test_layers test_autotune"
only=" $* "
for name in "$@"; do
    if [[ " $steps " != *" $name "* ]]; then
        echo "gpu.sh: no step is called $name; there are $steps" >&2
        exit 2
    fi
    case $name in train_step | scoring | train) only+="inputs " ;; esac
done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=4
export PYTHONUNBUFFERED=1 # what a step that is ended has printed is in the log
[ -n "$dry" ] && export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=2

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work # also what a step that is ended leaves lying about
named=${*:+-$*}
log=$out/log${named// /-}.txt summary=$out/summary${named// /-}.txt
: >"$log"
: >"$summary"
deadline=530 # seconds, for all steps together; a dry run on busy cores gets more
[ -n "$dry" ] && deadline=3000

# step NAME LIMIT COMMAND...: run within LIMIT seconds and what is left of the deadline; note exit code and seconds.
step() {
    local name=$1 limit=$2 begun=$SECONDS left=$((deadline - SECONDS)) code
    [ "$only" = "  " ] || [[ $only == *" $name "* ]] || return
    shift 2
    [ -n "$dry" ] && limit=$((limit * 10))
    [ "$only" != "  " ] || [ "$left" -lt "$limit" ] && limit=$left
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
    if [ "$limit" -lt 15 ]; then
        echo "$name: not started, no time left; bash benchmarks/gpu.sh $name" | tee -a "$log" "$summary"
        return
    fi
    timeout -k 5 "$limit" "$@" >>"$log" 2>&1
    code=$?
    case $code in
        0) said="ok" ;;
        5) said="exit 5 (pytest: no test was collected)" ;;
        124 | 137) said="ran out of its $limit s" ;;
        *) said="exit $code: $(grep -v '^ *$' "$log" | tail -n 1 | cut -c1-160)" ;;
    esac
    printf '%-16s %4d s  %s\n' "$name" $((SECONDS - begun)) "$said" | tee -a "$summary"
}

# tests NAME LIMIT FILE...: GPU tests, a line each.
tests() {
    step "$1" "$2" "$python" -m pytest -vv -m gpu --durations 5 "${@:3}"
}

if [ -n "$dry" ]; then
    shape=tiny sizes=(--samples 4 --rounds 1 --budget 1024) scored=(--rows 2 --rounds 1) batch=4 budget=1024
    projector=(--device cpu --items 32 --slots 64 --width 128 --tokens 256 --rounds 2)
    lora=(--repeats 2 --shrink 16) attention=(--repeats 2 --tokens 1000)
else
    shape=7b sizes=(--quick) scored=(--rows 16 --rounds 4) batch=32 budget=4096
    projector=() lora=() attention=(--device cuda --tokens 8000)
fi
peers=()
[ -n "${PEERS:-}" ] && peers=(--peers "$PEERS")

# Predicted for an H100 without peers, seconds, none measured: 10 + 30 + 70 + 180 + 30 + 25 + 15 + 20 up to lora, and
# 40 + 70 + 120 + 70 after it.
step hardware 25 "$python" -c '
import os, platform, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU: this step needs one to say more"
print(platform.python_version(), torch.__version__, torch.version.cuda, os.cpu_count(), "cores;", gpu)'
step inputs 70 "$python" benchmarks/arms/inputs.py --out "$work/inputs" --shape "$shape"
tests test_kernels 120 tests/gpu/test_{attention,lora,projector}.py
step train_step 200 "$python" benchmarks/train_step.py --inputs "$work/inputs" "${sizes[@]}" "${peers[@]}" \
    --out "$out/train_step.json"
step scoring 40 "$python" benchmarks/scoring.py --inputs "$work/inputs" "${scored[@]}" --out "$out/scoring.json"
step projector 30 "$python" benchmarks/projector.py "${projector[@]}" --out "$out/projector.json"
step attention 20 "$python" benchmarks/attention.py "${attention[@]}" --out "$out/attention.json"
step lora 25 "$python" benchmarks/lora.py "${lora[@]}" --out "$out/lora.json"
# Without TensorBoard's files, whose package a bare machine need not have.
step train 60 "$python" launch/train.py --model.path "$work/inputs/model" --data.shards "$work/inputs/shards" \
    --recommender.path "$work/inputs/recommender" --out "$work/run" --data.max_steps 2 --data.workers 0 \
    --data.global_batch_samples "$batch" --data.max_tokens_per_microbatch "$budget" --tracking.tensorboard false
tests test_host_syncs 100 tests/gpu/test_host_syncs.py
tests test_layers 150 tests/gpu/test_layers.py
tests test_autotune 100 tests/gpu/test_autotune.py

printf '\n%s s in all; results in %s\n' "$SECONDS" "$out" | tee -a "$summary"
cat "$summary"
! grep -qvE '^[a-z_]+ +[0-9]+ s  ok$|in all; results|^$' "$summary"
