"""The toy world: what is rendered, how it is scored, what the data set promises. Fast, on the CPU."""

import itertools
import json
import re
from dataclasses import replace

import decord
import numpy as np
import pytest

import make_toy_world
from toy_world import render, scene, tables, texts, world

SCENE = scene.Scene("circle", "red", "still", "still", "city", "day", "flat")
NUISANCE = render.Nuisance(0.34, 0.5, (0.5, 0.5), 3, False, 100, 110, 10, 2.0, 24)
EVERYTHING = frozenset(scene.DIMENSIONS)
SIDES = {"train": False, "eval": True, "in_domain": False, "new_rendering": False}  # of the held-out rule


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[world.Pair]]:
    """500 pairs of each split, without their clips."""
    return {split: [world.sample_pair(world.WorldConfig(), split, i) for i in range(500)] for split in world.SPLITS}


def make_tiny_world(output, *, num_pairs=(("train", 3), ("eval", 2)), **changes) -> dict:
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
        ({}, {}),
        ({"color": "blue"}, {"subject": 1}),
        ({"shape": "star", "color": "blue"}, {"subject": 0}),
        ({"motion": "grows"}, {"dynamics": 1}),
        ({"motion": "still"}, {"dynamics": 0}),
        ({"camera": "zooms in"}, {"camera": 1}),
        ({"camera": "still"}, {"camera": 0}),
        ({"place": "ocean"}, {"environment": 1}),
        ({"place": "ocean", "light": "night"}, {"environment": 0}),
        ({"style": "glowing"}, {"style": 0}),
    ],
)
def test_scores_follow_the_stated_rules(changes, expected):
    asked = replace(SCENE, motion="left", camera="pans left")
    scores = scene.true_scores(scene.Request(asked, EVERYTHING), replace(asked, **changes))
    assert scores == {**dict.fromkeys(scene.DIMENSIONS, 2), **expected}
    swapped = scene.true_scores(scene.Request(replace(asked, **changes), EVERYTHING), asked)
    assert swapped == scores  # a motion where stillness is asked for is as wrong as the reverse


def test_unmentioned_dimensions_are_not_scored():
    request = scene.Request(SCENE, frozenset({"subject", "dynamics"}))
    scores = scene.true_scores(request, replace(SCENE, style="glowing", color="blue"))
    assert scores == {"subject": 1, "dynamics": 2, "camera": "N/A", "environment": "N/A", "style": "N/A"}
    assert scene.overall_score(scores) == pytest.approx(1 + 4 * (0.5 + 1) / 2)
    assert scene.utility(scores) == 6 * 1 + 5 * 2


def test_every_pair_of_values_occurs_on_the_training_side():
    names = ("color", "shape", "motion")
    triples = list(itertools.product(*(scene.ATTRIBUTES[name] for name in names)))
    trained = [t for t in triples if not scene.is_held_out(replace(SCENE, **dict(zip(names, t, strict=True))))]
    assert len(triples) - len(trained) == 48
    for first, second in itertools.combinations(range(3), 2):
        assert {(t[first], t[second]) for t in trained} == {(t[first], t[second]) for t in triples}


def test_prompts_and_combinations_of_evaluation_do_not_occur_in_training(pairs):
    for split, is_held_out in SIDES.items():
        scenes = [shown for pair in pairs[split] for shown in (pair.request.scene, *(c.scene for c in pair.clips))]
        assert {scene.is_held_out(shown) for shown in scenes} == {is_held_out}
    assert not {pair.prompt for pair in pairs["train"]} & {pair.prompt for pair in pairs["eval"]}


def test_prompt_names_exactly_what_is_mentioned(pairs):
    for pair in pairs["train"]:
        words = set(re.findall(r"[a-z]+", pair.prompt.lower()))
        asked, mentioned = pair.request.scene, pair.request.mentioned
        assert {asked.color, asked.shape, asked.motion} <= words
        assert ({asked.place, asked.light} <= words) == ("environment" in mentioned)
        assert ("style" in words) == ("style" in mentioned)
        assert ("camera" in words) == ("camera" in mentioned)


