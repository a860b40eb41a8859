#!/usr/bin/env bash
# Everything that needs a GPU, in one run of under nine minutes on one H100: tests, kernels, scoring, the training step
# against its peers, and a real 7B-shape NF4 run. No network is used; weights are random. A step that fails or runs out
# of time does not stop the others.
# usage: [PYTHON=python3] [PEERS=python] [OUT=benchmarks/results/gpu] bash benchmarks/gpu.sh [--dry_run]
#   PYTHON     an interpreter with this package's libraries
#   PEERS      an interpreter with TRL, Unsloth or LLaMA-Factory (benchmarks/peers.txt); without it they are left to PYTHON
#   OUT        takes one .json a benchmark, log.txt with everything printed, summary.txt with exit codes and seconds
#   --dry_run  the same steps at tiny sizes on the CPU: shows that each starts
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=$(realpath -m "${OUT:-$root/benchmarks/results/gpu}")
cd "$root"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
dry=
[ "${1:-}" = "--dry_run" ] && dry=1
export PYTHONPATH=$root TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=4
[ -n "$dry" ] && export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=2

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$out/log.txt summary=$out/summary.txt
: >"$log"
: >"$summary"
deadline=530 # seconds, for all steps together; a dry run on busy cores gets more
[ -n "$dry" ] && deadline=3000

# step NAME LIMIT COMMAND...: run within LIMIT seconds and what is left of the deadline; note exit code and seconds.
step() {
    local name=$1 limit=$2 begun=$SECONDS left=$((deadline - SECONDS)) code
    shift 2
    [ -n "$dry" ] && limit=$((limit * 4))
    [ "$left" -lt "$limit" ] && limit=$left
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$log"
    if [ "$limit" -le 5 ]; then
        echo "$name: not started, no time left" | tee -a "$log" "$summary"
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
    printf '%-14s %4d s  %s\n' "$name" $((SECONDS - begun)) "$said" | tee -a "$summary"
}

# kernel NAME LIMIT [ARGUMENT...]: a kernel's own benchmark, where there is one.
kernel() {
    local name=$1 limit=$2
    shift 2
    if [ -f "benchmarks/$name.py" ]; then
        step "$name" "$limit" "$python" "benchmarks/$name.py" --out "$out/$name.json" "$@"
    else
        echo "$name: benchmarks/$name.py does not exist" | tee -a "$log" "$summary"
    fi
}

if [ -n "$dry" ]; then
    shape=tiny sizes=(--samples 4 --rounds 1 --budget 1024) scored=(--rows 2 --rounds 1) batch=4 budget=1024
    projector=(--device cpu --items 32 --width 128 --tokens 256 --rounds 2) lora=(--repeats 2) attention=(--repeats 2 --tokens 1000)
else
    shape=7b sizes=(--quick) scored=(--rows 16 --rounds 4) batch=32 budget=4096
    projector=() lora=() attention=(--device cuda --tokens 8000)
fi
peers=()
[ -n "${PEERS:-}" ] && peers=(--peers "$PEERS")

# Seconds on an H100 as predicted, none measured; the limit is the second argument.
step hardware 20 "$python" -c '
import os, platform, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU: this step needs one to say more"
print(platform.python_version(), torch.__version__, torch.version.cuda, os.cpu_count(), "cores;", gpu)'             # 5
step inputs 60 "$python" benchmarks/arms/inputs.py --out "$work/inputs" --shape "$shape"                              # 30
step tests 100 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider                                            # 60
step train 60 "$python" launch/train.py --model.path "$work/inputs/model" --data.shards "$work/inputs/shards" \
    --recommender.path "$work/inputs/recommender" --out "$work/run" --data.max_steps 2 --data.workers 0 \
    --data.global_batch_samples "$batch" --data.max_tokens_per_microbatch "$budget"                                   # 40
kernel projector 60 "${projector[@]}"                                                                                 # 30
kernel lora 60 "${lora[@]}"                                                                                           # 30
kernel attention 40 "${attention[@]}"                                                                                 # 20
step scoring 60 "$python" benchmarks/scoring.py --inputs "$work/inputs" "${scored[@]}" --out "$out/scoring.json"      # 40
step train_step 240 "$python" benchmarks/train_step.py --inputs "$work/inputs" "${sizes[@]}" "${peers[@]}" \
    --out "$out/train_step.json"                                                                                     # 200

printf '\n%s s in all; results in %s\n' "$SECONDS" "$out" | tee -a "$summary"
cat "$summary"
! grep -qvE '^[a-z_]+ +[0-9]+ s  ok$|in all; results' "$summary"
