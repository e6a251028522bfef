"""Pair accuracy on held-out preferences: with the CSV's CoTs, without CoTs, and with CoTs that the model writes.

    python -m infer_utils.evaluate CHECKPOINT eval.csv --output after.json
    python -m infer_utils.evaluate --compare before.json after.json

A base model in place of a checkpoint is evaluated with a fresh head, as training starts. A pair with a video that
does not decode is dropped and listed; more than 1% of them are an error.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint import RewardConfig, is_reward_checkpoint, write_json
from descore.csv_table import list_problems
from descore.decoder import VideoError
from descore.progress import progress
from infer_utils.scorer import MAX_COT_TOKENS, RewardScorer
from model_qwen3 import quiet_libraries
from preference_csv import PREFERENCES, CsvNeeds, PreferencePair, read_pairs

MODES = {"csv": "the CSV's CoTs", "masked": "no CoT", "own": "CoTs it writes itself"}
CHUNK_PAIRS = 32
MAX_DROPPED_SHARE = 0.01
"""Of the pairs, as in training."""
Z_95 = 1.959964  # standard normal quantile of a two-sided 95% interval


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    share, weight = successes / trials, Z_95**2 / trials
    center = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, center - half), min(1.0, center + half)


def score_pairs(
    scorer: RewardScorer,
    pairs: Sequence[PreferencePair],
    modes: Sequence[str],
    *,
    rows: Sequence[int],
    max_new_tokens: int,
) -> list[list[dict]]:
    """By label column, one record per pair: row, label, and for each mode the rewards [A, B].

    `rows`: the head's, for the pairs' label columns. Videos are decoded once for all modes. Pairs whose videos do not
    decode are left out and listed on stderr. Raises VideoError when they are too many.
    """
    records, dropped = [[] for _ in rows], []
    for start in progress(range(0, len(pairs), CHUNK_PAIRS), description="evaluate", unit="chunk"):
        chunk, encoded = [], []
        for pair in pairs[start : start + CHUNK_PAIRS]:
            try:
                encoded += scorer.encode([pair.video_a, pair.video_b], problems=[pair.problem] * 2)
                chunk.append(pair)
            except VideoError as error:
                dropped.append(f"row {pair.row}: {error}")
        if len(dropped) > MAX_DROPPED_SHARE * len(pairs):
            share = f"more than {MAX_DROPPED_SHARE:.0%} of {len(pairs)} pairs could not be loaded"
            raise VideoError(f"{share}; replace the files or remove the rows:\n{list_problems(dropped)}")
        cots = {"csv": [cot for pair in chunk for cot in (pair.cot_a, pair.cot_b)], "masked": None}
        if "own" in modes:
            cots["own"] = scorer.write_cots(encoded, max_new_tokens=max_new_tokens)
        rewards = {mode: scorer.score_encoded(encoded, cots[mode]) for mode in modes}
        for i, pair in enumerate(chunk):
            for of_column, row, judgement in zip(records, rows, pair.judgements, strict=True):
                scores = {mode: values[2 * i : 2 * i + 2, row].tolist() for mode, values in rewards.items()}
                of_column.append({"row": pair.row, "label": judgement.label, **scores})
    if dropped:
        sys.stderr.write(f"{len(dropped)} of {len(pairs)} pairs dropped:\n{list_problems(dropped)}\n")
    return records


def summarise(records: Sequence[dict], modes: Sequence[str]) -> dict[str, dict[str, float]]:
    """By mode: the share of pairs with a preference whose chosen video has the higher reward, its 95% interval from
    `low` to `high`, and their number. Empty without such pairs."""
    decided = [record for record in records if PREFERENCES.get(record["label"], 0) != 0]
    accuracies = {}
    for mode in modes if decided else ():
        correct = sum((r[mode][0] - r[mode][1]) * PREFERENCES[r["label"]] > 0 for r in decided)
        low, high = wilson_interval(correct, len(decided))
        accuracies[mode] = {"accuracy": correct / len(decided), "low": low, "high": high, "num_pairs": len(decided)}
    return accuracies


def format_table(results: dict[str, dict]) -> str:
    """Accuracies as text: one row per mode, one column per result."""
    modes = [mode for mode in MODES if all(mode in result["accuracy"] for result in results.values())]
    width = max(26, *(len(name) + 2 for name in results))
    lines = ["held-out pair accuracy " + "".join(f"{name:>{width}}" for name in results)]
    for mode in modes:
        cells = [result["accuracy"][mode] for result in results.values()]
        row = "".join(f"{'{accuracy:.3f}  [{low:.3f}, {high:.3f}]'.format(**cell):>{width}}" for cell in cells)
        lines.append(f"{MODES[mode]:<23}{row}")
    counts = [str(cell["num_pairs"]) for cell in cells]
    count = counts[0] if len(set(counts)) == 1 else ", ".join(counts)
    lines.append(f"{count} pairs with a preference; 95% intervals; chance is 0.5")
    return "\n".join(lines)


def evaluate(options: argparse.Namespace) -> dict:
    """Score the CSV and return what is written to the JSON file. Raises ValueError."""
    config = RewardConfig.find(options.checkpoint) or RewardConfig()
    columns = options.eval_dim or config.dimensions or ("GSB",)
    if len(columns) > config.num_rewards:
        raise ValueError(f"{options.checkpoint} has {config.num_rewards} reward(s). Give as many label columns.")
    rows = [config.row_of(name) for name in columns] if config.dimensions else [0]
    pairs = read_pairs(options.data, CsvNeeds(eval_dim=columns, cots="csv" in options.modes))
    for index, name in enumerate(columns):
        if not any(PREFERENCES.get(pair.judgements[index].label, 0) for pair in pairs):
            raise ValueError(
                f"{options.data} has no pair with a preference. Write A or B into {name} of at least one."
            )
    if is_reward_checkpoint(options.checkpoint):
        scorer = RewardScorer.from_pretrained(options.checkpoint, base_model=options.base_model)
    else:
        scorer = RewardScorer.from_base(options.checkpoint)
    records = score_pairs(scorer, pairs, options.modes, rows=rows, max_new_tokens=options.max_new_tokens)
    results = {}
    for name, of_column in zip(columns, records, strict=True):
        results[name] = {"accuracy": summarise(of_column, options.modes), "pairs": of_column}
        if not results[name]["accuracy"]:
            raise ValueError(f"no pair with a preference in {name} is left. Replace the files that do not decode.")
    head = {"checkpoint": options.checkpoint, "data": options.data}
    return head | ({"dimensions": results} if len(columns) > 1 else results[columns[0]])


def spread(results: dict[str, dict]) -> dict[str, dict]:
    """Results by name, with one for each dimension where a file holds several."""
    return {
        f"{name} {dimension}".strip(): result
        for name, whole in results.items()
        for dimension, result in whole.get("dimensions", {"": whole}).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint-N folder, a merged model or a base model")
    parser.add_argument("data", nargs="?", help="held-out preference CSV")
    parser.add_argument("--output", help="JSON file for accuracies and rewards")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), help="what CoTs it sees")
    parser.add_argument("--eval_dim", nargs="+", help="label columns; default: the model's dimensions, or GSB")
    parser.add_argument("--max_new_tokens", type=int, default=MAX_COT_TOKENS, help="longest CoT, in tokens")
    parser.add_argument("--base_model", help="where the base model is, if not where it was at training")
    parser.add_argument("--compare", nargs="+", metavar="JSON", help="print earlier results side by side instead")
    options = parser.parse_args()
    quiet_libraries()
    if options.compare:
        results = {Path(path).stem: json.loads(Path(path).read_text()) for path in options.compare}
    elif options.checkpoint and options.data:
        try:
            if options.output:  # before anything is scored
                Path(options.output).parent.mkdir(parents=True, exist_ok=True)
                is_new = not Path(options.output).exists()
                Path(options.output).open("a").close()
                if is_new:
                    Path(options.output).unlink()
            results = {Path(options.checkpoint).name: evaluate(options)}
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if options.output:
            write_json(Path(options.output), next(iter(results.values())))
    else:
        parser.error("Give a checkpoint and a CSV, or --compare.")
    sys.stdout.write(format_table(spread(results)) + "\n")


if __name__ == "__main__":
    main()
