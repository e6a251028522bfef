#!/usr/bin/env bash
# Whole steps of stage 2 (vLLM rollouts, update, weight hand-over, save) with a model of Qwen3-VL-8B's shape and random
# weights on the GPUs of this machine. Prints the table of benchmarks/summarize.py and writes it to RESULT.
#
#   RESULT=benchmarks/results/lora_1gpu.json bash benchmarks/train_8b.sh worker.actor.model.lora.rank=64
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PAIRS="${PAIRS:-8}"                       # per step; the paper's setting is 128
STEPS="${STEPS:-3}"
GPUS="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"
LAYERS="${LAYERS:-36}"                    # text layers; fewer to train all weights on one card
WORK="${WORK:-/tmp/descore_${LAYERS}_layers_${PAIRS}_pairs}"      # made once per number of layers and pairs
RESULT="${RESULT:-$WORK/result.json}"
TOKENIZER="${TOKENIZER:-../cold_start/model/tiny_base}"

[[ -f "$WORK/train.csv" ]] || PYTHONPATH=".:${PYTHONPATH:-}" python benchmarks/make_work.py --output "$WORK" --tokenizer "$TOKENIZER" --pairs $((PAIRS * 2)) --layers "$LAYERS"
rm -rf "$WORK/run"
status=0
trap 'echo "stopped: summarizing the steps so far" >&2' TERM INT
python -m verl.trainer.main config=examples/config.yaml data.train_files="$WORK/train.csv" \
  data.max_prompt_length=4096 data.max_response_length=1000 \
  data.rollout_batch_size="$PAIRS" worker.actor.global_batch_size="$PAIRS" \
  worker.actor.model.model_path="$WORK/model" \
  worker.reward.reward_function=examples/reward_function/r1ta_subdim_head.py:compute_score \
  trainer.n_gpus_per_node="$GPUS" trainer.max_steps="$STEPS" trainer.save_freq=-1 trainer.val_before_train=false \
  trainer.logger='[console,file]' trainer.save_checkpoint_path="$WORK/run" "$@" || status=$?
PYTHONPATH=".:${PYTHONPATH:-}" python benchmarks/summarize.py "$WORK/run" --output "$RESULT" \
  --settings "LAYERS=$LAYERS" "PAIRS=$PAIRS" "GPUS=$GPUS" "$@"
exit "$status"
