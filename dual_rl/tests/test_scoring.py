"""The reward model for use: one engine's thoughts and rewards against plain forwards, in any batch."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen3VLVideoProcessor

from model_support import CLIPS as ALL_CLIPS
from model_support import make_policy
from rollout_support import tiny_model, write_engine_folder
from scoring.reward_model import RewardModel
from scoring.types import ScoredVideo, ScoringSettings, ThoughtScore, VideoTask
from slow_path import compute_reward
from verl.data.vision_process import VideoError
from verl.model.policy import PolicyModel
from verl.model.reward_files import load_checkpoint, save_head
from verl.rollout.vllm_start import CPU_BLOCK_SIZE
from verl.types import Response, ResponseKey, VideoKey, VideoPrompt

CLIPS = ALL_CLIPS[:4]
PROMPTS = ["a red circle moves left over a plain gray background", "a blue star", "a green square grows", "a cat"]
TOLERANCE = 1e-4  # of rewards, fp32
SETTINGS = ScoringSettings(batch_size=4, max_prompt_length=1024, max_new_tokens=220, kv_cache_gib=1)
BACKENDS = ["hf", pytest.param("vllm", marks=pytest.mark.slow)]
torch.set_num_threads(1)


def write_reward_model(folder: Path, *, has_experts: bool = False) -> Path:
    """The tiny base, which has learned to think, with a head that has not learned."""
    tiny_model(has_experts=has_experts).save_pretrained(folder)
    write_engine_folder(folder, has_experts=has_experts)
    (folder / "reward_config.json").write_text("{}")
    hidden_size = AutoConfig.from_pretrained(folder).text_config.hidden_size
    generator = torch.Generator().manual_seed(3)
    save_head(folder / "rm_head.pth", torch.randn(1, hidden_size, generator=generator) / hidden_size**0.5)
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def load_tiny(tiny_folder) -> Callable[..., RewardModel]:
    """Loads it with changed settings."""
    return lambda **changes: RewardModel.from_pretrained(
        tiny_folder, settings=dataclasses.replace(SETTINGS, **changes)
    )


@pytest.fixture(scope="module")
def models(load_tiny) -> Iterator[dict[str, RewardModel]]:
    """Each backend once: starting vLLM takes most of the time."""
    made = {backend: load_tiny(backend=backend) for backend in ("hf", "vllm")}
    yield made
    for model in made.values():
        model.close()


@pytest.fixture(scope="module")
def thoughts(models) -> dict[str, list[ThoughtScore]]:
    """What each backend makes of CLIPS."""
    return {backend: think_and_score(model, encode(model)) for backend, model in models.items()}


@pytest.fixture(scope="module")
def policy(tiny_folder) -> PolicyModel:
    """The same weights for the plain slow path."""
    return make_policy(load_checkpoint(tiny_folder, with_weights=True)).eval()


def encode(model: RewardModel) -> list[VideoPrompt]:
    tasks = zip(CLIPS, PROMPTS, strict=True)
    futures = [
        model.loader.submit(VideoKey(number, "A"), f"<video>{prompt}", str(clip))
        for number, (clip, prompt) in enumerate(tasks)
    ]
    return [future.result() for future in futures]


def run_engine(model: RewardModel, prompts: Sequence[VideoPrompt], numbers: Sequence[int]) -> list[tuple]:
    """What the engine alone returns, in order of the prompts, for each its own number of thoughts."""
    for index, (prompt, num_thoughts) in enumerate(zip(prompts, numbers, strict=True)):
        model.engine.submit(str(index), prompt, num_thoughts)
    ready = {}
    while model.engine.num_unfinished:
        ready.update(model.engine.step())
    return [ready[str(index)] for index in range(len(prompts))]


def think_and_score(model: RewardModel, prompts: Sequence[VideoPrompt]) -> list[ThoughtScore]:
    """The same with one thought or none, as the model's settings say."""
    return [score for (score,) in run_engine(model, prompts, [0 if model.settings.mask_cot else 1] * len(prompts))]


