"""The output folder of a run: one run at a time in it, its checkpoints, and resuming from them."""

import json
import logging
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from arguments import DataArguments, TrainingArguments
from checkpoint import (
    STATE_FILE,
    LoadedReward,
    RewardConfig,
    fingerprint_weights,
    load_reward_model,
    save_merged,
    save_reward_files,
    write_json,
)
from data import PairDataset
from descore.run_lock import lock_folder
from engine import gather_trained_weights
from utils import run_on_main_process

logger = logging.getLogger(__name__)

LATEST = "latest"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
TEMPORARY_PREFIX = "tmp-checkpoint-"
DEEPSPEED_FOLDER, DEEPSPEED_TAG = "deepspeed", "state"
FULL_MODEL_FOLDER = "full_model"
CONFIG_FIELDS = ("reward_token", "video", "format_prompt", "dimensions")
"""Fields of `reward_config.json` that a resumed run must share. Paths may change."""


def take_over(output_dir: str) -> None:
    """Lock the output folder for this run; remove what a killed run left. Raises ValueError if it is in use."""

    def lock_and_clean() -> None:
        lock_folder(output_dir)
        for unfinished in Path(output_dir).glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(unfinished)

    run_on_main_process(lock_and_clean)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete `checkpoint-N` folders, oldest first."""
    matches = [
        (CHECKPOINT_NAME.fullmatch(path.parent.name), path.parent) for path in output_dir.glob(f"*/{STATE_FILE}")
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def find_resume(arguments: TrainingArguments) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises ValueError rather than mix two runs in one folder: for a fresh start in a folder with checkpoints, and for
    resuming from any checkpoint but the last.
    """
    output_dir, wanted = Path(arguments.output_dir), arguments.resume_from_checkpoint
    existing = list_checkpoints(output_dir)
    if wanted is None:
        if existing:
            raise ValueError(
                f"{output_dir} already holds {existing[-1].name}. Resume it with --resume_from_checkpoint {LATEST}, "
                "or choose another --output_dir."
            )
        return None
    if wanted == LATEST:
        if not existing:
            logger.info("no checkpoint in %s yet, starting from the beginning", output_dir)
        return existing[-1] if existing else None
    checkpoint = Path(wanted)
    if not (checkpoint / STATE_FILE).is_file():
        raise ValueError(f"--resume_from_checkpoint {wanted} is not a checkpoint-N folder with {STATE_FILE} in it.")
    paths = [path.resolve() for path in existing]
    is_here = checkpoint.resolve() in paths
    others = existing[paths.index(checkpoint.resolve()) + 1 :] if is_here else existing
    if others:
        names = ", ".join(path.name for path in others)
        raise ValueError(
            f"{output_dir} already holds {names}, which --resume_from_checkpoint {wanted} would mix with another run. "
            f"Remove {names}, or choose another --output_dir (OUTPUT_DIR)."
        )
    return checkpoint


