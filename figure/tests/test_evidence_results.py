"""From scored files to results, and from results to accuracies, claims and figures."""

import csv
import itertools
import json
import re
from dataclasses import asdict

import pytest

from draw_evidence import draw_all
from evidence.collecting import collect, summarise_scored, write_results
from evidence.plan import MAIN_ARMS, MASKED, OWN, Device, Plan, Scoring
from evidence.results import SETS, Results
from evidence.sizes import SIZES
from run_evidence import main

PLAN = Plan(SIZES["small"], "work", device=Device())
CORRECT = {
    "discriminative": "0101", "coupled": "0111", "coupled_fast": "0101", "stage1": "0111", "descore": "1111",
    "stage1_short": "0110",
}  # fmt: skip


def make_score(arm: str, seed: int, name: str, *, read: str, correct: str) -> dict:
    return {
        "arm": arm, "seed": seed, "set": name, "read": read, "pairs": f"digest of {name}", "correct": correct,
        "num_ties": 1, "with_ties": 0.5, "threshold": None, "mean_reward": 0.1, "sub_scores": 0.75, "num_unscored": 0,
    }  # fmt: skip


def make_content(seeds: tuple[int, ...] = (1, 2)) -> dict:
    """Four pairs a set, of which a model gets the same right in every set and seed; curves of three steps."""
    reads = {"discriminative": MASKED, "coupled": "text", "coupled_fast": "text"}
    scores = [
        make_score(arm, seed, name, read=reads.get(arm, OWN), correct=CORRECT[arm])
        for arm in MAIN_ARMS for seed in seeds for name in SETS
    ]  # fmt: skip
    kinds = itertools.product(("stage1", "discriminative", "coupled", "descore"), seeds,
                              ("seconds", "accuracy", "grad_norm", "bt_loss"))  # fmt: skip
    curves = [{"run": run, "seed": seed, "metric": metric, "values": [1.0, None, 3.0]} for run, seed, metric in kinds]
    jobs = [{"name": "world", "command": "make", "commit": "abc", "started": "2026-01-01", "seconds": 7200.0}]
    settings = {"short_steps": 1, "long_steps": 2}
    return {"size": "small", "settings": settings, "device": {}, "jobs": jobs, "scores": scores, "curves": curves}


def answer(label: str) -> str:
    scores = {"video_1_scores": {"subject": 2, "style": "N/A"}, "video_2_scores": {"subject": 0, "style": "N/A"}}
    return f"<answer>{json.dumps({**scores, 'gsb_result': label})}</answer>"


def thought(subject: object, overall: float) -> str:
    return f"<answer>{json.dumps({'dimensional_scores': {'subject': subject}, 'overall_score': overall})}</answer>"


def write_scored(path) -> None:
    """In domain: right, wrong, a tie, and one that could not be scored; another set: right by the head alone."""
    rows = [
        (answer("A"), "in_domain", 2.0, 1.0, thought(2, 5.0), thought(0, 1.0)),
        (answer("B"), "in_domain", 2.0, 1.0, thought(2, 3.0), thought(2, 3.0)),
        (answer("same"), "in_domain", 1.0, 1.0, thought(2, 3.0), "nothing"),
        (answer("A"), "in_domain", "", "", "", ""),
        *[(answer(x), "new_rendering", 0.0, 0.5, thought(2, 3.0), thought(0, 3.0)) for x in ("B", "invalid")],
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_A", "video_B", "answer", "set", "Reward_A", "Reward_B", "CoT_A", "CoT_B"])
        writer.writerows([f"{number}_a.mp4", f"{number}_b.mp4", *row] for number, row in enumerate(rows))


def test_a_scored_file_becomes_records_by_set_and_reading(tmp_path):
    write_scored(tmp_path / "scored.csv")
    records = summarise_scored(tmp_path / "scored.csv", Scoring("descore", 1, OWN))
    found = {(record["set"], record["read"]): record for record in records}
    correct = {key: record["correct"] for key, record in found.items()}
    assert correct == {
        ("in_domain", "own"): "100", ("in_domain", "text"): "100",
        ("new_rendering", "own"): "1", ("new_rendering", "text"): "0",
    }  # fmt: skip
    in_domain = found["in_domain", "own"]
    assert (in_domain["num_ties"], in_domain["num_unscored"]) == (1, 1)
    assert in_domain["with_ties"] == 0.5  # of four pairs the first and, at a threshold of 0, the tie
    assert in_domain["sub_scores"] == 0.5  # right: A, B of the first and A of the second; the tie's A; of eight
    assert in_domain["mean_reward"] == pytest.approx(8 / 6, abs=1e-4)
    assert in_domain["pairs"] == found["in_domain", "text"]["pairs"]


def test_results_are_written_one_record_per_line_read_back_and_drawn(tmp_path):
    path, content = tmp_path / "made_up.json", make_content()
    write_results(path, content)
    assert Results.load(path).content == content
    assert path.read_text().count('\n{"arm"') == len(content["scores"])
    draw_all(path)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"made_up_accuracy", "made_up_curves", "made_up_data"}
    write_results(tmp_path / "nothing.json", collect(PLAN, tmp_path, name="nothing"))
    assert "## Claims" in draw_all(tmp_path / "nothing.json")


def test_accuracies_and_differences_are_over_the_seeds_that_all_have():
    content = make_content()
    content["scores"].append(make_score("descore", 3, SETS[0], read=OWN, correct="0000"))
    results = Results(content)
    assert results.seeds("descore", OWN) == [1, 2]
    assert (results.accuracy("descore", OWN).value, results.accuracy("stage1", OWN).value) == (1.0, 0.75)
    difference = results.difference(("descore", OWN), ("stage1_short", OWN))
    assert (difference.value, difference.num_seeds, difference.num_pairs) == (0.5, 2, 12)
    assert results.difference(("descore", OWN), ("never_run", OWN)) is None
    next(score for score in content["scores"] if score["arm"] == "coupled")["pairs"] = "other"
    with pytest.raises(ValueError, match="scored on different pairs of in_domain"):
        Results(content).difference(("descore", OWN), ("coupled", "text"))


def test_the_driver_merges_files_and_says_which_it_cannot(tmp_path, capsys):
    made = {"settings": asdict(SIZES["small"]), "device": {"num_gpus": 1}}
    other_pairs = [{**make_score("descore", 2, SETS[0], read=OWN, correct="1"), "pairs": "others"}]
    changes = {"1": {}, "2": {}, "other pairs": {"scores": other_pairs}}
    changes["another kind of device"] = {"device": {"num_gpus": 0}}
    changes["another size"] = {"settings": {"short_steps": 3, "long_steps": 2}}
    for seed, (name, changed) in enumerate(changes.items(), start=1):
        content = make_content((seed,))
        content["jobs"] += [{**content["jobs"][0], "name": f"score_{arm}_{seed}_own"} for arm in ("stage1", "descore")]
        write_results(tmp_path / f"{name}.json", {**content, **made, **changed})
    command = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "all.json"), "--merge"]
    assert main([*command, str(tmp_path / "1.json"), str(tmp_path / "2.json")]) == 0
    assert Results.load(tmp_path / "all.json").seeds("descore", OWN) == [1, 2]
    claims = capsys.readouterr().out
    assert re.search(r"\| DeScore beats the discriminative model \|.*\| holds \|$", claims, re.MULTILINE)
    assert "masking half of the thoughts beats masking none" not in claims  # it was not run
    for what in list(changes)[2:]:
        assert main([*command, str(tmp_path / "1.json"), str(tmp_path / f"{what}.json")]) == 1
        assert f"{what}.json holds results of {what}" in capsys.readouterr().err
