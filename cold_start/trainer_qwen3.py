"""Stage 1 training: Bradley-Terry and its relatives on pairs of scored sequences.

One optimizer step, as the algorithm: take the step's micro-batches; count the pairs that the loss uses over all ranks
and micro-batches; one packed forward per micro-batch for A and B together; its loss over that global count; backward;
check; step. The gradient therefore depends on the pairs alone, not on micro-batching, padding or the number of ranks.
"""

import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from arguments import DataArguments, TrainingArguments
from checkpoint import (
    STATE_FILE,
    LoadedReward,
    RewardConfig,
    load_reward_model,
    save_merged,
    save_reward_files,
    write_json,
)
from data import MicroBatchSampler, PairBatch, PairDataset, PairDraw, PairFailure
from descore.csv_table import NUM_PROBLEMS_SHOWN
from descore.progress import progress
from engine import NonFiniteError, gather_trained_weights, step_engine
from fingerprint import fingerprint_weights
from losses import PairMetrics, compute_pair_loss, compute_pair_sums
from recompute import ActivationPlan
from training_log import LogWindow, Schedule
from utils import (
    Tracker,
    all_reduce_sum,
    barrier,
    gather_objects,
    get_random_state,
    is_main_process,
    run_on_main_process,
    set_random_state,
)

logger = logging.getLogger(__name__)

MODEL_FIELDS = ("reward_token", "video", "format_prompt")
"""Of a reward_config.json: what a run may not change when it continues. Paths may."""
CHECKPOINT_PREFIX = "checkpoint-"
CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")
TEMPORARY_PREFIX = "tmp-checkpoint-"
DEEPSPEED_FOLDER = "deepspeed"
DEEPSPEED_TAG = "state"
FULL_MODEL_FOLDER = "full_model"


