"""The toy world: what is rendered, how it is scored, what the data set promises."""

import re
from dataclasses import replace

import numpy as np
import pytest

import make_toy_world
from toy_world import render, scene, tables, texts, world

SCENE = scene.Scene("circle", "red", "still", "still", "city", "day", "flat")
NUISANCE = render.Nuisance(0.34, 0.5, (0.5, 0.5), 3, False, 100, 110, 10, 2.0, 24)


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[world.Pair]]:
    """200 pairs of each split, without their clips."""
    return {split: [world.sample_pair(world.WorldConfig(), split, i) for i in range(200)] for split in world.SPLITS}


def make_tiny_world(output, *, num_pairs=(("train", 2), ("eval", 2)), **changes) -> dict:
    options = {"num_pairs": dict(num_pairs), "workers": 1, "judge_problem": "<video>\nJudge: {}".format}
    return make_toy_world.make_world(output, world.WorldConfig(**changes), **options)


def draw(shown: scene.Scene, *seconds: float, rendering: str = "usual") -> np.ndarray:
    """Frames at these moments: float [T, h, w, 3]."""
    return render.render_frames(shown, replace(NUISANCE, rendering=rendering), np.array(seconds)).astype(float)


def subject_track(shown: scene.Scene) -> tuple[np.ndarray, np.ndarray]:
    """Centroid (x, y) [5, 2] and area [5] of the rendered subject, in pixels."""
    frames = draw(shown, *np.linspace(0, NUISANCE.duration, 5))
    mask = np.abs(frames - np.asarray(render.SUBJECT_RGB[shown.color])).max(axis=-1) < 60
    centroids = [(columns.mean(), rows.mean()) for rows, columns in map(np.nonzero, mask)]
    return np.asarray(centroids), mask.sum(axis=(1, 2))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"color": "blue"}, {"subject": 1}),
        ({"shape": "star", "color": "blue"}, {"subject": 0}),
        ({"motion": "grows"}, {"dynamics": 1}),
        ({"motion": "still", "camera": "still"}, {"dynamics": 0, "camera": 0}),
        ({"camera": "zooms in", "place": "ocean"}, {"camera": 1, "environment": 1}),
        ({"place": "ocean", "light": "night", "style": "glowing"}, {"environment": 0, "style": 0}),
    ],
)
def test_scores_follow_the_stated_rules(changes, expected):
    asked = replace(SCENE, motion="left", camera="pans left")
    everything = frozenset(scene.DIMENSIONS)
    scores = scene.true_scores(scene.Request(asked, everything), replace(asked, **changes))
    assert scores == {**dict.fromkeys(scene.DIMENSIONS, 2), **expected}
    swapped = scene.true_scores(scene.Request(replace(asked, **changes), everything), asked)
    assert swapped == scores  # a motion where stillness is asked for is as wrong as the reverse


def test_prompts_and_combinations_of_evaluation_do_not_occur_in_training(pairs):
    for split in pairs:
        scenes = [shown for pair in pairs[split] for shown in (pair.request.scene, *(c.scene for c in pair.clips))]
        assert {scene.is_held_out(shown) for shown in scenes} == {split == "eval"}
    assert not {pair.prompt for pair in pairs["train"]} & {pair.prompt for pair in pairs["eval"]}


def test_prompt_and_cot_say_what_they_are_about(pairs):
    rng = np.random.default_rng(0)
    for pair in pairs["train"]:
        words = set(re.findall(r"[a-z]+", pair.prompt.lower()))
        asked, mentioned = pair.request.scene, pair.request.mentioned
        assert {asked.color, asked.shape, asked.motion} <= words
        assert ({asked.place, asked.light} <= words) == ("environment" in mentioned)
        assert ("style" in words, "camera" in words) == ("style" in mentioned, "camera" in mentioned)
        seen = texts.misperceive(pair.clips[0].scene, rng, 0.3)
        cot = texts.write_cot(pair.request, seen, rng)
        scores = scene.true_scores(pair.request, seen)
        assert texts.parse_scores(cot) == scores
        assert f'"overall_score": {scene.overall_score(scores):.2f}}}' in cot
        for line, (name, attributes) in zip(cot.split("\n"), scene.DIMENSIONS.items(), strict=False):
            assert line.lower().startswith(f"{name}: ")
            assert all(getattr(seen, attribute) in line for attribute in attributes)


def test_rates_are_near_the_stated_ones(pairs):
    rates = {split: world.measure_rates(pairs[split]) for split in pairs}
    for name, intended, tolerance in (("tie_share", 0.1, 0.05), ("malformed_share", 0.02, 0.015)):
        assert all(of_split[name] == pytest.approx(intended, abs=tolerance) for of_split in rates.values())
    assert rates["train"]["attribute_error"] == pytest.approx(0.6 * 0.03 + 0.4 * 0.25, abs=0.015)
    assert rates["train"]["label_noise"] == pytest.approx(0.05, abs=0.03)
    assert [rates[split]["label_noise"] for split in world.SPLITS[1:]] == [0, 0, 0]


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_subject_moves_as_named(motion, axis, sign):
    centroids, _ = subject_track(replace(SCENE, motion=motion))
    steps = np.diff(centroids, axis=0)
    assert (sign * steps[:, axis] > 3).all()
    assert np.abs(steps[:, 1 - axis]).max() < 1
    moved = abs(centroids[-1, axis] - centroids[0, axis]) / NUISANCE.width
    assert moved == pytest.approx(np.mean(render.TRAVEL_RANGE), abs=0.02)


def test_world_is_reproducible_resumes_and_takes_more_held_out_sets(tmp_path):
    assert make_tiny_world(tmp_path / "one")["num_clips"] == 8
    more = {"train": 2, "eval": 2, "in_domain": 2, "new_rendering": 1}
    make_tiny_world(tmp_path / "more", num_pairs=more.items())
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.[cm][sp][v4]"))
    assert len(files) == 9 + 8
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "more" / name).read_bytes()
    rows = tables.read_table(tmp_path / "more" / tables.HELD_OUT_FILE)
    assert [row["set"] for row in rows] == [*["in_domain"] * 2, *["new_combinations"] * 2, "new_rendering"]
    answers = [row["answer"] for row in tables.read_table(tmp_path / "more" / "eval_rl.csv")]
    assert [row["answer"] for row in rows[2:4]] == answers
    removed, kept = sorted((tmp_path / "more" / "videos").iterdir())[:2]
    removed.unlink()
    written = kept.stat().st_mtime_ns
    make_tiny_world(tmp_path / "more")
    assert removed.is_file()
    assert kept.stat().st_mtime_ns == written
    assert len(list((tmp_path / "more" / "videos").iterdir())) == 8
    make_tiny_world(tmp_path / "more", seed=9)
    assert kept.stat().st_mtime_ns != written


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        make_tiny_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
