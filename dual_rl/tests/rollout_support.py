"""What the tests of the rollout engines share: the tiny base with `<Reward>`, prompts of made-up clips, engines."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Qwen3VLForConditionalGeneration,
)

from experts import with_experts
from model_support import TINY_BASE
from verl.config import RolloutConfig
from verl.data.scored_sequence import REWARD_TOKEN, SequenceBuilder, forbidden_token_ids, judge_problem
from verl.data.vision_process import VideoFrames
from verl.rollout.engine import RolloutEngine, build_engine
from verl.types import Response, Sampling, VideoKey, VideoPrompt

MAX_MODEL_LEN = 512
CPU = torch.device("cpu")
WRITING = Sampling(n=3, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=16, seed=5)
GREEDY = Sampling(n=1, temperature=0.0, top_p=1.0, top_k=-1, max_tokens=16, seed=5)


@cache
def tiny_model(*, has_experts: bool = False) -> PreTrainedModel:
    """The trained tiny base in fp32; with experts that vary its MLPs."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(TINY_BASE, dtype=torch.float32)
    return with_experts(model, spread=0.2) if has_experts else model


def write_engine_folder(folder: Path, *, has_experts: bool = False) -> Path:
    """Config and processor of the tiny base with `<Reward>`; no weights."""
    processor = AutoProcessor.from_pretrained(TINY_BASE)
    processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    processor.save_pretrained(folder)
    tiny_model(has_experts=has_experts).config.save_pretrained(folder)
    return folder


def tiny_weights(*, has_experts: bool = False) -> Mapping[str, torch.Tensor]:
    """Trained weights under Hugging Face names, fp32."""
    return tiny_model(has_experts=has_experts).state_dict()


def changed_weights(*, has_experts: bool = False) -> dict[str, torch.Tensor]:
    """Weights that differ in every part of the model: vision tower, merger, text layers, embedding, output."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.3 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tiny_weights(has_experts=has_experts).items()
    }


def make_engine(
    folder: Path, name: str, device: torch.device = CPU, *, max_model_len: int = MAX_MODEL_LEN, **config: object
) -> RolloutEngine:
    """An engine without weights."""
    processor = AutoProcessor.from_pretrained(folder)
    return build_engine(
        folder,
        config=RolloutConfig(name=name, **config),
        max_model_len=max_model_len,
        forbidden_token_ids=forbidden_token_ids(processor, AutoConfig.from_pretrained(folder).text_config.vocab_size),
        eos_token_id=processor.tokenizer.eos_token_id,
        device=device,
    )


def make_prompts(folder: Path, num_pairs: int = 2, *, repetitions: int = 1) -> list[VideoPrompt]:
    """Two prompts a pair, of clips of different length and size. `repetitions`: of the text."""
    builder = SequenceBuilder(AutoProcessor.from_pretrained(folder))
    generator = torch.Generator().manual_seed(1)
    prompts = []
    for number in range(2 * num_pairs):
        num_frames, width = 4 + 2 * (number % 2), 64 + 32 * (number % 3)
        frames = VideoFrames(
            frames=torch.randint(0, 256, (num_frames, 3, 64, width), dtype=torch.uint8, generator=generator),
            source_fps=8.0,
            frame_indices=tuple(range(0, 4 * num_frames, 4)),
            total_frames=4 * num_frames,
        )
        problem = judge_problem(f"a red circle moves left, number {number} " * repetitions)
        prompts.append(builder.encode_prompt(VideoKey(number // 2, "AB"[number % 2]), problem, frames))
    return prompts


class Rescorer:
    """Stock transformers, one full unpadded sequence at a time: what log-probs have to be."""

    def __init__(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        processor = AutoProcessor.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        self.builder = SequenceBuilder(processor)
        self.eos_token_id = processor.tokenizer.eos_token_id
        self.forbidden = forbidden_token_ids(processor, config.text_config.vocab_size)
        self.model = AutoModelForImageTextToText.from_config(config).eval()
        self.model.load_state_dict(dict(weights))

    @torch.no_grad()
    def log_probs(self, prompt: VideoPrompt, response: Response, *, temperature: float = 1.0) -> torch.Tensor:
        """fp32 [num_labels] of the response's labels."""
        labels = [*response.cot_ids, self.eos_token_id][: response.num_labels]
        input_ids = torch.cat([prompt.input_ids, torch.tensor(response.cot_ids, dtype=torch.long)])[None]
        logits = self.model(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == self.builder.processor.video_token_id).int() * 2,
            pixel_values_videos=self.builder.pixel_values(prompt),
            video_grid_thw=torch.tensor([prompt.grid_thw]),
        ).logits[0, prompt.input_ids.numel() - 1 :]
        logits[:, self.forbidden] = -torch.inf
        log_probs = torch.log_softmax(logits / temperature, dim=-1)
        return log_probs[range(len(labels)), labels]


def ids_of(responses: Sequence[Sequence[Response]]) -> list[list[tuple[int, ...]]]:
    """Token ids of every response of every prompt."""
    return [[response.cot_ids for response in group] for group in responses]
