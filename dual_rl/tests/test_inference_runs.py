"""Inference as users start it: whole runs over the example's clips with a small random model.

Rewards depend on a batch's padding by rounding only: runs that must be bit-equal score one video at a time, others may
differ in the last digits.
"""

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inference import main
from inference_support import NAMES, PROMPTS, VIDEOS, Desk, Scored, all_pairs, make_row
from model_support import write_small_model
from scoring.bench_csv import read_bench
from scoring.report import added_columns, format_result
from toy_world.tables import read_table
from training_support import assert_one_message, wait_until_gone
from verl.model.reward_files import save_head

NUM_KILLS = 3


@pytest.fixture(scope="module")
def desk(tmp_path_factory, small_model) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), small_model)


@pytest.fixture(scope="module")
def bench(desk) -> Path:
    """24 rows over 24 videos, each of which two rows name."""
    return desk.write(all_pairs())


@pytest.fixture(scope="module")
def whole(desk, bench) -> Scored:
    """`bench` scored without interruption by the script, one video at a time. It prints its own lines only."""
    (desk.root / "whole").mkdir()
    scored = desk.run_script(bench, "whole/scores.csv", batch_size=1)
    assert scored.code == 0, scored.output
    assert not scored.foreign_lines
    return scored


@pytest.fixture
def finished(whole, desk, tmp_path) -> str:
    """Output of a finished run, a copy for one test."""
    shutil.copytree(whole.csv.parent, tmp_path / "finished")
    return str(tmp_path / "finished" / "scores.csv")


@pytest.fixture
def assert_refused(capfd, caplog) -> Callable[..., None]:
    """Runs in this process: it must end with one message that matches a pattern, before anything is scored."""

    def check(pattern: str, desk: Desk, bench: Path, output: str = "out/scores.csv", **options: object) -> None:
        code = main(desk.flags(bench, output, **options))
        assert_one_message(code, capfd.readouterr().err, pattern)
        assert "to score" not in caplog.text

    return check


def write_head(path: Path, model: Path, *, value: float = 1.0) -> Path:
    """Another head for the model, the same `value` everywhere."""
    width = torch.load(model / "rm_head.pth", weights_only=True)["rm_head.weight"].shape[1]
    save_head(path, torch.full((1, width), value))
    return path


def assert_same(scored: Scored, whole: Scored) -> None:
    """The same thoughts about the same videos, and the same rewards but for rounding."""
    assert scored.code == 0, scored.output
    assert scored.of_items("cot") == whole.of_items("cot")
    assert scored.of_items("reward") == pytest.approx(whole.of_items("reward"), rel=1e-5, abs=1e-5)


def test_every_video_is_scored_once_and_reported_in_all_its_rows(desk):
    """test_bench_csv.py reads the other formats, test_report.py writes single videos."""
    pairs = all_pairs(PROMPTS[::2])
    path = desk.write([*pairs, *pairs[:4]], "videoalign", name="align")
    options = {"bench_type": "videoalign", "batch_size": 8, "report": desk.root / "page.html"}
    scored = desk.run(path, "align/scores.csv", **options)
    assert scored.code == 0, scored.output
    assert scored.output.endswith(format_result(scored.json) + "\n")
    bench, rewards, cots = read_bench(path, "videoalign"), scored.of_items("reward"), scored.of_items("cot")
    assert len(set(rewards.values())) == len(bench.items) == 16
    assert (scored.json["num_rows"], scored.json["num_scored"], scored.json["failures"]) == (20, 16, [])
    assert list(scored.rows[0]) == [*read_table(path)[0], *added_columns(bench)]
    for cells, before, row in zip(scored.rows, read_table(path), bench.rows, strict=True):
        expected = [*(repr(rewards[item]) for item in row.item_ids), *(cots[item] for item in row.item_ids)]
        assert cells == before | dict(zip(added_columns(bench), expected, strict=True))
    assert scored.json["labels"].keys() == {"VQ", "Overall"}
    assert "<h1>videoalign: align.csv</h1>" in (desk.root / "page.html").read_text()


def test_runs_of_a_calibrated_model_are_judged_by_its_calibration(desk, bench, finished, tmp_path, capsys):
    flags = replace(desk, model=shutil.copytree(desk.model, tmp_path / "model")).flags(bench, finished, batch_size=1)
    assert main([*flags, "--calibrate"]) == 0
    assert "signs" not in capsys.readouterr().out
    scale = json.loads((tmp_path / "model" / "reward_scale.json").read_text())
    assert scale["faulty"] == 1.0
    assert main(flags) == 0
    assert f"signs of reward hacking: none; mean {scale['mean']:.3f} ({scale['mean']:.3f}, +0.00 sd), spread " in (
        capsys.readouterr().out
    )


