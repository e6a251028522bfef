"""Gradient ascent through the reward, on the color that a small generator gives to a circle.

    PYTHONPATH=.:datasets python examples/follow_gradient.py --model output/quickstart/stage1/checkpoint-225

The prompt asks for one color, the generator starts with another. Whether the reward was earned or hacked shows in two
ways: which color of the toy world is nearest, and what the model rewards after it has thought about the clip anew.
"""

import argparse
import sys

import torch

from infer_utils import RewardScorer
from toy_world.looks import SUBJECT_RGB

NUM_FRAMES, SIDE, FPS = 16, 64, 8.0


def draw(color: torch.Tensor) -> torch.Tensor:
    """A circle of the color, float [3] from 0 to 1, that moves left on gray: float [num_frames, 3, side, side]."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centers = torch.linspace(0.75 * SIDE, 0.25 * SIDE, NUM_FRAMES)[:, None, None]
    distance = ((rows - SIDE / 2) ** 2 + (columns - centers) ** 2).sqrt()
    mask = torch.sigmoid(SIDE / 5 - distance)[:, None]
    return 0.5 * (1 - mask) + color[:, None, None] * mask


def nearest(color: torch.Tensor) -> str:
    distances = {name: (color * 255 - torch.tensor(rgb)).norm() for name, rgb in SUBJECT_RGB.items()}
    return min(distances, key=distances.get)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint-N of the quick start")
    parser.add_argument("--color", default="green", choices=SUBJECT_RGB)
    parser.add_argument("--start", default="blue", choices=SUBJECT_RGB)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    scorer = RewardScorer.from_pretrained(options.model)
    prompt = f"A {options.color} circle moves left."
    logits = torch.logit(torch.tensor(SUBJECT_RGB[options.start]) / 256).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(options.steps + 1):
        if step % 20 == 0:
            with torch.no_grad():
                thoughtful = scorer.differentiable(draw(logits.sigmoid()), prompt, fps=FPS).item()
            rgb = [round(255 * value) for value in logits.sigmoid().tolist()]
            sys.stdout.write(
                f"step {step}: {nearest(logits.sigmoid())} {rgb}, reward after a new thought {thoughtful:.3f}"
            )
        reward = scorer.differentiable(draw(logits.sigmoid()), prompt, "", fps=FPS)
        if step % 20 == 0:
            sys.stdout.write(f", without a thought {reward.item():.3f}\n")
        optimizer.zero_grad()
        (-reward).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
