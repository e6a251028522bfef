"""Thinking only where it matters, and several thoughts, as users start them: with a small random model."""

import json
import shutil

import pytest

from inference import main
from inference_support import NAMES, Desk, Scored, all_pairs, make_row
from scoring.benchmark import JOURNAL_SUFFIX
from scoring.thinking import choose_margin


@pytest.fixture
def desk(tmp_path, small_model) -> Desk:
    """With a model of its own, beside which calibrations are kept."""
    return Desk(tmp_path, shutil.copytree(small_model, tmp_path / "model"))


def score(desk: Desk, bench, output: str, *, code: int = 0, **options: object) -> Scored:
    """A run in this process."""
    assert main(desk.flags(bench, output, **options)) == code
    return Scored(code, "", desk.root / output)


def test_the_margin_is_the_least_that_keeps_the_verdicts():
    masked, thought = [3.0, -2.0, 1.0, 0.5], [1.0, 4.0, 2.0, -1.0]
    assert choose_margin(masked, thought, least_agreement=0.5) == (0.0, 0.5, 0.0)
    assert choose_margin(masked, thought, least_agreement=0.75) == (0.5, 0.75, 0.25)
    assert choose_margin(masked, thought, least_agreement=1.0) == (2.0, 1.0, 0.75)
    assert choose_margin([2.0, 1.0, 1.0], [1.0, 1.0, -1.0], least_agreement=1.0) == (
        1.0,
        1.0,
        2 / 3,
    )
    with pytest.raises(ValueError, match=r"no margin .* keeps 1 of the verdicts\. Lower think_agreement"):
        choose_margin([2.0, 1.0], [-1.0, 1.0], least_agreement=1.0)


def test_pairs_think_where_they_are_close_without_a_thought(desk, capsys):
    """The labels are what rewards without a thought say; with the opposite ones these are worse than chance."""
    bench = desk.write(all_pairs())
    margins = [
        float(row["Reward_A"]) - float(row["Reward_B"])
        for row in score(desk, bench, "out/masked.csv", mask_cot=True).rows
    ]
    rows = [make_row("tabench", pair, number) for number, pair in enumerate(all_pairs())]
    labelled = [row | {"answer": "AB"[margin < 0]} for row, margin in zip(rows, margins, strict=True)]
    opposite = [row | {"answer": "AB"[margin > 0]} for row, margin in zip(rows, margins, strict=True)]
    calibrate = {"calibrate": True, "think_agreement": 0.8}
    score(desk, desk.write(opposite, name="opposite"), "out/opposite.csv", code=1, **calibrate)
    assert "no better than chance: no margin is kept. Always think" in capsys.readouterr().err
    bench = desk.write(labelled)
    score(desk, bench, "out/new.csv", code=1, think_when_unsure=True)
    assert "has no think_margin.json: make it with inference.py --calibrate" in capsys.readouterr().err
    always = score(desk, bench, "out/always.csv", **calibrate)
    rule = json.loads((desk.model / "think_margin.json").read_text())
    thoughts = [float(row["Reward_A"]) - float(row["Reward_B"]) for row in always.rows]
    expected = choose_margin(margins, thoughts, least_agreement=0.8)
    assert (rule["margin"], rule["agreement"], rule["share_thinking"]) == pytest.approx(expected, abs=1e-5)
    assert rule["accuracy"] == 1.0

    rule["margin"] = sorted(map(abs, margins))[3] + 1e-4  # some think and most do not
    (desk.model / "think_margin.json").write_text(json.dumps(rule))
    mixed = score(desk, bench, "out/mixed.csv", think_when_unsure=True, report=desk.root / "page.html")
    items = [{row["video_A"] + row["prompt"], row["video_B"] + row["prompt"]} for row in mixed.rows]
    unsure = [item for item, margin in zip(items, margins, strict=True) if abs(margin) <= rule["margin"]]
    thinking = set().union(*unsure)
    assert 0 < len(thinking) < 24
    for row, item, thought, margin in zip(mixed.rows, items, always.rows, margins, strict=True):
        own = float(row["Reward_A"]) - float(row["Reward_B"])
        if item <= thinking:
            assert (row["CoT_A"], row["CoT_B"]) == (thought["CoT_A"], thought["CoT_B"])
            assert float(row["Reward_A"]) == pytest.approx(float(thought["Reward_A"]), abs=1e-5)
        else:
            assert (row["CoT_A"], row["CoT_B"], own) == ("", "", pytest.approx(margin, abs=1e-5))
    found = mixed.json
    assert (found["num_videos"], found["num_scored"], found["mean_reward"]) == (24, 24, None)
    assert found["thinking"] == {"num_thought": len(thinking), **rule}
    assert f"{len(thinking)} of 24 videos thought" in capsys.readouterr().out
    files = mixed.files
    assert score(desk, bench, "out/mixed.csv", think_when_unsure=True).files == files
    several = score(desk, bench, "out/several.csv", think_when_unsure=True, num_thoughts=2)
    assert {bool(row["CoT_A"]) == bool(row["StandardError_A"]) for row in several.rows} == {True}
    (desk.model / "think_margin.json").write_text('{"margin": 1.0}')
    score(desk, bench, "out/mixed.csv", code=1, think_when_unsure=True)
    assert "is damaged" in capsys.readouterr().err


def test_several_thoughts_resume_to_the_same_and_carry_their_standard_error(desk, capsys):
    bench = desk.write([(*NAMES[:2], "a cat"), (*NAMES[1:3], "a cat")])
    options = {"num_thoughts": 3, "report": desk.root / "page.html"}
    scored = score(desk, bench, "out/k.csv", **options)
    by_item = list(scored.journal.values())
    for entry in by_item:
        rewards = [thought["reward"] for thought in entry["thoughts"]]
        assert (len(rewards), entry["reward"]) == (3, pytest.approx(sum(rewards) / 3))
        assert entry["standard_error"] > 0
    assert scored.rows[0]["StandardError_A"] == repr(by_item[0]["standard_error"])
    assert (scored.json["run"]["num_thoughts"], scored.json["run"]["seed"]) == (3, 0)
    assert scored.json["mean_standard_error"] == pytest.approx(sum(entry["standard_error"] for entry in by_item) / 3)
    assert "mean of 3 thoughts, standard error" in (desk.root / "page.html").read_text()
    journal = scored.csv.with_suffix(JOURNAL_SUFFIX)
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    again = score(desk, bench, "out/k.csv", **options)  # in another batch
    written = [
        [[each["cot"] for each in entry["thoughts"]] for entry in run] for run in (by_item, again.journal.values())
    ]
    assert written[0] == written[1]
    score(desk, bench, "out/k.csv", code=1, seed=1, **options)
    assert "with another seed (0 there, 1 now)" in capsys.readouterr().err
