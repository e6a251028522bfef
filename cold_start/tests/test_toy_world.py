"""The toy world: what is rendered, how it is scored, what the data set promises. Fast, on the CPU."""

import itertools
import json
import re
from collections import Counter
from dataclasses import replace

import decord
import numpy as np
import pytest

import make_toy_world
from toy_world import judge, render, scene, tables, world
from toy_world_support import NUISANCE, SCENE, make_tiny_world

EVERYTHING = frozenset(scene.DIMENSIONS)
FRAME_MOMENTS = np.linspace(0, 2, 5)


@pytest.fixture(scope="module")
def sampled_pairs() -> list[world.Pair]:
    """2000 pairs, half of them held out, without their clips."""
    return [world.sample_pair(world.WorldConfig(), split, i) for split in world.SPLITS for i in range(1000)]


def request_for(asked: scene.Scene, mentioned=EVERYTHING) -> scene.Request:
    return scene.Request(asked, frozenset(mentioned))


def subject_mask(frames: np.ndarray, shown: scene.Scene) -> np.ndarray:
    """Where a frame has the subject's color: bool [T, h, w]."""
    return np.abs(frames - np.asarray(render.SUBJECT_RGB[shown.color], dtype=float)).max(axis=-1) < 60


def subject_track(shown: scene.Scene) -> tuple[np.ndarray, np.ndarray]:
    """Centroid (x, y) [T, 2] and area [T] of the rendered subject, in pixels."""
    mask = subject_mask(render.render_frames(shown, NUISANCE, FRAME_MOMENTS), shown)
    centroids = [(columns.mean(), rows.mean()) for rows, columns in map(np.nonzero, mask)]
    return np.asarray(centroids), mask.sum(axis=(1, 2))


# Scores and preferences


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"color": "blue"}, {"subject": 1}),
        ({"shape": "star"}, {"subject": 1}),
        ({"shape": "star", "color": "blue"}, {"subject": 0}),
        ({"motion": "right"}, {"dynamics": 1}),
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
    scores = scene.true_scores(request_for(asked), replace(asked, **changes))
    assert scores == {**dict.fromkeys(scene.DIMENSIONS, 2), **expected}


def test_moving_scores_zero_when_stillness_is_asked_for():
    scores = scene.true_scores(request_for(SCENE), replace(SCENE, motion="up", camera="pans left"))
    assert (scores["dynamics"], scores["camera"]) == (0, 0)


def test_unmentioned_dimensions_are_not_scored():
    scores = scene.true_scores(
        request_for(SCENE, {"subject", "dynamics"}), replace(SCENE, style="glowing", color="blue")
    )
    assert scores == {"subject": 1, "dynamics": 2, "camera": "N/A", "environment": "N/A", "style": "N/A"}
    assert scene.overall_score(scores) == pytest.approx(1 + 4 * (0.5 + 1) / 2)
    assert scene.utility(scores) == 6 * 1 + 5 * 2


def test_preference_follows_utility_and_ties_are_exact():
    right = dict.fromkeys(scene.DIMENSIONS, 2)
    assert scene.prefer(right, {**right, "style": 0}) == "A"
    assert scene.prefer({**right, "subject": 0}, {**right, "style": 0}) == "B"
    assert scene.prefer({**right, "environment": 1}, {**right, "style": 0}) == "same"  # both lose 4


def test_every_pair_of_values_occurs_on_the_training_side():
    triples = list(itertools.product(scene.COLORS, scene.SHAPES, scene.MOTIONS))
    held_out = {t for t in triples if scene.is_held_out(replace(SCENE, color=t[0], shape=t[1], motion=t[2]))}
    assert len(held_out) == 48
    for first, second in itertools.combinations(range(3), 2):
        trained = {(triple[first], triple[second]) for triple in triples if triple not in held_out}
        assert trained == {(triple[first], triple[second]) for triple in triples}


def test_request_and_clip_scenes_stay_on_their_side(sampled_pairs):
    world.check_disjoint(sampled_pairs)
    train, held_out = sampled_pairs[:1000], sampled_pairs[1000:]
    with pytest.raises(ValueError, match="both splits"):
        world.check_disjoint([train[0], replace(held_out[0], prompt=train[0].prompt)])


# Texts


