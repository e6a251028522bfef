"""Stage 1 training: Bradley-Terry and its relatives on pairs of scored sequences.

One optimizer step: take the step's micro-batches; count the pairs that the loss uses over all ranks and micro-batches;
one packed forward per micro-batch for A and B together; its loss over that global count; backward; check; step. The
gradient therefore depends on the pairs alone, not on micro-batching, padding or the number of ranks.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from arguments import DataArguments, TrainingArguments
from data import MicroBatchSampler, PairBatch, PairDataset, PairDraw, PairFailure
from descore.csv_table import list_problems
from descore.progress import progress
from engine import NonFiniteError, step_engine
from losses import compute_means, compute_pair_loss, compute_pair_sums
from recompute import ActivationPlan
from run_folder import RunCheckpoints
from training_log import LogWindow, Schedule, Tracker

logger = logging.getLogger(__name__)


class RewardTrainer:
    """Trains the model inside a DeepSpeed engine.

    `train_data`, `eval_data`: datasets of pairs; without `eval_data` nothing is evaluated. `checkpoints`: writes and
    resumes them. `activations`: chooses which layers recompute theirs; None leaves all of them as they are.
    """

    def __init__(
        self,
        engine,
        *,
        train_data: PairDataset,
        eval_data: PairDataset | None,
        arguments: TrainingArguments,
        data_arguments: DataArguments,
        schedule: Schedule,
        checkpoints: RunCheckpoints,
        activations: ActivationPlan | None = None,
    ) -> None:
        self.engine = engine
        self.train_data = train_data
        self.eval_data = eval_data
        self.arguments = arguments
        self.data_arguments = data_arguments
        self.schedule = schedule
        self.checkpoints = checkpoints
        self.activations = activations
        self.global_step = 0
        self.log_history: list[dict] = []
        self.dropped_train = DroppedPairs("training", train_data, data_arguments.max_dropped_share)
        self.dropped_eval = DroppedPairs("held-out", eval_data, data_arguments.max_dropped_share)

    def resume(self, checkpoint: Path) -> None:
        """Continue from `checkpoint-N/` as the uninterrupted run would have."""
        self.global_step, self.log_history = self.checkpoints.resume(checkpoint)

    def train(self) -> None:
        """Run to the last step, logging, evaluating and saving on the way; the last step always saves."""
        schedule, window, is_main = self.schedule, LogWindow(), self.engine.global_rank == 0
        tracker = Tracker(
            Path(self.arguments.output_dir),
            report_to=self.arguments.report_to,
            run_name=self.arguments.run_name,
            config=dataclasses.asdict(self.arguments) | dataclasses.asdict(self.data_arguments),
            start_step=self.global_step,
        )
        bar = progress(total=schedule.num_steps, initial=self.global_step, description="train", disable=not is_main)
        for micro_batches in self._steps():
            sums, grad_norm = self.train_step(micro_batches)
            self.global_step += 1
            window.add(sums, grad_norm=grad_norm)
            bar.update()
            if schedule.is_due(self.global_step, schedule.logging_steps):
                means, window = window.means(self.data_arguments.eval_dim), LogWindow()
                self._log(tracker, means | self._learning_rates())
                bar.set_postfix({n: f"{means[n]:.3f}" for n in ("loss", "accuracy") if n in means}, refresh=False)
            if self.eval_data is not None and schedule.is_due(self.global_step, schedule.eval_steps):
                metrics = self._log(tracker, self.evaluate())
                rounded = {name: round(value, 4) for name, value in metrics.items()}
                logger.info("step %d: %s", self.global_step, json.dumps(rounded))
            if schedule.is_due(self.global_step, schedule.save_steps):
                self.checkpoints.save(self.global_step, epoch=self._epoch, log_history=self.log_history)
            window.restart_clock()
        bar.close()
        for dropped in (self.dropped_train, self.dropped_eval):
            dropped.report()
        tracker.close()

    def train_step(self, micro_batches: list[PairBatch]) -> tuple[torch.Tensor, float]:
        """One optimizer step; returns `compute_pair_sums` over all micro-batches and ranks, and the gradient norm.

        Raises on every rank, before any weight changes: NonFiniteError, or ValueError when too many pairs were
        dropped.
        """
        num_pairs = self._count_contributing_pairs(micro_batches)
        sums = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for batch in micro_batches:
            loss_sum, of_batch = self._compute_loss(batch)
            # DeepSpeed averages gradients over ranks; the global count already accounts for all of them.
            loss = loss_sum * self.engine.world_size / max(num_pairs, 1.0)
            self.engine.backward(loss, scale_wrt_gas=False)
            if batch is not micro_batches[-1]:
                self.engine.step()  # counts the micro-batch; only the last one's moves weights
            sums = sums + of_batch
        sums = self._reduce_and_check(sums, self.dropped_train.note(micro_batches))
        return sums, step_engine(self.engine, step=self.global_step + 1)

    def _count_contributing_pairs(self, micro_batches: list[PairBatch]) -> float:
        """Over all ranks and micro-batches."""
        count = sum(int(batch.labels.count(self.arguments.loss_type)) for batch in micro_batches)
        total = torch.tensor([float(count)], device=self.engine.device)
        dist.all_reduce(total)
        return float(total)

    def _compute_loss(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """One packed forward: the sum of the pairs' losses, and their `compute_pair_sums`."""
        device, packed, loss_type = self.engine.device, batch.packed, self.arguments.loss_type
        if self.activations is not None and torch.is_grad_enabled():
            self.activations.prepare(packed.input_ids.numel(), num_patches=len(packed.pixel_values))
        labels = batch.labels.to(device)
        rewards = self.engine(packed.to(device))
        a_and_b = (batch.a_sequences, batch.b_sequences)
        pairs = (*(rewards[positions.to(device, non_blocking=True)] for positions in a_and_b), labels)
        loss_sum = compute_pair_loss(*pairs, loss_type=loss_type)
        return loss_sum, compute_pair_sums(loss_sum, *pairs, loss_type=loss_type)

    def _reduce_and_check(self, sums: torch.Tensor, num_dropped: int) -> torch.Tensor:
        """Sums over ranks. Raises NonFiniteError, or ValueError when too many pairs were dropped, on every rank."""
        totals = torch.cat([sums, sums.new_tensor([num_dropped])])
        dist.all_reduce(totals)
        if not bool(totals.isfinite().all()):
            raise NonFiniteError(f"loss is not finite at step {self.global_step + 1}; the last checkpoint is intact")
        if totals[-1]:
            self.dropped_train.require_few()
        return totals[:-1]

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and pair metrics on the held-out pairs, with the CSV's CoTs (`eval/`) and with them masked."""
        was_training = self.engine.training
        self.engine.eval()
        is_quiet = self.engine.global_rank != 0
        metrics: dict[str, float] = {}
        for prefix, is_masked in (("eval", False), ("eval_masked", True)):
            sums = torch.zeros((), dtype=torch.float64, device=self.engine.device)
            batches = self._loader(self.eval_data, self._eval_batches(is_masked))
            for batch in progress(batches, description=prefix, leave=False, disable=is_quiet):
                self.dropped_eval.note([batch])
                sums = sums + self._compute_loss(batch)[1]
            dist.all_reduce(sums)
            means = compute_means(sums, self.data_arguments.eval_dim)
            metrics |= {f"{prefix}/{name}": value for name, value in means.items()}
        self.dropped_eval.require_few()
        self.engine.train(was_training)
        return metrics

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

    def _eval_batches(self, is_masked: bool) -> list[list[PairDraw]]:
        """This rank's share of the evaluation; every rank has the same number of batches, the last may be empty."""
        size, world = self.arguments.per_device_eval_batch_size, self.engine.world_size
        total = len(self.eval_data)
        starts = [(i * world + self.engine.global_rank) * size for i in range(math.ceil(total / (size * world)))]
        return [[PairDraw(i, is_masked) for i in range(start, min(start + size, total))] for start in starts]

    def _loader(self, data: PairDataset, batches) -> DataLoader:
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=data.collate,
            num_workers=self.data_arguments.dataloader_num_workers,
            pin_memory=self.engine.device.type == "cuda",
        )

    @property
    def _epoch(self) -> float:
        return self.global_step / self.schedule.steps_per_epoch

    def _learning_rates(self) -> dict[str, float]:
        return {f"lr/{group['name']}": group["lr"] for group in self.engine.basic_optimizer.param_groups}

    def _log(self, tracker: Tracker, values: dict[str, float]) -> dict[str, float]:
        """Record scalars of this step; returns them with the epoch."""
        values = {"epoch": round(self._epoch, 4), **values}
        self.log_history.append({"step": self.global_step, **values})
        tracker.log(values, step=self.global_step)
        return values


