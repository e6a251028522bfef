"""The settings of stage 1 as command-line flags (`python train_reward.py --help`). Unknown flags are errors."""

import os
from dataclasses import dataclass, field
from typing import Literal

from losses import AGREEMENT_LOSSES, SCORE_LOSSES, LossType

RewardTokenMode = Literal["special", "last", "mean"]


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(
        default="Qwen/Qwen3-VL-8B-Instruct", metadata={"help": "any Qwen3-VL checkpoint: a folder or a hub name"}
    )
    reward_token: RewardTokenMode = field(
        default="special",
        metadata={"help": "where the reward is read: at <Reward>, at the last token, or as mean over the sequence"},
    )
    lora_enable: bool = field(
        default=True, metadata={"help": "adapt the language model with LoRA; False tunes all its weights"}
    )
    lora_r: int = field(default=64, metadata={"help": "LoRA rank"})
    lora_alpha: int = field(default=128, metadata={"help": "LoRA alpha"})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    freeze_llm: bool = field(default=False, metadata={"help": "leave the language model as it is: no LoRA, no tuning"})
    freeze_vision_tower: bool = field(default=False, metadata={"help": "leave the vision tower as it is"})
    tune_merger: bool = field(default=True, metadata={"help": "tune the vision-language mergers"})
    vision_lora: bool = field(
        default=False, metadata={"help": "adapt the vision tower with LoRA instead of tuning it"}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "recompute the activations that do not fit into the device's memory"}
    )
    max_kept_layers: int | None = field(
        default=None,
        metadata={"help": "most layers that keep activations on a GPU; default: as many as fit, 0: least memory"},
    )
    torch_compile: bool = field(
        default=True, metadata={"help": "fuse layers on GPUs; the first step takes a minute or two longer"}
    )

    def validate(self) -> None:
        """Raise ValueError on settings that contradict each other."""
        if self.vision_lora and not self.freeze_vision_tower:
            raise ValueError("--vision_lora True adapts a frozen tower: add --freeze_vision_tower True")
        if self.vision_lora and not self.uses_lora:
            raise ValueError("--vision_lora True needs LoRA: use --lora_enable True and --freeze_llm False")
        if self.lora_r <= 0 or self.lora_alpha <= 0:
            raise ValueError(f"--lora_r and --lora_alpha must be positive, not {self.lora_r} and {self.lora_alpha}")
        if self.max_kept_layers is not None and self.max_kept_layers < 0:
            raise ValueError(f"--max_kept_layers must not be negative, not {self.max_kept_layers}")

    @property
    def uses_lora(self) -> bool:
        return self.lora_enable and not self.freeze_llm


@dataclass
class DataArguments:
    """What it is trained on."""

    meta_data: str = field(default="datasets/train/example.csv", metadata={"help": "training CSV"})
    meta_data_test: str | None = field(default=None, metadata={"help": "held-out CSV for evaluation"})
    eval_dim: str = field(
        default="GSB", metadata={"help": "label column; opinion scores are read from MOS_A_<dim> and MOS_B_<dim>"}
    )
    format_prompt: str | None = field(
        default=None,
        metadata={"help": "Jinja file with the variable `content` around each problem; default: the checkpoint's"},
    )
    fps: float | None = field(
        default=None, metadata={"help": "sampled frames per second; default: the checkpoint's budget, or 2"}
    )
    min_frames: int | None = field(
        default=None, metadata={"help": "fewest frames of a clip; default: the checkpoint's budget, or 4"}
    )
    min_frame_pixels: int | None = field(
        default=None, metadata={"help": "fewest pixels of a frame; default: the checkpoint's budget, or 4096"}
    )
    max_frame_pixels: int | None = field(
        default=None, metadata={"help": "most pixels of a frame; default: the checkpoint's budget, or 200704"}
    )
    max_length: int = field(
        default=8192, metadata={"help": "most tokens of one sequence (prompt, video, CoT); longer rows are errors"}
    )
    enable_drop: bool = field(default=True, metadata={"help": "mask the CoT of a pair at random in training"})
    drop_prob: float = field(default=0.5, metadata={"help": "probability of masking"})
    max_dropped_share: float = field(
        default=0.01,
        metadata={"help": "share of a CSV's pairs that may be dropped when their videos stop decoding"},
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "processes that decode videos ahead of training"})

    def validate(self) -> None:
        """Raise ValueError on values outside their range."""
        if not 0.0 <= self.drop_prob <= 1.0:
            raise ValueError(f"--drop_prob is a probability, not {self.drop_prob}")
        if not 0.0 <= self.max_dropped_share <= 1.0:
            raise ValueError(f"--max_dropped_share is a share from 0 to 1, not {self.max_dropped_share}")
        if self.format_prompt is not None and not os.path.isfile(self.format_prompt):
            raise ValueError(f"--format_prompt {self.format_prompt}: no such file")
        if self.max_length < 1:
            raise ValueError(f"--max_length must be positive, not {self.max_length}")

    @property
    def mask_probability(self) -> float:
        """Probability that training masks a pair's CoT."""
        return self.drop_prob if self.enable_drop else 0.0


