"""Inference as users start it: whole runs over the example's clips with a small random model.

Rewards depend on a batch's padding by rounding alone: runs that must be bit-equal score one video at a time, others
may differ in the last digits.
"""

import importlib.util
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from inference import build_run, parse_arguments
from inference_support import (
    CLIPS,
    LABEL_COLUMNS,
    PROMPTS,
    VIDEOS,
    Desk,
    Scored,
    all_pairs,
    assert_same,
    assert_tidy,
    change_layer,
    copy_videos,
    make_row,
    share_correct,
    write_head,
)
from model_support import write_small_model
from scoring import benchmark
from scoring.bench_csv import BENCH_FORMATS, read_bench
from scoring.report import added_columns, format_table
from test_faults import assert_one_message
from toy_world.tables import read_table
from training_support import wait_until_gone

NUM_KILLS = 4
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def desk(tmp_path_factory, small_model) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), small_model)


@pytest.fixture(scope="module")
def bench(desk) -> Path:
    """24 rows over 24 videos, each of which two rows name."""
    return desk.write(all_pairs())


@pytest.fixture(scope="module")
def whole(desk, bench) -> Scored:
    """`bench` scored without interruption, one video at a time."""
    scored = desk.run(bench, output="whole/scores.csv", batch_size=1)
    assert scored.code == 0, scored.output
    return scored


@pytest.fixture
def finished(whole, desk, tmp_path) -> str:
    """Output of a finished run, for this test to do with as it likes."""
    shutil.copytree(whole.csv.parent, tmp_path / "finished")
    return str(tmp_path / "finished" / "scores.csv")


@pytest.mark.parametrize("bench_type", ["videoalign", "videofeedback"])  # test_bench_csv.py reads the others
def test_every_format_is_scored_once_a_video_and_reported(desk, bench_type):
    pairs = all_pairs(PROMPTS[::2])
    path = desk.write([*pairs, *pairs[:4]], bench_type, name=bench_type)
    scored = desk.run(path, bench_type, f"{bench_type}/scores.csv", batch_size=8)
    assert scored.code == 0, scored.output
    assert scored.output.endswith(format_table(scored.json) + "\n")
    bench = read_bench(path, bench_type)
    assert len(scored.journal) == len(scored.rewards) == len(bench.items) == 16
    assert (scored.json["num_rows"], scored.json["num_scored"], scored.json["failures"]) == (20, 16, [])
    assert list(scored.rows[0]) == [*read_table(path)[0], *added_columns(bench)]
    for cells, before, row in zip(scored.rows, read_table(path), bench.rows, strict=True):
        rewards, cots = ([of[item] for item in row.item_ids] for of in (scored.rewards, scored.cots))
        assert all(map(math.isfinite, rewards))
        assert cells == before | dict(zip(added_columns(bench), [*map(repr, rewards), *cots], strict=True))
    assert len(set(scored.rewards.values())) == 16
    for label in LABEL_COLUMNS[bench_type]:
        values = scored.json["labels"][label]
        assert (values["without_ties"]["value"], values["num_decided"]) == share_correct(scored.rows, label)
        assert bool(values["models"]) == bool(BENCH_FORMATS[bench_type].model_columns)


def test_a_run_killed_at_any_moment_continues_to_the_same_files(desk, bench, whole):
    rng, codes = random.Random(0), []
    scored = Scored(0, "", desk.root / "killed" / "scores.csv")
    for number in range(NUM_KILLS):
        running = desk.start(bench, output="killed/scores.csv", batch_size=1)
        if number % 2:  # somewhere in the start
            running.stop_at(0, seconds=rng.uniform(0.0, 0.7))
        else:  # somewhere in the work
            lines = len(scored.journal_path.read_bytes().splitlines()) if number else 0
            running.stop_at(lines + rng.randint(1, 2), seconds=rng.uniform(0.0, 0.05))
        codes.append(running.wait().code)
        for suffix in (".csv", ".json"):  # complete or absent
            path = scored.csv.with_suffix(suffix)
            assert not path.exists() or path.read_bytes() == whole.csv.with_suffix(suffix).read_bytes()
    assert set(codes) <= {-signal.SIGKILL, 0}
    assert codes.count(-signal.SIGKILL) > NUM_KILLS / 2
    running = desk.start(bench, output="killed/scores.csv", batch_size=1)
    running.stop_at(1 + len(whole.journal))  # all is scored, nothing reported
    running.wait()
    last = desk.run(bench, output="killed/scores.csv", batch_size=1)
    assert last.code == 0, last.output
    assert last.files == whole.files
    assert sorted(entry["name"] for entry in last.journal) == sorted(whole.rewards)


def test_ctrl_c_ends_a_run_that_no_other_could_join(desk, bench):
    running = desk.start(bench, output="interrupted/scores.csv", batch_size=1)
    running.stop_at(2, number=signal.SIGSTOP)
    other = desk.run(bench, output="interrupted/scores.csv", batch_size=1, overwrite=True)
    assert_one_message(other, r"scores.rewards.jsonl is being written by another run: wait for it, or choose another")
    for number in (signal.SIGINT, signal.SIGCONT):
        os.kill(running.process.pid, number)
    scored = running.wait()
    assert scored.code == 130, scored.output
    assert scored.output.endswith("interrupted; the same command continues where it stopped\n")
    assert "Traceback" not in scored.output
    assert scored.journal
    assert not scored.csv.exists()