def test_cot_states_what_was_seen_and_parses_to_its_scores(pairs):
    rng = np.random.default_rng(0)
    for pair in pairs["train"]:
        seen = texts.misperceive(pair.clips[0].scene, rng, 0.3)
        cot = texts.write_cot(pair.request, seen, rng)
        scores = scene.true_scores(pair.request, seen)
        assert texts.parse_scores(cot) == scores
        assert f'"overall_score": {scene.overall_score(scores):.2f}}}' in cot
        assert 500 <= len(cot) <= 750
        for line, (name, attributes) in zip(cot.split("\n"), scene.DIMENSIONS.items(), strict=False):
            assert line.lower().startswith(f"{name}: ")
            assert all(getattr(seen, attribute) in line for attribute in attributes)


@pytest.mark.parametrize("style", [True, 3, [2], None])
def test_unusable_answers_have_no_scores(style):
    scores = {**dict.fromkeys(scene.DIMENSIONS, 2), "style": style}
    for answer in (json.dumps({"dimensional_scores": scores}), json.dumps(scores), "[1]", "[" * 100_000):
        assert texts.parse_scores(f"<answer>{answer}</answer>") is None


def test_rates_are_near_the_stated_ones(pairs):
    rates = {split: world.measure_rates(pairs[split]) for split in pairs}
    for name, intended, tolerance in (
        ("tie_share", 0.10, 0.04),
        ("malformed_share", 0.02, 0.012),
        ("attribute_error", 0.6 * 0.03 + 0.4 * 0.25, 0.01),
    ):
        assert all(of_split[name] == pytest.approx(intended, abs=tolerance) for of_split in rates.values())
    assert rates["train"]["label_noise"] == pytest.approx(0.05, abs=0.03)
    assert [rates[split]["label_noise"] for split in world.SPLITS[1:]] == [0, 0, 0]
    assert 0.70 < rates["train"]["oracle_cot_scores"] < rates["train"]["oracle_cot_scores_ties_half"] < 0.85


def test_nuisances_keep_to_their_ranges_which_the_changed_rendering_shares_with_no_other(pairs):
    for split in pairs:
        for nuisance in (clip.nuisance for pair in pairs[split] for clip in pair.clips):
            assert {nuisance.width % 2, nuisance.height % 2} == {0}
            assert 2.0 <= nuisance.duration <= 4.0
            assert nuisance.num_frames / nuisance.fps == pytest.approx(nuisance.duration)
            is_changed = split == "new_rendering"
            assert (nuisance.fps in (18, 20, 25, 30)) == is_changed
            assert (not 0.8 <= nuisance.width / nuisance.height <= 1.25) == is_changed


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_subject_moves_as_named(motion, axis, sign):
    centroids, areas = subject_track(replace(SCENE, motion=motion))
    steps = np.diff(centroids, axis=0)
    assert (sign * steps[:, axis] > 3).all()
    assert np.abs(steps[:, 1 - axis]).max() < 1
    moved = abs(centroids[-1, axis] - centroids[0, axis]) / NUISANCE.width
    assert moved == pytest.approx(np.mean(render.TRAVEL_RANGE), abs=0.02)
    assert np.ptp(areas) < 0.1 * areas[0]


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"motion": "grows"}, 2.5, 4.5),
        ({"motion": "shrinks"}, 1 / 4.5, 1 / 2.5),
        ({"motion": "still"}, 0.99, 1.01),
        ({"camera": "zooms in"}, 1.7, 2.4),
    ],
)
def test_subject_grows_as_named(changes, low, high):
    centroids, areas = subject_track(replace(SCENE, **changes))
    assert low < areas[-1] / areas[0] < high
    assert np.ptp(centroids, axis=0).max() < 1


@pytest.mark.parametrize(("camera", "sign"), [("pans left", 1), ("pans right", -1)])
def test_pan_moves_background_and_subject_together(camera, sign):
    shown = replace(SCENE, camera=camera)
    first, last = draw(shown, 0, 2)[:, :20, ::sign]  # rows above the subject
    errors = {shift: np.abs(first[:, :-shift] - last[:, shift:]).mean() for shift in range(1, 40)}
    shift = min(errors, key=errors.get)
    assert shift == pytest.approx(np.mean(render.PAN_RANGE) * NUISANCE.width, abs=1)
    centroids, _ = subject_track(shown)
    assert sign * (centroids[-1, 0] - centroids[0, 0]) == pytest.approx(shift, abs=1.5)


