"""Fixtures of the stage 1 tests."""

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import RewardConfig, build_reward_model, load_builder
from compiling import compiling  # noqa: F401
from model_qwen3 import RewardModel
from scored_sequence import ScoredSequence, SequenceBuilder, judge_problem
from stage1_support import COT, SMALL_BUDGET, write_pairs_csv, write_small_base
from toy_world.render import encode_clip, sample_nuisance
from toy_world.scene import sample_clip_scene, sample_request
from vision_process import load_video

NUM_CLIPS = 6
torch.set_num_threads(1)  # tiny models: more threads only wait for each other, badly so on a busy machine


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What the tests check is remembered for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> Path:
    return write_small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> list[Path]:
    """Short H.264 clips of different size, length and frame rate."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(5)
    paths = [folder / f"clip_{index}.mp4" for index in range(NUM_CLIPS)]
    for path in paths:
        request = sample_request(rng, held_out=False)
        encode_clip(path, sample_clip_scene(request, rng, held_out=False), sample_nuisance(rng))
    return paths


@pytest.fixture(scope="session")
def builder(small_base) -> SequenceBuilder:
    return load_builder(small_base)


@pytest.fixture(scope="session")
def sequences(builder, clips) -> list[ScoredSequence]:
    """Four sequences of different clips and lengths; the last has its CoT masked."""
    cots = ["short", COT.format(score=2), COT.format(score=0) * 2, ""]
    return [
        builder.build(
            builder.encode_prompt(judge_problem(f"prompt number {i}"), load_video(clips[i], SMALL_BUDGET)),
            builder.encode_cot(cot),
        )
        for i, cot in enumerate(cots)
    ]


@pytest.fixture
def model(small_base, builder) -> RewardModel:
    """A fresh reward model in fp32, nothing frozen yet."""
    torch.manual_seed(1)
    return build_reward_model(str(small_base), builder.processor, RewardConfig(), dtype=torch.float32)


@pytest.fixture
def pairs_csv(tmp_path, clips) -> Path:
    return write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "same", "A", "invalid", "B"])
