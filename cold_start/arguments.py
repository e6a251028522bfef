"""The settings of stage 1 as command-line flags (`python train_reward.py --help`). Unknown flags are errors."""

import os
from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from losses import LossType

RewardTokenMode = Literal["special", "last", "mean"]


@dataclass
class ModelArguments:
    """The model, and which of its weights are trained."""

    model_name_or_path: str = HfArg(default="Qwen/Qwen3-VL-8B-Instruct", help="any Qwen3-VL: a folder or a hub name")
    reward_token: RewardTokenMode = HfArg(  # noqa: RUF009
        default="special", help="read the reward at <Reward>, at the last token, or as the mean over the sequence"
    )
    lora_enable: bool = HfArg(default=True, help="train the language model with LoRA; False trains all of its weights")
    lora_r: int = HfArg(default=64, help="LoRA rank")
    lora_alpha: int = HfArg(default=128, help="LoRA alpha")
    lora_dropout: float = HfArg(default=0.0, help="LoRA dropout")
    freeze_llm: bool = HfArg(default=False, help="freeze the language model: no LoRA, no tuning")
    freeze_vision_tower: bool = HfArg(default=False, help="freeze the vision tower")
    tune_merger: bool = HfArg(default=True, help="train the vision-language mergers")
    vision_lora: bool = HfArg(default=False, help="train a frozen vision tower with LoRA")
    gradient_checkpointing: bool = HfArg(default=True, help="recompute activations that do not fit into memory")
    max_kept_layers: int | None = HfArg(
        default=None, help="most layers that may keep activations on a GPU; default: as many as fit, 0: least memory"
    )
    torch_compile: bool = HfArg(default=True, help="compile the layers on GPUs; the first step takes a minute or two")

    def validate(self) -> None:
        """Raise ValueError for values out of range and for settings that contradict each other."""
        if self.vision_lora and not self.freeze_vision_tower:
            raise ValueError("--vision_lora True adapts a frozen tower. Add --freeze_vision_tower True.")
        if self.vision_lora and not self.uses_lora:
            raise ValueError("--vision_lora True needs LoRA. Use --lora_enable True and --freeze_llm False.")
        _require_at_least(self, 1, "lora_r", "lora_alpha")
        _require_at_least(self, 0, "max_kept_layers")

    @property
    def uses_lora(self) -> bool:
        return self.lora_enable and not self.freeze_llm


