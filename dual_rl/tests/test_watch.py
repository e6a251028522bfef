"""Signs of reward hacking: none on the videos of the calibration itself, one for each drift, one warning for each run.

toy_scored.txt: rewards and sub-scores (`-` for N/A) that the quick start's model gave its 400 held-out videos.
"""

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from model_support import CLIPS
from reward_client import RewardClient, ServerPath
from scoring.source import RewardScale, compute_scale
from scoring.types import ScoredVideo, Thought
from scoring.watch import MAX_RUNS, MIN_VIDEOS, WINDOW, RunWatch, compute_agreement, measure, observe
from serving_support import PROMPTS, TOLERANCE

pytest_plugins = ["serving_fixtures"]
DRIFTS = {
    "mean": lambda video, _: replace(video, reward=video.reward + 1.7),
    "spread": lambda video, _: replace(video, reward=1.3 + video.reward / 10),
    "agreement": lambda video, other: replace(video, reward=other.reward),
    "faulty": lambda video, other: replace(video, cot="It moves: 2") if other.reward < 0.7 else video,
}


@pytest.fixture(scope="module")
def videos() -> list[ScoredVideo]:
    words = (Path(__file__).parent / "toy_scored.txt").read_text().split()
    answers = [json.dumps({"dimensional_scores": dict(zip("sdcey", scores, strict=True))}) for scores in words[1::2]]
    thoughts = [f"It moves. <answer>{answer}</answer>" for answer in answers]
    return [ScoredVideo("", float(reward), cot, 9, True) for reward, cot in zip(words[::2], thoughts, strict=True)]


@pytest.fixture(scope="module")
def scale(videos) -> RewardScale:
    figures = measure(list(map(observe, videos)))
    scale = compute_scale([video.reward for video in videos], data="toy.csv", weights="w", video={})
    thoughts = {name: getattr(figures, name) for name in ("agreement", "agreement_error", "faulty")}
    return replace(scale, **thoughts)


def test_the_agreement_is_the_share_of_pairs_that_head_and_thought_order_alike(videos, scale):
    rewards, scores = (np.array(column) for column in zip(*(observe(video)[:2] for video in videos), strict=True))
    pairs = itertools.combinations(zip(rewards, scores, strict=True), 2)
    right = [(a > c) == (b > d) for (a, b), (c, d) in pairs if b != d and a != c]
    assert scale.agreement == pytest.approx(fmean(right), abs=1e-3)
    draws = [np.random.default_rng(seed).integers(len(videos), size=len(videos)) for seed in range(100)]
    spread = stdev(compute_agreement(rewards[draw], scores[draw])[0] for draw in draws)
    assert scale.agreement_error == pytest.approx(spread, rel=0.25)


def test_sub_scores_that_are_no_numbers_to_work_with_are_faulty():
    for value in ("-1e400", '"1e400"', "1" + "0" * 400, "1e308", '"a lot"', "NaN"):
        answer = f'<answer>{{"dimensional_scores": {{"subject": {value}, "camera": {value}}}}}</answer>'
        assert observe(ScoredVideo("a", 1.0, answer, 9, True))[2] == 1, value


def test_of_several_thoughts_the_share_of_faulty_ones_counts(videos):
    good, cut = (Thought(1.0, videos[0].cot, 9, is_finished) for is_finished in (True, False))
    several = replace(videos[0], is_finished=False, thoughts=(good, good, good, cut))
    assert observe(several)[2] == 0.25


def test_the_videos_of_the_calibration_are_no_sign_in_any_order_nor_when_most_are_good(videos, scale, caplog):
    watch = RunWatch(scale)
    for seed in range(40):
        for video in random.Random(seed).sample(videos, len(videos)):
            watch.add("default", [video])
    for video in sorted(videos, key=lambda video: observe(video)[1])[-WINDOW:]:
        watch.add("good", [video])
    for number in range(MAX_RUNS - 1):  # and few videos never are; the run that was silent for longest is forgotten
        watch.add(f"run-{number}", [replace(video, reward=99.0) for video in videos[: MIN_VIDEOS - 1]])
    assert not caplog.records
    assert set(watch.read()) == {"(calibration)", "good", *(f"run-{number}" for number in range(MAX_RUNS - 1))}


@pytest.mark.parametrize("sign", DRIFTS)
def test_each_drift_gives_its_sign_in_one_warning_with_the_figures(videos, scale, caplog, sign):
    watch, others = RunWatch(scale), random.Random(1).sample(videos, len(videos))
    for video, other in zip(videos, others, strict=True):
        watch.add("mine", [DRIFTS[sign](video, other)])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"run mine: signs of reward hacking ({sign}) in its last ")
    assert f" ({scale.mean:.3f}, " in record.getMessage()
    assert watch.read()["mine"]["signs"] == 1


def test_the_server_watches_each_run_that_clients_name(serving, offline, caplog):
    rewards = [result["reward"] for result in offline]
    mean, std = fmean(rewards), stdev(rewards)
    scale = {"mean": mean + 5 * std, "std": std, "num_videos": 100, "faulty": 1.0}
    watch = RunWatch(RewardScale(**scale, data="val.csv", weights="w", video={}))
    for reward in (rewards * MIN_VIDEOS)[: MIN_VIDEOS - 2]:
        watch.add("grpo 7", [ScoredVideo("", reward, "", 8, False)])
    client = serving(watch=watch).client
    for name in ("grpo 7", None):
        scores = RewardClient(f"http://127.0.0.1:{client.port}", run=name).score(list(map(ServerPath, CLIPS)), PROMPTS)
        assert [score.error for score in scores] == [None] * len(CLIPS)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "scoring.watch"]
    assert warning.startswith(f"run grpo 7: signs of reward hacking (mean) in its last {MIN_VIDEOS - 2 + len(CLIPS)} ")
    metrics = client.get("/metrics").text
    gauges = dict(re.findall(r'descore_run{figure="(\w+)",run="(?:grpo 7|default)"} (.*)', metrics))
    assert (gauges["num_videos"], gauges["faulty"]) == ("8.0", "1.0")
    assert float(gauges["mean"]) == pytest.approx(mean, abs=TOLERANCE)
    assert 'descore_run{figure="signs",run="grpo 7"} 1.0' in metrics
    assert 'descore_run{figure="faulty",run="(calibration)"} 1.0' in metrics
