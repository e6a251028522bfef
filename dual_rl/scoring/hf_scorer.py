"""Chain of thought and reward with plain transformers: for machines without vLLM, and as a reference for it.

One copy of the model does both: the `hf` rollout engine writes, and a second forward over the whole sequences reads
the states at `<Reward>`. Batches run one after the other.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from scoring.types import ScoringEngine, ScoringSettings, ThoughtScore
from verl.config import RolloutConfig
from verl.model.reward_files import PolicyCheckpoint
from verl.rollout.hf_engine import HfEngine
from verl.types import Sampling, VideoPrompt


class HfScorer(ScoringEngine):
    """A step is a whole batch."""

    is_continuous = False

    def __init__(
        self, folder: Path, checkpoint: PolicyCheckpoint, settings: ScoringSettings, device: torch.device
    ) -> None:
        super().__init__(checkpoint, settings)
        self.head_weight = self.head_weight.to(device)
        self.sampling = Sampling(
            n=1,
            temperature=0.0,
            top_p=1.0,
            top_k=-1,
            max_tokens=settings.max_new_tokens,
            seed=0,
            repetition_penalty=settings.repetition_penalty,
        )
        self.engine = HfEngine(
            folder,
            config=RolloutConfig(name="hf", precision=settings.precision, max_num_seqs=settings.batch_size),
            max_model_len=self.max_model_len,
            forbidden_token_ids=self.forbidden_token_ids,
            eos_token_id=self.eos_token_id,
            device=device,
        )
        self._waiting: list[tuple[str, VideoPrompt]] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.engine.load_weights(weights)

    def submit(self, name: str, prompt: VideoPrompt) -> None:
        self._waiting.append((name, prompt))

    def step(self) -> list[tuple[str, ThoughtScore]]:
        size = self.settings.batch_size
        batch, self._waiting = self._waiting[:size], self._waiting[size:]
        names, prompts = zip(*batch, strict=True)
        thoughts = [((), True)] * len(prompts)
        if not self.settings.mask_cot:
            responses = [response for (response,) in self.engine.generate(prompts, self.sampling)]
            thoughts = [(response.cot_ids, response.is_finished) for response in responses]
        rewards = self.compute_rewards(prompts, [cot_ids for cot_ids, _ in thoughts])
        scores = [ThoughtScore(*thought, reward) for thought, reward in zip(thoughts, rewards, strict=True)]
        return list(zip(names, scores, strict=True))

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
