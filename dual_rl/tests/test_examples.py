"""What users run or copy: the quick start, best of N, the reward for video generators, the scale."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from statistics import fmean, stdev
from types import ModuleType

import decord
import numpy as np
import pytest
import torch

from model_support import CLIPS, DUAL_RL, EXAMPLE_CSV
from scoring.reward_model import RewardModel
from scoring.source import RewardScale, compute_scale, load_calibration, read_checkpoint, save_calibration
from scoring.thinking import ThinkMargin
from scoring.types import ScoringSettings
from toy_world.tables import read_table
from verl.model.reward_files import fingerprint, save_head

SETTINGS = ScoringSettings(backend="hf", batch_size=4, max_new_tokens=6)
PROMPTS = ["a red circle", "a blue star"]


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DUAL_RL / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_quickstart_trains_and_shows_what_changed(small_model, tmp_path):
    """From a folder as stage 1's quick start leaves it, with the example's clips for a world."""
    world, work = tmp_path / "stage1_quickstart" / "world", tmp_path / "work"
    shutil.copytree(CLIPS[0].parent, world / "videos")
    for name in ("train_rl.csv", "eval_rl.csv"):
        shutil.copy(EXAMPLE_CSV, world / name)
    rows = [f"videos/example_{index}_a.mp4,videos/example_{index}_b.mp4,a shape,A" for index in range(2)]
    (world / "bench_tabench.csv").write_text("\n".join(["video_A,video_B,prompt,answer", *rows, ""]))
    settings = ["worker.rollout.name=hf", "worker.rollout.n=2"]
    settings += ["data.rollout_batch_size=4", "data.max_response_length=8"]
    variables = {"STAGE1": world.parent, "MODEL_PATH": small_model, "WORK": work, "STEPS": 1, "PROCESSES": 1}
    environment = os.environ | {name: str(value) for name, value in variables.items()} | {"BACKEND": "hf"}
    command = ["bash", str(DUAL_RL / "quickstart.sh"), *settings]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    log = [json.loads(line) for line in (work / "train_log.jsonl").read_text().splitlines()]
    accuracies = " +".join(f"{line['val/gsb_acc']:.3f}" for line in log)
    assert re.search(f"pair accuracy of the head +{accuracies}$", result.stdout, re.MULTILINE)
    assert "accuracy without ties" in result.stdout
    assert (work / "global_step_1" / "actor" / "huggingface" / "model.safetensors").is_file()
    assert json.loads((work / "bench_tabench_step_1.json").read_text())["num_scored"] == 4


def test_best_of_n_ranks_clips_and_lists_failures_and_incomplete_folders(small_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    example, folder, output = load_example("best_of_n"), tmp_path / "clips", tmp_path / "best.csv"
    for number in range(2):
        inner = folder / f"prompt_{number}"
        inner.mkdir(parents=True)
        (inner / "prompt.txt").write_text(f"shape number {number}\n")
        for index, clip in enumerate(CLIPS[3 * number : 3 * number + 3]):
            shutil.copy(clip, inner / f"{index}.mp4")
    (folder / "prompt_1" / "2.mp4").write_bytes(b"no video")
    model = shutil.copytree(small_model, tmp_path / "model")
    flags = ["--model_ckpt", str(model), "--clips", str(folder), "--output", str(output)]
    assert example.main([*flags, "--backend", "hf", "--max_new_tokens", "6"]) == 0
    console = capsys.readouterr()
    assert "failed: prompt_1/2.mp4: video does not decode" in console.err
    rows = read_table(output)
    assert [row["rank"] for row in rows] == ["1", "2", "3", "1", "2", ""]
    assert {row["video"] for row in rows} == {str(path) for path in folder.glob("*/*.mp4")}
    for name in ("prompt_0", "prompt_1"):
        rewards = [float(row["reward"]) for row in rows if row["folder"] == name and row["reward"]]
        assert rewards == sorted(rewards, reverse=True)
    assert f"prompt_0: {rows[0]['video']}" in console.out
    rewards = {row["video"]: row["reward"] for row in rows}
    assert example.main([*flags, "--backend", "hf", "--mask_cot"]) == 0
    first, second = (float(row["reward"]) for row in read_table(output)[:2])
    margin, checkpoint = first - second + 1e-4, read_checkpoint(model)
    measured = {"weights": fingerprint(model, checkpoint), "video": dataclasses.asdict(checkpoint.video_budget)}
    rule = {"margin": margin, "agreement": 1.0, "share_thinking": 0.5, "accuracy": 1.0, "num_pairs": 10}
    save_calibration(model, ThinkMargin(**rule, data="val.csv", **measured))
    capsys.readouterr()
    assert example.main([*flags, "--backend", "hf", "--max_new_tokens", "6", "--think_when_unsure"]) == 0
    thought = [row for row in read_table(output) if row["cot"]]
    assert f"{len(thought)} of 6 clips thought" in capsys.readouterr().out
    assert len(thought) in (2, 4)  # the first two clips of prompt_0, and perhaps the two of prompt_1
    for row in thought:
        assert float(row["reward"]) == pytest.approx(float(rewards[row["video"]]), abs=1e-5)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"(?s)empty has no text.*empty has no clip"):
        example.find_tasks(folder)


def test_clips_in_memory_and_on_disk_score_alike_for_trainers_of_generators(small_model):
    example = load_example("video_reward")
    clips = [decord.VideoReader(str(path)).get_batch(range(16)).asnumpy() for path in CLIPS[:2]]
    height, width = (min(clip.shape[axis] for clip in clips) for axis in (1, 2))
    videos = np.stack([clip[:, :height, :width] for clip in clips])
    reward = example.VideoReward(small_model, fps=8.0, settings=SETTINGS)
    scores, info = reward(videos, PROMPTS, None)
    assert (scores.dtype, scores.shape, len(info["cots"])) == (np.float32, (2,), 2)
    tensor = torch.from_numpy(videos).permute(0, 1, 4, 2, 3)
    for form in (tensor.float() / 255, videos.astype(np.float32) / 255):
        assert reward(form, PROMPTS, [{}, {}])[0] == pytest.approx(scores, abs=1e-5)
    expected = reward.model.score(CLIPS[:2], PROMPTS).rewards
    results = reward.reward([str(clip) for clip in CLIPS[:2]], PROMPTS)
    assert [result["Overall"] for result in results] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="made with normalize=False"):
        reward.reward([str(CLIPS[0])], PROMPTS[:1], use_norm=True)
    reward.close()


def test_a_model_scores_on_its_scale_which_is_refused_for_another_head(small_model, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    with pytest.raises(ValueError, match=r"has no reward_scale\.json: make it with inference\.py --calibrate"):
        RewardModel.from_pretrained(folder, settings=SETTINGS, normalize=True)
    with pytest.raises(ValueError, match="calibrate on more, and different, videos"):
        compute_scale([2.0, 2.0, 2.0], data="val.csv", weights="w", video={})
    with RewardModel.from_pretrained(folder, settings=SETTINGS) as model:
        raw = model.score(CLIPS[:2], PROMPTS).rewards
        budget = dataclasses.asdict(model.loader.budget)
    checkpoint = read_checkpoint(folder)
    scale = compute_scale(raw, data="val.csv", weights=fingerprint(folder, checkpoint), video=budget)
    assert json.loads(save_calibration(folder, scale).read_text())["num_videos"] == 2
    with RewardModel.from_pretrained(folder, settings=SETTINGS, normalize=True) as model:
        scaled = model.score(CLIPS[:2], PROMPTS).rewards
    assert scaled == pytest.approx([(reward - fmean(raw)) / stdev(raw) for reward in raw], abs=1e-4)
    assert "was measured" not in caplog.text
    assert load_calibration(RewardScale, folder, checkpoint, dataclasses.replace(SETTINGS, video_fps=3.0)) == scale
    assert "reward_scale.json was measured with video=" in caplog.text
    save_head(folder / "rm_head.pth", torch.load(folder / "rm_head.pth", weights_only=True)["rm_head.weight"] * 1.01)
    with pytest.raises(ValueError, match="other weights or another head"):
        load_calibration(RewardScale, folder, read_checkpoint(folder), SETTINGS)