def test_a_run_killed_at_any_moment_resumes_to_the_same_files(desk, bench, whole):
    rng, codes, csv = random.Random(0), [], desk.root / "killed" / "scores.csv"
    for number in range(NUM_KILLS):
        running = desk.start(bench, "killed/scores.csv", batch_size=1)
        if number % 2:  # somewhere in the start
            running.stop_at(0, seconds=rng.uniform(0.0, 0.7))
        else:  # somewhere in the work
            running.stop_at(running.num_lines() + rng.randint(1, 2), seconds=rng.uniform(0.0, 0.05))
        codes.append(running.wait().code)
        for suffix in (".csv", ".json"):  # complete or absent
            path = csv.with_suffix(suffix)
            assert not path.exists() or path.read_bytes() == whole.csv.with_suffix(suffix).read_bytes()
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert codes.count(-signal.SIGKILL) > NUM_KILLS / 2
    last = desk.run(bench, "killed/scores.csv", batch_size=1)
    assert last.code == 0, last.output
    assert last.files[:2] == whole.files[:2]
    assert last.journal.keys() == whole.journal.keys()


def test_ctrl_c_ends_a_run_that_no_other_could_join(desk, bench):
    running = desk.start(bench, "interrupted/scores.csv", batch_size=1)
    running.stop_at(2, number=signal.SIGSTOP)
    other = desk.run(bench, "interrupted/scores.csv", batch_size=1, overwrite=True)
    pattern = r"scores.rewards.jsonl is being written by another run\. Wait for it, or choose another"
    assert_one_message(other.code, other.output, pattern)
    for number in (signal.SIGINT, signal.SIGCONT):
        running.signal(number)
    scored = running.wait()
    assert scored.code == 130, scored.output
    assert scored.output.endswith("interrupted; the same command resumes where it stopped\n")
    assert "Traceback" not in scored.output
    assert scored.journal
    assert not scored.csv.exists()


def test_what_is_scored_is_not_scored_again_and_overwrite_starts_clean(desk, bench, whole, finished):
    for path in (Path(finished), Path(finished).with_suffix(".json")):
        path.unlink()
    scored = desk.run(bench, finished, batch_size=8)
    assert scored.code == 0, scored.output
    assert "24 scored before, 0 to score" in scored.output
    assert scored.files == whole.files
    scored = desk.run(bench, finished, batch_size=8, max_new_tokens=4, overwrite=True)
    assert "0 scored before, 24 to score" in scored.output
    assert scored.journal.keys() == whole.journal.keys()
    assert set(scored.of_items("num_tokens").values()) == {4}
    assert scored.json["run"] == {**whole.json["run"], "max_new_tokens": 4}


def test_rewards_of_another_run_are_not_mixed_in(desk, bench, whole, finished, tmp_path, assert_refused):
    options = {
        "max_new_tokens": {"max_new_tokens": 9},
        "data": {"data_path": desk.write(all_pairs()[::-1], name="reversed")},
        "weights": {"rm_ckpt": write_head(tmp_path / "head.pth", desk.model)},
    }
    for what, changed in options.items():
        pattern = rf"holds the rewards of another run, with another {what} \(.*with --overwrite\.$"
        assert_refused(pattern, desk, bench, finished, **changed)
        assert Scored(1, "", Path(finished)).files == whole.files


def test_videos_that_cannot_be_scored_are_listed_and_harm_no_others(tmp_path, small_model):
    desk, (good, other, broken, missing) = Desk(tmp_path, small_model), NAMES[:4]
    shutil.copytree(VIDEOS, tmp_path / "videos")
    (tmp_path / "videos" / broken).write_bytes((VIDEOS / broken).read_bytes()[:400])
    (tmp_path / "videos" / missing).unlink()
    sides = [(good, other), (good, broken), (missing, other), (other, good)]
    rows = [make_row("tabench", (*pair, "a cat"), 0) | {"problem": ""} for pair in sides]
    rows[3]["problem"] = "Judge <video> and say <Reward>"
    bench = desk.write(rows)
    scored = desk.run(bench)
    assert scored.code == 0, scored.output
    failed = [line for line in scored.output.splitlines() if line.startswith("failed: ")]
    assert len(failed) == len(scored.json["failures"]) == 4
    reasons = ((missing, 1, "video not found: "), (broken, 1, "does not decode"), ("<Reward>", 2, "reserved"))
    for name, count, reason in reasons:
        assert sum(name in line and reason in line for line in failed) == count, failed
    assert (scored.json["num_scored"], scored.json["labels"]["answer"]["num_unscored"]) == (2, 3)
    filled = [[bool(row[name]) for name in ("Reward_A", "Reward_B", "CoT_A", "CoT_B")] for row in scored.rows]
    assert filled == [[True] * 4, [True, False] * 2, [False, True] * 2, [False] * 4]
    before = scored.of_items("reward")
    for name in (broken, missing):
        shutil.copy(VIDEOS / name, tmp_path / "videos")
    scored = desk.run(bench)
    assert "2 scored before, 4 to score" in scored.output
    assert (len(scored.json["failures"]), scored.json["num_scored"]) == (2, 4)
    assert before.items() <= scored.of_items("reward").items()