@dataclass
class TrainingArguments:
    """How it is trained."""

    output_dir: str = field(default="output", metadata={"help": "where checkpoint-N/ folders and logs go"})
    loss_type: LossType = field(default="bt", metadata={"help": "loss on the rewards of a pair"})
    num_train_epochs: float = field(default=4.0, metadata={"help": "passes over the training CSV"})
    max_steps: int = field(default=-1, metadata={"help": "stop after this many optimizer steps; -1: no limit"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "pairs in one forward pass"})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "forward passes per optimizer step"})
    per_device_eval_batch_size: int = field(
        default=4, metadata={"help": "pairs in one forward pass of the evaluation"}
    )
    learning_rate: float = field(
        default=2e-6, metadata={"help": "learning rate of whatever has none of its own below"}
    )
    merger_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the mergers; default: --learning_rate"}
    )
    vision_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the vision tower; default: --learning_rate"}
    )
    special_token_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the <Reward> row; default: --learning_rate"}
    )
    rm_head_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the reward head; default: --learning_rate"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay of matrices"})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "any scheduler name of transformers"}
    )
    warmup_ratio: float = field(default=0.05, metadata={"help": "share of the steps with rising learning rate"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping over all trained weights together"})
    bf16: bool = field(
        default=True,
        metadata={"help": "frozen weights and matrix products in bf16, trained weights in fp32; False: all fp32"},
    )
    deepspeed: str = field(default="ds_config/zero2.json", metadata={"help": "DeepSpeed configuration"})
    logging_epochs: float = field(default=0.01, metadata={"help": "log every this fraction of an epoch"})
    eval_epochs: float = field(default=0.25, metadata={"help": "evaluate every this fraction of an epoch"})
    save_epochs: float = field(default=0.5, metadata={"help": "save every this fraction of an epoch"})
    save_total_limit: int | None = field(default=None, metadata={"help": "keep only this many newest checkpoints"})
    save_only_model: bool = field(
        default=False, metadata={"help": "leave out optimizer state: smaller, but training cannot resume"}
    )
    save_full_model: bool = field(
        default=False, metadata={"help": "also write a merged Hugging Face model into each checkpoint"}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint-N folder, or `latest` in --output_dir"}
    )
    report_to: Literal["tensorboard", "wandb", "none"] = field(
        default="tensorboard", metadata={"help": "where curves go"}
    )
    run_name: str | None = field(default=None, metadata={"help": "name of the run in wandb"})
    seed: int = field(default=42, metadata={"help": "seed of data order, CoT masking and initialisation"})
    local_rank: int = field(default=-1, metadata={"help": "set by the DeepSpeed launcher"})

    def validate(self) -> None:
        """Raise ValueError on values outside their range."""
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise ValueError(f"--save_total_limit must be at least 1, not {self.save_total_limit}")
        for name in ("num_train_epochs", "logging_epochs", "eval_epochs", "save_epochs", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive, not {getattr(self, name)}")

    def pairs_per_step(self, world_size: int) -> int:
        """Pairs of one optimizer step over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each part of the model; those that are not set follow `learning_rate`."""
        own = {
            "merger": self.merger_lr,
            "vision": self.vision_lr,
            "token": self.special_token_lr,
            "head": self.rm_head_lr,
        }
        base = {"base": self.learning_rate}
        return base | {part: self.learning_rate if rate is None else rate for part, rate in own.items()}

    @property
    def needs_scores(self) -> bool:
        return self.loss_type in SCORE_LOSSES

    @property
    def needs_agreeing_scores(self) -> bool:
        return self.loss_type in AGREEMENT_LOSSES


def validate_all(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    """All checks that need no file and no device. Raises ValueError."""
    for arguments in (model, data, training):
        arguments.validate()