class DroppedPairs:
    """The pairs of a dataset that could not be loaded. `name`: of the dataset, for messages."""

    def __init__(self, name: str, data: PairDataset | None, max_share: float) -> None:
        self.name = name
        self.data = data
        self.max_share = max_share
        self.failures: set[PairFailure] = set()

    def note(self, batches: list[PairBatch]) -> int:
        """Warn once about each pair that could not be loaded; returns how many are new on this rank."""
        new = {failure for batch in batches for failure in batch.failures} - self.failures
        self.failures |= new
        for failure in sorted(new):
            logger.warning("pair of row %d dropped: %s", failure.row, failure.message)
        return len(new)

    def require_few(self) -> None:
        """Raise ValueError, on every rank, when more than `max_share` of the pairs was dropped. A collective."""
        self._gather()
        share = len({failure.row for failure in self.failures}) / len(self.data)
        if share > self.max_share:
            raise ValueError(
                f"{share:.1%} of the {self.name} pairs could not be loaded, more than --max_dropped_share "
                f"{self.max_share:g}; replace these files or raise it, then resume:\n{self._describe()}"
            )

    def report(self) -> None:
        """List all of them on rank 0. A collective."""
        self._gather()
        if self.failures and dist.get_rank() == 0:
            logger.warning("%d pair(s) were dropped:\n%s", len(self.failures), self._describe())

    def _gather(self) -> None:
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.failures)
        self.failures = set().union(*gathered)

    def _describe(self) -> str:
        return list_problems([f"row {failure.row}: {failure.message}" for failure in sorted(self.failures)])