def test_subject_is_in_view_from_start_to_end_in_every_scene(pairs):
    for clip in (clip for pair in (*pairs["train"], *pairs["new_rendering"]) for clip in pair.clips):
        track = render.compute_track(clip.scene, clip.nuisance, np.array([0.0, 0.5, 1.0]) * clip.nuisance.duration)
        for centers, half in zip((track.center_x, track.center_y), clip.nuisance.half_size, strict=True):
            assert (np.abs(centers) + track.radius <= half + 0.02).all()


def test_every_color_stands_out_from_every_background_in_both_renderings():
    for values in itertools.product(*(scene.ATTRIBUTES[name] for name in ("color", "place", "light"))):
        shown = replace(SCENE, color=values[0], place=values[1], light=values[2])
        (usual,), (changed,) = draw(shown, 0), draw(shown, 0, rendering="changed")
        for frame in (usual, changed):
            assert np.linalg.norm(frame[55, 50] - frame[:20].mean(axis=(0, 1))) > 80, shown
        assert np.abs(usual - changed).mean() > 5, shown


@pytest.mark.parametrize("name", ["style", "shape"])
def test_styles_and_shapes_look_different(name):
    frames = [draw(replace(SCENE, **{name: value}), 0)[0] for value in scene.ATTRIBUTES[name]]
    for one, other in itertools.combinations(frames, 2):
        assert np.abs(one - other).max(axis=-1).mean() > 1.5


def test_clip_decodes_to_the_rendered_frames(tmp_path):
    shown, path = replace(SCENE, motion="left", camera="zooms in"), tmp_path / "clip.mp4"
    render.encode_clip(path, shown, NUISANCE)
    reader = decord.VideoReader(str(path))
    assert reader.get_avg_fps() == pytest.approx(NUISANCE.fps)
    decoded = reader.get_batch(range(len(reader))).asnumpy().astype(float)
    rendered = draw(shown, *np.arange(NUISANCE.num_frames) / NUISANCE.fps)
    assert decoded.shape == rendered.shape == (20, 110, 100, 3)
    assert np.abs(decoded - rendered).mean() < 12


def test_world_is_reproducible_and_resumes(tmp_path):
    assert make_tiny_world(tmp_path / "one")["num_clips"] == 10
    make_tiny_world(tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.[cm][sp][v4]"))
    assert len(files) == 9 + 10
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    removed, kept = sorted((tmp_path / "one" / "videos").iterdir())[:2]
    removed.unlink()
    written = kept.stat().st_mtime_ns
    make_tiny_world(tmp_path / "one")
    assert removed.is_file()
    assert kept.stat().st_mtime_ns == written
    make_tiny_world(tmp_path / "one", seed=9)
    assert kept.stat().st_mtime_ns != written


def test_compared_sets_are_added_and_leave_the_other_files_as_they_are(tmp_path):
    make_tiny_world(tmp_path / "plain")
    more = {"train": 3, "eval": 2, "in_domain": 2, "new_rendering": 1}
    make_tiny_world(tmp_path / "more", num_pairs=more.items())
    for path in (tmp_path / "plain").glob("*.csv"):
        assert (tmp_path / "more" / path.name).read_bytes() == path.read_bytes()
    rows = tables.read_table(tmp_path / "more" / tables.HELD_OUT_FILE)
    sets = ["in_domain", "in_domain", "new_combinations", "new_combinations", "new_rendering"]
    assert [row["set"] for row in rows] == sets
    assert [row["answer"] for row in rows[2:4]] == [
        row["answer"] for row in tables.read_table(tmp_path / "more" / "eval_rl.csv")
    ]
    assert len(list((tmp_path / "more" / "videos").iterdir())) == 16
    make_tiny_world(tmp_path / "more")
    assert len(list((tmp_path / "more" / "videos").iterdir())) == 10


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        make_tiny_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
