"""Pairs with responses of drawn lengths, in memory: what a rollout would return."""

import random
from dataclasses import dataclass

import torch

from verl.data.scored_sequence import SequenceBuilder
from verl.data.vision_process import VideoFrames
from verl.types import SIDES, PairRollout, PreferencePair, Response, ResponseKey, VideoKey, VideoPrompt

WORDS = "a clip that drifts over a plain background while the camera slowly turns to the left and back again "


@dataclass(frozen=True)
class WorkShape:
    """`prompt_tokens`: approximate, per prompt, video included. `frames`: fewest and most, even, of `side` x `side`
    pixels. `response_tokens`: shortest and longest; lengths are drawn uniformly. `n`: responses per video.
    """

    pairs: int = 4
    n: int = 8
    prompt_tokens: int = 2400
    frames: tuple[int, int] = (10, 14)
    side: int = 448
    response_tokens: tuple[int, int] = (200, 1000)


@dataclass(frozen=True)
class Work:
    """A step's pairs, their prompts, and an advantage per response."""

    rollouts: tuple[PairRollout, ...]
    prompts: dict[VideoKey, VideoPrompt]
    advantages: dict[ResponseKey, float]

    def first(self, count: int) -> "Work":
        """The first `count` pairs."""
        return Work(self.rollouts[:count], self.prompts, self.advantages)


def make_work(builder: SequenceBuilder, shape: WorkShape, *, seed: int = 0) -> Work:
    """Random frames, tokens and advantages; the same seed and shape give the same work."""
    draws = random.Random(seed)
    prompts, rollouts, advantages = {}, [], {}
    for pair_id in range(shape.pairs):
        responses = {}
        for side in SIDES:
            key = VideoKey(pair_id, side)
            prompts[key] = _make_prompt(builder, key, shape, draws)
            responses[side] = tuple(
                _make_response(ResponseKey(*key, sample), draws.randint(*shape.response_tokens), builder, draws)
                for sample in range(shape.n)
            )
            advantages |= {response.key: draws.gauss(0, 1) for response in responses[side]}
        pair = PreferencePair(pair_id, ("a.mp4", "b.mp4"), "", "", preference=1 if pair_id % 2 else -1)
        lengths = tuple(prompts[VideoKey(pair_id, side)].input_ids.numel() for side in SIDES)
        rollouts.append(PairRollout(pair, responses["A"], responses["B"], lengths))
    return Work(tuple(rollouts), prompts, advantages)


def _make_prompt(builder: SequenceBuilder, key: VideoKey, shape: WorkShape, draws: random.Random) -> VideoPrompt:
    num_frames = 2 * draws.randint(shape.frames[0] // 2, shape.frames[1] // 2)
    generator = torch.Generator().manual_seed(draws.randrange(2**31))
    size = (num_frames, 3, shape.side, shape.side)
    video = VideoFrames(
        frames=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        source_fps=24.0,
        frame_indices=tuple(range(0, 12 * num_frames, 12)),
        total_frames=12 * num_frames,
    )
    bare = builder.encode_prompt(key, WORDS, video).input_ids.numel()
    by_repetition = len(builder.tokenizer(WORDS, add_special_tokens=False)["input_ids"])
    repetitions = max(1, 1 + round((shape.prompt_tokens - bare) / by_repetition))
    return builder.encode_prompt(key, WORDS * repetitions, video)


def _make_response(key: ResponseKey, length: int, builder: SequenceBuilder, draws: random.Random) -> Response:
    tokenizer = builder.tokenizer
    special = {builder.reward_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    allowed = [token for token in range(len(tokenizer)) if token not in special]
    ids = tuple(draws.choices(allowed, k=length))
    return Response(key, ids, is_finished=True, log_probs=torch.zeros(length + 1))
