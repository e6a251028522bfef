"""Check a preference CSV before training: `python -m infer_utils.check_csv data.csv [--decode] [--model PATH]`.

Lists every fault with its row: columns, labels, scores, paths, empty CoTs, videos that are missing, empty, truncated
or too short, and with --model also reserved tokens and sequences over --max_length. Exits with 1 if there are any.
"""

import argparse
import sys
from collections import Counter

from checkpoint import RewardConfig, load_builder
from model_qwen3 import quiet_libraries
from preference_csv import CsvError, CsvNeeds, load_checked_pairs
from vision_process import VideoBudget


def check(options: argparse.Namespace) -> str:
    """A one-line summary of a CSV without faults. Raises CsvError that lists the faults otherwise."""
    needs = CsvNeeds(
        eval_dim=options.eval_dim,
        scores=options.needs_scores,
        agreeing_scores=options.needs_agreeing_scores,
        cots=not options.no_cots,
    )
    budget = RewardConfig.resolve(options.model).video if options.model else VideoBudget()
    builder = load_builder(options.model) if options.model else None
    pairs = load_checked_pairs(
        options.csv, needs, budget, builder=builder, max_length=options.max_length, should_decode=options.decode
    )
    counts = []
    for index, name in enumerate(options.eval_dim):
        labels = Counter(pair.judgements[index].label for pair in pairs)
        prefix = f"{name}: " if len(options.eval_dim) > 1 else ""
        counts.append(prefix + ", ".join(f"{labels[label]} {label}" for label in sorted(labels)))
    num_videos = len({video for pair in pairs for video in (pair.video_a, pair.video_b)})
    return f"{options.csv}: {len(pairs)} pairs ({'; '.join(counts)}), {num_videos} videos, no fault"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("--eval_dim", nargs="+", default=["GSB"], help="label columns")
    parser.add_argument("--needs_scores", action="store_true", help="require MOS columns (margin, scaled, reg)")
    parser.add_argument(
        "--needs_agreeing_scores", action="store_true", help="require scores that agree with the labels (scaled)"
    )
    parser.add_argument("--no_cots", action="store_true", help="do not require CoTs (training with --drop_prob 1)")
    parser.add_argument("--decode", action="store_true", help="decode all frames that training uses")
    parser.add_argument("--model", help="base model, to check lengths and reserved tokens too")
    parser.add_argument("--max_length", type=int, default=8192, help="most tokens of a sequence")
    quiet_libraries()
    try:
        sys.stdout.write(check(parser.parse_args()) + "\n")
    except CsvError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
