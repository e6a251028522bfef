"""The sets that models are compared on: clips of training's combinations, and a changed rendering."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import make_toy_world
from toy_world import render, scene, tables, world
from toy_world.renderings import RENDERINGS
from toy_world_support import NUISANCE, SCENE, make_tiny_world


def test_compared_sets_are_added_and_leave_the_other_files_as_they_are(tmp_path):
    make_tiny_world(tmp_path / "plain")
    num_pairs = {"train": 3, "eval": 2, "in_domain": 2, "new_rendering": 1}
    options = {"num_pairs": num_pairs, "workers": 1, "judge_problem": "<video>\nJudge: {}".format}
    manifest = make_toy_world.make_world(tmp_path / "more", world.WorldConfig(), **options)
    assert set(manifest["measured"]) == set(num_pairs)
    assert manifest["measured"]["in_domain"]["label_noise"] == 0
    for path in (tmp_path / "plain").glob("*.csv"):
        assert (tmp_path / "more" / path.name).read_bytes() == path.read_bytes()
    rows = tables.read_table(tmp_path / "more" / tables.HELD_OUT_FILE)
    sets = ["in_domain", "in_domain", "new_combinations", "new_combinations", "new_rendering"]
    assert [row["set"] for row in rows] == sets
    held_out = tables.read_table(tmp_path / "more" / "eval_rl.csv")
    assert [row["answer"] for row in rows[2:4]] == [row["answer"] for row in held_out]
    clips = list((tmp_path / "more" / "videos").iterdir())
    assert len(clips) == 2 * len(rows) + 6
    make_tiny_world(tmp_path / "more")
    assert len(list((tmp_path / "more" / "videos").iterdir())) == 10


@pytest.mark.parametrize("split", world.COMPARED_SPLITS)
def test_compared_sets_have_the_combinations_of_training_and_no_label_noise(split):
    pairs = [world.sample_pair(world.WorldConfig(label_noise=1.0), split, index) for index in range(100)]
    assert not any(scene.is_held_out(clip.scene) for pair in pairs for clip in pair.clips)
    assert all(pair.label == pair.true_label for pair in pairs)
    world.check_disjoint([*pairs, *(world.sample_pair(world.WorldConfig(), "eval", index) for index in range(100))])
    looks = {clip.nuisance.rendering for pair in pairs for clip in pair.clips}
    assert looks == {"changed" if split == "new_rendering" else "usual"}


def test_the_changed_rendering_shares_no_frame_shape_or_rate_with_the_usual_one():
    rng = np.random.default_rng(0)
    usual, changed = ([render.sample_nuisance(rng, name) for _ in range(300)] for name in RENDERINGS)
    assert not {nuisance.fps for nuisance in usual} & {nuisance.fps for nuisance in changed}
    assert all(abs(np.log(nuisance.width / nuisance.height)) <= np.log(1.25) + 1e-9 for nuisance in usual)
    assert all(abs(np.log(nuisance.width / nuisance.height)) > np.log(1.25) for nuisance in changed)


def test_every_color_stands_out_from_every_background_in_the_changed_rendering():
    nuisance = replace(NUISANCE, rendering="changed")
    for color, place, light in itertools.product(scene.COLORS, scene.PLACES, scene.LIGHTS):
        shown = replace(SCENE, color=color, place=place, light=light)
        frame = render.render_frames(shown, nuisance, np.zeros(1))[0].astype(float)
        subject, background = frame[55, 50], frame[:20].mean(axis=(0, 1))
        assert np.linalg.norm(subject - background) > 80, shown
        assert np.abs(frame - render.render_frames(shown, NUISANCE, np.zeros(1))[0]).mean() > 5, shown
