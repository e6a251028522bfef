"""A benchmark of the example's clips with rewards and thoughts made up, and what a page of a run embeds."""

import csv
import json
import math
import random
import re
import shutil
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from descore.answers import parse_annotation
from scoring.bench_csv import Bench, read_bench
from scoring.journal import Journal
from scoring.report import summarise
from scoring.scoring import ScoredVideo
from toy_world.tables import write_table
from training_support import EXAMPLE_CSV
from verl.types import Side

WORDS = {2: "as the prompt asks", 1: "only partly what the prompt asks for", 0: "not what the prompt asks for"}
DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def write_thought(scores: Mapping[str, int | str]) -> str:
    """A chain of thought in the form that the example's problems ask for."""
    lines = [
        f"{name.capitalize()}: the prompt says nothing about it, so N/A."
        if score == "N/A"
        else f"{name.capitalize()}: what the clip shows is {WORDS[score]}, score {score}."
        for name, score in scores.items()
    ]
    given = [score for score in scores.values() if score != "N/A"]
    overall = 1 + 4 * sum(given) / (2 * len(given))
    answer = json.dumps({"dimensional_scores": dict(scores), "overall_score": round(overall, 2)})
    return "\n".join([*lines, "<answer>", answer, "</answer>"])


def write_example_bench(folder: Path, *, seed: int = 0) -> tuple[Bench, dict[str, tuple[float, str]]]:
    """112 pairs: for each prompt of the example all pairs of its eight clips; per item a reward and a thought.

    Scores of a prompt's own clips are the annotated ones. People decide as Bradley-Terry has it, or call a tie.
    """
    rng, rows, made = random.Random(seed), [], {}
    with open(EXAMPLE_CSV, newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    shutil.copytree(EXAMPLE_CSV.parent / "videos", folder / "videos")
    clips = [f"videos/example_{number}_{side}.mp4" for number in range(4) for side in "ab"]
    for number, row in enumerate(cells):
        annotated, scores = parse_annotation(row["answer"]).scores, {}
        for place, clip in enumerate(clips):
            side: Side = "AB"[place % 2]
            is_own = place // 2 == number
            scores[clip] = annotated[side] if is_own else {name: rng.choice((0, 0, 1, 2)) for name in DIMENSIONS}
            given = [score for score in scores[clip].values() if score != "N/A"]
            made[str(folder / clip), row["problem"]] = (
                2 * sum(given) / len(given) - 2 + rng.gauss(0, 0.5),
                scores[clip],
            )
        for a, b in combinations(clips, 2):
            margin = made[str(folder / a), row["problem"]][0] - made[str(folder / b), row["problem"]][0]
            labels = {name: _draw_label(rng, margin) for name in ("TA", "Overall")}
            models = {"A_model": f"toy {a[-5]}{int(a[-7]) // 2}", "B_model": f"toy {b[-5]}{int(b[-7]) // 2}"}
            rows.append({"path_A": a, "path_B": b, **models, "problem": row["problem"], **labels})
    rows[5]["Overall"] = ""
    write_table(folder / "bench.csv", rows)
    bench = read_bench(folder / "bench.csv", "videoalign")
    found = {name: made[item.video, item.problem] for name, item in bench.items.items()}
    return bench, {name: (reward, write_thought(scores)) for name, (reward, scores) in found.items()}


def _draw_label(rng: random.Random, margin: float) -> str:
    if rng.random() < 0.35 * math.exp(-abs(margin)):
        return "same"
    return "A" if rng.random() < 1 / (1 + math.exp(-margin)) else "B"


def fill_journal(journal: Journal, scored: Mapping[str, tuple[float, str]]) -> None:
    """Note rewards and thoughts by item."""
    for name, (reward, thought) in scored.items():
        journal.add(ScoredVideo(name, reward, thought, len(thought) // 4, True))


def make_result(bench: Bench, journal: Journal) -> dict[str, object]:
    """What a run writes as JSON."""
    run = {
        "weights": "5f0c1a",
        "backend": "vllm",
        "video": {"fps": 2.0, "max_pixels": 401408},
        "format_prompt": "{{}}",
    }
    return {"model_ckpt": "runs/toy/global_step_60", "data_path": bench.path, "run": run} | summarise(
        bench, journal, seed=0
    )


def read_data(page: str) -> dict:
    """What a page embeds."""
    return json.loads(DATA.search(page)[1])
