"""Sharded state for resuming: what is trained, and the optimizer's moments, on any number of ranks.

Written with torch's distributed checkpoint, which re-shards on reading. Frozen weights are not in it: they come from
the model that training started from. All randomness of a step depends on its number, so no generator is stored.
"""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from verl.model.policy import PolicyModel

STATE_FOLDER = "state"
GROUP_SETTINGS = ("lr", "base_lr", "weight_decay", "betas")  # the run's, which may differ from the saved one's
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_training_state(folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer) -> None:
    """Write trained weights and optimizer state under `folder`; every rank takes part."""
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(folder / STATE_FOLDER))


def load_training_state(folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer) -> None:
    """Restore what `save_training_state` wrote, in place; every rank takes part.

    Learning rates, betas and weight decay stay those of `optimizer`, not of the saved run.
    Raises ValueError when the folder holds the state of another setup.
    """
    path = folder / STATE_FOLDER
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    state = {"model": weights, "optimizer": moments}
    try:
        dcp.load(state, checkpoint_id=str(path))
    except dcp.api.CheckpointException as error:
        raise ValueError(
            f"{path} does not fit this run (other model, LoRA rank or frozen parts?): {str(error).splitlines()[0]}"
        ) from error
    own = [{name: group[name] for name in GROUP_SETTINGS} for group in optimizer.param_groups]
    loaded = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **loaded, options=OPTIONS)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
