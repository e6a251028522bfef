"""What the tests of the toy world share: a plain clip, and a data set of five pairs."""

import make_toy_world
from toy_world import render, scene, world

SCENE = scene.Scene("circle", "red", "still", "still", "city", "day", "flat")
NUISANCE = render.Nuisance(
    size=0.34,
    speed=0.5,
    start=(0.5, 0.5),
    texture_seed=3,
    has_distractor=False,
    width=100,
    height=110,
    fps=10,
    duration=2.0,
    crf=24,
)


def make_tiny_world(output, **changes) -> dict:
    return make_toy_world.make_world(
        output,
        world.WorldConfig(**changes),
        num_pairs={"train": 3, "eval": 2},
        workers=1,
        judge_problem="<video>\nJudge: {}".format,
    )
