#!/usr/bin/env bash
# From nothing to a trained reward model on a CPU: renders a toy world, trains stage 1 on it from the shipped tiny base
# model, and shows how well the rewards rank held-out videos before and after. Can be repeated; training continues
# where it stopped. TRAIN_PAIRS, EVAL_PAIRS, EPOCHS and WORK make it shorter, longer or put it elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

WORK="${WORK:-output/quickstart}"
TRAIN_PAIRS="${TRAIN_PAIRS:-600}"
EVAL_PAIRS="${EVAL_PAIRS:-200}"
EPOCHS="${EPOCHS:-3}"
BASE=model/tiny_base
COT_TOKENS=320                                    # longest chain of thought that the tiny model may write
SECONDS=0

# The tiny model gains nothing from threads, which only wait for each other: one thread, two training processes.
PROCESSES=$(( $(nproc) > 1 ? 2 : 1 ))
export OMP_NUM_THREADS=1

say() { printf '\n== %s (%d:%02d)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
evaluate() { python -m infer_utils.evaluate "$1" "$WORK/world/eval.csv" --output "$2" --max_new_tokens "$COT_TOKENS"; }

say "1/5 rendering $TRAIN_PAIRS + $EVAL_PAIRS preference pairs of toy videos"
python datasets/make_toy_world.py --output "$WORK/world" --train_pairs "$TRAIN_PAIRS" --eval_pairs "$EVAL_PAIRS"

say "2/5 checking the training data"
python -m infer_utils.check_csv "$WORK/world/train.csv" --model "$BASE"

say "3/5 held-out accuracy before training"
evaluate "$BASE" "$WORK/before.json"

say "4/5 training stage 1"
# Head and <Reward> row start from nothing and learn fast; the rest moves little, so that the model still thinks clearly.
MODEL_PATH="$BASE" DATA="$WORK/world/train.csv" OUTPUT_DIR="$WORK/stage1" NUM_GPUS=0 NUM_PROCESSES="$PROCESSES" \
  bash train.sh --num_train_epochs "$EPOCHS" --per_device_train_batch_size $((8 / PROCESSES)) \
  --gradient_accumulation_steps 1 --learning_rate 5e-5 --merger_lr 5e-6 --vision_lr 5e-6 \
  --special_token_lr 1e-2 --rm_head_lr 1e-2 --gradient_checkpointing False --dataloader_num_workers 1 \
  --save_epochs 1 --resume_from_checkpoint latest

say "5/5 held-out accuracy after training"
checkpoint="$(find "$WORK/stage1" -maxdepth 1 -name 'checkpoint-*' | sort -V | tail -n 1)"
evaluate "$checkpoint" "$WORK/after.json" >/dev/null

say "done"
python -m infer_utils.evaluate --compare "$WORK/before.json" "$WORK/after.json"
python - "$WORK/stage1/train_log.jsonl" <<'PYTHON'
import json, statistics, sys
seconds = [line["seconds_per_step"] for line in map(json.loads, open(sys.argv[1])) if "seconds_per_step" in line]
sys.stdout.write(f"time per training step (8 pairs): {statistics.median(seconds):.2f} s\n")
PYTHON
cat <<TEXT
reward model:        cold_start/$checkpoint
training curves:     tensorboard --logdir cold_start/$WORK/stage1/runs
rewards of each pair cold_start/$WORK/before.json and after.json
videos and CSVs:     cold_start/$WORK/world
TEXT
