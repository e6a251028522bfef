"""The reward model for use: one engine's thoughts and rewards against plain forwards, in any company."""

import dataclasses
import importlib.util
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from transformers import Qwen3VLVideoProcessor

from infer_utils.scorer import Cot, RewardScorer
from scoring.hf_scorer import HfScorer
from scoring.reward_model import RewardModel
from scoring.scoring import FailedVideo, ScoredVideo, ScoringSettings, ThoughtScore, VideoTask
from scoring.source import find_model
from slow_path import compute_reward, load_policy
from test_reward_files import stage1_checkpoint
from verl.config import ModelConfig
from verl.data.vision_process import VideoBudget, VideoError, load_video, sample_frames
from verl.model.policy import PolicyModel
from verl.model.reward_files import load_base, stream_weights
from verl.rollout.vllm_start import CPU_BLOCK_SIZE
from verl.types import Response, ResponseKey, VideoKey, VideoPrompt

DUAL_RL = Path(__file__).resolve().parents[1]
TINY_BASE = DUAL_RL.parent / "cold_start" / "model" / "tiny_base"
TOY_CLIPS = sorted((DUAL_RL / "data" / "videos").glob("*.mp4"))[:4]
REAL_CLIPS = sorted((DUAL_RL.parents[1] / "shared" / "videos").glob("*.mp4"))
PROMPTS = ["a red circle moves left over a plain gray background", "a blue star", "a green square grows", "a cat"]
TOLERANCE = 1e-4  # of rewards, fp32
SETTINGS = ScoringSettings(batch_size=4, max_prompt_length=1024, max_new_tokens=220, kv_cache_gib=1)
HEAD_SEED = 3
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
torch.set_num_threads(1)


def load_tiny(backend: str, **changes: object) -> RewardModel:
    """The tiny base, which has learned to think, with a head that has not learned."""
    settings = dataclasses.replace(SETTINGS, backend=backend, **changes)
    return RewardModel.from_pretrained(TINY_BASE, settings=settings, fresh_head_seed=HEAD_SEED)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, RewardModel]]:
    """Each backend once: starting vLLM takes most of the time."""
    made = {"hf": load_tiny("hf")}
    if importlib.util.find_spec("vllm") is not None:
        made["vllm"] = load_tiny("vllm")
    yield made
    for model in made.values():
        model.close()