def test_prompt_names_exactly_what_is_mentioned(sampled_pairs):
    for pair in sampled_pairs[:300]:
        words = set(re.findall(r"[a-z]+", pair.prompt.lower()))
        asked, mentioned = pair.request.scene, pair.request.mentioned
        assert {asked.color, asked.shape, asked.motion} <= words
        assert ({asked.place, asked.light} <= words) == ("environment" in mentioned)
        assert ("style" in words) == ("style" in mentioned)
        assert ("camera" in words) == ("camera" in mentioned)


def test_cot_states_what_was_seen_and_parses_to_its_scores(sampled_pairs):
    rng = np.random.default_rng(0)
    for pair in sampled_pairs[:300]:
        seen = judge.misperceive(pair.clips[0].scene, rng, 0.3)
        cot = judge.write_cot(pair.request, seen, rng)
        scores = scene.true_scores(pair.request, seen)
        assert judge.parse_scores(cot) == scores
        assert f'"overall_score": {scene.overall_score(scores):.2f}}}' in cot
        assert 500 <= len(cot) <= 750
        lines = cot.split("\n")
        assert [line.split(":")[0].lower() for line in lines[:5]] == list(scene.DIMENSIONS)
        for word, line in ((seen.color, 0), (seen.motion, 1), (seen.camera, 2), (seen.place, 3), (seen.style, 4)):
            assert word in lines[line]


def test_every_kind_of_damaged_json_is_unusable():
    rng = np.random.default_rng(1)
    cot = judge.write_cot(request_for(SCENE), SCENE, rng)
    damaged = {judge.damage_json(cot, rng) for _ in range(30)}
    assert len(damaged) == 3
    assert all(judge.parse_scores(text) is None for text in damaged)


GOOD = {"subject": 2, "dynamics": 1, "camera": "N/A", "environment": 0, "style": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"so.\n<answer>\n{json.dumps({'dimensional_scores': GOOD})}\n</answer>", GOOD),
        (f"<answer>```json\n{json.dumps({'dimensional_scores': GOOD})}\n```</answer>", GOOD),
        (f"<answer>{json.dumps({'dimensional_scores': GOOD})}</answer><answer>no</answer>", GOOD),
        (f"<answer>no</answer><answer>{json.dumps({'dimensional_scores': GOOD})}</answer>", None),
        (json.dumps({"dimensional_scores": GOOD}), None),
        ("<answer>[1]</answer>", None),
        ("<answer>" + "[" * 100_000 + "</answer>", None),
        (f"<answer>{json.dumps(GOOD)}</answer>", None),
        (f"<answer>{json.dumps({'dimensional_scores': {**GOOD, 'style': True}})}</answer>", None),
        (f"<answer>{json.dumps({'dimensional_scores': {**GOOD, 'style': 3}})}</answer>", None),
        (f"<answer>{json.dumps({'dimensional_scores': {**GOOD, 'style': [2]}})}</answer>", None),
        (f"<answer>{json.dumps({'dimensional_scores': {'subject': 2}})}</answer>", None),
        ("", None),
    ],
)
def test_parse_scores_accepts_only_complete_answers(text, expected):
    assert judge.parse_scores(text) == expected


# Sampling


def test_measured_rates_are_near_the_stated_ones(sampled_pairs):
    config = world.WorldConfig()
    train, held_out = (world.measure_rates(half) for half in (sampled_pairs[:1000], sampled_pairs[1000:]))
    everything = world.measure_rates(sampled_pairs)
    assert everything["tie_share"] == pytest.approx(config.tie_share, abs=0.03)
    assert train["label_noise"] == pytest.approx(config.label_noise, abs=0.025)
    assert held_out["label_noise"] == 0
    assert everything["malformed_share"] == pytest.approx(config.malformed_share, abs=0.012)
    assert everything["attribute_error"] == pytest.approx(world.describe_config(config)["attribute_error"], abs=0.01)
    assert everything["oracle_true_scores"] == 1
    assert 0.75 < everything["oracle_cot_scores"] < everything["oracle_cot_scores_ties_half"] < 0.85


def test_errors_are_alike_on_both_sides(sampled_pairs):
    halves = (sampled_pairs[:1000], sampled_pairs[1000:])
    counts = [
        Counter((n, s) for pair in half for clip in pair.clips for n, s in clip.scores.items()) for half in halves
    ]
    for key in counts[0] | counts[1]:
        assert counts[0][key] == pytest.approx(counts[1][key], abs=100), key  # of 2000 clips


def test_clips_of_a_pair_differ_in_their_nuisances(sampled_pairs):
    assert all(pair.clips[0].nuisance != pair.clips[1].nuisance for pair in sampled_pairs)


