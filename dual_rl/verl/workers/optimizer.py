"""AdamW over fp32 masters and its learning-rate schedule, a pure function of the step."""

import math
from collections import defaultdict

import torch

from verl.config import OptimConfig
from verl.model.policy import PolicyModel


def build_optimizer(model: PolicyModel, settings: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what the model trains, groups of the model before those of the head.

    Vectors are not decayed, and the head group may have its own learning rate.
    """
    replicated = {id(parameter) for parameter in model.replicated_parameters()}
    head_lr = settings.lr if settings.head_lr is None else settings.head_lr
    parameters: dict[tuple[bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameters[id(parameter) in replicated, parameter.ndim > 1].append(parameter)
    groups = [
        {
            "params": parameters[is_head, is_decayed],
            "base_lr": head_lr if is_head else settings.lr,
            "weight_decay": settings.weight_decay if is_decayed else 0.0,
        }
        for is_head, is_decayed in sorted(parameters)
    ]
    # Head (plain tensors) and body (sharded ones) cannot share one multi-tensor kernel, but they are separate groups.
    # Fused, a step needs no memory beside the state; multi-tensor kernels need several times the largest group.
    is_on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    kernel = {"fused": True} if is_on_gpu else {"foreach": True}
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, **kernel)


def learning_rate_factor(step: int, settings: OptimConfig, *, total_steps: int) -> float:
    """Share of the full learning rate in step `step` (from 1) of `total_steps`."""
    warmup = math.ceil(settings.lr_warmup_ratio * total_steps)
    if step <= warmup:
        return step / (warmup + 1)
    if settings.lr_scheduler_type == "constant":
        return 1.0
    progress = (step - warmup) / max(total_steps - warmup, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine
