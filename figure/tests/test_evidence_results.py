"""From scored files to results, and from results to accuracies, claims and figures."""

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest

from draw_evidence import draw_all
from evidence.claims import describe
from evidence.collecting import collect, match_sub_scores, read_curves, summarise_scored, write_results
from evidence.merging import merge
from evidence.plan import MASKED, OWN, Device, Plan, Scoring
from evidence.results import SETS, Results
from evidence.sizes import SIZES
from evidence_support import make_content, make_score
from run_evidence import main

PLAN = Plan(SIZES["small"], "work", device=Device())


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
        (answer("B"), "new_rendering", 0.0, 0.5, thought(2, 3.0), thought(0, 3.0)),
        (answer("invalid"), "new_rendering", 0.0, 0.5, thought(2, 3.0), thought(0, 3.0)),
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
    masked = summarise_scored(tmp_path / "scored.csv", Scoring("discriminative", 1, MASKED))
    assert {(record["read"], record["sub_scores"]) for record in masked} == {("masked", None)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [(thought(2, 1.0), [True]), (thought(True, 1.0), [False]), ("nothing", [False]),
     ('<answer>{"dimensional_scores": 3}</answer>', [False])],
)  # fmt: skip
def test_sub_scores_are_matched_as_the_rule_does(text, expected):
    assert match_sub_scores(text, {"subject": 2, "style": "N/A"}) == expected