@dataclass
class DataArguments:
    """The training and evaluation data."""

    meta_data: str = HfArg(default="datasets/train/example.csv", help="training CSV")
    meta_data_test: str | None = HfArg(default=None, help="held-out CSV for evaluation")
    eval_dim: list[str] = HfArg(  # noqa: RUF009
        default_factory=lambda: ["GSB"],
        help="label columns, a reward for each; scores are read from MOS_A_<dim> and MOS_B_<dim>",
    )
    format_prompt: str | None = HfArg(
        default=None, help="Jinja file that wraps each problem (variable `content`); default: the checkpoint's"
    )
    fps: float | None = HfArg(default=None, help="sampled frames per second; default: the checkpoint's, or 2")
    min_frames: int | None = HfArg(default=None, help="fewest frames per clip; default: the checkpoint's, or 4")
    min_frame_pixels: int | None = HfArg(default=None, help="fewest pixels per frame; default likewise, or 4096")
    max_frame_pixels: int | None = HfArg(default=None, help="most pixels per frame; default likewise, or 200704")
    max_length: int = HfArg(default=8192, help="most tokens per sequence (prompt, video, CoT); longer rows are errors")
    enable_drop: bool = HfArg(default=True, help="mask the CoTs of a pair at random during training")
    drop_prob: float = HfArg(default=0.5, help="probability of masking")
    max_dropped_share: float = HfArg(default=0.01, help="share of pairs that may be dropped: videos do not decode")
    dataloader_num_workers: int = HfArg(default=2, help="processes that decode videos ahead of training")

    def validate(self) -> None:
        """Raise ValueError for values out of range."""
        for name in ("drop_prob", "max_dropped_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"--{name} must be between 0 and 1, not {getattr(self, name)}")
        if self.format_prompt is not None and not os.path.isfile(self.format_prompt):
            raise ValueError(f"--format_prompt {self.format_prompt}: file not found")
        if len(set(self.eval_dim)) < len(self.eval_dim):
            raise ValueError(f"--eval_dim {' '.join(self.eval_dim)} names a column twice")
        _require_at_least(self, 1, "max_length")

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names for the rows of the head; none if it has one."""
        return tuple(self.eval_dim) if len(self.eval_dim) > 1 else ()

    @property
    def video_budget(self) -> dict[str, float | None]:
        """Fields of VideoBudget; None where the checkpoint decides."""
        pixels = {"min_pixels": self.min_frame_pixels, "max_pixels": self.max_frame_pixels}
        return {"fps": self.fps, "min_frames": self.min_frames, **pixels}

    @property
    def mask_probability(self) -> float:
        """Probability that training masks the CoTs of a pair."""
        return self.drop_prob if self.enable_drop else 0.0


@dataclass
class TrainingArguments:
    """Loss, optimizer, schedule and output."""

    output_dir: str = HfArg(default="output", help="folder of the checkpoint-N/ folders and logs")
    loss_type: LossType = HfArg(default="bt", help="loss on the rewards of a pair")  # noqa: RUF009
    num_train_epochs: float = HfArg(default=4.0, help="passes over the training CSV")
    max_steps: int = HfArg(default=-1, help="stop after this many optimizer steps; -1: no limit")
    per_device_train_batch_size: int = HfArg(default=1, help="pairs per forward pass")
    gradient_accumulation_steps: int = HfArg(default=4, help="forward passes per optimizer step")
    per_device_eval_batch_size: int = HfArg(default=4, help="pairs per forward pass of the evaluation")
    learning_rate: float = HfArg(default=2e-6, help="learning rate of everything without one of its own below")
    merger_lr: float | None = HfArg(default=None, help="learning rate of the mergers; default: --learning_rate")
    vision_lr: float | None = HfArg(default=None, help="learning rate of the vision tower; default: --learning_rate")
    special_token_lr: float | None = HfArg(default=None, help="of the <Reward> row; default: --learning_rate")
    rm_head_lr: float | None = HfArg(default=None, help="of the reward head; default: --learning_rate")
    weight_decay: float = HfArg(default=0.0, help="AdamW weight decay of matrices")
    lr_scheduler_type: str = HfArg(default="constant_with_warmup", help="any scheduler name of transformers")
    warmup_ratio: float = HfArg(default=0.05, help="fraction of the steps that warm up the learning rate")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping over all trained weights together")
    bf16: bool = HfArg(default=True, help="frozen weights and matrix products in bf16, trained weights in fp32")
    deepspeed: str = HfArg(default="ds_config/zero2.json", help="DeepSpeed configuration")
    logging_epochs: float = HfArg(default=0.01, help="log every this fraction of an epoch")
    eval_epochs: float = HfArg(default=0.25, help="evaluate every this fraction of an epoch")
    save_epochs: float = HfArg(default=0.5, help="save every this fraction of an epoch")
    save_total_limit: int | None = HfArg(default=None, help="keep only this many of the newest checkpoints")
    save_only_model: bool = HfArg(default=False, help="leave out the optimizer state: training cannot resume")
    save_full_model: bool = HfArg(default=False, help="also write a merged Hugging Face model into each checkpoint")
    resume_from_checkpoint: str | None = HfArg(default=None, help="a checkpoint-N folder, or `latest` in --output_dir")
    report_to: Literal["tensorboard", "wandb", "none"] = HfArg(default="tensorboard", help="where curves are logged")
    run_name: str | None = HfArg(default=None, help="name of the run in wandb")
    seed: int = HfArg(default=42, help="seed of data order, CoT masking and initialisation")
    local_rank: int = HfArg(default=-1, help="set by the DeepSpeed launcher")

    def validate(self) -> None:
        """Raise ValueError for values out of range."""
        batch_sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        _require_at_least(self, 1, *batch_sizes, "save_total_limit")
        for name in ("num_train_epochs", "logging_epochs", "eval_epochs", "save_epochs", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, not {getattr(self, name)}")

    def pairs_per_step(self, world_size: int) -> int:
        """Pairs per optimizer step over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate per part of the model; parts without one of their own follow `learning_rate`."""
        own = {
            "base": self.learning_rate,
            "merger": self.merger_lr,
            "vision": self.vision_lr,
            "token": self.special_token_lr,
            "head": self.rm_head_lr,
        }
        return {part: self.learning_rate if rate is None else rate for part, rate in own.items()}


def _require_at_least(arguments: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
