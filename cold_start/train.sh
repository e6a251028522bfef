#!/usr/bin/env bash
# Stage 1: trains a reward model on preference pairs with DeepSpeed, on every GPU of the machine or on its CPU.
#
# Paths are relative to where it is called from.
#
#   bash train.sh                                   the shipped example
#   DATA=my.csv OUTPUT_DIR=output/mine bash train.sh
#   DATA=my.csv bash train.sh --loss_type btt --num_train_epochs 2      any flag of train_reward.py
#
# On several nodes, the same on each of them with its own NODE_RANK (0 is the one that MASTER_ADDR names):
#
#   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 DATA=my.csv bash train.sh
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

num_gpus() {  # those of the machine, or those of them that CUDA_VISIBLE_DEVICES names
  local gpus; gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep '^GPU')" || return 0
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES")"; fi
  grep -c '^[^-]' <<<"$gpus" || true
}
NUM_GPUS="${NUM_GPUS:-$(num_gpus)}"

DATA="${DATA:-$here/datasets/train/example.csv}"        # training CSV, see datasets/train/README.md
EVAL_DATA="${EVAL_DATA:-}"                              # held-out CSV of the same form; empty: no evaluation
OUTPUT_DIR="${OUTPUT_DIR:-$here/output}"                # checkpoint-N/ folders and logs
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
HOSTFILE="${HOSTFILE:-}"                                # of several nodes: a line "HOST slots=GPUS" for each
if [[ -n "$HOSTFILE" ]]; then
  : "${NODE_RANK:?HOSTFILE needs NODE_RANK, which line of the file this node is, from 0}"
  : "${MASTER_ADDR:?HOSTFILE needs MASTER_ADDR, the address of the first node}"
  : "${MASTER_PORT:?HOSTFILE needs MASTER_PORT, a free port of the first node, the same on all}"
fi
MASTER_PORT="${MASTER_PORT:-$(free_port)}"              # so that two runs on one machine do not collide

if [[ "${NUM_GPUS:-0}" -gt 0 ]]; then
  MODEL_PATH="${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct}"
  PROCESSES="$NUM_GPUS"
  BF16="${BF16:-True}"
else
  MODEL_PATH="${MODEL_PATH:-$here/model/tiny_base}"     # an 8B model is too large for a CPU: the tiny one stands in
  PROCESSES="${NUM_PROCESSES:-1}"
  BF16="${BF16:-False}"
  export DS_ACCELERATOR=cpu
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + PROCESSES - 1) / PROCESSES ))}"
fi
sharded() { [[ -n "$HOSTFILE" || "$PROCESSES" -gt 1 ]]; }  # one process has nothing to share its state with
DS_CONFIG="${DS_CONFIG:-$here/ds_config/$(sharded && echo zero2 || echo zero0).json}"    # zero0, zero2 or zero3
echo "stage 1: $MODEL_PATH on $DATA -> $OUTPUT_DIR ($PROCESSES process(es), ${NUM_GPUS:-0} GPU(s))"

arguments=(
  --deepspeed "$DS_CONFIG"
  --model_name_or_path "$MODEL_PATH"
  --meta_data "$DATA"
  --output_dir "$OUTPUT_DIR"
  --bf16 "$BF16"
)
[[ -z "$EVAL_DATA" ]] || arguments+=(--meta_data_test "$EVAL_DATA")

if [[ -n "$HOSTFILE" ]]; then
  launch=(--hostfile "$HOSTFILE" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
elif [[ "${NUM_GPUS:-0}" -gt 0 && -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
  export CUDA_VISIBLE_DEVICES="$(cut -d, -f-"$PROCESSES" <<<"$CUDA_VISIBLE_DEVICES")"
  launch=()  # --num_gpus would have DeepSpeed take the machine's first GPUs instead
else
  launch=(--num_gpus "$PROCESSES")
fi
exec python -m deepspeed.launcher.runner --log_level warning "${launch[@]}" --master_port "$MASTER_PORT" \
  "$here/train_reward.py" "${arguments[@]}" "$@"