@pytest.fixture(params=["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def model(request, models) -> RewardModel:
    return models[request.param]


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    """The same weights for the plain slow path."""
    checkpoint = load_base(TINY_BASE, seed=HEAD_SEED)
    weights = dict(stream_weights(TINY_BASE, checkpoint, dtype=torch.float32))
    return load_policy(dataclasses.replace(checkpoint, weights=weights), ModelConfig(model_path="")).eval()


@pytest.fixture(params=["toy", pytest.param("real", marks=pytest.mark.slow)])
def clips(request) -> list[Path]:
    if request.param == "toy":
        return TOY_CLIPS
    if len(REAL_CLIPS) < len(PROMPTS):
        pytest.skip("the real clips of ../shared/videos are not beside this checkout")
    return REAL_CLIPS


def encode(model: RewardModel, clips: Sequence[Path]) -> list[VideoPrompt]:
    tasks = zip(clips, PROMPTS, strict=True)
    futures = [
        model.loader.submit(VideoKey(number, "A"), f"<video>{prompt}", str(clip))
        for number, (clip, prompt) in enumerate(tasks)
    ]
    return [future.result() for future in futures]


def think_and_score(model: RewardModel, prompts: Sequence[VideoPrompt]) -> list[ThoughtScore]:
    """What the engine alone gives, in order of the prompts."""
    for number, prompt in enumerate(prompts):
        model.engine.submit(str(number), prompt)
    ready = {}
    while model.engine.num_unfinished:
        ready.update(model.engine.step())
    return [ready[str(number)] for number in range(len(prompts))]


@torch.no_grad()
def plain_rewards(
    policy: PolicyModel, model: RewardModel, prompts: Sequence[VideoPrompt], scores: Sequence[ThoughtScore]
) -> list[float]:
    """Stock transformers on each whole sequence by itself."""
    rewards = []
    for prompt, score in zip(prompts, scores, strict=True):
        response = Response(ResponseKey(*prompt.key, 0), score.cot_ids, score.is_finished, torch.zeros(0))
        rewards.append(compute_reward(policy, prompt, response, model.builder).item())
    return rewards


def test_rewards_are_those_of_the_plain_forward(model, policy):
    prompts = encode(model, TOY_CLIPS)
    scores = think_and_score(model, prompts)
    assert [score.reward for score in scores] == pytest.approx(
        plain_rewards(policy, model, prompts, scores), abs=TOLERANCE
    )
    assert all(score.is_finished for score in scores)
    assert len({score.cot_ids for score in scores}) == len(scores)
    assert np.std([score.reward for score in scores]) > 100 * TOLERANCE


def test_a_thought_cut_at_the_limit_is_scored_as_it_stands(model, policy, monkeypatch):
    prompts = encode(model, TOY_CLIPS)
    if isinstance(model.engine, HfScorer):
        monkeypatch.setattr(model.engine, "sampling", dataclasses.replace(model.engine.sampling, max_tokens=7))
    else:
        settings = dataclasses.replace(model.engine.settings, max_new_tokens=7)
        monkeypatch.setattr(model.engine, "settings", settings)
    scores = think_and_score(model, prompts)
    assert [len(score.cot_ids) for score in scores] == [7] * 4
    assert not any(score.is_finished for score in scores)
    assert [score.reward for score in scores] == pytest.approx(
        plain_rewards(policy, model, prompts, scores), abs=TOLERANCE
    )


def test_with_the_cot_masked_the_reward_stands_behind_the_prompt(model, policy, monkeypatch):
    prompts = encode(model, TOY_CLIPS)
    if isinstance(model.engine, HfScorer):
        monkeypatch.setattr(model.engine, "mask_cot", True)
    else:
        monkeypatch.setattr(model.engine, "settings", dataclasses.replace(model.engine.settings, mask_cot=True))
    scores = think_and_score(model, prompts)
    assert [(score.cot_ids, score.is_finished) for score in scores] == [((), True)] * 4
    assert [score.reward for score in scores] == pytest.approx(
        plain_rewards(policy, model, prompts, scores), abs=TOLERANCE
    )
    assert model.score(TOY_CLIPS, PROMPTS).cots == [""] * 4


@needs_vllm
def test_backends_write_and_score_alike(models, clips):
    ours, theirs = (models[name].score(clips, PROMPTS) for name in ("vllm", "hf"))
    assert ours.cots == theirs.cots
    assert ours.rewards == pytest.approx(theirs.rewards, abs=TOLERANCE)


def test_company_does_not_change_a_score(model, clips):
    together = model.score(clips, PROMPTS)
    assert all(math.isfinite(reward) for reward in together.rewards)
    for order in ([3, 1, 0, 2], [2], [0, 1, 2, 3, 3, 2, 1, 0]):  # the last are more than fit
        scores = model.score([clips[n] for n in order], [PROMPTS[n] for n in order])
        assert scores.cots == [together.cots[n] for n in order]
        assert scores.rewards == pytest.approx([together.rewards[n] for n in order], abs=TOLERANCE)


def test_an_interrupted_call_leaves_nothing_in_the_next_one(model, monkeypatch):
    expected = model.score(TOY_CLIPS[:2], PROMPTS[:2])

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.score(TOY_CLIPS[2:], PROMPTS[2:])
    assert model.num_pending == 2
    scores = model.score(TOY_CLIPS[:2], PROMPTS[:2])
    assert scores.cots == expected.cots
    assert scores.rewards == pytest.approx(expected.rewards, abs=TOLERANCE)
    assert model.num_pending == 0


@needs_vllm
def test_vllm_encodes_a_video_once_and_scores_on_the_cached_prefix(models, monkeypatch):
    engine = models["vllm"].engine
    prompts = encode(models["vllm"], TOY_CLIPS)
    (inner,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.model)
    encoded, processed = [], []
    hook = inner.visual.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    preprocess = Qwen3VLVideoProcessor.preprocess
    monkeypatch.setattr(
        Qwen3VLVideoProcessor, "preprocess", lambda *args, **kwargs: processed.append(1) or preprocess(*args, **kwargs)
    )
    engine.cached_tokens = engine.prompt_tokens = 0
    scores = think_and_score(models["vllm"], prompts)
    hook.remove()
    merged = sum(math.prod(prompt.grid_thw) // 4 for prompt in prompts)
    assert sum(encoded) == merged
    assert len(processed) == len(prompts)
    lengths = [
        prompt.input_ids.numel() + len(score.cot_ids) + 1 for prompt, score in zip(prompts, scores, strict=True)
    ]
    assert engine.prompt_tokens == sum(lengths)
    assert engine.prompt_tokens - engine.cached_tokens <= len(prompts) * CPU_BLOCK_SIZE


def read_frames(path: Path) -> tuple[np.ndarray, float]:
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())


@pytest.mark.parametrize("budget", [VideoBudget(), VideoBudget(fps=3.7, max_pixels=64 * 64)])
def test_frames_in_memory_are_sampled_as_those_of_a_file(budget):
    for clip in [*TOY_CLIPS, *REAL_CLIPS[:1]]:
        frames, fps = read_frames(clip)
        of_file = load_video(clip, budget)
        for form in (frames, torch.from_numpy(frames).permute(0, 3, 1, 2)):
            in_memory = sample_frames(form, fps=fps, budget=budget)
            assert torch.equal(in_memory.frames, of_file.frames)
            assert in_memory.metadata == of_file.metadata


def test_frames_in_memory_score_as_their_file(model):
    clips = [read_frames(clip) for clip in TOY_CLIPS]
    as_arrays = model.score([frames for frames, _ in clips], PROMPTS, fps=[fps for _, fps in clips])
    of_files = model.score(TOY_CLIPS, PROMPTS)
    assert as_arrays.cots == of_files.cots
    assert as_arrays.rewards == pytest.approx(of_files.rewards, abs=TOLERANCE)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((8, 64, 64, 3)), np.zeros((8, 3, 64, 64), np.uint8), np.zeros((2, 64, 64, 3), np.uint8)],
    ids=["floats", "channels first", "too few"],
)
def test_frames_that_are_no_clip_are_refused(frames):
    with pytest.raises(VideoError, match=r"give a uint8 array|at least 4"):
        sample_frames(frames, fps=8.0, budget=VideoBudget())