class RewardTrainer:
    """Trains the model inside a DeepSpeed engine.

    `reward`: the model being trained with its sequence builder and reward config. `train_data`, `eval_data`: datasets
    of pairs; without `eval_data` nothing is evaluated. `activations`: chooses which layers recompute theirs.
    """

    def __init__(
        self,
        engine,
        reward: LoadedReward,
        *,
        train_data: PairDataset,
        eval_data: PairDataset | None,
        arguments: TrainingArguments,
        data_arguments: DataArguments,
        schedule: Schedule,
        activations: ActivationPlan | None = None,
    ) -> None:
        self.engine = engine
        self.activations = activations
        self.reward = reward
        base = Path(reward.config.base_model)
        self.base_weights = fingerprint_weights(base) if base.is_dir() else str(base)
        self.train_data = train_data
        self.eval_data = eval_data
        self.arguments = arguments
        self.data_arguments = data_arguments
        self.schedule = schedule
        self.output_dir = Path(arguments.output_dir)
        self.global_step = 0
        self.log_history: list[dict] = []
        self.dropped: dict[PairDataset, set[PairFailure]] = {data: set() for data in (train_data, eval_data) if data}

    def train(self) -> None:
        """Run to the last step, logging, evaluating and saving on the way; the last step always saves."""
        schedule, window = self.schedule, LogWindow(self.engine.device)
        self.tracker = self._build_tracker()
        bar = progress(
            total=schedule.num_steps, initial=self.global_step, description="train", disable=not is_main_process()
        )
        for micro_batches in self._steps():
            num_pairs = self._count_contributing_pairs(micro_batches)
            sums = sum(self._forward_backward(batch, num_pairs, i) for i, batch in enumerate(micro_batches))
            sums = self._reduce_and_check(sums, micro_batches)
            grad_norm = step_engine(self.engine, step=self.global_step + 1)
            self.global_step += 1
            window.add(sums, num_pairs=num_pairs, grad_norm=grad_norm)
            bar.update()
            if self._is_due(schedule.logging_steps):
                bar.set_postfix(self._log(window.means() | self._learning_rates()), refresh=False)
            if self.eval_data is not None and self._is_due(schedule.eval_steps):
                self._log(self.evaluate())
            if self._is_due(schedule.save_steps):
                self.save_checkpoint()
            window.restart_clock()
        bar.close()
        self._report_dropped()
        self.tracker.close()

    def _build_tracker(self) -> Tracker:
        return Tracker(
            self.output_dir,
            report_to=self.arguments.report_to,
            run_name=self.arguments.run_name,
            config=dataclasses.asdict(self.arguments) | dataclasses.asdict(self.data_arguments),
            start_step=self.global_step,
        )

    def _steps(self) -> Iterator[list[PairBatch]]:
        """The micro-batches of this rank, one list per optimizer step, decoded ahead by worker processes."""
        arguments = self.arguments
        sampler = MicroBatchSampler(
            len(self.train_data),
            batch_size=arguments.per_device_train_batch_size,
            accumulation_steps=arguments.gradient_accumulation_steps,
            rank=self.engine.global_rank,
            world_size=self.engine.world_size,
            num_steps=self.schedule.num_steps,
            start_step=self.global_step,
            mask_probability=self.data_arguments.mask_probability,
            seed=arguments.seed,
        )
        batches = iter(self._loader(self.train_data, sampler))
        for _ in range(self.global_step, self.schedule.num_steps):
            yield [next(batches) for _ in range(arguments.gradient_accumulation_steps)]

    def _loader(self, data: PairDataset, batches) -> DataLoader:
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=data.collate,
            num_workers=self.data_arguments.dataloader_num_workers,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _count_contributing_pairs(self, micro_batches: list[PairBatch]) -> float:
        """Pairs that the loss uses in this step, over all ranks and micro-batches."""
        loss_type = self.arguments.loss_type
        count = sum(int(batch.labels.contributes(loss_type).sum()) for batch in micro_batches)
        return float(all_reduce_sum(torch.tensor([float(count)], device=self.engine.device)))

    def _forward_backward(self, batch: PairBatch, num_pairs: float, micro_step: int) -> torch.Tensor:
        """One packed forward and backward. Returns the local loss sum and pair sums, float64 [5]."""
        is_boundary = micro_step == self.arguments.gradient_accumulation_steps - 1
        loss_sum, pair_sums = self._compute_loss(batch)
        # DeepSpeed averages gradients over ranks; the global count already accounts for all of them.
        loss = loss_sum * self.engine.world_size / max(num_pairs, 1.0)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not is_boundary:
            self.engine.step()
        return torch.cat([loss_sum.detach().double().view(1), pair_sums.detach()])

    def _compute_loss(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        device, packed = self.engine.device, batch.packed
        labels = batch.labels.to(device)
        if self.activations is not None and torch.is_grad_enabled():
            self.activations.prepare(packed.input_ids.numel(), num_patches=len(packed.pixel_values))
        rewards = self.engine(packed.to(device))
        rewards_a = rewards[batch.a_sequences.to(device, non_blocking=True)]
        rewards_b = rewards[batch.b_sequences.to(device, non_blocking=True)]
        loss_sum = compute_pair_loss(rewards_a, rewards_b, labels, loss_type=self.arguments.loss_type)
        return loss_sum, compute_pair_sums(rewards_a.detach(), rewards_b.detach(), labels)

    def _reduce_and_check(self, sums: torch.Tensor, micro_batches: list[PairBatch]) -> torch.Tensor:
        """Sums over ranks. Raises on every rank, before the optimizer step: NonFiniteError, or ValueError when too
        many pairs were dropped."""
        num_dropped = self._note_dropped(self.train_data, micro_batches)
        totals = all_reduce_sum(torch.cat([sums, sums.new_tensor([num_dropped])]))
        sums, num_dropped = totals[:-1], totals[-1]
        if not bool(sums.isfinite().all()):
            raise NonFiniteError(f"loss is not finite at step {self.global_step + 1}; the last checkpoint is intact")
        if num_dropped:
            self._require_few_dropped(self.train_data, "training")
        return sums

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and pair metrics on the held-out pairs, with the CSV's CoTs (`eval/`) and with them masked."""
        was_training = self.engine.training
        self.engine.eval()
        metrics: dict[str, float] = {}
        for prefix, is_masked in (("eval", False), ("eval_masked", True)):
            sums, num_pairs = torch.zeros(5, dtype=torch.float64, device=self.engine.device), 0.0
            batches = self._loader(self.eval_data, self._eval_batches(is_masked))
            for batch in progress(batches, description=prefix, leave=False, disable=not is_main_process()):
                self._note_dropped(self.eval_data, [batch])
                loss_sum, pair_sums = self._compute_loss(batch)
                sums += torch.cat([loss_sum.double().view(1), pair_sums])
                num_pairs += int(batch.labels.contributes(self.arguments.loss_type).sum())
            totals = all_reduce_sum(torch.cat([sums, sums.new_tensor([num_pairs])])).tolist()
            metrics[f"{prefix}/loss"] = totals[0] / max(totals[5], 1.0)
            metrics |= {f"{prefix}/{name}": value for name, value in PairMetrics(*totals[1:5]).means().items()}
        self._require_few_dropped(self.eval_data, "held-out")
        self.engine.train(was_training)
        return metrics

    def _eval_batches(self, is_masked: bool) -> list[list[PairDraw]]:
        """This rank's share of the evaluation; every rank has the same number of batches, the last may be empty."""
        size, world = self.arguments.per_device_eval_batch_size, self.engine.world_size
        num_rounds = math.ceil(len(self.eval_data) / (size * world))
        starts = [(i * world + self.engine.global_rank) * size for i in range(num_rounds)]
        total = len(self.eval_data)
        return [[PairDraw(i, is_masked) for i in range(start, min(start + size, total))] for start in starts]

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N/` under a temporary name and rename it: it is complete or absent."""
        folder = self.output_dir / f"{CHECKPOINT_PREFIX}{self.global_step}"
        temporary = self.output_dir / f"{TEMPORARY_PREFIX}{self.global_step}"
        weights = gather_trained_weights(self.engine)

        def write() -> None:
            reward = self.reward
            save_reward_files(
                temporary,
                model=self.engine.module,
                weights=weights,
                processor=reward.builder.processor,
                config=reward.config,
            )
            write_json(temporary / STATE_FILE, self._state())
            if self.arguments.save_full_model:
                dtype = torch.bfloat16 if self.arguments.bf16 else torch.float32
                save_merged(temporary / FULL_MODEL_FOLDER, load_reward_model(temporary, dtype=dtype))

        run_on_main_process(write)
        if not self.arguments.save_only_model:
            folder_of_state = temporary / DEEPSPEED_FOLDER
            self.engine.save_checkpoint(
                str(folder_of_state), tag=DEEPSPEED_TAG, save_latest=False, exclude_frozen_parameters=True
            )
            torch.save(get_random_state(), folder_of_state / f"random_state_{self.engine.global_rank}.pt")
        barrier()
        if is_main_process():
            temporary.rename(folder)
            self._remove_old_checkpoints()
            logger.info("saved %s", folder)
        barrier()

    def resume(self, folder: Path) -> None:
        """Continue from `checkpoint-N/`: weights, optimizer, schedule, data order and random states."""
        if not (folder / DEEPSPEED_FOLDER).is_dir():
            raise ValueError(f"{folder} holds no optimizer state (--save_only_model?); it cannot be resumed from")
        state = json.loads((folder / STATE_FILE).read_text())
        self._require_same_model(folder, state)
        for name, value in self._identity().items():
            if state.get(name) != value:  # older versions did not record the ZeRO stage
                was = state.get(name, "not recorded")
                raise ValueError(f"cannot resume from {folder}: {name} was {was}, now it is {value}")
        state_folder = folder / DEEPSPEED_FOLDER
        loaded_from, _ = self.engine.load_checkpoint(str(state_folder), tag=DEEPSPEED_TAG, load_module_strict=False)
        if loaded_from is None:
            raise ValueError(
                f"{state_folder} holds no complete DeepSpeed state; remove {folder} and resume from the one before it"
            )
        random_state = state_folder / f"random_state_{self.engine.global_rank}.pt"
        set_random_state(torch.load(random_state, weights_only=True))
        self.global_step, self.log_history = state["global_step"], state["log_history"]
        logger.info("resumed from %s", folder)

    def _identity(self) -> dict:
        """What must be the same for a resumed run to equal an uninterrupted one."""
        return {
            "num_pairs": len(self.train_data),
            "data": self.train_data.fingerprint,
            "pairs_per_step": self.arguments.pairs_per_step(self.engine.world_size),
            "world_size": self.engine.world_size,
            "zero_stage": self.engine.zero_optimization_stage(),
            "seed": self.arguments.seed,
            "mask_probability": self.data_arguments.mask_probability,
            "loss_type": self.arguments.loss_type,
        }

    def _require_same_model(self, folder: Path, state: dict) -> None:
        """Raise ValueError where the run goes on from another model: checkpoints do not hold what is frozen."""
        before, now = RewardConfig.load(folder), self.reward.config
        changed = [name for name in MODEL_FIELDS if getattr(before, name) != getattr(now, name)]
        if state.get("base_weights", self.base_weights) != self.base_weights:  # older versions did not record them
            changed.append("weights of the base model")
        if changed:
            raise ValueError(
                f"cannot resume from {folder}: it was trained with another model ({', '.join(changed)}); set "
                f"--model_name_or_path back to {before.base_model}, and flags to what they were, or start anew in "
                "another --output_dir"
            )

    def _state(self) -> dict:
        return {
            "global_step": self.global_step,
            "epoch": self.global_step / self.schedule.steps_per_epoch,
            **self._identity(),
            "base_weights": self.base_weights,
            "log_history": self.log_history,
        }

    def _remove_old_checkpoints(self) -> None:
        limit = self.arguments.save_total_limit
        if limit is not None:
            for old in list_checkpoints(self.output_dir)[:-limit]:
                shutil.rmtree(old)

    def _is_due(self, interval: int) -> bool:
        return self.global_step % interval == 0 or self.global_step == self.schedule.num_steps

    def _learning_rates(self) -> dict[str, float]:
        return {f"lr/{group['name']}": group["lr"] for group in self.engine.basic_optimizer.param_groups}

    def _log(self, values: dict[str, float]) -> dict[str, str]:
        """Record scalars; returns the few that the progress bar shows."""
        epoch = self.global_step / self.schedule.steps_per_epoch
        values = {"epoch": round(epoch, 4), **values}
        self.log_history.append({"step": self.global_step, **values})
        self.tracker.log(values, step=self.global_step)
        if any(name.startswith("eval") for name in values):
            logger.info("step %d: %s", self.global_step, json.dumps({k: round(v, 4) for k, v in values.items()}))
        return {name.rsplit("/", 1)[-1]: f"{values[name]:.3f}" for name in ("loss", "accuracy") if name in values}

    def _note_dropped(self, data: PairDataset, batches: list[PairBatch]) -> int:
        """Warn once of each pair that could not be loaded; how many are new on this rank."""
        new = {failure for batch in batches for failure in batch.failures} - self.dropped[data]
        self.dropped[data] |= new
        for failure in sorted(new):
            logger.warning("pair of row %d dropped: %s", failure.row, failure.message)
        return len(new)

    def _require_few_dropped(self, data: PairDataset, name: str) -> None:
        """Raise ValueError, on every rank, when more than a stated share of the pairs was dropped. A collective."""
        self.dropped[data] = set().union(*gather_objects(self.dropped[data]))
        share = len({failure.row for failure in self.dropped[data]}) / len(data)
        if share > self.data_arguments.max_dropped_share:
            raise ValueError(
                f"{share:.1%} of the {name} pairs could not be loaded, more than --max_dropped_share "
                f"{self.data_arguments.max_dropped_share:g}; replace these files or raise it, then resume:\n"
                + describe_failures(self.dropped[data])
            )

    def _report_dropped(self) -> None:
        for data in self.dropped:
            failures = set().union(*gather_objects(self.dropped[data]))
            if failures and is_main_process():
                logger.warning("%d pair(s) were dropped:\n%s", len(failures), describe_failures(failures))


def describe_failures(failures: Collection[PairFailure]) -> str:
    """A line for each row, the first `NUM_PROBLEMS_SHOWN` of them."""
    lines = [f"  row {failure.row}: {failure.message}" for failure in sorted(failures)]
    more = len(lines) - NUM_PROBLEMS_SHOWN
    return "\n".join(lines[:NUM_PROBLEMS_SHOWN] + ([f"  ... and {more} more"] if more > 0 else []))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first; folders with other names than `checkpoint-N` are passed over."""
    found = {}
    for path in output_dir.glob(f"{CHECKPOINT_PREFIX}*"):
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and (path / STATE_FILE).is_file():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]