def test_what_is_scored_is_not_scored_again(desk, bench, whole, finished, monkeypatch):
    for path in (Path(finished), Path(finished).with_suffix(".json")):
        path.unlink()
    scored = desk.run(bench, output=finished, batch_size=8)
    assert scored.code == 0, scored.output
    assert "24 scored before, 0 to score" in scored.output
    assert scored.files == whole.files
    assert scored.journal_path.read_bytes() == whole.journal_path.read_bytes()

    def start_no_engine(*_: object, **__: object) -> None:
        raise AssertionError("an engine was asked for")

    monkeypatch.setattr(benchmark, "score_tasks", start_no_engine)
    arguments = desk.arguments(bench, "tabench", finished, {})
    assert benchmark.run_benchmark(build_run(parse_arguments(arguments))) == whole.json


OTHER_RUNS: dict[str, tuple[str, Callable[[Desk, Path], dict]]] = {
    "settings": (r"max_new_tokens \(8 there, 9 now\)", lambda *_: {"max_new_tokens": 9}),
    "CSV": (r"data \(", lambda desk, _: {"data_path": desk.write(all_pairs()[::-1], name="reversed")}),
    "head": (r"weights \(", lambda desk, folder: {"rm_ckpt": write_head(folder / "head.pth", desk.model)}),
    "model": (r"weights \(", lambda desk, folder: {"model_ckpt": change_layer(folder / "other", desk.model)}),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_rewards_of_another_run_are_not_mixed_in(desk, bench, whole, finished, tmp_path, what):
    pattern, make_options = OTHER_RUNS[what]
    scored = desk.run(bench, output=finished, **make_options(desk, tmp_path))
    assert_one_message(scored, rf"holds the rewards of another run, with another {pattern}.*with --overwrite$")
    assert scored.files == whole.files
    assert scored.journal_path.read_bytes() == whole.journal_path.read_bytes()


def test_files_from_elsewhere_are_not_written_over(desk, bench, tmp_path):
    (tmp_path / "mine.csv").write_text("notes\n")
    (tmp_path / "folder.csv").mkdir()
    scored = desk.run(bench, output=str(tmp_path / "mine.csv"))
    assert_one_message(scored, r"mine\.csv is there and comes from elsewhere: choose another output, or --overwrite$")
    assert (tmp_path / "mine.csv").read_text() == "notes\n"
    scored = desk.run(bench, output=str(tmp_path / "folder.csv"))
    assert_one_message(scored, r"cannot be written: \S+folder\.csv is in the way$")


def test_overwrite_starts_clean(desk, bench, whole, finished):
    scored = desk.run(bench, output=finished, batch_size=8, max_new_tokens=4, overwrite=True)
    assert scored.code == 0, scored.output
    assert "0 scored before, 24 to score" in scored.output
    assert set(scored.rewards) == set(whole.rewards)
    assert {entry["num_tokens"] for entry in scored.journal} == {4}
    assert scored.json["run"] == {**whole.json["run"], "max_new_tokens": 4}


def test_videos_that_cannot_be_scored_are_listed_and_harm_no_others(tmp_path, small_model):
    desk, (good, other, broken, missing) = Desk(tmp_path, small_model), CLIPS[:4]
    copy_videos(tmp_path, broken=[broken])
    (tmp_path / "videos" / missing).unlink()
    sides = [(good, other), (good, broken), (missing, other), (other, good)]
    rows = [make_row("tabench", (*pair, "a cat"), 0) | {"problem": ""} for pair in sides]
    rows[3]["problem"] = "Judge <video> and say <Reward>"
    bench = desk.write_rows(rows)
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
    before = scored.rewards
    for name in (broken, missing):
        shutil.copy(VIDEOS / name, tmp_path / "videos")
    scored = desk.run(bench)
    assert "2 scored before, 4 to score" in scored.output
    assert (len(scored.json["failures"]), scored.json["num_scored"]) == (2, 4)
    assert before.items() <= scored.rewards.items()


def test_a_run_in_which_nothing_can_be_scored_fails(tmp_path, small_model):
    desk = Desk(tmp_path, small_model)
    copy_videos(tmp_path, broken=CLIPS[:2])
    scored = desk.run(desk.write([(*CLIPS[:2], "a cat")]))
    assert scored.code == 1, scored.output
    assert "Traceback" not in scored.output
    assert "1 rows, 2 videos: 0 scored, 2 failed" in scored.output
    assert all(f"videos/{name}" in scored.output for name in CLIPS[:2])
    assert [row["Reward_A"] for row in scored.rows] == [""]


MISTAKES = [
    (r".*bench.csv: 1 fault\(s\)$", {"answer": "?"}, {}),
    (r"\n  genai needs left_video_path, .*: it looks like --bench_type tabench$", {}, {"bench_type": "genai"}),
    (r"\n  it has the column\(s\) Reward_A already; rename them$", {"Reward_A": "1"}, {}),
    (r"--output is \S+scores.txt; name a .csv file", {}, {"output": "scores.txt"}),
    (r"--output is the benchmark itself, \S+bench.csv; name another file", {}, {"output": "bench.csv"}),
    ("max_new_tokens=9000 leaves -?[0-9]+ of 8192 positions", {}, {"max_new_tokens": 9000}),
    ("batch_size is 0; it must be at least 1", {}, {"batch_size": 0}),
    ("repetition_penalty is 0.0; it must be positive", {}, {"repetition_penalty": 0}),
    ("save_every is 0; it must be at least 1", {}, {"save_every": 0}),
    ("video fps must be positive", {}, {"video_fps": 0}),
    ("seed is -1; it must not be negative", {}, {"seed": -1}),
    (r"no model folder at /no/such/model$", {}, {"model_ckpt": "/no/such/model"}),
    ("no reward head at .*: name the rm_head.pth", {}, {"rm_ckpt": VIDEOS}),
    ("exclude each other: give one of --fresh_head and", {}, {"rm_ckpt": VIDEOS, "fresh_head": True}),
]


@pytest.mark.parametrize(("pattern", "cells", "options"), MISTAKES)
def test_mistakes_are_told_before_an_engine_is_started(tmp_path, small_model, pattern, cells, options):
    desk = Desk(tmp_path, small_model)
    bench = desk.write_rows([make_row("tabench", (*CLIPS[:2], "a cat"), 0) | cells])
    content = bench.read_bytes()
    scored = desk.run(bench, **{"output": "out/scores.csv", **options})
    assert_one_message(scored, pattern)
    assert "to score" not in scored.output
    assert bench.read_bytes() == content
    assert {path.suffix for path in scored.csv.parent.iterdir() if path.is_file()} <= {".csv", ".console"}
    assert scored.csv.name == bench.name or not scored.csv.exists()


@pytest.mark.parametrize("options", [{"rm_ckpt": "no number"}, {"max_prompt_length": 20}], ids=["reward", "prompt"])
def test_what_fails_in_the_engine_is_listed_by_file(desk, options):
    write_head(desk.root / "no number", desk.model, value=math.nan)
    options = {name: desk.root / value if name == "rm_ckpt" else value for name, value in options.items()}
    scored = desk.run(desk.write([(*CLIPS[:2], "a cat")], name="two"), output=f"{next(iter(options))}.csv", **options)
    assert scored.code == 1
    assert "Traceback" not in scored.output
    assert all(f"videos/{name}: " in scored.output for name in CLIPS[:2])
    assert scored.journal == []


def test_a_base_model_is_scored_with_a_fresh_head_only(desk, bench, tmp_path):
    base = write_small_model(tmp_path / "base", has_reward=False)
    scored = desk.run(bench, output="base/scores.csv", model_ckpt=base)
    assert_one_message(scored, "is no reward model: it does not know '<Reward>'. Train it in stage 1 first, ")
    fresh = {"model_ckpt": base, "fresh_head": True, "batch_size": 1}
    pairs = desk.write(all_pairs(PROMPTS[:1]), name="few")
    first, again, other = (
        desk.run(pairs, output=f"base/{name}.csv", seed=seed, **fresh)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert [scored.code for scored in (first, again, other)] == [0, 0, 0]
    assert first.rewards == again.rewards
    assert first.cots == other.cots
    assert all(abs(first.rewards[name] - other.rewards[name]) > 1e-3 for name in first.rewards)
    assert_one_message(desk.run(pairs, output="base/first.csv", seed=2, **fresh), r"another weights \(")


@pytest.mark.skipif(not HAS_VLLM, reason="vllm is not installed")
def test_the_script_scores_with_vllm_as_transformers_do_and_tells_what_it_has_to(desk, bench, whole):
    scored = desk.run_script(bench, output="vllm/out.csv", batch_size=8, max_new_tokens=8)
    assert_same(scored, whole)
    assert_tidy(scored)


@pytest.mark.slow
def test_two_engines_score_as_one_and_the_death_of_one_costs_nothing(desk, bench, whole):
    running = desk.start(bench, output="spread/scores.csv", num_workers=2, batch_size=1)
    running.stop_at(2, number=signal.SIGCONT)  # no signal to speak of: wait for the first reward
    family = psutil.Process(running.process.pid).children(recursive=True)
    engines = [child for child in family if child.name().startswith("ray::ScoringActor")]
    engines[0].kill()
    scored = running.wait()
    assert_one_message(scored, "an engine died: its process was killed, .* continues where this run stopped$")
    assert not wait_until_gone({engine.pid for engine in engines})
    assert scored.journal
    scored = desk.run(bench, output="spread/scores.csv", num_workers=2)
    assert "to score on 2 CPU engine(s)" in scored.output
    assert_same(scored, whole)
