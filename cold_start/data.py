"""From a preference pair to a packed batch, and the order in which pairs come.

A video that does not decode drops its whole pair, which is listed; it is never replaced by another.
"""

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from torch.utils.data import Dataset, Sampler

from arguments import DataArguments, TrainingArguments
from descore.csv_table import CsvError
from losses import AGREEMENT_LOSSES, SCORE_LOSSES, PairLabels
from preference_csv import INVALID_LABEL, PREFERENCES, CsvNeeds, Judgement, PreferencePair, load_checked_pairs
from scored_sequence import PackedSequences, ScoredSequence, SequenceBuilder, pack_sequences
from vision_process import VideoBudget, VideoError, VideoFrames, load_video


@dataclass(frozen=True)
class PairDraw:
    """One visit of a pair: its index in the list of pairs, and whether its CoTs are masked this time."""

    index: int
    is_masked: bool


@dataclass(frozen=True)
class MicroBatchSampler(Sampler[list[PairDraw]]):
    """The micro-batches of one rank, in order, from `start_step` to `num_steps`.

    An optimizer step takes the next `pairs_per_step` pairs of the epoch's shuffled order, whatever the number of ranks
    and micro-batches they are spread over; the last step of an epoch takes what is left, so that some of its
    micro-batches are short or empty. Order and masking depend on seed, epoch and pair only, so that a resumed run
    continues as the uninterrupted one would have.
    """

    num_pairs: int
    _: KW_ONLY
    batch_size: int
    accumulation_steps: int
    rank: int
    world_size: int
    num_steps: int
    start_step: int = 0
    mask_probability: float = 0.0
    seed: int = 0

    @property
    def pairs_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[PairDraw]]:
        steps_per_epoch = math.ceil(self.num_pairs / self.pairs_per_step)
        order: list[int] = []
        for step in range(self.start_step, self.num_steps):
            epoch, step_in_epoch = divmod(step, steps_per_epoch)
            if not order or step_in_epoch == 0:
                order = list(range(self.num_pairs))
                random.Random(f"order {self.seed} {epoch}").shuffle(order)
            first = step_in_epoch * self.pairs_per_step
            for micro_step in range(self.accumulation_steps):
                begin = first + (micro_step * self.world_size + self.rank) * self.batch_size
                end = min(begin + self.batch_size, first + self.pairs_per_step)
                yield [PairDraw(index, self._is_masked(epoch, index)) for index in order[begin:end]]

    def _is_masked(self, epoch: int, index: int) -> bool:
        return random.Random(f"mask {self.seed} {epoch} {index}").random() < self.mask_probability


@dataclass(frozen=True)
class EncodedPair:
    """A pair with both sequences built."""

    sequence_a: ScoredSequence
    sequence_b: ScoredSequence
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True, order=True)
class PairFailure:
    """A pair that was dropped because a video did not decode."""

    row: int
    message: str


@dataclass(frozen=True)
class PairBatch:
    """A packed micro-batch of P pairs.

    `packed` holds 2P sequences; `a_sequences` and `b_sequences`, int64 [P], say which are the two of each pair.
    `failures`: pairs that were dropped. A batch without pairs holds one placeholder pair with an invalid label, so
    that every rank runs a forward pass, and contributes nothing.
    """

    packed: PackedSequences
    a_sequences: torch.Tensor
    b_sequences: torch.Tensor
    labels: PairLabels
    failures: tuple[PairFailure, ...] = ()

    def pin_memory(self) -> "PairBatch":
        """A copy in page-locked memory; called by a DataLoader with `pin_memory`."""
        sequences = {name: getattr(self, name).pin_memory() for name in ("packed", "a_sequences", "b_sequences")}
        return dataclasses.replace(self, labels=self.labels.pin_memory(), **sequences)


class PairDataset(Dataset):
    """Decodes and tokenises pairs; indexed by PairDraw."""

    def __init__(self, pairs: Sequence[PreferencePair], builder: SequenceBuilder, budget: VideoBudget) -> None:
        self.pairs = pairs
        self.builder = builder
        self.budget = budget

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with texts, labels, scores and order of the pairs, but not with the paths of the videos."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            judged = (value for judgement in pair.judgements for value in dataclasses.astuple(judgement))
            content = (pair.problem, pair.cot_a, pair.cot_b, *judged)
            digest.update(repr(content).encode())
        return digest.hexdigest()[:16]

    def __getitem__(self, draw: PairDraw) -> EncodedPair | PairFailure:
        pair, builder, sequences = self.pairs[draw.index], self.builder, []
        try:
            for video, cot in ((pair.video_a, pair.cot_a), (pair.video_b, pair.cot_b)):
                frames = load_video(video, self.budget, size_factor=builder.size_factor)
                cot_ids = builder.encode_cot("" if draw.is_masked else cot)
                sequences.append(builder.build(builder.encode_prompt(pair.problem, frames), cot_ids))
        except VideoError as error:
            return PairFailure(row=pair.row, message=str(error))
        return EncodedPair(*sequences, judgements=pair.judgements)

    def _placeholder(self) -> EncodedPair:
        """A pair of blank clips that no loss counts."""
        side = self.builder.size_factor * 2
        blank = torch.zeros(self.budget.min_frames, 3, side, side, dtype=torch.uint8)
        frames = VideoFrames(blank, self.budget.fps, tuple(range(len(blank))), len(blank))
        sequence = self.builder.build(self.builder.encode_prompt("", frames))
        return EncodedPair(sequence, sequence, (Judgement(INVALID_LABEL),) * len(self.pairs[0].judgements))

    def collate(self, items: Sequence[EncodedPair | PairFailure]) -> PairBatch:
        """Pack the pairs of a micro-batch."""
        failures = tuple(item for item in items if isinstance(item, PairFailure))
        encoded = [item for item in items if isinstance(item, EncodedPair)] or [self._placeholder()]
        packed = pack_sequences([sequence for pair in encoded for sequence in (pair.sequence_a, pair.sequence_b)])

        def tabulate(value_of: Callable[[Judgement], float]) -> torch.Tensor:
            return torch.tensor([[value_of(judgement) for judgement in pair.judgements] for pair in encoded])

        return PairBatch(
            packed=packed,
            a_sequences=torch.arange(0, 2 * len(encoded), 2),
            b_sequences=torch.arange(1, 2 * len(encoded), 2),
            labels=PairLabels(
                preference=tabulate(lambda judgement: float(PREFERENCES.get(judgement.label, 0))),
                is_valid=tabulate(lambda judgement: judgement.label != INVALID_LABEL),
                score_a=tabulate(lambda judgement: judgement.score_a),
                score_b=tabulate(lambda judgement: judgement.score_b),
            ),
            failures=failures,
        )


def load_checked_data(
    path: str, builder: SequenceBuilder, budget: VideoBudget, *, data: DataArguments, training: TrainingArguments
) -> PairDataset:
    """The pairs of a CSV, checked. A collective. Raises CsvError that lists the faults of all rows, on every rank."""
    needs = CsvNeeds(
        eval_dim=data.eval_dim,
        scores=training.loss_type in SCORE_LOSSES,
        agreeing_scores=training.loss_type in AGREEMENT_LOSSES,
        cots=data.mask_probability < 1.0,
    )
    pairs = load_checked_pairs(path, needs, budget, builder=builder, max_length=data.max_length)
    for index, name in enumerate(data.dimensions):
        if all(pair.judgements[index].label == INVALID_LABEL for pair in pairs):
            raise CsvError(path, [f"{name} labels no pair; leave it out of --eval_dim, or label some"])
    return PairDataset(pairs, builder, budget)
