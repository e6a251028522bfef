"""DeepSpeed around the reward model: configuration, optimizer, safe steps, whole weights out of partitioned ones."""

import json
import math
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import get_scheduler

from arguments import ModelArguments, TrainingArguments
from model_qwen3 import RewardModel, parameter_groups
from recompute import ActivationPlan

PRECISIONS = ("bf16", "fp16", "torch_autocast")
BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SET_BY_FLAGS = {
    **dict.fromkeys(PRECISIONS, "precision is set with --bf16 True or False"),
    **dict.fromkeys(("optimizer", "scheduler"), "it is set with the learning rate flags"),
    **dict.fromkeys((*BATCH_SIZES, "gradient_clipping"), "it is set with the training flags"),
}
"""Keys of a DeepSpeed configuration that flags decide."""
SHARED_MEMORY_OP = "deepspeed_shm_comm"
ZERO_OF_WEIGHTS = 3
"""The ZeRO stage that partitions weights too."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; the message names the step. The weights are those of the step before."""


def init_distributed() -> None:
    """Join the process group. On CPUs, keep DeepSpeed from compiling an all-reduce that only its inference uses."""
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    deepspeed.init_distributed(verbose=False)


def read_deepspeed_config(path: str, arguments: TrainingArguments) -> dict:
    """The user's JSON with batch sizes and clipping filled in. Raises ValueError for keys that flags decide."""
    if not Path(path).is_file():
        raise ValueError(f"--deepspeed {path}: no such file")
    config = json.loads(Path(path).read_text())
    for name, reason in SET_BY_FLAGS.items():
        value = config.pop(name, "auto")
        if isinstance(value, dict):  # DeepSpeed's precisions are off unless they say enabled
            value = value.get("enabled", name not in PRECISIONS)
        if value is not False and value != "auto":
            raise ValueError(f"{path}: remove {name!r}; {reason}")
    config["train_micro_batch_size_per_gpu"] = arguments.per_device_train_batch_size
    config["gradient_accumulation_steps"] = arguments.gradient_accumulation_steps
    config["gradient_clipping"] = arguments.max_grad_norm
    if get_accelerator().device_name() == "cpu":
        config.get("zero_optimization", {})["overlap_comm"] = False  # streams exist on accelerators only
    return config


def build_engine(model: RewardModel, arguments: TrainingArguments, *, num_steps: int):
    """Wrap the model in a DeepSpeed engine with AdamW, one learning rate per part, and a schedule over `num_steps`."""
    device = torch.device(get_accelerator().current_device_name())
    model.to(device)
    groups = parameter_groups(model, arguments.learning_rates, weight_decay=arguments.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, fused=device.type == "cuda")
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(arguments.warmup_ratio * num_steps),
        num_training_steps=num_steps,
    )
    config = read_deepspeed_config(arguments.deepspeed, arguments)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def compile_and_plan_activations(engine, arguments: ModelArguments) -> ActivationPlan | None:
    """On a GPU, compile the layers and plan which of them recompute their activations; None where all do, or none.

    Not with ZeRO-3, whose weights come and go within a layer, and whose ranks must recompute alike.
    """
    model = engine.module
    if engine.device.type != "cuda" or engine.zero_optimization_stage() == ZERO_OF_WEIGHTS:
        return None
    if arguments.torch_compile:
        model.compile_layers()
    if not arguments.gradient_checkpointing:
        return None
    trained = [parameter for _, parameter in model.trainable_parameters()]
    blocks = model.qwen.visual.blocks
    return ActivationPlan(
        model.text_layers, trained, engine.device, max_kept=arguments.max_kept_layers, vision_blocks=blocks
    )


def step_engine(engine, *, step: int) -> float:
    """Optimizer step at the accumulation boundary; returns the gradient norm before clipping.

    Raises NonFiniteError before any weight changes. ZeRO checks the norm itself and then skips the update; without
    ZeRO it is checked here.
    """
    has_zero = engine.zero_optimization()
    if has_zero:
        engine.step()
        norm = float(engine.get_global_grad_norm())
    else:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm) or norm < 0:
        raise NonFiniteError(f"gradient norm is not finite at step {step}; lower the learning rate or check its data")
    if not has_zero:
        engine.step()
    return norm


def gather_trained_weights(engine) -> dict[str, torch.Tensor]:
    """Trained parameters by name, whole, on the CPU; filled on rank 0 only. A collective: call it on every rank."""
    names, parameters = zip(*engine.module.trainable_parameters(), strict=True)
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        if engine.global_rank != 0:
            return {}
        return {name: p.detach().cpu().clone() for name, p in zip(names, parameters, strict=True)}
