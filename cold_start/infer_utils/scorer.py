"""Scoring from Python:

from infer_utils import RewardScorer
scorer = RewardScorer.from_pretrained("output/checkpoint-100")
rewards = scorer.score(["a.mp4", "b.mp4"], prompts=["a red circle moves left"] * 2, cots=[cot_a, cot_b])
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from checkpoint import LoadedReward, RewardConfig, build_reward_model, load_builder, load_reward_model
from descore.progress import progress
from scored_sequence import EncodedPrompt, judge_problem, pack_sequences
from vision_process import load_video, resize_frames, sample_frames

MAX_COT_TOKENS = 4096
REPETITION_PENALTY = 1.05


@dataclass(frozen=True)
class Cot:
    """A chain of thought: its token ids as generated (without EOS), and their text."""

    ids: tuple[int, ...]
    text: str


class RewardScorer:
    """A loaded reward model that scores videos."""

    def __init__(self, loaded: LoadedReward) -> None:
        self.model, self.builder, self.config = loaded.model, loaded.builder, loaded.config

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        base_model: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "RewardScorer":
        """Load `checkpoint-N/` or a merged model. Default: bf16 on a GPU, fp32 on a CPU."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return cls(load_reward_model(path, base_model=base_model, dtype=dtype, device=device))

    @classmethod
    def from_base(cls, path: str | os.PathLike, *, seed: int = 0) -> "RewardScorer":
        """A base model with a fresh head, in fp32 on the CPU: the start of training, for comparison."""
        torch.manual_seed(seed)
        config = replace(RewardConfig.resolve(path), base_model=str(path))
        builder = load_builder(path, config)
        model = build_reward_model(str(path), builder.processor, config, dtype=torch.float32)
        return cls(LoadedReward(model.requires_grad_(False).eval(), builder, config))

    def encode(
        self,
        videos: Sequence[str | os.PathLike],
        prompts: Sequence[str] = (),
        *,
        problems: Sequence[str] | None = None,
    ) -> list[EncodedPrompt]:
        """Decode videos and tokenize prompts once, for several scorings. Raises VideoError that names a bad file.

        `prompts`: the videos' text prompts, for the built-in judge prompt. `problems`: complete judge prompts instead.
        """
        texts = problems if problems is not None else [judge_problem(prompt) for prompt in prompts]
        factor = self.builder.size_factor
        return [
            self.builder.encode_prompt(text, load_video(video, self.config.video, size_factor=factor))
            for video, text in zip(videos, texts, strict=True)
        ]

    def score(
        self,
        videos: Sequence[str | os.PathLike],
        prompts: Sequence[str],
        cots: Sequence[str | Cot] | None = None,
        *,
        reward_dim: str | None = None,
        batch_size: int = 8,
    ) -> list[float]:
        """Rewards of (video, prompt, CoT); without `cots` the CoT is masked.

        `reward_dim`: which of the model's dimensions, by default the first. Raises ValueError if it has no such one.
        """
        row = self.config.row_of(reward_dim)
        return self.score_encoded(self.encode(videos, prompts), cots, batch_size=batch_size)[:, row].tolist()

    @torch.no_grad()
    def score_encoded(
        self, encoded: Sequence[EncodedPrompt], cots: Sequence[str | Cot] | None = None, *, batch_size: int = 8
    ) -> torch.Tensor:
        """fp32 [len(encoded), num_rewards], `batch_size` sequences in one packed forward; prompts from `encode`."""
        cots = [""] * len(encoded) if cots is None else cots
        sequences = [
            self.builder.build(prompt, cot.ids if isinstance(cot, Cot) else self.builder.encode_cot(cot))
            for prompt, cot in zip(encoded, cots, strict=True)
        ]
        rewards = [torch.empty(0, self.config.num_rewards)]
        for start in range(0, len(sequences), batch_size):
            batch = pack_sequences(sequences[start : start + batch_size]).to(self.model.device)
            rewards.append(self.model(batch).cpu())
        return torch.cat(rewards)

    def differentiable(
        self,
        frames: torch.Tensor,
        prompt: str,
        cot: str | Cot | None = None,
        *,
        fps: float,
        reward_dim: str | None = None,
        is_exact: bool = True,
    ) -> torch.Tensor:
        """The reward of a clip as a function of its pixels: a scalar in the graph of `frames`.

        `frames`: float [num_frames, 3, height, width] from 0 to 1, `fps` of them per second. The CoT is fixed; without
        one the model writes it, without gradient; "" masks it. The value is that of `score` for frames rounded to 8
        bits, the gradient that of the unrounded ones (straight-through); `is_exact=False` rounds nothing. Raises
        VideoError.
        """
        budget, factor = self.config.video, self.builder.size_factor
        rounded = (frames.detach().clamp(0, 1) * 255).round().to(torch.uint8)
        video = sample_frames(rounded, fps=fps, budget=budget, size_factor=factor)
        pixels = resize_frames(frames[list(video.frame_indices)] * 255, budget, size_factor=factor).clamp(0, 255)
        if is_exact:
            pixels = pixels + (video.frames - pixels).detach()
        encoded = self.builder.encode_prompt(judge_problem(prompt), replace(video, frames=pixels))
        cot = self.write_cots([encoded])[0] if cot is None else cot
        ids = cot.ids if isinstance(cot, Cot) else self.builder.encode_cot(cot)
        batch = pack_sequences([self.builder.build(encoded, ids)]).to(self.model.device)
        return self.model(batch)[0, self.config.row_of(reward_dim)]

    @torch.no_grad()
    def write_cots(
        self,
        encoded: Sequence[EncodedPrompt],
        *,
        batch_size: int = 32,
        max_new_tokens: int = MAX_COT_TOKENS,
        repetition_penalty: float = REPETITION_PENALTY,
        temperature: float = 0.0,
    ) -> list[Cot]:
        """CoTs written by the model itself, greedily at temperature 0. It never writes `<Reward>` or vision tokens."""
        processor, tokenizer = self.builder.processor, self.builder.tokenizer
        sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
        suppressed = [self.builder.reward_token_id, processor.video_token_id, processor.image_token_id]
        cots: list[Cot] = []
        with _stock_text_attention(self.model):
            for start in progress(range(0, len(encoded), batch_size), description="writing CoTs", leave=False):
                batch = encoded[start : start + batch_size]
                ids = [prompt.input_ids for prompt in batch]
                input_ids = pad_sequence(ids, True, tokenizer.pad_token_id, padding_side="left")
                inputs = {
                    "input_ids": input_ids,
                    "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, padding_side="left"),
                    "mm_token_type_ids": (input_ids == processor.video_token_id).int() * 2,
                    "pixel_values_videos": torch.cat([prompt.pixel_values for prompt in batch]),
                    "video_grid_thw": torch.tensor([prompt.grid_thw for prompt in batch]),
                }
                output = self.model.generator.generate(
                    **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                    do_sample=temperature > 0,
                    **sampling,
                    max_new_tokens=max_new_tokens,
                    repetition_penalty=repetition_penalty,
                    suppress_tokens=suppressed,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
                for row in output[:, input_ids.shape[1] :].tolist():
                    ids = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
                    cots.append(Cot(tuple(ids), tokenizer.decode(ids)))
        return cots


@contextmanager
def _stock_text_attention(model: torch.nn.Module) -> Iterator[None]:
    """Use SDPA in the text model: generation takes padded batches with a cache, not packed sequences."""
    config = model.qwen.config.text_config
    packed, config._attn_implementation = config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = packed
