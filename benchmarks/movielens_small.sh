#!/usr/bin/env bash
# The README's MovieLens-100K run: every stage on real data with a small Llama made from scratch, on two CPU cores,
# about an hour. It measures that the way works, not what a 7B model would reach.
# usage: bash benchmarks/movielens_small.sh RAW TOKENIZER OUT
#   RAW        folder with u.data and u.item (`llara-dist download movielens --out raw` makes raw/ml-100k)
#   TOKENIZER  folder with the Llama-2 tokenizer (tokenizer.model is enough)
set -euo pipefail
raw=$(realpath "$1") tokenizer=$(realpath "$2") out=$(realpath -m "$3")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"
steps=${STEPS:-400}

[ -d "$out/data" ] || llara-dist prepare --recipe movielens --raw "$raw" --out "$out/data"
[ -d "$out/recommender" ] || llara-dist recommender train --data "$out/data" --out "$out/recommender"
[ -d "$out/llm" ] || llara-dist tiny-llama --data "$out/data" --tokenizer "$tokenizer" \
    --hidden 256 --layers 4 --steps "${PRETRAINING_STEPS:-2500}" --out "$out/llm"
[ -d "$out/shards" ] || llara-dist shards build --data "$out/data" --tokenizer "$out/llm" --out "$out/shards"

for arm in text-only hybrid; do
    case $arm in
        text-only) curriculum=(--curriculum.schedule constant --curriculum.probability 0) ;;
        hybrid) curriculum=(--curriculum.schedule linear) ;;
    esac
    deepspeed --num_accelerators 2 launch/train.py --model.path "$out/llm" --data.shards "$out/shards" \
        --recommender.path "$out/recommender" --out "$out/$arm" --resume auto "${curriculum[@]}" \
        --data.max_steps "$steps" --data.global_batch_samples 32 --data.max_tokens_per_microbatch 4096 \
        --data.workers 0 --lora.rank 16 --lora.alpha 32 --lora.dropout 0.05 \
        --optimizer.lora_lr 1e-3 --optimizer.projector_lr 3e-3 --deepspeed ds_configs/zero1.json
    for split in val test; do
        deepspeed --num_accelerators 2 launch/evaluate.py --run "$out/$arm" --split "$split"
    done
done
llara-dist recommender eval --data "$out/data" --weights "$out/recommender" --split test