def test_frames_without_a_rate_are_refused(models):
    with pytest.raises(ValueError, match="how many there are a second"):
        models["hf"].score([read_frames(TOY_CLIPS[0])[0]], PROMPTS[:1])


def test_a_video_that_cannot_be_scored_stops_no_other(model, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(TOY_CLIPS[0].read_bytes()[:400])
    texts = ["<video>fine", "<video>fine", "<video>says <Reward>", "<video>" + "long " * 2000, "<video>fine"]
    videos = [TOY_CLIPS[0], broken, TOY_CLIPS[1], TOY_CLIPS[1], tmp_path / "none.mp4"]
    tasks = [VideoTask(str(n), str(video), text) for n, (video, text) in enumerate(zip(videos, texts, strict=True))]
    outcomes = {outcome.name: outcome for outcome in model.score_stream(tasks)}
    assert isinstance(outcomes.pop("0"), ScoredVideo)
    assert all(isinstance(outcome, FailedVideo) for outcome in outcomes.values())
    assert "does not decode" in outcomes["1"].error
    assert "reserved token '<Reward>'" in outcomes["2"].error
    assert "over max_prompt_length 1024" in outcomes["3"].error
    assert f"video not found: {tmp_path / 'none.mp4'}" in outcomes["4"].error
    with pytest.raises(VideoError, match=r"(?s)does not decode.*not found"):
        model.score([broken, TOY_CLIPS[0], tmp_path / "none.mp4"], PROMPTS[:3])


def test_checkpoints_of_both_stages_score_as_stage_1_does(small_model, tmp_path):
    """Adapter and tuned weights merged; stage 2's layout found from its outer folders."""
    checkpoint = stage1_checkpoint(tmp_path / "checkpoint-5", small_model)
    settings = dataclasses.replace(SETTINGS, backend="hf", max_new_tokens=12)
    shutil.copytree(small_model, tmp_path / "global_step_7" / "actor" / "huggingface")
    inner = tmp_path / "global_step_7" / "actor" / "huggingface"
    assert find_model(tmp_path / "global_step_7") == find_model(inner.parent) == find_model(inner) == str(inner)
    for path in (checkpoint, tmp_path / "global_step_7"):
        with RewardModel.from_pretrained(path, settings=settings) as model:
            prompts = encode(model, TOY_CLIPS)
            scores = think_and_score(model, prompts)
        scorer = RewardScorer.from_pretrained(find_model(path), dtype=torch.float32, device="cpu")
        encoded = scorer.encode(TOY_CLIPS, problems=[f"<video>{prompt}" for prompt in PROMPTS])
        cots = [Cot(score.cot_ids, "") for score in scores]
        assert [score.reward for score in scores] == pytest.approx(scorer.score_encoded(encoded, cots), abs=TOLERANCE)


@torch.no_grad()
def test_a_head_in_fp32_reads_bf16_states_without_the_error_of_one_in_bf16(models):
    """Against the same states and many heads in float64."""
    in_bf16 = load_tiny("hf", precision="bf16")
    prompts = encode(in_bf16, TOY_CLIPS)
    reward_id = in_bf16.builder.reward_token_id
    continuations = [(*score.cot_ids, reward_id) for score in think_and_score(models["hf"], prompts)]
    engine = in_bf16.engine.engine
    states = engine.model.model(**engine.left_padded(prompts, continuations)).last_hidden_state[:, -1]
    assert states.dtype == torch.bfloat16
    hidden_size = states.shape[1]
    heads = torch.randn(1000, hidden_size, generator=torch.Generator().manual_seed(0)) / hidden_size**0.5
    truth = states.double() @ heads.double().T
    errors = {
        "fp32": (states.float() @ heads.T).double() - truth,
        "bf16": (states @ heads.bfloat16().T).double() - truth,
    }
    assert 1000 * errors["fp32"].abs().mean() < errors["bf16"].abs().mean()
    rewards = in_bf16.engine.compute_rewards(prompts, [ids[:-1] for ids in continuations])
    expected = states.float() @ in_bf16.engine.head_weight[0]
    assert rewards == pytest.approx(expected.tolist(), abs=1e-6)


@needs_vllm
@pytest.mark.slow
def test_vllm_in_bf16_keeps_the_head_in_fp32(models):
    """Its rewards have the states' error only: they are no multiples of bf16's steps."""
    in_bf16 = load_tiny("vllm", precision="bf16")
    prompts = encode(in_bf16, TOY_CLIPS)
    rewards = [score.reward for score in think_and_score(in_bf16, prompts)]
    in_bf16.close()
    assert any(float(torch.tensor(reward).bfloat16()) != reward for reward in rewards)
    assert rewards == pytest.approx([score.reward for score in think_and_score(models["hf"], prompts)], abs=0.3)


@needs_vllm
@pytest.mark.slow
def test_tied_embeddings_are_scored_alike(tmp_path):
    from model_support import write_small_model

    folder = write_small_model(tmp_path / "tied", tied=True)
    scores = {}
    for backend in ("hf", "vllm"):
        settings = dataclasses.replace(SETTINGS, backend=backend, max_new_tokens=8)
        with RewardModel.from_pretrained(folder, settings=settings) as model:
            scores[backend] = think_and_score(model, encode(model, TOY_CLIPS))
    assert [s.cot_ids for s in scores["vllm"]] == [s.cot_ids for s in scores["hf"]]
    assert [s.reward for s in scores["vllm"]] == pytest.approx([s.reward for s in scores["hf"]], abs=TOLERANCE)