@torch.no_grad()
def assert_plain_forward(
    policy: PolicyModel, model: RewardModel, scores: Sequence[ThoughtScore], *, tolerance: float = TOLERANCE
) -> None:
    """Rewards are those of stock transformers on each whole sequence by itself."""
    rewards = []
    for prompt, score in zip(encode(model), scores, strict=True):
        response = Response(ResponseKey(*prompt.key, 0), score.cot_ids, score.is_finished, torch.zeros(0))
        rewards.append(compute_reward(policy, prompt, response, model.builder).item())
    assert [score.reward for score in scores] == pytest.approx(rewards, abs=tolerance)
    assert np.std(rewards) > 100 * TOLERANCE


def read_frames(path: Path) -> tuple[np.ndarray, float]:
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy(), float(reader.get_avg_fps())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_are_those_of_the_plain_forward(models, thoughts, policy, backend):
    scores = thoughts[backend]
    assert all(score.is_finished for score in scores)
    assert len({score.cot_ids for score in scores}) == len(scores)
    assert_plain_forward(policy, models[backend], scores)


def test_backends_write_and_score_alike(thoughts):
    ours, theirs = thoughts["vllm"], thoughts["hf"]
    assert [score.cot_ids for score in ours] == [score.cot_ids for score in theirs]
    assert [score.reward for score in ours] == pytest.approx([score.reward for score in theirs], abs=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_its_batch_nor_an_interrupted_call_changes_a_score(models, monkeypatch, backend):
    model = models[backend]

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.score(CLIPS[2:], PROMPTS[2:])
    assert model.num_pending == 2
    order = [0, 1, 2, 3, 1]  # more than fit
    together = model.score([CLIPS[n] for n in order], [PROMPTS[n] for n in order])
    assert model.num_pending == 0
    frames, fps = read_frames(CLIPS[1])
    for alone in (model.score(CLIPS[1:2], PROMPTS[1:2]), model.score([frames], PROMPTS[1:2], fps=fps)):
        for n in (1, 4):
            assert alone.cots == [together.cots[n]]
            assert alone.rewards == pytest.approx([together.rewards[n]], abs=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_thoughts_are_drawn_alike_in_any_batch_and_scored_by_the_plain_forward(
    models, thoughts, policy, backend
):
    """In a batch with greedy thoughts and with none, which stay what they are."""
    model, prompts = models[backend], encode(models[backend])
    several = run_engine(model, [*prompts, *prompts, prompts[0]], [3] * 4 + [1] * 4 + [0])
    assert [score.cot_ids for (score,) in several[4:8]] == [score.cot_ids for score in thoughts[backend]]
    assert [score.cot_ids for score in several[8]] == [()]
    assert all(len({score.cot_ids for score in scores}) > 1 for scores in several[:4])
    for sample in range(3):
        assert_plain_forward(policy, model, [scores[sample] for scores in several[:4]])
    together = model.score_videos(CLIPS, PROMPTS, num_thoughts=3)
    frames, fps = read_frames(CLIPS[1])
    (alone,) = model.score_videos([frames], PROMPTS[1:2], fps=fps, num_thoughts=3)
    assert [thought.cot for thought in alone.thoughts] == [thought.cot for thought in together[1].thoughts]
    rewards = [thought.reward for thought in alone.thoughts]
    expected = (np.mean(rewards), np.std(rewards, ddof=1) / 3**0.5)
    assert (alone.reward, alone.standard_error) == pytest.approx(expected)
    assert alone.num_tokens == sum(thought.num_tokens for thought in alone.thoughts)
    (longer,) = model.score_videos(CLIPS[1:2], PROMPTS[1:2], num_thoughts=4)
    assert [thought.cot for thought in longer.thoughts[:3]] == [thought.cot for thought in alone.thoughts]


def test_vllm_encodes_a_video_once_and_scores_on_the_cached_prefix(models, monkeypatch):
    engine = models["vllm"].engine
    prompts = encode(models["vllm"])
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
    assert sum(encoded) == sum(math.prod(prompt.grid_thw) // 4 for prompt in prompts)
    assert len(processed) == len(prompts)
    lengths = [
        prompt.input_ids.numel() + len(score.cot_ids) + 1 for prompt, score in zip(prompts, scores, strict=True)
    ]
    assert engine.prompt_tokens == sum(lengths)
    assert engine.prompt_tokens - engine.cached_tokens <= len(prompts) * CPU_BLOCK_SIZE


def test_videos_that_cannot_be_scored_are_named(models, tmp_path):
    model, broken = models["hf"], tmp_path / "broken.mp4"
    broken.write_bytes(CLIPS[0].read_bytes()[:400])
    tasks = [VideoTask(text, str(CLIPS[0]), f"<video>{text}") for text in ("fine", "long " * 2000)]
    outcomes = {outcome.name: outcome for outcome in model.score_stream(tasks)}
    assert isinstance(outcomes.pop("fine"), ScoredVideo)
    (failed,) = outcomes.values()
    assert "over max_prompt_length 1024" in failed.error
    with pytest.raises(VideoError, match="give a uint8 array"):
        model.score([np.zeros((8, 64, 64, 3))], PROMPTS[:1], fps=8.0)
    with pytest.raises(VideoError, match=r"(?s)does not decode.*not found"):
        model.score([broken, tmp_path / "none.mp4"], PROMPTS[:2])


# From here on engines of vLLM are closed, which ends the process groups of the shared one: it is not used again.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{"max_new_tokens": 7}, {"mask_cot": True}], ids=["cut", "masked"])
def test_a_thought_that_is_cut_or_masked_is_scored_as_it_is(load_tiny, thoughts, policy, backend, changes):
    with load_tiny(backend=backend, **changes) as model:
        scores = think_and_score(model, encode(model))
        cut = [(whole.cot_ids[:7], False) for whole in thoughts[backend]]
        assert [(score.cot_ids, score.is_finished) for score in scores] == (
            [((), True)] * 4 if model.settings.mask_cot else cut
        )
        assert_plain_forward(policy, model, scores)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_head_stays_in_fp32_beside_a_model_in_bf16(load_tiny, thoughts, backend):
    """Its rewards have the states' error only: they are not multiples of bf16's steps."""
    with load_tiny(backend=backend, precision="bf16") as in_bf16:
        rewards = [score.reward for score in think_and_score(in_bf16, encode(in_bf16))]
    assert any(float(torch.tensor(reward).bfloat16()) != reward for reward in rewards)
    assert rewards == pytest.approx([score.reward for score in thoughts["hf"]], abs=0.3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp8_scores_drawn_greedy_and_no_thoughts_in_one_batch(load_tiny, policy):
    settings = {"quantization": "fp8", "kv_cache_dtype": "fp8", "num_thoughts": 3, "gpu_memory_utilization": 0.3}
    with load_tiny(backend="vllm", **settings) as model:
        several = run_engine(model, encode(model) * 3, [3] * 4 + [1] * 4 + [0] * 4)
        for scores in (several[4:8], several[8:], *([group[n : n + 1] for group in several[:4]] for n in range(3))):
            assert_plain_forward(policy, model, [score for (score,) in scores], tolerance=0.5)


def test_experts_write_and_score_alike_in_both_engines(models, tmp_path):
    models["vllm"].close()  # its process groups are those of a dense model
    folder = write_reward_model(tmp_path, has_experts=True)
    policy, written = make_policy(load_checkpoint(folder, with_weights=True)).eval(), []
    for backend in ("hf", "vllm"):
        settings = dataclasses.replace(SETTINGS, backend=backend, max_new_tokens=40)
        with RewardModel.from_pretrained(folder, settings=settings) as model:
            scores = think_and_score(model, encode(model))
            assert_plain_forward(policy, model, scores)
            written.append([score.cot_ids for score in scores])
    assert written[0] == written[1]
