"""The reward model for use: videos and prompts in, rewards and chains of thought out.

    from inference import RewardModel

    model = RewardModel.from_pretrained("results/mine/global_step_100")
    rewards, cots = model.score(["a.mp4", "b.mp4"], ["a cat runs", "a cat runs"])

Threads decode videos ahead of the engine, which holds `batch_size` of them at a time and takes a new one as soon as
one is done. A video that cannot be scored is an outcome of its own and does not stop the others.
"""

import dataclasses
import hashlib
import logging
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import count, islice
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch

from scoring.source import (
    RewardScale,
    apply_scale_to_video,
    choose_budget,
    choose_prompt_length,
    find_model,
    load_calibration,
    read_checkpoint,
)
from scoring.types import (
    FailedVideo,
    Outcome,
    ScoredVideo,
    ScoringEngine,
    ScoringSettings,
    Thought,
    ThoughtScore,
    VideoTask,
)
from verl.data.loading import VideoLoader
from verl.data.scored_sequence import SequenceBuilder, judge_problem
from verl.data.vision_process import VideoBudget, VideoError, VideoFrames, sample_frames
from verl.model.precision import resolve_precision
from verl.model.reward_files import PolicyCheckpoint, save_engine_folder, stream_weights
from verl.temporary import temporary_folder
from verl.types import VideoKey, VideoPrompt

WINDOW = 2
"""Videos in progress, decoding included, as a multiple of `batch_size`."""

logger = logging.getLogger(__name__)

Frames = np.ndarray | torch.Tensor


class Scores(NamedTuple):
    """`rewards[i]` and the chain of thought `cots[i]` of the i-th video."""

    rewards: list[float]
    cots: list[str]


