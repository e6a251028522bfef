#!/usr/bin/env bash
# Stage 2 on a CPU: starts from the checkpoint of the stage 1 quick start, trains thinking and scoring together on its
# toy world, and scores the toy benchmark with the result. Run it again to resume. STEPS sets its length, WORK its
# folder; further arguments are settings of the training (key=value).
set -euo pipefail
stage="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

STAGE1="${STAGE1:-$stage/../cold_start/output/quickstart}"   # what cold_start/quickstart.sh wrote: world/ and stage1/
WORK="${WORK:-$stage/results/quickstart}"
STEPS="${STEPS:-60}"
SEED="${SEED:-1}"
BACKEND="${BACKEND:-vllm}"                                   # of the benchmark
PROCESSES="${PROCESSES:-$(( $(nproc) > 1 ? 2 : 1 ))}"
SECONDS=0

newest() { find "$1" -maxdepth 1 -name "$2" 2>/dev/null | sort -V | tail -n 1 || true; }
MODEL_PATH="${MODEL_PATH:-$(newest "$STAGE1/stage1" 'checkpoint-*')}"
[[ -n "$MODEL_PATH" ]] || { echo "no stage 1 checkpoint in $STAGE1: run bash cold_start/quickstart.sh first" >&2 && exit 1; }

# The tiny model needs learning rates that would ruin a large one. Validation samples as training does.
export OMP_NUM_THREADS=1 NUM_GPUS=0 NUM_PROCESSES="$PROCESSES" OUTPUT_DIR="$WORK"
MODEL_PATH="$MODEL_PATH" TRAIN_FILES="$STAGE1/world/train_rl.csv" VAL_FILES="$STAGE1/world/eval_rl.csv" \
  bash "$stage/examples/train.sh" \
  data.seed="$SEED" worker.rollout.seed="$SEED" \
  data.max_prompt_length=512 data.max_response_length=256 \
  data.rollout_batch_size=8 data.val_batch_size=100 worker.actor.global_batch_size=4 \
  worker.actor.micro_batch_size_per_device_for_update=1 worker.actor.micro_batch_size_per_device_for_experience=2 \
  worker.actor.optim.lr=5e-5 worker.actor.optim.head_lr=1e-3 worker.actor.optim.lr_scheduler_type=cosine \
  algorithm.kl_coef=1e-3 worker.rollout.n=8 'worker.rollout.val_override_config={temperature: 1.0, n: 2}' \
  trainer.max_steps="$STEPS" trainer.val_freq=20 trainer.save_freq=20 trainer.save_limit=1 "$@"

echo
python3 "$stage/examples/summarize_run.py" "$WORK"
printf '\ntime of stage 2: %d:%02d\n\n' $((SECONDS / 60)) $((SECONDS % 60))

SECONDS=0
trained="$(newest "$WORK" 'global_step_*[0-9]')"
scored="$WORK/bench_tabench_step_${trained##*_}"
MODEL_CKPT="$trained" DATA_PATH="$STAGE1/world/bench_tabench.csv" BENCH_TYPE=tabench \
  OUTPUT="$scored.csv" bash "$stage/inference.sh" --max_new_tokens 256 --backend "$BACKEND"
printf '\ntime of the benchmark: %d:%02d\n' $((SECONDS / 60)) $((SECONDS % 60))
cat <<TEXT
reward model:     $trained/actor/huggingface  (rm_head.pth beside it)
training curves:  $WORK/train_log.jsonl, tensorboard --logdir $WORK/tensorboard
thoughts:         $WORK/generations.jsonl
scored benchmark: $scored.csv, .json
TEXT