def test_nuisances_keep_to_the_stated_ranges(sampled_pairs):
    for nuisance in (clip.nuisance for pair in sampled_pairs for clip in pair.clips):
        assert {nuisance.width % 2, nuisance.height % 2} == {0}
        assert min(nuisance.width, nuisance.height) >= 80
        assert max(nuisance.width, nuisance.height) <= 144
        assert 0.8 <= nuisance.width / nuisance.height <= 1.25
        assert 2.0 <= nuisance.duration <= 4.0
        assert nuisance.num_frames / nuisance.fps == pytest.approx(nuisance.duration)


def test_sampling_is_determined_by_seed_split_and_index():
    config = world.WorldConfig(seed=4)
    assert world.sample_pair(config, "train", 7) == world.sample_pair(config, "train", 7)
    assert world.sample_pair(config, "train", 7) != world.sample_pair(world.WorldConfig(seed=5), "train", 7)


# Pictures


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_subject_moves_as_named(motion, axis, sign):
    centroids, areas = subject_track(replace(SCENE, motion=motion))
    steps = np.diff(centroids, axis=0)
    assert (sign * steps[:, axis] > 3).all()
    assert np.abs(steps[:, 1 - axis]).max() < 1
    moved = abs(centroids[-1, axis] - centroids[0, axis]) / NUISANCE.width
    assert moved == pytest.approx(np.mean(render.TRAVEL_RANGE), abs=0.02)
    assert np.ptp(areas) < 0.1 * areas[0]


def test_subject_grows_shrinks_and_stays_still():
    for motion, low, high in (("grows", 2.5, 4.5), ("shrinks", 1 / 4.5, 1 / 2.5), ("still", 0.99, 1.01)):
        centroids, areas = subject_track(replace(SCENE, motion=motion))
        assert low < areas[-1] / areas[0] < high
        assert np.ptp(centroids, axis=0).max() < 1


@pytest.mark.parametrize(("camera", "sign"), [("pans left", 1), ("pans right", -1)])
def test_pan_moves_background_and_subject_together(camera, sign):
    shown = replace(SCENE, camera=camera)
    frames = render.render_frames(shown, NUISANCE, np.array([0.0, 2.0])).astype(int)
    free = ~subject_mask(frames, shown).any(axis=(0, 2))  # rows without the subject
    first, last = frames[0][free], frames[1][free]
    if sign < 0:
        first, last = first[:, ::-1], last[:, ::-1]
    errors = {shift: np.abs(first[:, :-shift] - last[:, shift:]).mean() for shift in range(1, 40)}
    shift = min(errors, key=errors.get)
    assert shift == pytest.approx(np.mean(render.PAN_RANGE) * NUISANCE.width, abs=1)
    centroids, _ = subject_track(shown)
    assert sign * (centroids[-1, 0] - centroids[0, 0]) == pytest.approx(shift, abs=1.5)


def test_zoom_enlarges_subject_and_background():
    shown = replace(SCENE, camera="zooms in")
    frames = render.render_frames(shown, NUISANCE, np.array([0.0, 2.0])).astype(float)
    _, areas = subject_track(shown)
    assert 1.7 < areas[-1] / areas[0] < 2.4
    edges = [np.abs(np.diff(frame[:20].mean(axis=-1), axis=1)).mean() for frame in frames]
    assert edges[1] < 0.85 * edges[0]  # larger windows: fewer edges a pixel


def test_subject_is_in_view_from_start_to_end_in_every_scene(sampled_pairs):
    for clip in (clip for pair in sampled_pairs[::4] for clip in pair.clips):
        track = render.compute_track(clip.scene, clip.nuisance, np.array([0.0, 0.5, 1.0]) * clip.nuisance.duration)
        shorter = min(clip.nuisance.width, clip.nuisance.height)
        assert (np.abs(track.center_x) + track.radius <= clip.nuisance.width / shorter / 2 + 0.02).all()
        assert (np.abs(track.center_y) + track.radius <= clip.nuisance.height / shorter / 2 + 0.02).all()


def test_every_color_stands_out_from_every_background():
    for color, place, light in itertools.product(scene.COLORS, scene.PLACES, scene.LIGHTS):
        shown = replace(SCENE, color=color, place=place, light=light)
        frame = render.render_frames(shown, NUISANCE, np.zeros(1))[0].astype(float)
        subject, background = frame[55, 50], frame[:20].mean(axis=(0, 1))
        assert np.linalg.norm(subject - background) > 80, shown


