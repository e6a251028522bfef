"""Which model scores and how: the flags that all scoring command lines share, and what they mean."""

import argparse
import logging
import sys
from dataclasses import dataclass, fields
from typing import get_args

from transformers.utils import logging as transformers_logging

from scoring.reward_model import RewardModel, choose_device
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
    """The settings of scoring, and flags that name the model."""
    add = parser.add_argument
    add("--model_ckpt", required=True, help="stage 1 checkpoint-N, stage 2 global_step_N, or a merged model")
    add("--rm_ckpt", help="rm_head.pth; default: the one beside the model")
    add("--normalize", action="store_true", help="give rewards on the scale that inference.py --calibrate kept")
    add_settings(parser, ScoringSettings)


def add_settings(parser: argparse.ArgumentParser, kind: type) -> None:
    """A flag for each field of a dataclass of `setting`s."""
    for field in fields(kind):
        parts = get_args(field.type) or (field.type,)
        if field.type is bool:
            options = {"action": "store_true"}
        elif isinstance(parts[0], str):
            options = {"choices": parts, "default": field.default}
        else:
            options = {"type": parts[0], "default": field.default}
        parser.add_argument("--" + field.name, help=field.metadata["help"], **options)


def build_source(options: argparse.Namespace) -> ModelSource:
    """The model that the flags name. Raises ValueError for invalid settings."""
    settings = ScoringSettings(**{field.name: getattr(options, field.name) for field in fields(ScoringSettings)})
    settings.require_device(choose_device())
    return ModelSource(options.model_ckpt, options.rm_ckpt, settings)


def configure_console() -> None:
    """Our own messages go to stderr, of libraries only warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("verl", "scoring", "serving"):
        logging.getLogger(name).setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