MISTAKES = [
    (r".*bench.csv: 1 fault\(s\)$", {"answer": "?"}, {}),
    (r"\n  it has the column\(s\) Reward_A already; rename them$", {"Reward_A": "1"}, {}),
    (r"--output is \S+scores.txt; name a .csv file", {}, {"output": "scores.txt"}),
    (r"--output is the benchmark itself, \S+bench.csv; name another file", {}, {"output": "bench.csv"}),
    (r"mine\.csv exists and is not from such a run: choose another output", {}, {"output": "mine.csv"}),
    (r"\S+folder\.csv", {}, {"output": "folder.csv"}),
    ("max_new_tokens=9000 leaves -?[0-9]+ of 8192 positions", {}, {"max_new_tokens": 9000}),
    ("fp8 needs the vllm backend on a GPU", {}, {"backend": "vllm", "quantization": "fp8"}),
    (r"think_agreement is 0.9\. Give a share up to 1, with --calibrate", {}, {"think_agreement": 0.9}),
    ("batch_size is 0; it must be at least 1", {}, {"batch_size": 0}),
    (r"no model folder at /no/such/model$", {}, {"model_ckpt": "/no/such/model"}),
    ("no reward head at .*: name the rm_head.pth", {}, {"rm_ckpt": VIDEOS}),
]


def test_mistakes_are_reported_before_an_engine_starts(tmp_path, small_model, assert_refused):
    desk, row = Desk(tmp_path, small_model), make_row("tabench", (*NAMES[:2], "a cat"), 0)
    (tmp_path / "mine.csv").write_text("notes\n")
    (tmp_path / "folder.csv").mkdir()
    for pattern, cells, options in MISTAKES:
        bench = desk.write([row | cells])
        before = {path: path.read_bytes() for path in tmp_path.glob("*.csv") if path.is_file()}
        assert_refused(pattern, desk, bench, **options)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.csv") if path.is_file()} == before


def test_a_run_in_which_nothing_can_be_scored_fails_and_lists_the_files(desk):
    head = write_head(desk.root / "not a number", desk.model, value=math.nan)
    scored = desk.run(desk.write([(*NAMES[:2], "a cat")], name="two"), "nothing.csv", rm_ckpt=head)
    assert scored.code == 1
    assert "Traceback" not in scored.output
    assert "1 rows, 2 videos: 0 scored, 2 failed" in scored.output
    assert all(f"videos/{name}: " in scored.output for name in NAMES[:2])
    assert (scored.journal, [row["Reward_A"] for row in scored.rows]) == ({}, [""])


def test_a_base_model_is_refused(desk, bench, tmp_path, assert_refused):
    base = write_small_model(tmp_path / "base", has_reward=False)
    pattern = "is no reward model: it does not know '<Reward>'. Train it in stage 1 first, "
    assert_refused(pattern, desk, bench, "base/scores.csv", model_ckpt=base)


@pytest.mark.slow
def test_vllm_scores_like_transformers_and_prints_its_own_lines_only(desk, bench, whole):
    (desk.root / "vllm").mkdir()
    scored = desk.run_script(bench, "vllm/out.csv", backend="vllm", batch_size=8)
    assert_same(scored, whole)
    assert not scored.foreign_lines


@pytest.mark.slow
def test_two_engines_score_like_one_and_the_death_of_one_costs_nothing(desk, bench, whole):
    running = desk.start(bench, "spread/scores.csv", num_workers=2, batch_size=1)
    running.stop_at(2, number=signal.SIGCONT)  # has no effect: wait for the first reward
    engines = [pid for pid, name in running.children().items() if name.startswith("ray::_Engine")]
    os.kill(engines[0], signal.SIGKILL)
    scored = running.wait()
    pattern = "an engine died: its process was killed, .* resumes where this run stopped$"
    assert_one_message(scored.code, scored.output, pattern)
    assert not wait_until_gone(set(engines))
    assert scored.journal
    scored = desk.run(bench, "spread/scores.csv", num_workers=2)
    assert "to score on 2 CPU engine(s)" in scored.output
    assert_same(scored, whole)