def test_styles_and_shapes_look_different():
    for name in ("style", "shape"):
        frames = [
            render.render_frames(replace(SCENE, **{name: value}), NUISANCE, np.zeros(1))[0].astype(float)
            for value in scene.ATTRIBUTES[name]
        ]
        for one, other in itertools.combinations(frames, 2):
            assert np.abs(one - other).max(axis=-1).mean() > 1.5


def test_clip_is_deterministic_and_decodes_to_the_promised_frames(tmp_path):
    """Many times, as an encoder may differ from itself in one of a hundred."""
    shown, path = replace(SCENE, motion="left", camera="zooms in"), tmp_path / "clip.mp4"
    contents = set()
    for _ in range(100):
        render.encode_clip(path, shown, NUISANCE)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert list(tmp_path.iterdir()) == [path]
    reader = decord.VideoReader(str(path))
    assert reader.get_avg_fps() == pytest.approx(NUISANCE.fps)
    decoded = reader.get_batch(range(len(reader))).asnumpy().astype(float)
    rendered = render.render_frames(shown, NUISANCE, np.arange(NUISANCE.num_frames) / NUISANCE.fps)
    assert decoded.shape == rendered.shape == (20, 110, 100, 3)
    assert np.abs(decoded - rendered).mean() < 12


# The data set


def test_world_is_reproducible_and_resumes(tmp_path):
    manifest = make_tiny_world(tmp_path / "one")
    assert manifest["complete"]
    assert manifest["num_clips"] == 10
    make_tiny_world(tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").glob("*.csv"))
    assert len(names) == 9
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    clips = sorted((tmp_path / "one" / "videos").iterdir())
    assert [path.read_bytes() for path in clips] == [
        path.read_bytes() for path in sorted((tmp_path / "two" / "videos").iterdir())
    ]
    clips[0].unlink()
    kept = clips[1].stat().st_mtime_ns
    make_tiny_world(tmp_path / "one")
    assert clips[0].is_file()
    assert clips[1].stat().st_mtime_ns == kept
    make_tiny_world(tmp_path / "one", seed=9)
    assert clips[1].stat().st_mtime_ns != kept


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        make_toy_world.prepare_output(tmp_path, world.WorldConfig())
    assert (tmp_path / "thesis.txt").is_file()


def test_tables_have_the_stated_columns(sampled_pairs):
    built = tables.build_tables({"train": sampled_pairs[:5], "eval": sampled_pairs[1000:1005]}, "{}".format)
    columns = {name: list(rows[0]) for name, rows in built.items()}
    stage_1 = ["videos", "problem", "durations", "prompt", "CoT_A", "CoT_B", "GSB", "MOS_A_GSB", "MOS_B_GSB"]
    assert columns["train.csv"] == columns["eval.csv"] == stage_1
    assert columns["train_rl.csv"] == columns["eval_rl.csv"] == ["videos", "problem", "answer"]
    assert columns["bench_tabench.csv"] == ["video_A", "video_B", "prompt", "answer"]
    two_sided = {"path_A", "path_B", "A_model", "B_model", "prompt"}
    details = {"fps_A", "num_frames_A", "fps_B", "num_frames_B", "VQ", "MQ", "TA", "Overall"}
    assert set(columns["bench_videoalign.csv"]) == two_sided | details
    genai = {"left_video_path", "right_video_path", "left_model", "right_model", "prompt", "vote_type"}
    assert set(columns["bench_genai.csv"]) == genai
    react = {f"GSB_{name}" for name in ("overall", *scene.DIMENSIONS)}
    assert set(columns["bench_react.csv"]) == two_sided | react
    assert columns["bench_videofeedback.csv"] == ["video_path", "prompt", "video_fps"]


def test_check_finds_scores_that_contradict_each_other(tmp_path, sampled_pairs):
    (tmp_path / "videos").mkdir()
    pairs = {"train": sampled_pairs[:100], "eval": sampled_pairs[1000:1100]}
    for pair in itertools.chain(*pairs.values()):
        for clip in pair.clips:
            (tmp_path / "videos" / clip.name).touch()
    built = tables.build_tables(pairs, "{}".format)

    def check() -> None:
        for name, rows in built.items():
            tables.write_table(tmp_path / name, rows)
        tables.check_tables(tmp_path, built, label_noise=0.05, malformed_share=0.02)

    check()
    built["eval.csv"][4]["MOS_A_GSB"] = 0.5
    with pytest.raises(ValueError, match="eval pair 4: MOS_A_GSB"):
        check()
