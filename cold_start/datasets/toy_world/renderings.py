"""How clips may look apart from what they show: the usual rendering, and a changed one that training never sees.

`changed` asks the same questions of the same scenes: frames are larger and wide or tall, other frame rates, smaller
subjects, more distractors, and every place has another texture and another shade (see textures.py). What a scene is,
how it is scored and how far things move stay as they are.
"""

from dataclasses import dataclass
from typing import Literal

RenderingName = Literal["usual", "changed"]


@dataclass(frozen=True)
class Rendering:
    """Ranges that a clip's nuisances are drawn from.

    `sides`: width and height in pixels. `aspects`: ranges of width / height. `frame_rates` in frames a second, with
    their probabilities. `diameters`: of the subject midway through the clip, in units of the smaller side.
    `distractor_probability`: of a small disc in the background.
    """

    sides: tuple[int, int]
    aspects: tuple[tuple[float, float], ...]
    frame_rates: tuple[int, ...]
    frame_rate_probabilities: tuple[float, ...]
    diameters: tuple[float, float]
    distractor_probability: float

    def allows(self, width: int, height: int) -> bool:
        """Whether frames of this size have one of the aspects."""
        return any(low <= width / height <= high for low, high in self.aspects)


RENDERINGS: dict[RenderingName, Rendering] = {
    "usual": Rendering(
        sides=(80, 144),
        aspects=((0.8, 1.25),),
        frame_rates=(8, 10, 12, 15, 24),
        frame_rate_probabilities=(0.3, 0.3, 0.2, 0.15, 0.05),
        diameters=(0.28, 0.40),
        distractor_probability=0.3,
    ),
    "changed": Rendering(
        sides=(96, 176),
        aspects=((0.6, 0.78), (1.28, 1.65)),
        frame_rates=(18, 20, 25, 30),
        frame_rate_probabilities=(0.25, 0.25, 0.25, 0.25),
        diameters=(0.26, 0.32),
        distractor_probability=0.7,
    ),
}