class RunCheckpoints:
    """Writes and resumes the checkpoints of one run.

    `engine`: the DeepSpeed engine. `reward`: the model inside it with its sequence builder and config.
    """

    def __init__(
        self,
        engine,
        reward: LoadedReward,
        *,
        arguments: TrainingArguments,
        data_arguments: DataArguments,
        train_data: PairDataset,
    ) -> None:
        self.engine = engine
        self.reward = reward
        self.arguments = arguments
        self.output_dir = Path(arguments.output_dir)
        base = Path(reward.config.base_model)
        # A resumed run equals an uninterrupted one only if all of this is the same. The base's weights are part of it
        # because checkpoints hold no frozen weights.
        self.identity = {
            "num_pairs": len(train_data),
            "data": train_data.fingerprint,
            "pairs_per_step": arguments.pairs_per_step(engine.world_size),
            "world_size": engine.world_size,
            "zero_stage": engine.zero_optimization_stage(),
            "seed": arguments.seed,
            "mask_probability": data_arguments.mask_probability,
            "loss_type": arguments.loss_type,
            "base_weights": fingerprint_weights(base) if base.is_dir() else str(base),
        }

    def save(self, step: int, *, epoch: float, log_history: list[dict]) -> None:
        """Write `checkpoint-N/` under a temporary name, then rename it: it is complete or absent. A collective."""
        folder = self.output_dir / f"checkpoint-{step}"
        temporary = self.output_dir / f"{TEMPORARY_PREFIX}{step}"
        weights = gather_trained_weights(self.engine)
        state = {"global_step": step, "epoch": epoch, **self.identity, "log_history": log_history}

        def write() -> None:
            model, processor = self.engine.module, self.reward.builder.processor
            save_reward_files(temporary, model=model, weights=weights, processor=processor, config=self.reward.config)
            write_json(temporary / STATE_FILE, state)
            if self.arguments.save_full_model:
                dtype = torch.bfloat16 if self.arguments.bf16 else torch.float32
                save_merged(temporary / FULL_MODEL_FOLDER, load_reward_model(temporary, dtype=dtype))

        run_on_main_process(write)
        if not self.arguments.save_only_model:
            state_folder = temporary / DEEPSPEED_FOLDER
            options = {"tag": DEEPSPEED_TAG, "save_latest": False, "exclude_frozen_parameters": True}
            self.engine.save_checkpoint(str(state_folder), **options)
            cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
            torch.save({"cpu": torch.get_rng_state(), **cuda}, state_folder / self._random_state_name)
        dist.barrier()
        if self.engine.global_rank == 0:
            temporary.rename(folder)
            limit = self.arguments.save_total_limit
            for old in list_checkpoints(self.output_dir)[:-limit] if limit else ():
                shutil.rmtree(old)
            logger.info("saved %s", folder)
        dist.barrier()

    def resume(self, folder: Path) -> tuple[int, list[dict]]:
        """Load weights, optimizer, schedule and random states of `checkpoint-N/`; returns its step and log history.

        Raises ValueError if the checkpoint belongs to another run or holds no optimizer state.
        """
        state_folder = folder / DEEPSPEED_FOLDER
        if not state_folder.is_dir():
            raise ValueError(
                f"{folder} holds no optimizer state, as --save_only_model asks for. Training cannot resume from it."
            )
        state = json.loads((folder / STATE_FILE).read_text())
        self._require_same_run(folder, state)
        loaded_from, _ = self.engine.load_checkpoint(str(state_folder), tag=DEEPSPEED_TAG, load_module_strict=False)
        if loaded_from is None:
            raise ValueError(
                f"{state_folder} holds no complete DeepSpeed state. Remove {folder} and resume from the one before it."
            )
        random_state = torch.load(state_folder / self._random_state_name, weights_only=True)
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_state["cuda"])
        logger.info("resumed from %s", folder)
        return state["global_step"], state["log_history"]

    def _require_same_run(self, folder: Path, state: dict) -> None:
        config, mine = RewardConfig.load(folder), self.reward.config
        was = {name: state.get(name, "not recorded") for name in self.identity}
        was["base_weights"] = state.get("base_weights", self.identity["base_weights"])  # older versions lack it
        was |= {name: getattr(config, name) for name in CONFIG_FIELDS}
        now = self.identity | {name: getattr(mine, name) for name in CONFIG_FIELDS}
        changed = "; ".join(
            "format_prompt is another" if name == "format_prompt" else f"{name} was {was[name]}, now it is {now[name]}"
            for name in now
            if was[name] != now[name]
        )
        if changed:
            raise ValueError(
                f"cannot resume from {folder}: {changed}. Use the data, the flags and the base model "
                f"({config.base_model}) of that run, or start a new one in another --output_dir."
            )

    @property
    def _random_state_name(self) -> str:
        return f"random_state_{self.engine.global_rank}.pt"
