"""The order in which pairs are drawn: a permutation per epoch that depends on seed and epoch only.

Drawing goes on over epochs without end. The position is two numbers, so that a resumed run draws what the
uninterrupted one would have, on any number of ranks.
"""

import hashlib
import logging
import random
from collections.abc import Sequence

from verl.types import PreferencePair

logger = logging.getLogger(__name__)


class BatchStream:
    """Batches of pairs, epoch after epoch; the last incomplete batch of an epoch is dropped.

    The permutation differs between epochs, so that other pairs are left out each time. Raises ValueError when there
    are fewer pairs than a batch holds.

    Example: 10 pairs in batches of 4 are 2 batches an epoch; 2 pairs are left out of each epoch.
    """

    def __init__(self, pairs: Sequence[PreferencePair], *, batch_size: int, shuffle: bool, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch needs at least one pair, not {batch_size}; raise data.rollout_batch_size")
        if len(pairs) < batch_size:
            raise ValueError(
                f"{len(pairs)} pairs do not fill a batch of {batch_size}: lower data.rollout_batch_size or add pairs"
            )
        self.pairs = tuple(pairs)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.batch_in_epoch = 0
        self._order = self._permute()
        if num_left_out := len(self.pairs) % batch_size:
            logger.info(
                "%d of %d pairs do not fill a batch and are left out, others each epoch", num_left_out, len(pairs)
            )

    @property
    def steps_per_epoch(self) -> int:
        """Complete batches in an epoch."""
        return len(self.pairs) // self.batch_size

    def peek(self) -> list[PreferencePair]:
        """The batch that `next_batch` will return, for decoding ahead."""
        start = self.batch_in_epoch * self.batch_size
        return [self.pairs[index] for index in self._order[start : start + self.batch_size]]

    def next_batch(self) -> list[PreferencePair]:
        """Draw `batch_size` pairs and move on, into the next epoch where this one is used up."""
        batch = self.peek()
        self.batch_in_epoch += 1
        if self.batch_in_epoch == self.steps_per_epoch:
            self.epoch, self.batch_in_epoch = self.epoch + 1, 0
            self._order = self._permute()
        return batch

    def _permute(self) -> list[int]:
        order = list(range(len(self.pairs)))
        if self.shuffle:
            random.Random(f"order {self.seed} {self.epoch}").shuffle(order)
        return order

    def state_dict(self) -> dict[str, int | bool | str]:
        """Position and what it refers to; goes into JSON."""
        return {"epoch": self.epoch, "batch_in_epoch": self.batch_in_epoch, **self._identity()}

    def load_state_dict(self, state: dict[str, int | bool | str]) -> None:
        """Continue where `state` was taken. Raises ValueError when data, batch size, shuffling or seed differ."""
        changed = [name for name, value in self._identity().items() if state.get(name) != value]
        if changed:
            raise ValueError(
                f"the checkpoint was written with another {', '.join(changed)} of the training data: resume with the "
                "same files and data settings, or start anew from its weights (worker.actor.model.model_path)"
            )
        self.epoch, self.batch_in_epoch = int(state["epoch"]), int(state["batch_in_epoch"])
        self._order = self._permute()

    def _identity(self) -> dict[str, int | bool | str]:
        digest = hashlib.sha256()
        for pair in self.pairs:  # not the place of the videos, which may be moved between two runs
            digest.update(repr((pair.pair_id, pair.problem, pair.answer)).encode())
        return {
            "fingerprint": digest.hexdigest()[:16],
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }
