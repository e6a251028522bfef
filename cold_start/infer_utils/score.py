"""Score one video: `python -m infer_utils.score CHECKPOINT video.mp4 "the prompt" [--cot TEXT | --think]`.

Without a CoT, the model sees the video and the prompt only. With --think it writes a CoT first, which is printed.
"""

import argparse
import sys

from infer_utils.scorer import MAX_COT_TOKENS, Cot, RewardScorer
from model_qwen3 import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint-N folder or a merged model")
    parser.add_argument("video")
    parser.add_argument("prompt", help="the text prompt that the video was generated from")
    cot = parser.add_mutually_exclusive_group()
    cot.add_argument("--cot", help="a chain of thought about the video")
    cot.add_argument("--think", action="store_true", help="let the model write the chain of thought")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_COT_TOKENS, help="longest chain of thought")
    parser.add_argument("--base_model", help="where the base model is, if not where it was at training")
    options = parser.parse_args()
    quiet_libraries()
    try:
        scorer = RewardScorer.from_pretrained(options.checkpoint, base_model=options.base_model)
        encoded = scorer.encode([options.video], [options.prompt])
        cots: list[str | Cot] | None = [options.cot] if options.cot else None
        if options.think:
            cots = scorer.write_cots(encoded, max_new_tokens=options.max_new_tokens)
            sys.stdout.write(f"{cots[0].text}\n")
        rewards = scorer.score_encoded(encoded, cots)[0].tolist()
    except ValueError as error:
        parser.error(str(error))
    for name, reward in zip(scorer.config.dimensions or ("reward",), rewards, strict=True):
        sys.stdout.write(f"{name}: {reward:.6f}\n")


if __name__ == "__main__":
    main()
