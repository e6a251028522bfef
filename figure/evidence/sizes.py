"""How much each size of the evidence trains and scores.

The four models get the same budget: about the same seconds of training. Stage 1 and the discriminative model train for
`long_steps`, the coupled model for `coupled_steps`, DeScore for `short_steps` of stage 1 and `rl_steps` of stage 2. On
two CPU cores with one process each, a step of stage 1 (8 pairs) took 0.8 s and one of stage 2 (8 pairs, 8 responses to
each video) 12.3 s: 225 + 20, 525, and 35 steps are 7 minutes each (masked steps are shorter: the discriminative model
sees as many pairs as stage 1 only, in less time). The seconds that each run took are in the results.

`full` is `small` with more seeds and held-out pairs, for GPUs: with ten jobs at a time on an H100 and 16 cores, 525
steps of stage 1 took 3 minutes, 35 of stage 2 the same, 1,800 thoughts and scores 80 seconds.
"""

from dataclasses import dataclass

BATCH_PAIRS = 8
"""Pairs of an optimizer step of stage 1, and of a step of stage 2."""


@dataclass(frozen=True)
class Size:
    """`train_pairs`, and `held_out_pairs` of each of three sets; `responses` to a video in stage 2; steps as above.

    `seeds` of the four models, `ablation_seeds` of what is compared with them; `max_tokens` of a chain of thought.
    """

    train_pairs: int
    held_out_pairs: int
    short_steps: int
    long_steps: int
    rl_steps: int
    coupled_steps: int
    responses: int
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...]
    max_tokens: int = 256

    def __post_init__(self) -> None:
        assert set(self.ablation_seeds) <= set(self.seeds), "ablations are compared with models of the same seeds"
        assert self.short_steps % self.steps_per_epoch == 0, "stage 1 saves after whole epochs"

    @property
    def steps_per_epoch(self) -> int:
        """Of stage 1 on all training pairs."""
        return -(-self.train_pairs // BATCH_PAIRS)


SIZES = {
    "trial": Size(16, 4, 2, 4, 1, 2, 2, seeds=(1,), ablation_seeds=(1,), max_tokens=32),
    "small": Size(600, 200, 225, 525, 20, 35, 8, seeds=(1, 2, 3), ablation_seeds=(1,)),
    "full": Size(600, 300, 225, 525, 20, 35, 8, seeds=(1, 2, 3, 4, 5), ablation_seeds=(1,)),
}
