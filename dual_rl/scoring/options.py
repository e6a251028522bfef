"""Which model scores and how: the flags that all scoring command lines share, and what they mean."""

import argparse
import logging
import sys
from dataclasses import dataclass

from transformers.utils import logging as transformers_logging

from scoring.reward_model import RewardModel
from scoring.types import ScoringSettings


@dataclass(frozen=True)
class ModelSource:
    """Arguments of `RewardModel.from_pretrained`."""

    model_ckpt: str
    rm_ckpt: str | None
    settings: ScoringSettings

    def load(self) -> RewardModel:
        """The model on this process's device."""
        return RewardModel.from_pretrained(self.model_ckpt, self.rm_ckpt, settings=self.settings)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags with the names and defaults of `ScoringSettings`, and those that name the model."""
    add, default = parser.add_argument, ScoringSettings()
    add("--model_ckpt", required=True, help="stage 1 checkpoint-N, stage 2 global_step_N, or a merged model")
    add("--rm_ckpt", help="rm_head.pth; default: the one beside the model")
    add("--batch_size", type=int, default=default.batch_size, help="videos in an engine at a time")
    add("--backend", choices=["vllm", "hf"], default=default.backend, help="hf: plain transformers")
    add("--max_prompt_length", type=int, help="tokens, the video's included; default: what the model takes")
    add("--max_new_tokens", type=int, default=default.max_new_tokens, help="tokens of the chain of thought")
    add("--repetition_penalty", type=float, default=default.repetition_penalty)
    add("--mask_cot", action="store_true", help="score without a chain of thought: <Reward> follows the prompt")
    add("--precision", choices=["auto", "bf16", "fp32"], default=default.precision, help="auto: bf16 on GPUs")
    add("--gpu_memory_utilization", type=float, default=default.gpu_memory_utilization)
    add("--kv_cache_gib", type=int, help="of vLLM; default: what gpu_memory_utilization leaves, 2 on a CPU")
    add("--enforce_eager", action="store_true", help="start faster, write slower")
    add("--num_threads", type=int, default=default.num_threads, help="that decode videos, per engine")
    add("--video_fps", type=float, help="default, like --max_pixels: as the model was trained")
    add("--max_pixels", type=int)
    add("--normalize", action="store_true", help="give rewards on the scale that inference.py --calibrate kept")


def build_source(options: argparse.Namespace) -> ModelSource:
    """The model that the flags name. Raises ValueError for invalid settings."""
    settings = ScoringSettings(**{name: getattr(options, name) for name in ScoringSettings.__dataclass_fields__})
    return ModelSource(options.model_ckpt, options.rm_ckpt, settings)


def configure_console() -> None:
    """Our own messages go to stderr, of libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("verl", "scoring", "serving"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
