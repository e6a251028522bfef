#!/usr/bin/env bash
# Scores a benchmark CSV with a reward model and prints how often the rewards agree with people.
#
#   MODEL_CKPT=dual_rl/results/mine/global_step_100 DATA_PATH=bench.csv BENCH_TYPE=tabench bash dual_rl/inference.sh
#   MODEL_CKPT=... DATA_PATH=... BENCH_TYPE=genai bash dual_rl/inference.sh --batch_size 128 --backend hf     any flag
#
# Paths are relative to the current directory. Run it again to resume.
set -euo pipefail
stage="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

MODEL_CKPT="${MODEL_CKPT:?set it to a stage 1 checkpoint-N, a stage 2 global_step_N, or a merged model}"
RM_CKPT="${RM_CKPT:-}"                                # rm_head.pth; empty: the one beside the model
DATA_PATH="${DATA_PATH:?set it to a benchmark CSV}"
BENCH_TYPE="${BENCH_TYPE:?set it to tabench, videoalign, genai, react or videofeedback}"
NAME="${NAME:-$(basename "$MODEL_CKPT")}"             # names the results of this model
OUTPUT="${OUTPUT:-$stage/results/inference/$NAME/$(basename "$DATA_PATH" .csv).csv}"

arguments=(--model_ckpt "$MODEL_CKPT" --data_path "$DATA_PATH" --bench_type "$BENCH_TYPE" --output "$OUTPUT")
[[ -z "$RM_CKPT" ]] || arguments+=(--rm_ckpt "$RM_CKPT")
echo "inference: $MODEL_CKPT on $DATA_PATH ($BENCH_TYPE) -> $OUTPUT"

export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"   # vLLM's notes to developers are not for the console
export PYTHONPATH="$stage${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
exec python3 "$stage/inference.py" "${arguments[@]}" "$@"
