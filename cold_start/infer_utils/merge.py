"""Merge a stage 1 checkpoint into a plain Hugging Face model: `python -m infer_utils.merge CHECKPOINT OUTPUT`."""

import argparse
import sys
from pathlib import Path

import torch

from checkpoint import load_reward_model, save_merged
from model_qwen3 import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint-N folder")
    parser.add_argument("output", help="a folder that does not exist yet")
    parser.add_argument("--base_model", help="where the base model is, if not where it was at training")
    parser.add_argument("--reward_dim", help="keep this dimension alone, which makes a model with one reward")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of the weights")
    options = parser.parse_args()
    quiet_libraries()
    output = Path(options.output)
    if output.exists():
        parser.error(f"{output} exists. Choose another folder.")
    temporary = output.with_name(f"tmp-{output.name}")
    try:
        loaded = load_reward_model(
            options.checkpoint, base_model=options.base_model, dtype=getattr(torch, options.dtype)
        )
        loaded = loaded.pick(options.reward_dim) if options.reward_dim else loaded
    except ValueError as error:
        parser.error(str(error))
    save_merged(temporary, loaded)
    temporary.rename(output)
    sys.stdout.write(f"merged model: {output}\n")


if __name__ == "__main__":
    main()
