#!/usr/bin/env bash
# Stage 2: trains thinking (GRPO) and scoring (Bradley-Terry) together, on every GPU of the machine or on its CPU.
#
#   MODEL_PATH=cold_start/output/checkpoint-500 TRAIN_FILES=train.csv VAL_FILES=val.csv EXP_NAME=mine \
#       bash dual_rl/examples/train.sh
#   MODEL_PATH=... TRAIN_FILES=... bash dual_rl/examples/train.sh worker.rollout.n=4 trainer.max_steps=100      any key
#
# Paths are relative to the working directory. The same command resumes a run that stopped.
set -euo pipefail
stage="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

MODEL_PATH="${MODEL_PATH:?set it to a stage 1 checkpoint-N, or the actor/huggingface folder of a stage 2 checkpoint}"
HEAD_PATH="${HEAD_PATH:-}"                              # rm_head.pth; empty: that of the model
EXP_NAME="${EXP_NAME:-dual_rl}"                         # names the run and its folder
TRAIN_FILES="${TRAIN_FILES:?set it to a CSV with videos, problem and answer; see dual_rl/data/README.md}"
VAL_FILES="${VAL_FILES:-}"                              # held-out CSV of the same form; empty: no validation
OUTPUT_DIR="${OUTPUT_DIR:-$stage/results/$EXP_NAME}"    # global_step_N/ folders and logs

num_gpus() {  # of the machine, or as many as CUDA_VISIBLE_DEVICES names
  local gpus; gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep '^GPU')" || return 0
  if [[ -v CUDA_VISIBLE_DEVICES ]]; then gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES")"; fi
  grep -c '^[^-]' <<<"$gpus" || true
}
NUM_GPUS="${NUM_GPUS:-$(num_gpus)}"

arguments=(
  config="$stage/examples/config.yaml"
  data.train_files="$TRAIN_FILES"
  data.rollout_batch_size=128
  algorithm.use_kl_loss=true
  algorithm.kl_penalty=low_var_kl
  algorithm.kl_coef=1e-5
  worker.actor.model.model_path="$MODEL_PATH"
  worker.actor.global_batch_size=128
  worker.actor.bt_weight=5e-3
  worker.actor.clip_ratio_low=0.2
  worker.actor.clip_ratio_high=0.3
  worker.actor.clip_ratio_dual=3.0
  worker.actor.optim.lr=1e-6
  worker.rollout.n=8
  worker.reward.reward_function="$stage/examples/reward_function/r1ta_subdim_head.py:compute_score"
  trainer.experiment_name="$EXP_NAME"
  trainer.save_checkpoint_path="$OUTPUT_DIR"
)
[[ -z "$HEAD_PATH" ]] || arguments+=(worker.actor.model.head_path="$HEAD_PATH")
[[ -z "$VAL_FILES" ]] || arguments+=(data.val_files="$VAL_FILES")

if [[ "${NUM_GPUS:-0}" -gt 0 ]]; then
  arguments+=(trainer.n_gpus_per_node="$NUM_GPUS")
else  # for the tiny model: small batches, short responses, one training process unless asked for more
  NUM_PROCESSES="${NUM_PROCESSES:-1}"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + NUM_PROCESSES - 1) / NUM_PROCESSES ))}"
  arguments+=(
    trainer.n_gpus_per_node=0
    trainer.n_cpu_ranks_per_node="$NUM_PROCESSES"
    data.rollout_batch_size=8
    data.val_batch_size=32
    data.max_prompt_length=1024
    data.max_response_length=320
    worker.actor.global_batch_size=8
    worker.actor.micro_batch_size_per_device_for_update=4
    worker.actor.micro_batch_size_per_device_for_experience=8
    worker.actor.model.enable_gradient_checkpointing=false
    worker.actor.offload.offload_params=false
    worker.actor.offload.offload_optimizer=false
    worker.ref.fsdp.enable_cpu_offload=false
  )
fi
echo "stage 2: $MODEL_PATH on $TRAIN_FILES -> $OUTPUT_DIR (${NUM_GPUS:-0} GPU(s))"

# The package is in this stage's folder; Python must not search the folder that the script is called from.
export PYTHONPATH="$stage${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec python3 -m verl.trainer.main "${arguments[@]}" "$@"
