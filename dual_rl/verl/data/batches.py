"""The order in which pairs are drawn: a permutation per epoch that depends on seed and epoch only.

The position is two numbers, so that a resumed run draws what the uninterrupted one would have, on any number of ranks.
"""

import logging
import random
from collections.abc import Mapping, Sequence

from verl.types import PreferencePair

logger = logging.getLogger(__name__)


class BatchStream:
    """Batches of pairs, epoch after epoch; the last incomplete batch of an epoch is left out, other pairs each time.

    Raises ValueError when the pairs do not fill a batch.
    """

    def __init__(self, pairs: Sequence[PreferencePair], *, batch_size: int, shuffle: bool, seed: int) -> None:
        if len(pairs) < batch_size:
            raise ValueError(
                f"{len(pairs)} pairs do not fill a batch of {batch_size}. Lower data.rollout_batch_size or add pairs."
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
        """The batch that `next_batch` will return, to decode it ahead."""
        start = self.batch_in_epoch * self.batch_size
        return [self.pairs[index] for index in self._order[start : start + self.batch_size]]

    def next_batch(self) -> list[PreferencePair]:
        """Draw `batch_size` pairs and move on, into the next epoch at the end of this one."""
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

    def state_dict(self) -> dict[str, int]:
        """The position; goes into JSON."""
        return {"epoch": self.epoch, "batch_in_epoch": self.batch_in_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from `state`, taken from a stream of the same pairs and settings."""
        self.epoch, self.batch_in_epoch = state["epoch"], state["batch_in_epoch"]
        self._order = self._permute()
