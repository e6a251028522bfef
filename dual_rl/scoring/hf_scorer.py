"""Chain of thought and reward with plain transformers: for machines without vLLM, and as a reference for it.

One copy of the model does both: the `hf` rollout engine writes, and a second forward over the whole sequences reads
the states at `<Reward>`. Batches run one after the other.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import torch

from scoring.types import ScoringEngine, ScoringSettings, ThoughtScore
from verl.config import RolloutConfig
from verl.model.reward_files import PolicyCheckpoint
from verl.rollout.hf_engine import HfEngine
from verl.types import VideoPrompt


class HfScorer(ScoringEngine):
    """A step is a whole batch of videos with equally many thoughts."""

    is_continuous = False

    def __init__(
        self, folder: Path, checkpoint: PolicyCheckpoint, settings: ScoringSettings, device: torch.device
    ) -> None:
        super().__init__(checkpoint, settings)
        self.head_weight = self.head_weight.to(device)
        self.engine = HfEngine(
            folder,
            config=RolloutConfig(name="hf", precision=settings.precision, max_num_seqs=settings.batch_size),
            max_model_len=self.max_model_len,
            forbidden_token_ids=self.forbidden_token_ids,
            eos_token_id=self.eos_token_id,
            device=device,
        )
        self._waiting: list[tuple[str, VideoPrompt, int]] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.engine.load_weights(weights)

    def submit(self, name: str, prompt: VideoPrompt, num_thoughts: int) -> None:
        self._waiting.append((name, prompt, num_thoughts))

    def step(self) -> list[tuple[str, tuple[ThoughtScore, ...]]]:
        num_thoughts, rows = self._waiting[0][2], max(1, self._waiting[0][2])  # of a video
        size = max(1, self.settings.batch_size // rows)
        batch = list(takewhile(lambda entry: entry[2] == num_thoughts, self._waiting[:size]))
        self._waiting = self._waiting[len(batch) :]
        names, prompts, _ = zip(*batch, strict=True)
        thoughts = [((), True)] * len(prompts)
        if num_thoughts:
            groups = self.engine.generate(prompts, self.sampling(num_thoughts))
            thoughts = [(response.cot_ids, response.is_finished) for group in groups for response in group]
        repeated = [prompt for prompt in prompts for _ in range(rows)]
        rewards = self.compute_rewards(repeated, [cot_ids for cot_ids, _ in thoughts])
        scores = [ThoughtScore(*thought, reward) for thought, reward in zip(thoughts, rewards, strict=True)]
        return [(name, tuple(scores[n * rows : (n + 1) * rows])) for n, name in enumerate(names)]

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    @torch.no_grad()
    def compute_rewards(self, prompts: Sequence[VideoPrompt], cot_ids: Sequence[Sequence[int]]) -> list[float]:
        """The head on the final normed states of `prompt, CoT, <Reward>`, in fp32."""
        continuations = [(*ids, self.reward_token_id) for ids in cot_ids]
        inputs = self.engine.left_padded(prompts, continuations)
        hidden = self.engine.model.model(**inputs, use_cache=False).last_hidden_state
        return (hidden[:, -1].float() @ self.head_weight[0]).tolist()