def test_curves_of_both_stages_have_one_name(tmp_path):
    lines = {
        "stage1_3": [{"step": 1, "loss": 0.5, "accuracy": 1.0, "grad_norm": 2.0, "seconds_per_step": 0.8},
                     {"step": 2, "loss": 0.25, "accuracy": None, "grad_norm": 2.0, "seconds_per_step": 0.8}],
        "coupled_3": [{"step": 0, "val/gsb_acc": 0.5},
                      {"step": 1, "bt/loss": 0.7, "reward/agreement/mean": 0.6, "timing/seconds/step": 9.0}],
    }  # fmt: skip
    curves = {}
    for run, log in lines.items():
        (tmp_path / f"{run}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
        for curve in read_curves(tmp_path / f"{run}.jsonl", run):
            curves[curve["run"], curve["metric"]] = curve["values"]
            assert curve["seed"] == 3
    assert curves["stage1", "accuracy"] == [1.0, None]
    assert curves["coupled", "accuracy"] == [0.6]
    assert curves["coupled", "seconds"] == [9.0]


def test_results_are_written_one_record_per_line_read_back_and_drawn(tmp_path):
    path, content = tmp_path / "made_up.json", make_content()
    write_results(path, content)
    assert Results.load(path).content == content
    lines = path.read_text().splitlines()
    assert sum(line.startswith('{"arm"') for line in lines) == len(content["scores"])
    draw_all(path)
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"made_up_{name}.png" for name in ("accuracy", "curves", "data")
    }
    write_results(tmp_path / "nothing.json", collect(PLAN, tmp_path, name="nothing"))
    assert "## Claims" in draw_all(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no size, jobs, scores, curves"):
        Results.load(tmp_path / "other.json")


def test_accuracies_and_differences_are_over_the_seeds_that_all_have():
    content = make_content()
    content["scores"].append(make_score("descore", 3, SETS[0], read=OWN, correct="0000"))
    results = Results(content)
    assert results.seeds("descore", OWN) == [1, 2]
    assert (results.accuracy("descore", OWN).value, results.accuracy("stage1", OWN).value) == (1.0, 0.75)
    difference = results.difference(("descore", OWN), ("stage1_short", OWN))
    assert (difference.value, difference.num_seeds, difference.num_pairs) == (0.5, 2, 12)
    assert results.accuracy("never_run", OWN) is None
    assert results.difference(("descore", OWN), ("never_run", OWN)) is None
    assert results.mean("with_ties", "descore", OWN) == 0.5
    assert results.training_seconds("stage1") == [4.0, 4.0]
    assert np.isnan(results.curve("stage1", "accuracy", 1)[1])


def test_models_that_judged_other_pairs_are_not_compared():
    content = make_content()
    next(score for score in content["scores"] if score["arm"] == "coupled")["pairs"] = "other"
    with pytest.raises(ValueError, match="scored on different pairs of in_domain"):
        Results(content).difference(("descore", OWN), ("coupled", "text"))


def test_claims_are_listed_with_their_verdict():
    content = make_content()
    for score in content["scores"]:
        if score["arm"] == "stage1":
            score["correct"] = "1111"
    text = describe(Results(content))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert rows["DeScore beats the discriminative model"].endswith("| holds |")
    assert rows["both stages beat stage 1 of the same budget"].endswith("| undecided |")
    assert "masking half of the thoughts beats masking none" not in rows  # it was not run
    assert "2.0 hours" in text


def write_part(path, seed: int, **changes: object) -> dict:
    """The results of a machine that ran one seed of `small`."""
    content = make_content((seed,))
    content["jobs"] += [{**content["jobs"][0], "name": f"score_{arm}_{seed}_own"} for arm in ("stage1", "descore")]
    content |= {"device": {"num_gpus": 1}, **changes}
    write_results(path, content)
    return content


def test_results_of_several_machines_become_one(tmp_path):
    """The first record of a job stays, and what the plan does not know stays out."""
    first, second = (write_part(tmp_path / f"{seed}.json", seed) for seed in (1, 2))
    other, unknown = (make_score("descore", seed, SETS[0], read=OWN, correct="0000") for seed in (1, 9))
    write_part(tmp_path / "again.json", 1, curves=[], scores=[other, unknown])
    nothing = {**first, "jobs": [], "scores": [], "curves": [], "device": {"num_gpus": 0}}
    merged = merge(nothing, [tmp_path / f"{name}.json" for name in ("2", "1", "again")], PLAN)
    assert merged["device"] == {"num_gpus": 1}
    names = ["world", *(f"score_{arm}_{seed}_own" for seed in (1, 2) for arm in ("stage1", "descore"))]
    assert [job["name"] for job in merged["jobs"]] == names
    for key in ("scores", "curves"):
        assert sorted(map(json.dumps, merged[key])) == sorted(map(json.dumps, first[key] + second[key]))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"settings": {"short_steps": 3, "long_steps": 2}}, "another size"),
        ({"device": {"num_gpus": 0}}, "another kind of device"),
        ({"scores": [{**make_score("descore", 2, SETS[0], read=OWN, correct="1"), "pairs": "others"}]}, "other pairs"),
    ],
)
def test_results_of_other_work_do_not_merge(tmp_path, changes, what):
    ours = write_part(tmp_path / "1.json", 1)
    write_part(tmp_path / "2.json", 2, **changes)
    with pytest.raises(ValueError, match=f"2.json holds results of {what}"):
        merge(ours, [tmp_path / "2.json"], PLAN)


def test_the_driver_merges_files_and_says_which_it_cannot(tmp_path, capsys):
    files = {}
    for name, seed, num_gpus in (("1", 1, 1), ("2", 2, 1), ("cpu", 3, 0)):
        files[name] = str(tmp_path / f"{name}.json")
        settings = {"settings": asdict(SIZES["small"]), "device": {"num_gpus": num_gpus}}
        write_part(tmp_path / f"{name}.json", seed, **settings)
    command = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "all.json"), "--merge"]
    assert main([*command, files["1"], files["2"]]) == 0
    assert Results.load(tmp_path / "all.json").seeds("descore", OWN) == [1, 2]
    assert "DeScore beats the discriminative model" in capsys.readouterr().out
    assert main([*command, files["1"], files["cpu"]]) == 1
    assert "cpu.json holds results of another kind of device" in capsys.readouterr().err