class RewardModel:
    """A reward model in one engine on one device. Close it, or use it as a context manager.

    `scale`: of the rewards that `score` returns; None for the head's own. Outcomes of `score_stream` are never scaled.
    """

    def __init__(
        self, checkpoint: PolicyCheckpoint, engine: ScoringEngine, *, budget: VideoBudget, scale: RewardScale | None
    ) -> None:
        self.engine = engine
        self.settings = engine.settings
        self.scale = scale
        self.files = ExitStack()
        """The engine's files, which it reads lazily."""
        self.builder = SequenceBuilder(checkpoint.processor, format_prompt=checkpoint.format_prompt)
        self.loader = VideoLoader(self.builder, budget, num_threads=self.settings.num_threads)
        self._decoding: deque[tuple[VideoTask, Future[VideoPrompt]]] = deque()
        self._numbers = count()
        self._sources: dict[str, str] = {}  # path of each video in progress, for messages

    @classmethod
    def from_pretrained(
        cls,
        model_ckpt: str | os.PathLike,
        rm_ckpt: str | os.PathLike | None = None,
        *,
        settings: ScoringSettings | None = None,
        normalize: bool = False,
    ) -> "RewardModel":
        """Load stage 1's `checkpoint-N`, a merged model, or stage 2's `global_step_N` (or its `huggingface/`).

        `rm_ckpt`: an `rm_head.pth` or its folder, by default the one beside the model. `normalize`: `score` returns
        rewards on the scale that `inference.py --calibrate` kept beside the checkpoint. Raises ValueError like
        `read_checkpoint` and `load_calibration`.
        """
        settings, device = settings or ScoringSettings(), choose_device()
        settings.require_device(device)
        checkpoint = read_checkpoint(model_ckpt, rm_ckpt)
        settings = dataclasses.replace(settings, max_prompt_length=choose_prompt_length(checkpoint, settings))
        scale = load_calibration(RewardScale, model_ckpt, checkpoint, settings) if normalize else None
        budget = choose_budget(checkpoint, settings)
        if budget != checkpoint.video_budget:
            logger.warning("trained with %s, videos are now read with %s", checkpoint.video_budget, budget)
        dtype = resolve_precision(settings.precision, device)
        with ExitStack() as files:
            folder = files.enter_context(temporary_folder("engine"))
            save_engine_folder(folder, checkpoint, dtype=dtype)
            engine = _find_engine_class(settings.backend)(folder, checkpoint, settings, device)
            engine.load_weights(stream_weights(find_model(model_ckpt), checkpoint, dtype=dtype))
            model = cls(checkpoint, engine, budget=budget, scale=scale)
            model.files = files.pop_all()
        return model

    def score(
        self,
        videos: Sequence[str | os.PathLike | Frames],
        prompts: Sequence[str],
        *,
        fps: float | Sequence[float] | None = None,
        num_thoughts: int | None = None,
    ) -> Scores:
        """Rewards and chains of thought, in order; arguments and errors as of `score_videos`."""
        scored = self.score_videos(videos, prompts, fps=fps, num_thoughts=num_thoughts)
        return Scores([video.reward for video in scored], [video.cot for video in scored])

    def score_videos(
        self,
        videos: Sequence[str | os.PathLike | Frames],
        prompts: Sequence[str],
        *,
        fps: float | Sequence[float] | None = None,
        num_thoughts: int | None = None,
    ) -> list[ScoredVideo]:
        """Scores in order, on the model's scale.

        `videos`: paths, or all frames of a clip as uint8 array [num_frames, height, width, 3] or tensor [num_frames,
        3, height, width] with their frames per second in `fps`, one for all or one each. `prompts`: what each was
        generated from. `num_thoughts`: as of `VideoTask`; the same video, prompt and seed give the same thoughts in
        any call. Raises VideoError that lists every video that cannot be scored.
        """
        if num_thoughts is not None and num_thoughts < 0:
            raise ValueError(f"num_thoughts is {num_thoughts}; it must not be negative")
        rates = list(fps) if isinstance(fps, Sequence) else [fps] * len(videos)
        tasks = [  # with new names: an earlier call that was interrupted may have left videos in progress
            VideoTask(f"video {next(self._numbers)}", self._prepare(video, rate), judge_problem(prompt), num_thoughts)
            for video, prompt, rate in zip(videos, prompts, rates, strict=True)
        ]
        outcomes = {outcome.name: outcome for outcome in self.score_stream(tasks)}
        ordered = [outcomes[task.name] for task in tasks]
        if failures := [outcome.error for outcome in ordered if isinstance(outcome, FailedVideo)]:
            raise VideoError("\n".join(["videos could not be scored", *failures]))
        return [apply_scale_to_video(outcome, self.scale) for outcome in ordered]

    def score_stream(self, tasks: Iterable[VideoTask]) -> Iterator[Outcome]:
        """Outcomes as they become ready; only a window of `tasks` is in progress at a time."""
        tasks = iter(tasks)
        while True:
            self.submit(islice(tasks, WINDOW * self.settings.batch_size - self.num_pending))
            if not self.num_pending:
                return
            yield from self.advance()

    def submit(self, tasks: Iterable[VideoTask]) -> None:
        """Start decoding; `advance` returns the outcomes."""
        for task in tasks:
            key = VideoKey(next(self._numbers), "A")
            self._sources[task.name] = "frames in memory" if isinstance(task.video, VideoFrames) else task.video
            self._decoding.append((task, self.loader.submit(key, task.problem, task.video)))

    @property
    def num_pending(self) -> int:
        """Videos that were submitted and have no outcome yet."""
        return len(self._decoding) + self.engine.num_unfinished

    def advance(self) -> list[Outcome]:
        """Hand decoded videos to the engine, let it work for a step, and return what has become ready."""
        outcomes: list[Outcome] = []
        while self._decoding and self.engine.num_unfinished < self.settings.batch_size:
            task, future = self._decoding[0]
            name = task.name
            if self.engine.is_continuous and self.engine.num_unfinished and not future.done():
                break  # the engine has work while decoding goes on
            self._decoding.popleft()
            try:
                prompt = future.result()
                if (length := prompt.input_ids.numel()) > (limit := self.settings.max_prompt_length):
                    raise ValueError(f"a prompt of {length} tokens, video included, is over max_prompt_length {limit}")
            except VideoError as error:  # names its file
                outcomes.append(FailedVideo(name, str(error)))
            except ValueError as error:
                outcomes.append(FailedVideo(name, f"{self._sources[name]}: {error}"))
            else:
                self._begin(task, prompt)
        if self.engine.num_unfinished:
            outcomes += [self._outcome(name, scores) for name, scores in self.engine.step()]
        for outcome in outcomes:
            del self._sources[outcome.name]
        return outcomes

    def close(self) -> None:
        """Stop engine and threads, and remove the engine's files."""
        self.loader.close()
        self.engine.close()
        self.files.close()

    def __enter__(self) -> "RewardModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, video: str | os.PathLike | Frames, fps: float | None) -> str | VideoFrames:
        if isinstance(video, str | os.PathLike):
            return os.fspath(video)
        if fps is None:
            raise ValueError("frames have no rate. Give the frames per second: score(..., fps=24).")
        return sample_frames(video, fps=fps, budget=self.loader.budget, size_factor=self.builder.size_factor)

    def _begin(self, task: VideoTask, prompt: VideoPrompt) -> None:
        num_thoughts = task.num_thoughts
        if num_thoughts is None:
            num_thoughts = 0 if self.settings.mask_cot else self.settings.num_thoughts
        if num_thoughts > 1:  # draws follow the key: make it one of what is seen, not of the place in a queue
            content = hashlib.blake2b(prompt.input_ids.numpy(), digest_size=8)
            content.update(prompt.video.frames.contiguous().numpy())
            prompt = dataclasses.replace(prompt, key=VideoKey(int.from_bytes(content.digest()), "A"))
        self.engine.submit(task.name, prompt, num_thoughts)

    def _outcome(self, name: str, scores: Sequence[ThoughtScore]) -> Outcome:
        rewards = [score.reward for score in scores]
        if not all(map(math.isfinite, rewards)):
            return FailedVideo(name, f"{self._sources[name]}: not all of its rewards are numbers: {rewards}")
        thoughts = [
            Thought(
                reward=score.reward,
                cot=self.builder.tokenizer.decode(score.cot_ids, skip_special_tokens=True),
                num_tokens=len(score.cot_ids),
                is_finished=score.is_finished,
            )
            for score in scores
        ]
        return summarise_thoughts(name, thoughts)


def summarise_thoughts(name: str, thoughts: Sequence[Thought]) -> ScoredVideo:
    """The score of a video from its thoughts, at least one."""
    if len(thoughts) == 1:
        return ScoredVideo(name, **dataclasses.asdict(thoughts[0]))
    rewards = [thought.reward for thought in thoughts]
    mean = fmean(rewards)
    return ScoredVideo(
        name,
        mean,
        min(thoughts, key=lambda thought: abs(thought.reward - mean)).cot,
        sum(thought.num_tokens for thought in thoughts),
        all(thought.is_finished for thought in thoughts),
        standard_error=stdev(rewards) / len(rewards) ** 0.5,
        thoughts=tuple(thoughts),
    )


def choose_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _find_engine_class(backend: str) -> type[ScoringEngine]:
    if backend == "vllm":
        from scoring.vllm_scorer import VllmScorer as Engine
    else:
        from scoring.hf_scorer import HfScorer as Engine
    return Engine
