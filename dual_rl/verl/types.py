"""The types that cross module boundaries in stage 2.

Everything moves whole pairs: a pair is drawn, generated for, balanced over ranks, packed and updated as a whole. A
response has its `ResponseKey`; rewards, advantages and log-probs are looked up by that key, never by an index.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from verl.data.vision_process import VideoFrames

if TYPE_CHECKING:
    import ray

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


class VideoKey(NamedTuple):
    """One video of one pair; its n responses form a group. `pair_id` is the row of the CSV, counted from 0."""

    pair_id: int
    side: Side


class ResponseKey(NamedTuple):
    """One response: the `sample`-th, counted from 0, of a video."""

    pair_id: int
    side: Side
    sample: int

    @property
    def video(self) -> VideoKey:
        return VideoKey(self.pair_id, self.side)


@dataclass(frozen=True)
class PreferencePair:
    """One row of a stage 2 CSV.

    `videos`: absolute paths of A and B. `problem`: user turn with at most one `<video>`. `answer`: the annotation as
    in the CSV, for the reward function. `preference`: +1 if A is better, -1 if B is, 0 for a tie, None if the row has
    no usable label (such a pair takes part in GRPO, but not in Bradley-Terry).
    """

    pair_id: int
    videos: tuple[str, str]
    problem: str
    answer: str
    preference: int | None


@dataclass(frozen=True)
class VideoPrompt:
    """The user turn of one video, ready for generation and for the packed forward.

    `text`: rendered chat text with one video placeholder token, ending in the generation prompt. `input_ids`: int64
    [prompt_length], the same with the placeholder expanded. `grid_thw`: patches along time, height and width.
    """

    key: VideoKey
    text: str
    input_ids: torch.Tensor
    video: VideoFrames
    grid_thw: tuple[int, int, int]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `seed` is mixed with each response's key: draws depend on neither rank nor batch.

    `n` responses per video, `temperature` 0 for greedy, `top_k` -1 for all tokens, at most `max_tokens` tokens each.
    `repetition_penalty`: positive logits of tokens that occur in prompt or response are divided by it, negative ones
    multiplied (CTRL, Keskar et al. 2019); 1 for none.
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Response:
    """A generated response: its ids are carried to training and scoring, never re-tokenised.

    `cot_ids`: token ids without EOS. `is_finished`: EOS was generated; False when cut at the length limit.
    `log_probs`: float32 [num_labels], the rollout engine's log-probability of each CoT token and, when finished, EOS.

    Example: ids (5, 9, 2) and finished give num_labels 4: three CoT tokens and EOS.
    """

    key: ResponseKey
    cot_ids: tuple[int, ...]
    is_finished: bool
    log_probs: torch.Tensor

    @property
    def num_labels(self) -> int:
        return len(self.cot_ids) + int(self.is_finished)


@dataclass(frozen=True)
class PairRollout:
    """A pair with the responses for both videos, n each, in order of `sample`.

    `prompt_tokens`: of A's and of B's prompt. `prompts`: Ray's reference to the two `VideoPrompt`s, which stay in its
    object store until a worker fetches them; None without Ray.
    """

    pair: PreferencePair
    responses_a: tuple[Response, ...]
    responses_b: tuple[Response, ...]
    prompt_tokens: tuple[int, int]
    prompts: "ray.ObjectRef | None" = None

    @property
    def responses(self) -> tuple[Response, ...]:
        """All 2n responses, A's before B's."""
        return self.responses_a + self.responses_b

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed row: each prompt once, each CoT with its `<Reward>`."""
        return sum(self.prompt_tokens) + sum(len(response.cot_ids) + 1 for response in self.responses)
